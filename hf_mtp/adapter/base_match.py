"""Whether an adapter and a base belong together: sizes, and the tokenizer."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..base.inspection import weight_shape

if TYPE_CHECKING:
    from .config import GatedLoraConfig

logger = logging.get_logger(__name__)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> str:
    """16 hexadecimal digits that change with any token or its id, and with nothing else.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Whose tokens.
        size (`int`, *optional*): Tokens of this id and above do not count; somebody may have added them.
    """
    known = (item for item in tokenizer.get_vocab().items() if size is None or item[1] < size)
    return hashlib.sha256(json.dumps(sorted(known), ensure_ascii=True).encode()).hexdigest()[:16]


def record_tokenizer(config: "GatedLoraConfig", tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Writes into an adapter's config what tokens the base has. One that only adds some agrees with it.

    Args:
        config ([`GatedLoraConfig`]): Its `tokenizer_fingerprint` and `tokenizer_size` are filled in.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): What the training reads its texts with.
        model ([`~transformers.PreTrainedModel`]): The base, whose own tokenizer counts if it is at hand.
    """
    own, vocabulary = _tokenizer_of(model) or tokenizer, tokenizer.get_vocab()
    other = [token for token, index in own.get_vocab().items() if vocabulary.get(token, index) != index]
    if other:
        logger.warning(
            f"The tokenizer of this training gives {len(other)} tokens other ids than the one of {_name(model)} does, "
            f"such as {other[0]!r}. The adapter learns from texts that its base reads otherwise."
        )
    config.tokenizer_fingerprint = tokenizer_fingerprint(own)
    config.tokenizer_size = max(own.get_vocab().values(), default=-1) + 1


def refuse_other_base(config: "GatedLoraConfig", model: PreTrainedModel, hidden_size: int) -> None:
    """Records what the base looks like in a new adapter's config; raises if a trained adapter's base looked different.

    Args:
        config ([`GatedLoraConfig`]): Its `base_hidden_size` and `base_vocab_size` are filled in if empty.
        model ([`~transformers.PreTrainedModel`]): The base.
        hidden_size (`int`): Of the base.

    Raises:
        ValueError: The base has another hidden size, vocabulary or tokenizer than the adapter was trained for.
    """
    tokenizer = _tokenizer_of(model) if config.tokenizer_fingerprint is not None else None
    found = None if tokenizer is None else tokenizer_fingerprint(tokenizer, config.tokenizer_size)
    vocab_size = weight_shape(model.get_output_embeddings())[0]
    for name, meaning, actual in (
        ("base_hidden_size", "hidden size", hidden_size),
        ("base_vocab_size", "vocabulary size", vocab_size),
    ):
        recorded = getattr(config, name)
        has_grown = name == "base_vocab_size" and found is not None  # in rows; its tokens are looked at below
        if recorded is None:
            setattr(config, name, actual)
        elif recorded != actual and not has_grown:
            raise ValueError(
                f"This adapter was trained for a base of {meaning} {recorded}, but {_name(model)} has {actual}. Load "
                f"it on the base it was trained for: {config.base_model_name_or_path}."
            )
    if found not in (None, config.tokenizer_fingerprint):
        raise ValueError(
            f"This adapter was trained with a tokenizer of fingerprint {config.tokenizer_fingerprint}, but the one of "
            f"{_name(model)} has {found}: its token ids mean other text. Load the adapter on the base it was trained "
            f"for: {config.base_model_name_or_path}."
        )


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer if it is at hand: in a local folder or in the local cache of the Hub."""
    try:
        return AutoTokenizer.from_pretrained(model.config._name_or_path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None  # the base was made in memory or comes without a tokenizer


def _name(model: PreTrainedModel) -> str:
    name = model.config._name_or_path
    return Path(name).name if name else type(model).__name__
