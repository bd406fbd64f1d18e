#!/usr/bin/env python
"""Measure the adapter on SmolLM2: speed, tokens per forward pass, and whether the text is the base's own.

    python examples/smollm2/measure.py speed DATA docs/results/smollm2.json --base smollm2

Every prompt is decoded with every method in turn; the base, with and without adapters, is one set of weights. An
interrupted measurement goes on where it stopped. Timings need a machine on which nothing else computes. On two cores
with bfloat16 instructions, 128 new tokens take 3 to 6 seconds per method, and 64 tokens half of that.

  peers         which settings of prompt lookup, early exit and a small draft are best, on prompts of their own
  speed         plain decoding, `auto` and prompt lookup; further methods on the first --rare prompts
  table         `auto` with masks, with the n-gram table, with both and with neither
  by_k          the paper's table: k = 1, 2, 4, 8 on five kinds of text, linear, quadratic and `auto`
  batches       batches of 4 and 8 rows, plain and `auto`
  tokens        tokens per pass of quadratic decoding; needs no quiet machine
  temperatures  tokens per pass at T = 0.7 and 1.0, and greedily; those of `auto` depend on the costs of passes
  float32       whether the texts are those of plain decoding in float32; needs no quiet machine
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from held_out import held_out_questions, own_questions
from methods import PEERS, PLAIN, PLAIN_IN_A_BATCH, Method, Models, mtp, sampled
from paired import Record, fastest_setting, measure, one_by_one, summarize

from hf_mtp import GatedLoraConfig
from hf_mtp.adapter.card import write_model_card
from hf_mtp.base.machine import describe_machine
from hf_mtp.evaluation.run import adapter_fingerprint

HERE = Path(__file__).resolve().parent
BATCHES = (4, 8)
K = (1, 2, 4, 8)
DOMAINS = {"maths": "maths (GSM8K)", "code": "code (MBPP)", "chat": "chat"}
FREE = "auto, columns nearly free"
SMALL = {"prompts": 1, "new_tokens": 12, "rare": 1}


@dataclass(frozen=True)
class Experiment:
    """What is measured.

    Args:
        methods (`Callable`): From the command line to the decoding methods.
        groups (`Callable`): From the command line to the prompts of each domain, in groups that are decoded together.
        prompts (`int`): Groups of each domain, unless the command line says otherwise.
        new_tokens (`int`): Length of an answer at most, likewise.
        dtype (`str`): What the base computes in; `"auto"` is what it is stored in.
    """

    methods: Callable[[argparse.Namespace], dict[str, Method]]
    groups: Callable[[argparse.Namespace], dict[str, list[list[str]]]]
    prompts: int
    new_tokens: int = 128
    dtype: str = "auto"


def speed_methods(args: argparse.Namespace) -> dict[str, Method]:
    """Ours, and every peer with its best setting."""
    peers = {family: PEERS[family][setting] for family, setting in best_peers(args.peers).items()}
    ours = {strategy: mtp(strategy, is_rare=strategy != "auto") for strategy in ("auto", "quadratic", "linear")}
    ours["auto, bitwise"] = mtp(mtp_bitwise=True)
    untrained = {"auto, untrained adapter": mtp(model="untrained", is_rare=True)}
    return {"plain": PLAIN, **ours, **peers, **untrained, "plain, in a batch": PLAIN_IN_A_BATCH}


def best_peers(path: Path) -> dict[str, str]:
    """Family to setting, as the experiment `peers` found them."""
    if not path.is_file():
        sys.exit(f"{path} is missing. Measure `peers` first, or pass its report as --peers.")
    return json.loads(path.read_text(encoding="utf-8"))["best"]


def peer_methods(args: argparse.Namespace) -> dict[str, Method]:
    """Every setting of every peer."""
    settings = {(family, name): method for family, methods in PEERS.items() for name, method in methods.items()}
    return {"plain": PLAIN, **{f"{family}: {name}": method for (family, name), method in settings.items()}}


def strategies_by_k(args: argparse.Namespace) -> dict[str, Method]:
    """Every strategy with every k."""
    strategies = ("linear", "quadratic", "auto")
    return {"plain": PLAIN, **{f"{strategy}, k={k}": mtp(strategy, k) for strategy in strategies for k in K}}


def temperatures(args: argparse.Namespace) -> dict[str, Method]:
    """Greedily and by sampling, also as if columns were nearly free."""
    models = {"quadratic": ("quadratic", "adapter"), "auto": ("auto", "adapter"), FREE: ("auto", "free_columns")}
    return {
        f"{name}, {how}": mtp(strategy, model=model) if t is None else sampled(strategy, t, model)
        for name, (strategy, model) in models.items()
        for how, t in (("greedy", None), ("T = 0.7", 0.7), ("T = 1.0", 1.0))
    }


def held_out(args: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Held-out prompts, one by one."""
    return one_by_one(held_out_questions(args.data, args.prompts))


def for_settings(args: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Held-out prompts to choose settings on."""
    return one_by_one(held_out_questions(args.data, args.prompts, for_settings=True))


def five_kinds(args: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Our own prompts."""
    return one_by_one(own_questions(args.prompts))


def batches(args: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Held-out prompts of all domains in turn, in batches."""
    questions = held_out_questions(args.data, -(-args.prompts * max(BATCHES) // len(DOMAINS)))
    texts = [text for turn in zip(*questions.values(), strict=True) for text in turn]
    return {
        f"batch of {size}": [texts[start : start + size] for start in range(0, len(texts) - size + 1, size)][
            : args.prompts
        ]
        for size in BATCHES
    }


def just(**methods: Method) -> Callable[[argparse.Namespace], dict[str, Method]]:
    """These methods and plain decoding, whatever the command line says."""
    return lambda args: {"plain": PLAIN, **methods}


WITH_AND_WITHOUT = {
    "masks and table": mtp(),
    "masks alone": mtp(model="without_table"),
    "table alone": mtp(model="table_alone"),
    "neither": mtp(model="untrained"),
}
EXPERIMENTS = {
    "peers": Experiment(peer_methods, for_settings, prompts=2, new_tokens=64),
    "speed": Experiment(speed_methods, held_out, prompts=40),
    "table": Experiment(just(**WITH_AND_WITHOUT), held_out, prompts=8),
    "by_k": Experiment(strategies_by_k, five_kinds, prompts=4, new_tokens=64),
    "batches": Experiment(just(auto=mtp()), batches, prompts=4),
    "tokens": Experiment(just(quadratic=mtp("quadratic")), held_out, prompts=20),
    "temperatures": Experiment(temperatures, held_out, prompts=6),
    "float32": Experiment(just(auto=mtp()), held_out, prompts=14, dtype="float32"),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS, help="what is measured, see above")
    parser.add_argument("data", type=Path, help="folder with the held-out sets")
    parser.add_argument("output", type=Path, help="file for the numbers, JSON")
    parser.add_argument("--base", required=True, help="the model's folder")
    parser.add_argument("--adapter", type=Path, default=HERE / "adapter", help="folder of the adapter (%(default)s)")
    parser.add_argument("--peers", type=Path, default=HERE.parents[1] / "docs/results/peers.json",
                        help="report of `peers`, for the best settings of others (%(default)s)")  # fmt: skip
    parser.add_argument("--prompts", type=int, help="prompts of each domain; for `batches`, batches of each size")
    parser.add_argument("--rare", type=int, default=3, help="prompts a domain of the further methods (%(default)s)")
    parser.add_argument("--new-tokens", type=int, help="length of an answer at most")
    parser.add_argument("--minutes", type=float, help="no prompt is begun after so much time")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--small", action="store_true", help="one prompt a domain and short answers, to try it out")
    parser.add_argument("--card", action="store_true", help="write the tokens per pass into the adapter's card")
    args = parser.parse_args()
    experiment = EXPERIMENTS[args.experiment]
    for name, value in (SMALL if args.small else {}).items():
        setattr(args, name, value)
    args.prompts = args.prompts or experiment.prompts
    args.new_tokens = args.new_tokens or experiment.new_tokens
    if args.card and args.experiment != "tokens":
        parser.error("--card writes what `tokens` measures; leave it out, or measure `tokens`.")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    experiment = EXPERIMENTS[args.experiment]
    methods, groups = experiment.methods(args), experiment.groups(args)
    try:
        models = Models(args.base, args.adapter, experiment.dtype)
        fingerprint = adapter_fingerprint(models.adapter)
    except (OSError, ValueError) as error:  # no such folder, or an adapter of another base
        sys.exit(f"{type(error).__name__}: {error}")
    settings = {
        "experiment": args.experiment,
        "machine": describe_machine(),
        "adapter": fingerprint,
        "dtype": str(models.base.dtype).removeprefix("torch."),
        "new_tokens": args.new_tokens,
        "rare": args.rare,
        "methods": {
            name: method.options | {"assistant_tokens": method.assistant_tokens} for name, method in methods.items()
        },
        "prompts": groups,
    }
    record = Record(args.output, settings)
    measure(models, methods, groups, record, args.new_tokens, args.rare, args.minutes)
    domains = summarize(record.rows)
    about = {name: value for name, value in settings.items() if name != "prompts"}
    report = about | {"domains": domains} | best_of(args.experiment, domains) | {"rows": record.rows}
    record.finish(report, is_complete=len(record.rows) == sum(map(len, groups.values())))
    print_table(domains)
    if args.card:
        write_card(args.adapter, domains)


def best_of(experiment: str, domains: dict[str, dict[str, dict]]) -> dict[str, dict[str, str]]:
    """The setting of each peer that is fastest over all domains."""
    if experiment != "peers":
        return {}
    return {"best": {family: fastest_setting(domains, family, settings) for family, settings in PEERS.items()}}


def print_table(domains: dict[str, dict[str, dict]]) -> None:
    for domain, methods in domains.items():
        for name, row in methods.items():
            speed = f"{row['speedup']:.2f}x, " if "speedup" in row else ""
            same = f", {row['identical']} of {row['prompts']} texts as plain" if "identical" in row else ""
            print(f"{domain:12} {name:36} {speed}{row['tokens_per_pass']:.2f} tokens per pass{same}")


def write_card(adapter: Path, domains: dict[str, dict[str, dict]]) -> None:
    """Puts the tokens per pass of quadratic decoding into the adapter's config and model card."""
    config = GatedLoraConfig.from_pretrained(adapter)
    config.tokens_per_pass = {
        DOMAINS[name]: round(methods["quadratic"]["tokens_per_pass"], 2) for name, methods in domains.items()
    }
    config.save_pretrained(adapter)
    write_model_card(config, adapter)


if __name__ == "__main__":
    main()
