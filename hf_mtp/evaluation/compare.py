"""Compares decoding with and without `mtp=True`: forward passes, seconds, and whether the output is the same.

The examples and benchmarks use it, and you can use it with your own model and prompts. It knows upgraded models and
token ids, and nothing of datasets, tables or plots.
"""

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel

from .decoded import DecodedRows, decode_rows
from .measures import repeated_share, tokens_per_pass


@dataclass
class PairedAnswers:
    """One prompt, answered without (`plain`) and with (`mtp`) multi-token prediction.

    Args:
        plain, mtp ([`DecodedRows`]): The answer, one row, and its cost.
    """

    plain: DecodedRows
    mtp: DecodedRows

    @property
    def identical(self) -> bool:
        """Whether both answers have the same token ids."""
        return self.plain.rows == self.mtp.rows

    @property
    def speedup(self) -> float:
        """Wall-clock time of plain decoding divided by the time with `mtp=True`."""
        return self.plain.seconds / self.mtp.seconds


def decode_both_ways(
    model: PeftModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options
) -> list[PairedAnswers]:
    """Answers every prompt without and with `mtp=True`. The two alternate in coming first.

    Args:
        model ([`~peft.PeftModel`]): An upgraded model.
        prompts (`Sequence[Sequence[int]]`): Token ids of each.
        max_new_tokens (`int`): Maximum number of new tokens per answer.
        options: Further arguments of `generate`. Those that begin with `mtp_` are left out in plain decoding.

    Returns:
        `list[PairedAnswers]`: One for each prompt, in order.
    """
    warm_up(model, prompts[0], **options)
    methods = {"plain": _plain(options), "mtp": {"mtp": True, **options}}
    pairs = []
    for index, prompt in enumerate(prompts):
        names = ("plain", "mtp") if index % 2 == 0 else ("mtp", "plain")
        decoded = {name: decode_rows(model, [prompt], max_new_tokens, **methods[name]) for name in names}
        pairs.append(PairedAnswers(**decoded))
    return pairs


def warm_up(model: PeftModel, prompt: Sequence[int], **options) -> None:
    """Decodes a few tokens both ways, so that the first prompt does not include one-time costs."""
    decode_rows(model, [prompt], 4, **_plain(options))
    decode_rows(model, [prompt], 12, mtp=True, **options)


def _plain(options: dict) -> dict:
    """The arguments of `generate` that apply to plain decoding."""
    return {name: value for name, value in options.items() if not name.startswith("mtp_")}


def summarize(pairs: Sequence[PairedAnswers]) -> dict[str, float | int]:
    """Summarizes the pairs of one domain.

    Args:
        pairs (`Sequence[PairedAnswers]`): At least one.

    Returns:
        `dict`: The sums of tokens, forward passes and seconds; `tokens_per_pass`, the ratio of the sums; `speedup`,
        the median over prompts, and `speedup_in_total`, the ratio of all seconds; `identical`, the number of prompts
        with the same output; `repeated_4grams`, the mean share.
    """
    plain, mtp = [each.plain for each in pairs], [each.mtp for each in pairs]
    tokens, passes = [answer.tokens for answer in mtp], [answer.forward_passes for answer in mtp]
    seconds_plain, seconds_mtp = (sum(answer.seconds for answer in answers) for answers in (plain, mtp))
    return {
        "prompts": len(pairs),
        "new_tokens": sum(tokens),
        "forward_passes_plain": sum(answer.forward_passes for answer in plain),
        "forward_passes_mtp": sum(passes),
        "seconds_plain": seconds_plain,
        "seconds_mtp": seconds_mtp,
        "tokens_per_pass": tokens_per_pass(tokens, passes)["tokens_per_pass"],
        "speedup": statistics.median(each.speedup for each in pairs),
        "speedup_in_total": seconds_plain / seconds_mtp,
        "identical": sum(each.identical for each in pairs),
        "repeated_4grams": statistics.fmean(repeated_share(answer.rows[0]) for answer in mtp),
    }


def same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules that shares the weights.

    One copy can have an adapter and another none. Two copies of the weights would differ by some percent in speed,
    depending on where they lie in memory.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
