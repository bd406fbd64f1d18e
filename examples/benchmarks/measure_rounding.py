#!/usr/bin/env python
"""What makes a pass over several columns round in another way than passes over one column.

    python examples/benchmarks/measure_rounding.py --base BASE --adapter ADAPTER --output docs/results/rounding.json

First, for every shape of linear layer: how many rows a product may have before it sums up in another order than a
product of one row. Then passes over nine regular columns and some masks behind random prefixes, with ordinary products
or products in order, and with ordinary attention or attention column by column. Counts columns whose logits are those
of one column at a time, bit by bit. Prints a table; the last line is one JSON document.
"""

import argparse
import inspect
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from report import finish
from transformers import AutoModelForCausalLM, DynamicCache

from hf_mtp.base.caches import cache_name
from hf_mtp.base.lora_layers import linear_layers
from hf_mtp.base.machine import describe_machine
from hf_mtp.cache.column_attention import ColumnAttention
from hf_mtp.cache.rollback import RollbackCache
from hf_mtp.layout.blocks import decoding_layout
from hf_mtp.layout.mask_plan import choose_masks, no_masks
from hf_mtp.passes.bitwise import OrderedProducts
from hf_mtp.passes.decoding_pass import DecodingPass
from hf_mtp.passes.summation_order import rows_in_order

PREFIXES, REGULAR, MASKS, MOST_ROWS = (40, 100, 250), 9, (0, 8, 32), 40
VARIANTS = {
    "ordinary pass": (False, False),
    "products in order": (True, False),
    "attention by column": (False, True),
    "both (bitwise)": (True, True),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="base model: folder or Hub id")
    parser.add_argument("--adapter", required=True, type=Path, help="folder of the adapter")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    return parser.parse_args()


def rows_by_shape(base) -> list[dict]:
    """For each shape of linear layer, the numbers of rows whose products keep the order of a single row."""
    layers = {tuple(layer.weight.shape): layer.weight for layer in linear_layers(base).values()}
    layers[tuple(base.get_output_embeddings().weight.shape)] = base.get_output_embeddings().weight
    found = []
    for shape, weight in layers.items():
        counts = range(2, MOST_ROWS + 1)
        keep = [n for n in counts if rows_in_order(lambda x, w=weight: F.linear(x, w), weight, 3, n) == n]
        until = next((n - 1 for n in counts if n not in keep), MOST_ROWS)
        found.append({"outputs": shape[0], "inputs": shape[1], "all_up_to": until, "in_order": [1, *keep]})
    return found


class Passes:
    """Passes over the same columns behind a prefix: one column at a time, or all at once with masks after them."""

    def __init__(self, model: PeftModel, prefix: int):
        self.tuner, self.base, self.k = model.base_model, model.get_base_model(), model.base_model.active_mtp_config.k
        generator = torch.Generator().manual_seed(prefix)
        self.ids = torch.randint(3, self.tuner.vocab_size, (1, prefix + REGULAR), generator=generator)
        self.prefix = prefix
        self.forward, self.cache = DecodingPass(self.tuner), RollbackCache(torch.zeros(1, dtype=torch.long))
        nothing, places = no_masks(1, 1, self.k, self.ids.device), self.cache.rows.next_places(prefix)
        self.forward(self.ids[:, :prefix], decoding_layout(places, nothing, first=prefix - 1), self.cache, 1)
        self.cache.keep([prefix])

    def one_by_one(self) -> torch.Tensor:
        """`(T, V)` logits."""
        name = cache_name(inspect.signature(self.base.forward).parameters)
        cache, logits = DynamicCache(), []
        self.base(self.ids[:, : self.prefix], **{name: cache}, use_cache=True, logits_to_keep=1)
        for column in self.ids[:, self.prefix :].split(1, dim=1):
            logits.append(self.base(column, **{name: cache}, use_cache=True).logits[0])
        return torch.cat(logits)

    def at_once(self, masks: int, in_order: bool, by_column: bool) -> torch.Tensor:
        """`(T, V)` logits."""
        plan = choose_masks(torch.ones(1, REGULAR, self.k), masks)
        rows = self.cache.rows
        layout = decoding_layout(rows.next_places(REGULAR), plan)
        rows.column_attention = ColumnAttention(REGULAR, REGULAR + masks) if by_column else None
        with OrderedProducts(self.base, 1, REGULAR, masks) if in_order else nullcontext():
            return self.forward(self.ids[:, self.prefix :], layout, self.cache, logits_rows=REGULAR).logits_BRV[0]


@torch.no_grad()
def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto")
    products = rows_by_shape(base)
    for row in products:
        print(f"{row['outputs']} x {row['inputs']}: up to {row['all_up_to']} rows keep the order")
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    equal = {variant: dict.fromkeys(map(str, MASKS), 0) for variant in VARIANTS}
    for prefix in PREFIXES:
        passes = Passes(model, prefix)
        expected_TV = passes.one_by_one()
        for masks in MASKS:
            for variant, switches in VARIANTS.items():
                found_TV = passes.at_once(masks, *switches)
                equal[variant][str(masks)] += int((found_TV == expected_TV).all(dim=1).sum())
    for variant, counts in equal.items():
        print(f"{variant:20} " + ", ".join(f"{count} with {masks} masks" for masks, count in counts.items()))
    report = {"machine": describe_machine(), "dtype": str(base.dtype).removeprefix("torch.")}
    finish({**report, "products": products, "columns": REGULAR * len(PREFIXES), "equal": equal}, args.output)


if __name__ == "__main__":
    main()
