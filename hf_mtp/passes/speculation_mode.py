"""Determines by trial which speculation mode a base model supports. The name of the architecture never matters.

Speculation needs passes over several tokens with exactly the results of one token at a time. The modes, best first:
a tree, which quadratic decoding needs; a chain whose cache rolls back; a chain on a copy of a state that cannot be
rolled back; a chain recomputed from the start of the text; none.
"""

import enum
import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..adapter.gate import HiddenStateCapture
from ..base.caches import cache_name
from ..base.inspection import (
    accepted_inputs,
    decoder_of,
    evaluation_mode,
    input_device,
    is_recurrent,
    mask_form,
    weight_shape,
)
from ..base.sizes import WINDOW
from ..base.tiny import tiny_model
from ..cache.rollback import RollbackCache
from ..cache.sequence import SequenceCache, TextCache
from ..layout.attention import attention_kinds, attention_masks, in_blocks
from ..layout.blocks import BlockLayout, decoding_layout
from ..layout.mask_plan import whole_blocks
from .decoding_pass import DecodingPass
from .recurrent_pass import RecomputePass, RecurrentPass

logger = logging.get_logger(__name__)


class SpeculationMode(str, enum.Enum):
    """How a model can compute several tokens in one pass with the results of one token at a time.

    - `TREE`: blocks of masks and alternative drafts branch off at every draft.
    - `CHAIN`: a pass is one plain sequence, the drafts and a block of masks.
    - `CHAIN_ON_COPY`: the same, with drafts and masks in a copy of a cache that cannot be rolled back.
    - `RECOMPUTE`: each pass recomputes the whole sequence.
    - `NONE`: plain decoding only.
    """

    TREE = "tree"
    CHAIN = "chain"
    CHAIN_ON_COPY = "chain on a copied state"
    RECOMPUTE = "recomputed chain"
    NONE = "none"

    @property
    def pays(self) -> bool:
        """Whether speculation can be faster than plain decoding: a pass reads new columns only."""
        return self not in (SpeculationMode.RECOMPUTE, SpeculationMode.NONE)


# The pass and the cache of each mode except NONE.
PASSES = {
    SpeculationMode.TREE: (DecodingPass, RollbackCache),
    SpeculationMode.CHAIN: (DecodingPass, RollbackCache),
    SpeculationMode.CHAIN_ON_COPY: (RecurrentPass, SequenceCache),
    SpeculationMode.RECOMPUTE: (RecomputePass, TextCache),
}
PROMPT = WINDOW + 3  # tokens in a trial's prompt: more than any window of a tiny model
MASKS = 2  # per block in a trial

# The mode of each model, by its attention implementation.
_known: "weakref.WeakKeyDictionary[PreTrainedModel, dict[str, SpeculationMode]]" = weakref.WeakKeyDictionary()
# Modes that a tiny model of the same kind allows, by config, attention implementation and class.
_of_kinds: dict[tuple[str, str, type], list[SpeculationMode] | None] = {}


class _Unadapted:
    """Lets a model without an adapter pass for an upgraded one, with ordinary tokens in place of masks.

    So the result of a trial depends on the model alone, and not on an adapter's weights.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        # The "mask" i is token 3 + i, past the ids that are often special.
        self.vocab_size = min(3, weight_shape(model.get_input_embeddings())[0] - MASKS)

    @contextmanager
    def masks_in_columns(self, first: int, index_BM: torch.LongTensor, lora: object = None) -> Iterator[None]:
        yield

    @contextmanager
    def capture_hidden_states(self) -> Iterator[HiddenStateCapture]:
        capture = HiddenStateCapture()
        capture.states = torch.empty(1, 0, 0)  # never read
        yield capture


@torch.compiler.disable  # the models of a trial run once
def speculation_mode(model: PreTrainedModel) -> SpeculationMode:
    """The best mode that a base model allows.

    Runs a few short passes, once per model and attention implementation: through the model itself, and through a tiny
    random one of the same type with short attention windows. If only the model itself fails, perhaps
    because memory ran out, the result is not kept for later calls.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model, without its adapter.

    Returns:
        [`SpeculationMode`]
    """
    known = _known.setdefault(model, {})
    implementation = str(model.config._attn_implementation)
    if implementation in known:
        return known[implementation]
    of_kind = _modes_of_kind(model, implementation)
    errors: list[Exception] = []
    best = next(
        mode
        for mode in SpeculationMode
        if mode is SpeculationMode.NONE or ((of_kind is None or mode in of_kind) and _holds(model, mode, errors))
    )
    if of_kind is None or not errors:
        known[implementation] = best
    else:
        logger.warning(
            f"{type(model).__name__} failed in a trial with several tokens per pass, but a tiny model of the same "
            f"type did not ({errors[0]}). This call uses mode {best.value!r}, and the next call tries again."
        )
    return best


def _modes_of_kind(model: PreTrainedModel, implementation: str) -> list[SpeculationMode] | None:
    """The modes that a tiny model of the same kind allows; `None` if no such model can be built."""
    key = model.config.to_json_string(use_diff=False), implementation, type(model)
    if key not in _of_kinds:
        try:
            stand_in = tiny_model(model.config, model_class=type(model))
            if mask_form(model) not in (None, in_blocks):  # flash and flex attention do not support float64 on a CPU
                stand_in.set_attn_implementation(model.config._attn_implementation)
        except Exception as error:  # a config may lead to any error of its model's code
            logger.debug("No tiny model can stand in for %s: %s", type(model).__name__, error)
            _of_kinds[key] = None
        else:
            _of_kinds[key] = [mode for mode in PASSES if _holds(stand_in, mode, [])]
    return _of_kinds[key]


def _holds(model: PreTrainedModel, mode: SpeculationMode, errors: list[Exception]) -> bool:
    """Whether a model allows a mode. What its code raises is added to `errors`."""
    device_type = input_device(model).type
    try:
        with torch.no_grad(), torch.autocast(device_type, enabled=False), evaluation_mode(model):
            if mode in (SpeculationMode.TREE, SpeculationMode.CHAIN) and is_recurrent(model):
                return False
            dtype = _computing_dtype(model)
            if mode is not SpeculationMode.TREE:
                return _passes_equal_sequences(model, dtype, *PASSES[mode], linear=True)
            return (
                mask_form(model) is not None
                and _branch_equals_sequence(model, dtype)
                and _passes_equal_sequences(model, dtype, *PASSES[mode], linear=False, rows=2)
            )
    except Exception as error:
        logger.debug("%s does not allow the mode %r: %s", type(model).__name__, mode.value, error)
        errors.append(error)
        return False


def example_ids(model: PreTrainedModel, rows: int, count: int) -> torch.LongTensor:
    """`(rows, count)` ids, all different where the vocabulary has so many, and none 0.

    0 is often a padding token, which models treat specially.
    """
    vocab, total = weight_shape(model.get_input_embeddings())[0], rows * count
    ids = [vocab * i // (total + 2) for i in range(1, total + 1)]
    return torch.tensor(ids, device=input_device(model)).view(rows, count)


def _computing_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of a model's products: that of its weights, unless accelerate has put autocast into its forward."""
    device_type, found = input_device(model).type, []

    def look(*_) -> None:
        is_on = torch.is_autocast_enabled(device_type)
        found.append(torch.get_autocast_dtype(device_type) if is_on else model.dtype)

    hook = decoder_of(model).register_forward_pre_hook(look)
    inputs = {"input_ids": example_ids(model, 1, PROMPT), "use_cache": False}
    try:
        model(**accepted_inputs(inputs, inspect.signature(model.forward).parameters))
    finally:
        hook.remove()
    return found[0]


def are_close(found: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two results of a model that computes in `dtype` are equal up to rounding."""
    # Some layers compute in float32 whatever the model's dtype, in sums whose order depends on the length. Wrong
    # results differ by orders of magnitude more.
    tolerance = max(50 * torch.finfo(dtype).eps, 500 * torch.finfo(torch.float32).eps) * truth.abs().max()
    return bool((found - truth).abs().max() <= tolerance)


def _plain_logits(model: PreTrainedModel, text_1T: torch.LongTensor, last: int = 5) -> torch.Tensor:
    """`(last, V)`: logits of the last tokens, read one at a time after the model's own cache, if it has one."""
    known = inspect.signature(model.forward).parameters
    first, logits, past, start = text_1T.shape[1] - last + 1, [], {}, 0
    position_1T = torch.arange(text_1T.shape[1], device=text_1T.device)[None]
    for end in range(first, text_1T.shape[1] + 1):
        inputs = {"input_ids": text_1T[:, start:end], "position_ids": position_1T[:, start:end], "use_cache": True}
        outputs = model(**accepted_inputs(inputs, known), **past)
        if cache_name(outputs) in outputs:
            past, start = {cache_name(known): outputs[cache_name(outputs)]}, end
        logits.append(outputs.logits[0, -1:])
    if torch.cat(logits).isnan().any():  # nothing equals NaN, so the trial would blame the model's cache
        raise FloatingPointError(f"its logits are NaN in {model.dtype}; float16 may be too narrow for it")
    return torch.cat(logits)


def _branch_equals_sequence(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether a text with a branch on its last token but one has the logits of the two separate texts."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    ids, text, branch = example_ids(model, 1, PROMPT + 2), list(range(PROMPT)), [PROMPT, PROMPT + 1]
    column = torch.arange(PROMPT, device=ids.device)[None]
    layout = BlockLayout.of_blocks(column[:, -2:-1], column, torch.zeros_like(column), k=2)
    mask = attention_masks(layout, attention_kinds(model.config.get_text_config(decoder=True)), mask_form(model))
    branched = model(input_ids=ids, attention_mask=mask, position_ids=layout.position_BN, use_cache=False).logits[0]
    return all(
        are_close(branched[rows], model(input_ids=ids[:, rows], use_cache=False).logits[0], dtype)
        for rows in (text, [*text[:-1], *branch])
    )


def _passes_equal_sequences(
    model: PreTrainedModel, dtype: torch.dtype, pass_type: type, cache_type: type, linear: bool, rows: int = 1
) -> bool:
    """Whether passes with masks and with right and wrong drafts, as in decoding, have the logits of plain decoding.

    The second of two rows is padded. In each pass, one row accepts its drafts and the other rejects them.
    """
    forward = pass_type(_Unadapted(model))
    ids = example_ids(model, rows, PROMPT + 6)
    cache = cache_type(torch.arange(rows, device=ids.device))
    text_BT, wrong_B2 = ids[:, :-2], ids[:, -2:]
    truth_B = [_plain_logits(model, text_BT[row : row + 1, row:]) for row in range(rows)]
    read = [0] * rows
    for accepted in (None, [0, 2], [2, 0]):  # after the prompt, how many of two drafts are right
        if accepted is None:
            regular_BT, before, drafts, kept = text_BT[:, :PROMPT], PROMPT - 1, 0, [PROMPT] * rows
        else:
            columns = [
                [text_BT[row, read[row]], *(text_BT[row, read[row] + 1 : read[row] + 3] if right else wrong_B2[row])]
                for row, right in enumerate(accepted[:rows])
            ]
            regular_BT = torch.tensor(columns, device=ids.device)
            before, drafts, kept = 0, 2, [1 + right for right in accepted[:rows]]
        positions_BT = cache.rows.next_places(regular_BT.shape[1])
        plan = whole_blocks(torch.full((rows,), drafts, device=ids.device), drafts, MASKS, linear)
        layout = decoding_layout(positions_BT, plan, first=before)
        logits_BRV = forward(regular_BT, layout, cache, logits_rows=1 + drafts).logits_BRV
        for row in range(rows):
            true = truth_B[row][read[row] + before - PROMPT + 1 : read[row] + kept[row] - PROMPT + 1]
            if not are_close(logits_BRV[row, : len(true)], true, dtype):
                return False
        cache.keep(kept)
        read = [tokens + new for tokens, new in zip(read, kept, strict=True)]
    return True
