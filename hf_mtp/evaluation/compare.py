"""Compares decoding with and without `mtp=True`: forward passes, seconds, and whether the output is the same.

The examples and benchmarks use it, and you can use it with your own model and prompts. It knows upgraded models and
token ids, and nothing of datasets, tables or plots.
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from .decoded import decode_rows
from .measures import repeated_share, tokens_per_pass


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
    """One prompt, answered without (`plain`) and with (`mtp`) multi-token prediction.

    Args:
        new_tokens (`int`): New tokens of the answer with `mtp=True`, the end token included.
        forward_passes_plain, forward_passes_mtp (`int`): Forward passes of the base, the one over the prompt included.
        seconds_plain, seconds_mtp (`float`): Wall-clock time.
        identical (`bool`): Whether both answers have the same token ids.
        repeated_4grams (`float`): The share of the answer's 4-grams that occur earlier in it.
        steps (`list[int]`): New tokens of each forward pass with `mtp=True`, in order.
        ids (`list[int]`): New tokens with `mtp=True`.
    """

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


def decode(model: PreTrainedModel | PeftModel, prompt_1T: torch.LongTensor, max_new_tokens: int, **options) -> Decoded:
    """Answers one prompt, greedily unless the options say otherwise.

    Args:
        model ([`~peft.PeftModel`] or [`~transformers.PreTrainedModel`]): An upgraded model, or any other.
        prompt_1T (`torch.LongTensor` of shape `(1, T)`): The prompt.
        max_new_tokens (`int`): Most new tokens.
        options: Further arguments of `generate`, such as `mtp=True`.
    """
    decoded = decode_rows(model, prompt_1T.tolist(), max_new_tokens, **options)
    return Decoded(decoded.rows[0], decoded.forward_passes, decoded.seconds, decoded.steps)


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
        max_new_tokens (`int`): Maximum number of new tokens per answer.
        on_prompt (`Callable`, *optional*): Called after each prompt.
        options: Further arguments of `generate`. Those that begin with `mtp_` are left out in plain decoding.

    Returns:
        `list[Record]`: One for each prompt, in order.
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


def summarize(records: list[Record]) -> dict[str, float | int]:
    """Summarizes the records of one domain.

    Returns:
        `dict`: The sums of tokens, forward passes and seconds; `tokens_per_step`, the ratio of the sums; `speedup`,
        the median over prompts, and `speedup_in_total`, the ratio of all seconds; `identical`, the number of prompts
        with the same output; `repeated_4grams`, the mean share.
    """
    tokens, passes = [record.new_tokens for record in records], [record.forward_passes_mtp for record in records]
    seconds_plain = sum(record.seconds_plain for record in records)
    seconds_mtp = sum(record.seconds_mtp for record in records)
    return {
        "prompts": len(records),
        "new_tokens": sum(tokens),
        "forward_passes_plain": sum(record.forward_passes_plain for record in records),
        "forward_passes_mtp": sum(passes),
        "seconds_plain": seconds_plain,
        "seconds_mtp": seconds_mtp,
        "tokens_per_step": tokens_per_pass(tokens, passes)["tokens_per_pass"],
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
    tokens, passes = [len(answer.ids) for answer in answers], [answer.forward_passes for answer in answers]
    return tokens_per_pass(tokens, passes)["tokens_per_pass"]


def same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules that shares the weights.

    One copy can have an adapter and another none. Two copies of the weights would differ by some percent in speed,
    depending on where they lie in memory.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
