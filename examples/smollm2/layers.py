#!/usr/bin/env python
"""Find the layers that an adapter needs: leave out the LoRA of some, and simulate decoding without it.

    python examples/smollm2/layers.py DATA ../../docs/results/layers.json --base smollm2 --adapter adapter

Nothing is trained in between, so each number is a lower bound on what an adapter without these layers can learn.
Groups of layers that the output file has already are kept.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from recipe import held_out_answers
from train import BATCHES, SETTINGS, load_base, make_trainer

from hf_mtp.base.machine import describe_machine
from hf_mtp.evaluation.run import adapter_fingerprint

BLOCK = re.compile(r"layers\.(\d+)\.")


def block(name: str) -> int:
    """The number of the decoder layer that a parameter is in."""
    return int(BLOCK.search(name).group(1))


def of(*parts: str) -> Callable[[str], bool]:
    """Whether a parameter belongs to one of these projections."""
    return lambda name: any(f".{part}_proj." in name for part in parts)


def between(first: int, last: int) -> Callable[[str], bool]:
    """Whether a parameter belongs to one of these decoder layers."""
    return lambda name: first <= block(name) <= last


LEFT_OUT = {
    "nothing": lambda name: False,
    "q": of("q"),
    "k": of("k"),
    "v": of("v"),
    "o": of("o"),
    "gate": of("gate"),
    "up": of("up"),
    "down": of("down"),
    **{f"layers {first} to {first + 4}": between(first, first + 4) for first in range(0, 30, 5)},
    "every other layer": lambda name: block(name) % 2 == 1,
    "k, v, down, and layers 0 to 4": lambda name: of("k", "v", "down")(name) or between(0, 4)(name),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the held-out sets")
    parser.add_argument("output", type=Path, help="file for the numbers, JSON")
    parser.add_argument("--base", required=True, help="the model's folder")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts of each domain (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = json.loads(args.output.read_text(encoding="utf-8"))["left_out"] if args.output.is_file() else {}
    held_out = held_out_answers(args)
    base, tokenizer = load_base(args.base)
    model = PeftModel.from_pretrained(base, args.adapter, is_trainable=True)  # which the trainer wants
    about = {"machine": describe_machine(), "adapter": adapter_fingerprint(model), "prompts": args.prompts}
    settings = SETTINGS | BATCHES["cpu"] | {"disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        texts = next(iter(held_out.values()))
        trainer = make_trainer(model, tokenizer, texts, Path(folder), 1, settings, eval_dataset=held_out)
        for group, is_left_out in LEFT_OUT.items():
            if group in found:
                continue
            with without(model, is_left_out) as layers:
                if not layers and found:  # the adapter has none of these
                    continue
                metrics = trainer.evaluate()
            rates = {name: round(metrics[f"eval_{name}_tokens_per_pass"], 3) for name in held_out}
            found[group] = {"layers": layers, "tokens_per_pass": rates}
            print(group, found[group], flush=True)
            args.output.write_text(json.dumps({**about, "left_out": found}, indent=1) + "\n", encoding="utf-8")


@contextmanager
def without(model: PeftModel, is_left_out: Callable[[str], bool]) -> Iterator[int]:
    """The model without the LoRA of some layers. Gives their number."""
    weights = {name: w for name, w in model.named_parameters() if ".lora_B." in name and is_left_out(name)}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for weight in weights.values():
            weight.zero_()
    yield len(weights)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(before[name])


if __name__ == "__main__":
    main()
