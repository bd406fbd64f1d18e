"""Decodes prompts with `generate` and counts what it takes: [`decode_rows`]. Knows token ids, but no texts or tables.

Shapes: B rows, T tokens of the longest prompt.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..adapter.config import GatedLoraConfig
from ..base.inspection import decoder_of, input_device
from ..base.padding import end_tokens, left_padded, up_to_end

# Whatever the model's own generation config says.
GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}


@dataclass
class DecodedRows:
    """Answers of one call of `generate`, and their cost.

    Args:
        rows (`list[list[int]]`): New tokens of each row, the end token included.
        forward_passes (`int`): Forward passes of the base's decoder, those over the prompts included.
        row_passes (`int`): The same, counted once for each row that had not ended. Equal to `forward_passes` for one
            row.
        seconds (`float`): Wall-clock time.
        steps (`list[int]`): New tokens of each forward pass, in order; all 1 in plain decoding.
        drafted_per_position, accepted_per_position (`list[int]`): Counts of drafts, as in [`MTPStatistics`]. Empty
            without the decode loop of hf_mtp.
        is_mtp (`bool`): Whether that loop decoded. For some models, `mtp=True` decodes plainly.
    """

    rows: list[list[int]]
    forward_passes: int
    row_passes: int
    seconds: float
    steps: list[int] = field(default_factory=list)
    drafted_per_position: list[int] = field(default_factory=list)
    accepted_per_position: list[int] = field(default_factory=list)
    is_mtp: bool = False

    @property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return sum(map(len, self.rows))


def checked_config(model: PeftModel, batch_size: int = 1, max_new_tokens: int = 1) -> GatedLoraConfig:
    """The config of a model's active adapter.

    Args:
        model ([`~peft.PeftModel`]): An upgraded model.
        batch_size, max_new_tokens (`int`, *optional*): At least 1.

    Raises:
        ValueError: The model has no adapter of hf_mtp, or a number is less than 1.
    """
    config = getattr(getattr(model, "base_model", None), "active_mtp_config", None)
    if config is None:
        raise ValueError(
            f"{type(model).__name__} has no adapter of hf_mtp. Load one with `PeftModel.from_pretrained(base, "
            "adapter)`, or with --adapter."
        )
    for name, value in {"batch_size": batch_size, "max_new_tokens": max_new_tokens}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, but got {value}.")
    return config


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
        output = model.generate(input_ids=input_ids, **{**GREEDY, **options})
        new_BN = output[:, input_ids.shape[1] :].cpu()  # waits for a GPU to finish
        return new_BN, forward_passes(), time.perf_counter() - start


def decode_rows(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options
) -> DecodedRows:
    """Answers some prompts in one call of `generate`, greedily unless the options say otherwise.

    Args:
        model ([`~peft.PeftModel`] or [`~transformers.PreTrainedModel`]): An upgraded model, or any other.
        prompts (`Sequence[Sequence[int]]`): Token ids of each row. Shorter ones are padded on the left.
        max_new_tokens (`int`): Most new tokens of each row.
        options: Further arguments of `generate`, such as `mtp=True`.
    """
    pad = _padding_token(model)
    ids_BT, mask_BT = (tensor.to(input_device(model)) for tensor in left_padded(prompts, pad))
    options = {"attention_mask": mask_BT, "max_new_tokens": max_new_tokens, "pad_token_id": pad, **options}
    earlier = getattr(model, "mtp_statistics", None)
    new_BN, passes, seconds = timed_generate(model, ids_BT, **options)
    rows = new_BN.tolist()
    if len(rows) > 1:
        rows = [up_to_end(row, end_tokens(model)) for row in rows]
    counts = getattr(model, "mtp_statistics", None)
    if counts is earlier:  # the decode loop did not run
        tokens = sum(map(len, rows))
        row_passes = passes if len(rows) == 1 else tokens
        return DecodedRows(rows, passes, row_passes, seconds, steps=[1] * tokens)
    return DecodedRows(
        rows,
        passes,
        passes if len(rows) == 1 else counts.row_passes,
        seconds,
        counts.steps,
        counts.drafted_per_position,
        counts.accepted_per_position,
        is_mtp=True,
    )


def _padding_token(model: PreTrainedModel | PeftModel) -> int:
    """The padding token of the generation config, else the smallest end token."""
    pad = model.generation_config.pad_token_id
    return min(end_tokens(model), default=0) if pad is None else pad
