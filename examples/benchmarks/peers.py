#!/usr/bin/env python
"""Other drafters, trained for the same minutes as our adapter, in one run on SmolLM2.

    PYTHONPATH=examples/smollm2 python examples/benchmarks/peers.py answers.jsonl DATA \\
        docs/results/peers_trained.json --base smollm2 --trained out/peers --minutes 8

Trains what `--trained` does not hold yet: a small gated LoRA, Medusa-style heads and an EAGLE-style head, each from
the same answers of the model itself (`hf-mtp regenerate` writes them) for the same processor time. Then decodes
held-out prompts with every method in turn: plainly, with the methods of transformers that run with this model, and
with all peers. The setting of each peer is the fastest one on prompts that no result is reported for; it is kept in
`--trained`, as is the memory of each method. An interrupted measurement goes on where it stopped.

`--prepare-only` trains and measures memory, which needs no quiet machine. `--measure-only` does the rest, in about
five minutes on a quiet one. `--dtype float32` shows whether the texts are those of plain decoding where rounding
flips no near-ties.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from held_out import held_out_questions
from methods import PLAIN, Method
from paired import Record, fastest_setting, measure, one_by_one, summarize
from peer_memory import peak_memory
from peer_methods import OURS, PeerModels, families, refused_generators
from peer_training import TRAINED, train_missing

from hf_mtp.base.machine import describe_machine

ROOT = Path(__file__).resolve().parents[2]
SETTING_TOKENS = 32  # length of the answers that settings are chosen on


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, help="the model's own answers, JSON Lines")
    parser.add_argument("data", type=Path, help="folder with the held-out sets, see examples/smollm2")
    parser.add_argument("output", type=Path, help="file for the numbers, JSON")
    parser.add_argument("--base", required=True, help="the model's folder")
    parser.add_argument("--adapter", type=Path, default=ROOT / "examples/smollm2/adapter",
                        help="folder of the adapter that ships (%(default)s)")  # fmt: skip
    parser.add_argument("--trained", type=Path, required=True, help="folder for what is trained and chosen")
    parser.add_argument("--best", type=Path, default=ROOT / "docs/results/peers.json",
                        help="report with the best settings of transformers' methods (%(default)s)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8, help="processor time of each training (%(default)s)")
    phase = parser.add_mutually_exclusive_group()
    phase.add_argument("--prepare-only", action="store_true", help="train, and measure memory only")
    phase.add_argument("--measure-only", action="store_true", help="train nothing")
    parser.add_argument("--prompts", type=int, default=3, help="prompts of each domain (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="length of an answer at most (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of decoding (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="to compute in; that of the weights by default")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not args.measure_only:
        torch.set_num_threads(1)
        train_missing(args.base, args.answers, args.trained, args.minutes)
        measure_memory(args)
    if not args.prepare_only:
        torch.set_num_threads(args.threads)
        measure_all(args)


def measure_memory(args: argparse.Namespace) -> None:
    """Peak memory of a process that decodes with one method, for each method, unless it is known."""
    kept, where = args.trained / "memory.json", (args.base, args.adapter, args.trained)
    if not kept.is_file():
        found = {name: peak_memory(where, name) for name in ("plain", *families(PeerModels(*where)))}
        kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure_all(args: argparse.Namespace) -> None:
    """Chooses settings, decodes all prompts, and writes the report."""
    missing = [name for name in TRAINED if not (args.trained / name / "record.json").is_file()]
    if missing:
        raise SystemExit(f"{args.trained} lacks {', '.join(missing)}. Run without --measure-only to train them.")
    models = PeerModels(args.base, args.adapter, args.trained, args.dtype)
    best = chosen_settings(models, args)
    print_table(run(models, {"plain": PLAIN} | chosen_methods(models, best), best, args))


def run(models: PeerModels, methods: dict[str, Method], best: dict[str, str], args: argparse.Namespace) -> dict:
    """Decodes all prompts, and writes the report."""
    groups = one_by_one(held_out_questions(args.data, args.prompts))
    settings = {
        "experiment": "peers_trained",
        "machine": describe_machine(),
        "dtype": str(models.base.dtype).removeprefix("torch."),
        "new_tokens": args.new_tokens,
        "best": best,
        "trained": trained_records(models, args.trained),
        "prompts": groups,
    }
    record, load = Record(args.output, settings), os.getloadavg()[0]
    measure(models, methods, groups, record, args.new_tokens, rare_turns=1)
    about = {name: value for name, value in settings.items() if name != "prompts"}
    about |= {
        "processors": os.cpu_count(),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "memory_mib": known_memory(args),
        "refused": refused_generators(models),
        "domains": summarize(record.rows),
    }
    record.finish(about | {"rows": record.rows}, is_complete=len(record.rows) == sum(map(len, groups.values())))
    return about


def chosen_settings(models: PeerModels, args: argparse.Namespace) -> dict[str, str]:
    """Family to its fastest setting: known ones of transformers' methods, and for the peers a measurement, kept."""
    kept = args.trained / "settings.json"
    known = json.loads(args.best.read_text(encoding="utf-8"))["best"]
    if not kept.is_file():
        groups = one_by_one(held_out_questions(args.data, 1, for_settings=True))
        tried = {
            f"{family}: {setting}": method
            for family, settings in families(models).items()
            for setting, method in settings.items()
            if family not in known and len(settings) > 1
        }
        record = Record(kept, {"tried": [*tried]})
        measure(models, {"plain": PLAIN} | tried, groups, record, SETTING_TOKENS, rare_turns=1)
        domains = summarize(record.rows)
        record.finish({"domains": domains, "rows": record.rows}, is_complete=True)
    return best_settings(models, known, json.loads(kept.read_text(encoding="utf-8"))["domains"])


def best_settings(models: PeerModels, known: dict[str, str], domains: dict[str, dict]) -> dict[str, str]:
    """The setting of each family that is fastest over all domains, or the only one."""
    best = {}
    for family, settings in families(models).items():
        if family in known:
            best[family] = known[family]
        elif len(settings) == 1:
            best[family] = next(iter(settings))
        else:
            best[family] = fastest_setting(domains, family, settings)
    return best


def chosen_methods(models: PeerModels, best: dict[str, str]) -> dict[str, Method]:
    """Each family with its best setting."""
    return {family: settings[best[family]] for family, settings in families(models).items()}


def trained_records(models: PeerModels, folder: Path) -> dict[str, dict]:
    """How each peer was trained: parameters, minutes and steps."""
    names = ("parameters", "texts", "steps", "minutes", "minutes_on_the_clock")
    records = {name: json.loads((folder / name / "record.json").read_text(encoding="utf-8")) for name in TRAINED}
    found = {name: {key: record[key] for key in names} for name, record in records.items()}
    tensors = (p for name, p in models.adapter.named_parameters() if "lora_" in name)
    return found | {"shipped": {"parameters": sum(tensor.numel() for tensor in tensors)}}


def known_memory(args: argparse.Namespace) -> dict[str, float | None]:
    """What [`measure_memory`] found, with the weights as they are stored."""
    kept = args.trained / "memory.json"
    return json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() and args.dtype == "auto" else {}


def print_table(report: dict) -> None:
    for domain, methods in report["domains"].items():
        for name, row in methods.items():
            same = f"{row['identical']} of {row['prompts']} texts as plain"
            mark = "*" if name in OURS else " "
            print(f"{domain:8}{mark}{name:32} {row['speedup']:.2f}x, {row['tokens_per_pass']:.2f} per pass, {same}")


if __name__ == "__main__":
    main()
