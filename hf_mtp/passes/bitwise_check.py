"""Tests whether a pass over several columns gives, bit for bit, the results of passes over one column."""

import inspect
import weakref

import torch
from transformers import DynamicCache, PreTrainedModel

from ..adapter.tuner import GatedLoraTuner
from ..base.caches import cache_name
from ..base.inspection import evaluation_mode, input_device
from ..cache.rollback import RollbackCache
from ..layout.blocks import decoding_layout
from ..layout.mask_plan import no_masks, whole_blocks
from .decoding_pass import DecodingPass
from .speculation_mode import example_ids

# Tokens of the prompt, and drafts. Kernels change at multiples of 16 keys, which each trial crosses. They also change
# with the number of columns, so a single trial may pass by chance.
TRIALS = ((13, 4), (26, 9))

# Whether a model passed, by what decides which kernels run.
_known: "weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple, bool]]" = weakref.WeakKeyDictionary()


@torch.compiler.disable
def refuse_unless_bitwise(tuner: GatedLoraTuner, rows: int) -> None:
    """Raises if a model's regular columns are not those of plain decoding, bit for bit.

    The first call for a model, number of rows and number of threads runs a few short passes.

    Args:
        tuner ([`GatedLoraTuner`]): The upgraded model.
        rows (`int`): Rows of the batch.

    Raises:
        NotImplementedError: They are not.
    """
    model, device = tuner.model, input_device(tuner.model)
    key = rows, model.dtype, str(device), torch.get_num_threads(), str(model.config._attn_implementation)
    known = _known.setdefault(model, {})
    if key not in known:
        with evaluation_mode(model):
            known[key] = all(_are_equal(tuner, rows, *trial) for trial in TRIALS)
    if not known[key]:
        raise NotImplementedError(
            f"`mtp_bitwise=True` cannot be guaranteed for {type(model).__name__} with {rows} rows in {model.dtype} on "
            f"{device.type} (attn_implementation={model.config._attn_implementation!r}): in a trial, several tokens "
            "per pass rounded differently than one token at a time. It needs 'sdpa' attention and ordinary linear "
            "layers, and works on most CPUs. Leave out `mtp_bitwise`: in float32 the output is the same in "
            "practice, and in half precision only near-ties may flip."
        )


@torch.no_grad()
def _are_equal(tuner: GatedLoraTuner, rows: int, prompt: int, drafts: int) -> bool:
    """Whether logits, keys and values of columns after a prompt are equal, bit by bit, to those of one at a time."""
    model, k, device = tuner.model, tuner.active_mtp_config.k, input_device(tuner.model)
    length = prompt + 1 + drafts
    ids = example_ids(model, rows, length)
    plain_BTV, plain = _one_by_one(model, ids, prompt)
    forward, cache = DecodingPass(tuner, bitwise=True), RollbackCache(torch.zeros_like(ids[:, 0]))
    for start, end in ((0, prompt), (prompt, length)):
        if start:
            plan = whole_blocks(torch.full((rows,), drafts, device=device), drafts, k, linear=True)
        else:
            plan = no_masks(rows, 1, k, device)
        places, before = cache.rows.next_places(end - start), 0 if start else prompt - 1
        layout = decoding_layout(places, plan, first=before)
        output = forward(ids[:, start:end], layout, cache, logits_rows=end - start - before)
        cache.keep([end - start] * rows)
    return torch.equal(output.logits_BRV, plain_BTV) and all(
        torch.equal(ours.keys[:, :, :length], theirs.keys) and torch.equal(ours.values[:, :, :length], theirs.values)
        for ours, theirs in zip(cache.layers, plain.layers, strict=True)
    )


def _one_by_one(model: PreTrainedModel, ids: torch.LongTensor, prompt: int) -> tuple[torch.Tensor, DynamicCache]:
    """`(B, T, V)`: logits of the columns after the prompt, read one at a time, and the cache."""
    name = cache_name(inspect.signature(model.forward).parameters)
    cache, logits = DynamicCache(), []
    model(input_ids=ids[:, :prompt], **{name: cache}, use_cache=True)
    for column in ids[:, prompt:].split(1, dim=1):
        logits.append(model(input_ids=column, **{name: cache}, use_cache=True).logits)
    return torch.cat(logits, dim=1), cache
