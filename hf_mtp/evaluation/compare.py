"""Compares decoding with and without `mtp=True`: forward passes, seconds, and whether the output is the same.

The examples and benchmarks use it, and you can use it with your own model and prompts. It knows upgraded models and
token ids, and nothing of datasets, tables or plots.
"""

import copy
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..base.inspection import decoder_of

LIBRARIES = ("hf_mtp", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


@dataclass
class Decoded:
    """One answer and its cost.

    Args:
        ids (`list[int]`): New tokens, the end token included.
        forward_passes (`int`): Forward passes of the base's decoder, the one over the prompt included.
        seconds (`float`): Wall-clock time.
        steps (`list[int]`): New tokens of each forward pass, in order; all 1 in plain decoding.
    """

    ids: list[int]
    forward_passes: int
    seconds: float
    steps: list[int]


@dataclass
class Record:
    """One prompt, answered without (`plain`) and with (`mtp`) multi-token prediction."""

    new_tokens: int
    forward_passes_plain: int
    forward_passes_mtp: int
    seconds_plain: float
    seconds_mtp: float
    identical: bool
    repeated_4grams: float
    steps: list[int]
    ids: list[int] = field(repr=False)

    @property
    def tokens_per_step(self) -> float:
        """New tokens per forward pass with `mtp=True`. Plain decoding has 1."""
        return self.new_tokens / self.forward_passes_mtp

    @property
    def speedup(self) -> float:
        """Wall-clock time of plain decoding divided by the time with `mtp=True`."""
        return self.seconds_plain / self.seconds_mtp


@contextmanager
def counted_forward_passes(model: PreTrainedModel | PeftModel) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the number of forward passes of the base's decoder since the start."""
    passes = 0

    def count(*_):
        nonlocal passes
        passes += 1

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    hook = decoder_of(base).register_forward_pre_hook(count)
    try:
        yield lambda: passes
    finally:
        hook.remove()


def decode(model: PreTrainedModel | PeftModel, prompt_1T: torch.LongTensor, max_new_tokens: int, **options) -> Decoded:
    """Answers one prompt, greedily unless the options say otherwise.

    Args:
        model ([`~peft.PeftModel`] or [`~transformers.PreTrainedModel`]): An upgraded model, or any other.
        prompt_1T (`torch.LongTensor` of shape `(1, T)`): The prompt.
        max_new_tokens (`int`): Most new tokens.
        options: Further arguments of `generate`, such as `mtp=True`.
    """
    inputs = {"input_ids": prompt_1T, "attention_mask": torch.ones_like(prompt_1T)}
    new_1T, passes, seconds = timed_generate(model, max_new_tokens=max_new_tokens, **inputs, **options)
    ids = new_1T[0].tolist()
    steps = model.base_model.mtp_statistics.steps if options.get("mtp") else [1] * len(ids)
    return Decoded(ids, passes, seconds, steps)


def timed_generate(
    model: PreTrainedModel | PeftModel, input_ids: torch.LongTensor, **options
) -> tuple[torch.LongTensor, int, float]:
    """Runs `generate`, greedily unless the options say otherwise.

    Args:
        model ([`~peft.PeftModel`] or [`~transformers.PreTrainedModel`]): An upgraded model, or any other.
        input_ids (`torch.LongTensor` of shape `(B, T)`): The prompts.
        options: Further arguments of `generate`.

    Returns:
        `tuple`: The new tokens, `(B, N)`; the forward passes of the base's decoder, that over the prompts included;
        and the wall-clock time in seconds.
    """
    with counted_forward_passes(model) as forward_passes:
        start = time.perf_counter()
        output = model.generate(input_ids=input_ids, **{"do_sample": False, **options})
        new_BN = output[:, input_ids.shape[1] :].cpu()  # waits for a GPU to finish
        return new_BN, forward_passes(), time.perf_counter() - start


def decode_both_ways(
    model: PeftModel,
    prompts: list[torch.LongTensor],
    max_new_tokens: int,
    *,
    on_prompt: Callable[[], None] = lambda: None,
    **options,
) -> list[Record]:
    """Answers every prompt without and with `mtp=True`. The two alternate in coming first.

    Args:
        model ([`~peft.PeftModel`]): An upgraded model.
        prompts (`list[torch.LongTensor]`): Each of shape `(1, T)`.
        max_new_tokens (`int`): Most new tokens per answer.
        on_prompt (`Callable`, *optional*): Called after each prompt.
        options: Further arguments of `generate`. Those that begin with `mtp_` are left out in plain decoding.
    """
    warm_up(model, prompts[0], **options)
    ways = [_plain(options), {"mtp": True, **options}]
    records = []
    for index, prompt_1T in enumerate(prompts):
        order = (0, 1) if index % 2 == 0 else (1, 0)
        done = {way: decode(model, prompt_1T, max_new_tokens, **ways[way]) for way in order}
        records.append(compare(done[0], done[1]))
        on_prompt()
    return records


def warm_up(model: PeftModel, prompt_1T: torch.LongTensor, **options) -> None:
    """Decodes a few tokens both ways, so that the first prompt does not include one-time costs."""
    decode(model, prompt_1T, 4, **_plain(options))
    decode(model, prompt_1T, 12, mtp=True, **options)


def _plain(options: dict) -> dict:
    """The arguments of `generate` that apply to plain decoding."""
    return {name: value for name, value in options.items() if not name.startswith("mtp_")}


def compare(plain: Decoded, fast: Decoded) -> Record:
    """Compares two answers to one prompt."""
    return Record(
        new_tokens=len(fast.ids),
        forward_passes_plain=plain.forward_passes,
        forward_passes_mtp=fast.forward_passes,
        seconds_plain=plain.seconds,
        seconds_mtp=fast.seconds,
        identical=plain.ids == fast.ids,
        repeated_4grams=repeated_share(fast.ids),
        steps=fast.steps,
        ids=fast.ids,
    )


def repeated_share(ids: list[int], n: int = 4) -> float:
    """The share of n-grams that repeat an earlier one of the answer. A text that loops is easy to predict."""
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summarize(records: list[Record]) -> dict[str, float | int]:
    """Summarizes the records of one domain.

    Returns:
        `dict`: The sums of tokens, forward passes and seconds; `tokens_per_step`, the ratio of the sums; `speedup`,
        the median over prompts, and `speedup_in_total`, the ratio of all seconds; `identical`, the number of prompts
        with the same output; `repeated_4grams`, the mean share.
    """
    new_tokens = sum(record.new_tokens for record in records)
    passes = sum(record.forward_passes_mtp for record in records)
    seconds_plain = sum(record.seconds_plain for record in records)
    seconds_mtp = sum(record.seconds_mtp for record in records)
    return {
        "prompts": len(records),
        "new_tokens": new_tokens,
        "forward_passes_plain": sum(record.forward_passes_plain for record in records),
        "forward_passes_mtp": passes,
        "seconds_plain": seconds_plain,
        "seconds_mtp": seconds_mtp,
        "tokens_per_step": new_tokens / passes,
        "speedup": statistics.median(record.speedup for record in records),
        "speedup_in_total": seconds_plain / seconds_mtp,
        "identical": sum(record.identical for record in records),
        "repeated_4grams": statistics.fmean(record.repeated_4grams for record in records),
    }


def decode_all(
    model: PeftModel,
    prompts: list[torch.LongTensor],
    max_new_tokens: int,
    *,
    on_prompt: Callable[[], None] = lambda: None,
    **mtp,
) -> list[Decoded]:
    """Answers every prompt once. Arguments as in [`decode_both_ways`], and `mtp=True` for multi-token prediction."""
    answers = []
    for prompt_1T in prompts:
        answers.append(decode(model, prompt_1T, max_new_tokens, **mtp))
        on_prompt()
    return answers


def tokens_per_step(answers: list[Decoded]) -> float:
    """New tokens per forward pass over all answers."""
    return sum(len(answer.ids) for answer in answers) / sum(answer.forward_passes for answer in answers)


def same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules that shares the weights.

    One copy can have an adapter and another none. Two copies of the weights would differ by some percent in speed,
    depending on where they lie in memory.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def bfloat16_is_faster(size: int = 256, repeats: int = 8) -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones, found in a fraction of a second.

    A CPU that has no instructions for bfloat16 does not. A trial finds this out on any kind of CPU and torch release.

    Args:
        size (`int`, *optional*, defaults to 256):
            Rows and columns of the matrices. Emulated bfloat16 takes a thousand times as long, so they are small.
        repeats (`int`, *optional*, defaults to 8): Products per dtype, of which the fastest counts.
    """

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.ones(2, size, size, dtype=dtype)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def describe_machine() -> dict[str, str | int | dict]:
    """The processor, the number of threads, versions of libraries, and the name of the GPU, if any."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    description = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }
    if torch.cuda.is_available():
        description["accelerator"] = torch.cuda.get_device_name()
    return description


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
