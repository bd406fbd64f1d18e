#!/usr/bin/env python
"""What a pass with masks costs, against the bare base over as many columns.

    python examples/benchmarks/measure_pass.py --base BASE --adapter ADAPTER --output docs/results/pass.json

Behind a prefix in the cache, batch 1: the base's own forward pass over n columns; a pass of decoding over n columns
with masks among them; the same pass with ordinary tokens in the place of masks, so without a LoRA; and drafting. The
passes take turns. Quotes medians. Prints a table; the last line is one JSON document.
"""

import argparse
import inspect
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from report import finish
from transformers import AutoModelForCausalLM, DynamicCache

from hf_mtp.adapter.prepared import PreparedLora
from hf_mtp.base.caches import cache_name
from hf_mtp.base.machine import describe_machine
from hf_mtp.cache.rollback import RollbackCache
from hf_mtp.layout.blocks import decoding_layout
from hf_mtp.layout.mask_plan import choose_masks, no_masks
from hf_mtp.passes.decoding_pass import DecodingPass

COLUMNS, PREFIX, ROUNDS = (9, 17, 25), 256, 25


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="base model: folder or Hub id")
    parser.add_argument("--adapter", required=True, type=Path, help="folder of the adapter")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    return parser.parse_args()


class OrdinaryTokens:
    """An upgraded model whose masks are ordinary tokens: the gate stays closed.

    Args:
        tuner ([`GatedLoraModel`]): The upgraded model.
    """

    vocab_size = 3  # the "mask" i is token 3 + i

    def __init__(self, tuner):
        self.tuner = tuner

    def __getattr__(self, name: str):
        return getattr(self.tuner, name)

    def masks_in_columns(self, first: int, index_BM: torch.LongTensor, lora: PreparedLora):
        return nullcontext()


class Passes:
    """Passes over columns behind a prefix, none of which is kept."""

    def __init__(self, model: PeftModel, prefix_1T: torch.LongTensor):
        self.tuner, self.base, self.k = model.base_model, model.get_base_model(), model.base_model.active_mtp_config.k
        self.forward, self.closed = DecodingPass(self.tuner), DecodingPass(OrdinaryTokens(self.tuner))
        self.prefix_1T = prefix_1T
        self.cache = RollbackCache(torch.zeros(1, dtype=torch.long))
        first = no_masks(1, 1, self.k, prefix_1T.device)
        positions_1T = torch.arange(PREFIX)[None]
        self.forward(prefix_1T, decoding_layout(positions_1T, first, first=PREFIX - 1), self.cache, logits_rows=1)
        self.cache.keep([PREFIX])
        self.name = cache_name(inspect.signature(self.base.forward).parameters)
        self.own_cache = DynamicCache()
        self.base(prefix_1T, **{self.name: self.own_cache}, use_cache=True)

    def bare(self, columns: int) -> None:
        self.base(self.prefix_1T[:, :columns], **{self.name: self.own_cache}, logits_to_keep=columns, use_cache=True)
        self.own_cache.crop(-columns)

    def masked(self, columns: int, forward: DecodingPass | None = None) -> None:
        """Twice as many masks as drafts."""
        drafts = (columns - 1) // 3
        plan = choose_masks(torch.ones(1, 1 + drafts, self.k), columns - 1 - drafts)
        layout = decoding_layout(self.cache.rows.next_places(1 + drafts), plan)
        forward = forward or self.forward
        output = forward(self.prefix_1T[:, : 1 + drafts], layout, self.cache, logits_rows=1 + drafts)
        self.block = (column := plan.column_BRk[:, 0]), output.block(column), output.block_logits(column)

    def without_lora(self, columns: int) -> None:
        self.masked(columns, self.closed)

    def draft(self, columns: int) -> None:
        _, states, logits = self.block
        self.tuner.draft(self.prefix_1T[:, 0], states, logits_BKV=logits).token_BK.tolist()


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto")
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    passes = Passes(model, torch.arange(5, 5 + PREFIX)[None])
    kinds = {
        "bare base": passes.bare,
        "with masks": passes.masked,
        "without LoRA": passes.without_lora,
        "drafting": passes.draft,
    }
    times = {(kind, columns): [] for columns in COLUMNS for kind in kinds}
    for number in range(ROUNDS + 2):
        for kind, columns in times:
            start = time.perf_counter()
            kinds[kind](columns)
            if number >= 2:  # the first ones warm up
                times[kind, columns].append(1000 * (time.perf_counter() - start))
    rows = [
        {"columns": columns, **{kind: round(statistics.median(times[kind, columns]), 2) for kind in kinds}}
        for columns in COLUMNS
    ]
    for row in rows:
        print(f"{row['columns']} columns:", ", ".join(f"{kind} {row[kind]:.1f} ms" for kind in kinds))
    finish({"machine": describe_machine(), "dtype": str(base.dtype), "prefix": PREFIX, "rows": rows}, args.output)


if __name__ == "__main__":
    main()
