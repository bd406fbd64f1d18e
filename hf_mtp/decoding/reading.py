"""How a base model can read several tokens in one pass: found out by trying, never by the name of its architecture.

Best first: in branches, which quadratic decoding needs; as one sequence, rolled back by not counting columns of the
cache; as one sequence, on a copy of a state that cannot be rolled back; as a whole text from its start; or not at all.
"""

import enum
import inspect
import weakref
from typing import TYPE_CHECKING

import torch
from peft import get_peft_model
from transformers import PreTrainedModel
from transformers.utils import logging

from ..adapter.config import GatedLoraConfig
from ..adapter.gate import GateError
from ..base.cache import RollbackCache, cache_name
from ..base.sizes import WINDOW
from ..base.support import evaluation_mode, input_device, is_recurrent, mask_form, weight_shape
from ..base.tiny import tiny_model
from ..blocks.layout import BlockLayout, decoding_layout
from ..blocks.masks import attention_kinds, attention_masks, in_blocks
from .drafting import found_drafts, no_drafts
from .pacing import Whole
from .sequence import SequenceCache, SequenceStep, WholeTextCache, WholeTextStep
from .step import MaskedStep

if TYPE_CHECKING:
    from ..tuner import GatedLoraModel

logger = logging.get_logger(__name__)


class Reading(str, enum.Enum):
    """What a model reads in one pass, and get exactly what it gets from one token at a time."""

    BRANCHES = "branches"
    SEQUENCES = "sequences"
    SEQUENCES_FROM_STATES = "sequences from a copied state"
    WHOLE_TEXTS = "whole texts"
    TOKENS = "single tokens"

    @property
    def pays(self) -> bool:
        """Whether a pass reads new columns only."""
        return self not in (Reading.WHOLE_TEXTS, Reading.TOKENS)


PROMPT = WINDOW + 3  # tokens of a trial: more than any window of a tiny model


# By model, as it is with each attention implementation.
_known: "weakref.WeakKeyDictionary[PreTrainedModel, dict[str, Reading]]" = weakref.WeakKeyDictionary()
# By config, the best reading of the model itself, and its class.
_of_kinds: dict[tuple[str, Reading, type], Reading] = {}


@torch.compiler.disable  # passes through models that are run once
def reading_of(tuner: "GatedLoraModel") -> Reading:
    """The best way in which an upgraded model reads several tokens exactly.

    Runs a few short forward passes, once per model and attention implementation: through the model itself, and through
    a tiny random one of the same kind, whose windows are short enough to be left.

    Args:
        tuner ([`GatedLoraModel`]): The upgraded model.
    """
    known = _known.setdefault(tuner.model, {})
    implementation = str(tuner.model.config._attn_implementation)
    if implementation not in known:
        known[implementation] = _of_stand_in(tuner.model, _best(tuner, list(Reading)))
    return known[implementation]


def _best(tuner: "GatedLoraModel", readings: list[Reading]) -> Reading:
    return next(reading for reading in readings if reading is Reading.TOKENS or _holds(tuner, reading))


def _of_stand_in(model: PreTrainedModel, best: Reading) -> Reading:
    """What also holds for a tiny model of the same kind: `best` or less."""
    key = model.config.to_json_string(use_diff=False), best, type(model)
    if best is not Reading.TOKENS and key not in _of_kinds:
        try:
            with torch.random.fork_rng(devices=[]):
                stand_in = tiny_model(model.config, model_class=type(model))
                if mask_form(model) not in (None, in_blocks):  # flash and flex take no float64 on a CPU
                    stand_in.set_attn_implementation(model.config._attn_implementation)
                tuner = get_peft_model(stand_in, GatedLoraConfig(k=2, r=2)).base_model
        except Exception as error:  # a config may lead to any error of its model's code
            logger.debug("There is no stand-in for %s: %s", type(model).__name__, error)
            _of_kinds[key] = best
        else:
            _of_kinds[key] = _best(tuner, list(Reading)[list(Reading).index(best) :])
    return _of_kinds.get(key, best)


def _holds(tuner: "GatedLoraModel", reading: Reading) -> bool:
    """Whether a model can be read so. One that raises when read so cannot, whatever its code raises."""
    with torch.no_grad(), evaluation_mode(tuner):
        try:
            if reading is Reading.BRANCHES:
                return (
                    mask_form(tuner.model) is not None
                    and not is_recurrent(tuner.model)
                    and _branch_equals_sequence(tuner.model)
                    and _passes_equal_sequences(tuner, MaskedStep, RollbackCache, linear=False, rows=2)
                )
            if reading is Reading.SEQUENCES:
                return not is_recurrent(tuner.model) and _passes_equal_sequences(
                    tuner, MaskedStep, RollbackCache, linear=True
                )
            if reading is Reading.WHOLE_TEXTS:
                return _passes_equal_sequences(tuner, WholeTextStep, WholeTextCache, linear=True)
            return _passes_equal_sequences(tuner, SequenceStep, SequenceCache, linear=True)
        except GateError:
            raise
        except Exception as error:
            logger.debug("%s cannot be read in %s: %s", type(tuner.model).__name__, reading.value, error)
            return False


def _example(model: PreTrainedModel, rows: int, count: int) -> torch.LongTensor:
    """`(rows, count)` ids, all apart and from 0, which is often a padding token that models treat apart."""
    vocab, total = weight_shape(model.get_input_embeddings())[0], rows * count
    return torch.tensor([vocab * i // (total + 2) for i in range(1, total + 1)], device=input_device(model)).view(
        rows, count
    )


def are_close(found: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    # Some layers compute in float32 whatever the model's dtype, in sums whose order depends on the length. What is
    # wrong is wrong by orders of magnitude.
    tolerance = max(50 * torch.finfo(truth.dtype).eps, 500 * torch.finfo(torch.float32).eps) * truth.abs().max()
    return bool((found - truth).abs().max() <= tolerance)


def _plain_logits(model: PreTrainedModel, text_1T: torch.LongTensor, last: int = 5) -> torch.Tensor:
    """`(last, V)`: what plain decoding gets at the last tokens, one at a time behind the model's own cache, if any."""
    known = inspect.signature(model.forward).parameters
    first, logits, past, start = text_1T.shape[1] - last + 1, [], {}, 0
    position_1T = torch.arange(text_1T.shape[1], device=text_1T.device)[None]
    for end in range(first, text_1T.shape[1] + 1):
        inputs = {"input_ids": text_1T[:, start:end], "position_ids": position_1T[:, start:end], "use_cache": True}
        outputs = model(**{name: value for name, value in inputs.items() if name in known}, **past)
        if cache_name(outputs) in outputs:
            past, start = {cache_name(known): outputs[cache_name(outputs)]}, end
        logits.append(outputs.logits[0, -1:])
    return torch.cat(logits)


def _branch_equals_sequence(model: PreTrainedModel) -> bool:
    """Whether a text and a branch that hangs on its last token but one give what two texts give, without masks."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    ids, text, branch = _example(model, 1, PROMPT + 2), list(range(PROMPT)), [PROMPT, PROMPT + 1]
    column = torch.arange(PROMPT, device=ids.device)[None]
    layout = BlockLayout.of_blocks(column[:, -2:-1], column, torch.zeros_like(column), k=2)
    mask = attention_masks(layout, attention_kinds(model.config.get_text_config(decoder=True)), mask_form(model))
    branched = model(input_ids=ids, attention_mask=mask, position_ids=layout.position_BN, use_cache=False).logits[0]
    return all(
        are_close(branched[rows], model(input_ids=ids[:, rows], use_cache=False).logits[0])
        for rows in (text, [*text[:-1], *branch])
    )


def _passes_equal_sequences(
    tuner: "GatedLoraModel", step_type: type, cache_type: type, linear: bool, rows: int = 1
) -> bool:
    """Whether passes as decoding makes them, masks, rejected and accepted drafts and all, give each text's logits.

    The second of two rows is padded, and accepts what the first rejects.
    """
    step, pace, k = step_type(tuner), Whole(linear), min(2, tuner.active_mtp_config.k)
    ids = _example(tuner.model, rows, PROMPT + 6)
    cache = cache_type(torch.arange(rows, device=ids.device))
    text_BT, wrong_B2 = ids[:, :-2], ids[:, -2:]
    truth_B = [_plain_logits(tuner.model, text_BT[row : row + 1, row:]) for row in range(rows)]
    drafts, read = no_drafts(rows, ids.device), [0] * rows
    for accepted in (None, [0, 2], [2, 0]):  # after the prompt, which of two drafts hold
        if accepted is None:
            regular, before, kept = text_BT[:, :PROMPT], PROMPT - 1, [PROMPT] * rows
        else:
            drafted = [
                (text_BT[row, read[row] + 1 : read[row] + 3] if accepted[row] else wrong_B2[row]).tolist()
                for row in range(rows)
            ]
            drafts = found_drafts(drafted, [[0.5, 0.5]] * rows, ids.device, drawn=False)
            pending = torch.stack([text_BT[row, read[row]] for row in range(rows)])[:, None]
            regular, before, kept = torch.cat([pending, drafts.token_BK], dim=1), 0, [1 + n for n in accepted[:rows]]
        columns = cache.rows.next_columns(regular.shape[1]) - cache.rows.start_B[:, None]
        layout = decoding_layout(columns, pace.slots(drafts, k), first=before)
        logits_BRV = step(regular, layout, cache, logits_rows=1 + drafts.count).logits_BRV
        for row in range(rows):
            true = truth_B[row][read[row] + before - PROMPT + 1 : read[row] + kept[row] - PROMPT + 1]
            if not are_close(logits_BRV[row, : len(true)], true):
                return False
        cache.keep(kept)
        read = [tokens + new for tokens, new in zip(read, kept, strict=True)]
    return True
