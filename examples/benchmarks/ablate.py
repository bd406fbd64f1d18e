#!/usr/bin/env python
"""Train short with one thing changed at a time, and measure each run on held-out text.

    python examples/benchmarks/ablate.py --base BASE --data DATA --output docs/results/ablation.json

Every run starts from the settings `START`, and has the same number of steps, data and seed, in a process of its own.
Tokens per pass are those of a walk through held-out text, the base's own argmax being the truth. Runs that the output
file has already, made with the same arguments, are kept. The last line printed is one JSON document.
"""

import argparse
import json
import resource
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from measure_reference import simulated
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from processes import MIB, in_a_process
from reference_data import DOMAINS, test_dataset, train_dataset
from report import finish
from train_reference import ADAPTER, SETTINGS, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mtp import GatedLoraConfig
from hf_mtp.base.machine import describe_machine
from hf_mtp.evaluation.decoded import decode_rows
from hf_mtp.evaluation.measures import tokens_per_pass


@dataclass(frozen=True)
class Variant:
    """One run: what differs from the reference.

    Args:
        adapter (`dict`): Arguments of `GatedLoraConfig`.
        settings (`dict`): Arguments of `MTPConfig`.
        ungated (`bool`): Whether LoRA acts on all tokens.
        decodes (`bool`): Whether prompts are decoded, too.
        seed (`int`): Of the adapter's weights, of the order of the data and of the anchors.
    """

    adapter: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    ungated: bool = False
    decodes: bool = False
    seed: int = 0


REFERENCE = "reference"
START = {
    **SETTINGS,
    "learning_rate": 5e-3,
    "lcm_weight": 3.0,
    "anchors_per_sequence": 32,  # so that the runs are short
    "disable_tqdm": True,
}
# The base is trained, too, where there is no gate, and has to have something to learn from.
OF_DATA = {"targets": "data", "base_weight": 1.0, "lcm_weight": 1.0}
GROUPS: dict[str, dict[str, Variant]] = {
    "reference": {REFERENCE: Variant(decodes=True)},
    "other seeds": {f"seed {seed}": Variant(seed=seed) for seed in (1, 2)},  # what differs by chance alone
    "losses": {
        "with base cross-entropy": Variant(settings={"base_weight": 1.0}),
        "without latent consistency": Variant(settings={"lcm_weight": 0.0}),
        "latent consistency 1": Variant(settings={"lcm_weight": 1.0}),
        "with auxiliary loss": Variant(settings={"auxiliary_weight": 1.0}),
    },
    "sampler": {
        "off": Variant(adapter={"sampler": False}, settings={"base_weight": 1.0}),
        "plain, as in the paper": Variant(adapter={"sampler_residual": False}),
        "recurrent": Variant(adapter={"sampler_recurrent": True}),
    },
    "targets": {
        "data": Variant(settings={"targets": "data"}),
        "model": Variant(settings={"targets": "model"}),
        "soft, total variation": Variant(settings={"divergence": "tv"}),
    },
    "position weights": {f"decay {decay}": Variant(settings={"position_decay": decay}) for decay in (1.0, 0.9, 0.6)},
    "rank": {f"r = {r}": Variant(adapter={"r": r, "lora_alpha": 2 * r}) for r in (1, 4, 16, 64, 128, 256)},
    "anchors": {
        f"{anchors or 'all'}": Variant(settings={"anchors_per_sequence": anchors}) for anchors in (16, 64, None)
    },
    "masks": {f"k = {k}": Variant(adapter={"k": k}) for k in (1, 2, 4, 12, 16)},
    "optimizer": {
        "AdamW, rate 1e-3": Variant(settings={"muon": False, "learning_rate": 1e-3}),
        "AdamW, rate 5e-3": Variant(settings={"muon": False}),
        "Muon, rate 1e-3": Variant(settings={"learning_rate": 1e-3, "muon_learning_rate": 1e-3}),
        "Muon, rate 1e-2": Variant(settings={"learning_rate": 1e-2, "muon_learning_rate": 1e-2}),
    },
    "recipes": {
        "the default": Variant(settings={"learning_rate": 1e-3, "lcm_weight": 1.0}),
        "the paper's losses": Variant(
            adapter={"sampler_residual": False},
            settings={**OF_DATA, "position_decay": 1.0},
        ),
        "all of the paper's settings": Variant(
            adapter={"sampler_residual": False, "r": 128, "lora_alpha": 256},
            settings={**OF_DATA, "position_decay": 1.0, "muon": False, "learning_rate": 2e-4},
        ),
    },
    "gate": {
        "gated LoRA": Variant(settings=OF_DATA),
        "LoRA on all tokens": Variant(ungated=True, settings={**OF_DATA, "gradient_checkpointing": True}),
    },
}
VARIANTS = {(group, name): variant for group, runs in GROUPS.items() for name, variant in runs.items()}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="base model: folder or Hub id")
    parser.add_argument("--data", required=True, type=Path, help="folder with the text")
    parser.add_argument("--output", required=True, type=Path, help="where to write the JSON")
    parser.add_argument("--steps", type=int, default=80, help="training steps of each run")
    parser.add_argument("--prompts", type=int, default=8, help="held-out texts per domain")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS), help="some of the groups")
    return parser.parse_args()


def ungate(model: PeftModel) -> None:
    """Makes the LoRA of an upgraded model an ordinary one, which acts on all tokens."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_variant.clear()
            if isinstance(layer, Linear):
                layer.__class__ = Linear


@torch.no_grad()
def loss_of_regular_tokens(model: PeftModel, tokenizer, dataset: Dataset) -> float:
    """Nats per token of the answers, under the model's own next-token predictions."""
    total, tokens = 0.0, 0
    for row in dataset:
        prompt, answer = (
            tokenizer(row[name], add_special_tokens=False).input_ids for name in ("prompt", "completion")
        )
        ids = torch.tensor([prompt + answer])[:, : SETTINGS["max_length"]]
        first = min(len(prompt), ids.shape[1] - 1)
        logits = model(input_ids=ids).logits[0, first - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum").item()
        tokens += ids.shape[1] - first
    return total / tokens


def run(variant: Variant, args: argparse.Namespace, tokenizer, texts: dict[str, Dataset]) -> dict:
    """Trains and measures one variant."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(variant.seed)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    model = get_peft_model(base, GatedLoraConfig(**{**ADAPTER, **variant.adapter}))
    if variant.ungated:
        ungate(model)
    held_out = {domain: texts[domain] for domain in DOMAINS}
    before = {domain: loss_of_regular_tokens(model, tokenizer, rows) for domain, rows in held_out.items()}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        settings = {**START, **variant.settings}
        record = train(model, tokenizer, texts["train"], Path(folder), settings, steps=args.steps, seed=variant.seed)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model.eval()
        result = {
            "tokens_per_pass": {
                domain: simulated(model, tokenizer, rows, Path(folder))["tokens_per_pass"]
                for domain, rows in held_out.items()
            }
        }
    after = {domain: loss_of_regular_tokens(model, tokenizer, rows) for domain, rows in held_out.items()}
    result |= {
        "adapter": variant.adapter,
        "settings": variant.settings,
        **{name: record[name] for name in ("cpu_seconds", "masks_trained", "trainable_parameters")},
        "training_memory_mib": round((peak - memory) * 1024 / MIB),
        "base_loss_before": before,
        "base_loss_after": after,
    }
    if variant.decodes:
        prompts = [tokenizer(row["prompt"]).input_ids for row in held_out["maths"]]
        result["decoded_tokens_per_pass"] = {
            strategy: decoded(model, prompts, strategy) for strategy in ("quadratic", "linear")
        }
    return result


def decoded(model, prompts: list[list[int]], strategy: str) -> float:
    """Tokens per pass over all prompts."""
    answers = [decode_rows(model, [ids], 96, mtp=True, mtp_strategy=strategy) for ids in prompts]
    passes = [answer.forward_passes for answer in answers]
    return tokens_per_pass([answer.tokens for answer in answers], passes)["tokens_per_pass"]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # threads that have started do not survive a fork
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    texts = {domain: test_dataset(args.data, tokenizer, domain, args.prompts) for domain in DOMAINS}
    texts["train"] = train_dataset(args.data, tokenizer, sequences=2000)
    about = {"steps": args.steps, "prompts": args.prompts, "threads": args.threads}
    report = {"machine": describe_machine(), **about, "runs": []}
    if args.output.is_file():
        earlier = json.loads(args.output.read_text(encoding="utf-8"))
        if all(earlier.get(name) == value for name, value in about.items()):
            report["runs"] = earlier["runs"]
    done = {(entry["group"], entry["name"]) for entry in report["runs"]}
    for (group, name), variant in VARIANTS.items():
        if group not in args.only or (group, name) in done:
            continue
        result = in_a_process(partial(run, variant, args, tokenizer, texts))
        report["runs"].append({"group": group, "name": name, **result})
        report["runs"].sort(key=lambda run: [*VARIANTS].index((run["group"], run["name"])))
        print(group, name, result["tokens_per_pass"], result["cpu_seconds"], flush=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    finish(report, args.output)


if __name__ == "__main__":
    main()
