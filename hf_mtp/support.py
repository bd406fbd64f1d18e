"""What a base model can do: take branches (quadratic decoding, training) or only a plain sequence (linear decoding).

Asks the model itself, by its forward pass, and never by the name of its architecture.
"""

import inspect
import weakref

import torch
from transformers import PreTrainedModel

from .layout import BlockLayout
from .masks import AttentionKind, attention_kinds, attention_masks

_takes_branches: "weakref.WeakKeyDictionary[PreTrainedModel, bool]" = weakref.WeakKeyDictionary()
_ATTENTION_KINDS = {AttentionKind().name, "sliding_attention", "chunked_attention"}


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raises for models that cannot decode several tokens per pass yet.

    Raises:
        ValueError: The model is an encoder-decoder.
        NotImplementedError: The model keeps a recurrent state, which cannot be rolled back by a crop.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model, but multi-token prediction needs a decoder-only "
            "causal language model."
        )
    kinds = {kind.name for kind in attention_kinds(model.config.get_text_config(decoder=True))}
    recurrent = sorted(kinds - _ATTENTION_KINDS)
    if recurrent or getattr(model, "_is_stateful", False):
        raise NotImplementedError(
            f"{type(model).__name__} has recurrent layers ({', '.join(recurrent) or 'a state of its own'}), whose "
            "roll-back is not implemented yet. Use a model that has attention layers only."
        )


def refuse_attention_without_masks(model: PreTrainedModel) -> None:
    """Raises if the attention implementation in use cannot take an additive 4-D mask.

    Raises:
        ValueError: It is flash or flex attention.
    """
    if not takes_4d_masks(model):
        raise ValueError(
            f"The base model uses attn_implementation={model.config._attn_implementation!r}, which takes no 4-D "
            "attention mask, but masks that hang on several tokens need one. Call "
            "`model.set_attn_implementation('sdpa')`, or decode with "
            "mtp_strategy='linear'."
        )


def takes_4d_masks(model: PreTrainedModel) -> bool:
    """Whether the attention implementation in use can take an additive 4-D mask."""
    implementation = model.config._attn_implementation or "eager"
    return "flash" not in implementation and "flex" not in implementation


@torch.no_grad()
def takes_branches(model: PreTrainedModel) -> bool:
    """Whether a branch in one forward pass gives what the same tokens give as a sequence of their own.

    Runs three short forward passes through the model itself, once per model: `a b c` with the branch `d e` hung on
    `a`, against `a b c` and against `a d e`. Alibi, recurrent and 2-D-mask-only models fail this.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, adapters and all. No mask is involved.
    """
    if model not in _takes_branches:
        _takes_branches[model] = _branch_equals_sequence(model)
    return _takes_branches[model]


def _branch_equals_sequence(model: PreTrainedModel) -> bool:
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    config = model.config.get_text_config(decoder=True)
    # Ids apart from each other and away from 0, which is often a padding token that models treat apart.
    a, b, c, d, e = (config.vocab_size * i // 7 for i in range(1, 6))
    ids = torch.tensor([[a, b, c, d, e]], device=model.device)
    column = torch.arange(3, device=model.device)[None]
    layout = BlockLayout.of_blocks(column[:, :1], column, torch.zeros_like(column), k=2)
    mask = attention_masks(layout, attention_kinds(config), model.dtype)
    branched = model(input_ids=ids, attention_mask=mask, position_ids=layout.position_BN, use_cache=False).logits[0]
    for rows in ([0, 1, 2], [0, 3, 4]):
        sequence = model(input_ids=ids[:, rows], use_cache=False).logits[0]
        tolerance = 50 * torch.finfo(sequence.dtype).eps * sequence.abs().max()
        if not (branched[rows] - sequence).abs().max() <= tolerance:
            return False
    return True
