"""Whether an adapter and a base belong together: sizes, and the tokenizer."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..base.inspection import weight_shape

if TYPE_CHECKING:
    from .config import GatedLoraConfig


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hexadecimal digits that change with any token or its id, and with nothing else."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


def refuse_other_base(config: "GatedLoraConfig", model: PreTrainedModel) -> None:
    """Records what the base looks like in a new adapter's config; raises if a trained adapter's base looked different.

    Args:
        config ([`GatedLoraConfig`]): Its `base_hidden_size` and `base_vocab_size` are filled in if empty.
        model ([`~transformers.PreTrainedModel`]): The base.

    Raises:
        ValueError: The base has another hidden size, vocabulary or tokenizer than the adapter was trained for.
    """
    vocab_size, hidden_size = weight_shape(model.get_output_embeddings())
    for name, meaning, actual in (
        ("base_hidden_size", "hidden size", hidden_size),
        ("base_vocab_size", "vocabulary size", vocab_size),
    ):
        recorded = getattr(config, name)
        if recorded is None:
            setattr(config, name, actual)
        elif recorded != actual:
            raise ValueError(
                f"This adapter was trained for a base of {meaning} {recorded}, but {_name(model)} has {actual}. Load "
                f"it on the base it was trained for: {config.base_model_name_or_path}."
            )
    if config.tokenizer_fingerprint is not None:
        _refuse_other_tokenizer(config, model)


def _refuse_other_tokenizer(config: "GatedLoraConfig", model: PreTrainedModel) -> None:
    """Compares tokenizers if the base's is at hand: in a local folder or in the local cache of the Hub."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError):
        return  # the base was made in memory or comes without a tokenizer: nothing to compare
    found = tokenizer_fingerprint(tokenizer)
    if found != config.tokenizer_fingerprint:
        raise ValueError(
            f"This adapter was trained with a tokenizer of fingerprint {config.tokenizer_fingerprint}, but the one of "
            f"{_name(model)} has {found}: its token ids mean other text. Load the adapter on the base it was trained "
            f"for: {config.base_model_name_or_path}."
        )


def _name(model: PreTrainedModel) -> str:
    name = model.config._name_or_path
    return Path(name).name if name else type(model).__name__
