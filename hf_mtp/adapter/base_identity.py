"""Records and checks the base that an adapter was trained for: its sizes and its tokenizer."""

import hashlib
import json
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..base.inspection import weight_shape, weights_fingerprint
from ..base.lora_layers import lora_weights
from .config import GatedLoraConfig

logger = logging.get_logger(__name__)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> str:
    """A hash of all tokens and their ids, 16 hexadecimal digits.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Whose tokens.
        size (`int`, *optional*): Tokens of this id and above do not count; somebody may have added them.
    """
    known = (item for item in tokenizer.get_vocab().items() if size is None or item[1] < size)
    return hashlib.sha256(json.dumps(sorted(known), ensure_ascii=True).encode()).hexdigest()[:16]


def base_fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """16 hexadecimal digits that change if the base is trained further, or is another one of the same name.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The base, or an upgraded model. Adapters of
            the user's own are part of the base, gated ones are not.
    """
    tuner, base = getattr(model, "base_model", None), model.get_base_model() if isinstance(model, PeftModel) else model
    gated = tuner.gated_layers().values() if hasattr(tuner, "gated_layers") else ()
    return weights_fingerprint(base.parameters(), without=lora_weights(gated))


def record_base(config: GatedLoraConfig, model: PreTrainedModel, hidden_size: int) -> None:
    """Writes into an adapter's config which sizes its base has.

    Args:
        config ([`GatedLoraConfig`]): Its `base_hidden_size` and `base_vocab_size` are filled in.
        model ([`~transformers.PreTrainedModel`]): The base.
        hidden_size (`int`): Size of the states that the base's prediction head reads.
    """
    config.base_hidden_size, config.base_vocab_size = hidden_size, _rows(model)


def record_tokenizer(config: GatedLoraConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Writes into an adapter's config which tokens its base has. A tokenizer that only adds some agrees with it.

    Args:
        config ([`GatedLoraConfig`]): Its `tokenizer_fingerprint` and `tokenizer_size` are filled in.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the training.
        model ([`~transformers.PreTrainedModel`]): The base, whose own tokenizer counts if it is at hand.
    """
    own, vocabulary = _tokenizer_of(model) or tokenizer, tokenizer.get_vocab()
    other = [token for token, index in own.get_vocab().items() if vocabulary.get(token, index) != index]
    if other:
        logger.warning(
            f"The tokenizer of this training and the one of {_name(model)} have different ids for {len(other)} "
            f"tokens, such as {other[0]!r}. The adapter would learn from text that its base reads differently. Train "
            "with the base's own tokenizer."
        )
    config.tokenizer_fingerprint = tokenizer_fingerprint(own)
    config.tokenizer_size = max(own.get_vocab().values(), default=-1) + 1


def refuse_other_base(config: GatedLoraConfig, model: PreTrainedModel, hidden_size: int) -> None:
    """Raises if an adapter was trained for a different base.

    Args:
        config ([`GatedLoraConfig`]): What it records of the base counts.
        model ([`~transformers.PreTrainedModel`]): The base.
        hidden_size (`int`): Size of the states that the base's prediction head reads.

    Raises:
        ValueError: The base has a different hidden size, vocabulary or tokenizer.
    """
    tokenizer = _tokenizer_of(model) if config.tokenizer_fingerprint is not None else None
    found = None if tokenizer is None else tokenizer_fingerprint(tokenizer, config.tokenizer_size)
    recorded = {"hidden size": (config.base_hidden_size, hidden_size)}
    if found is None:  # else the tokens tell more than the number of rows, some of which may be spare ones
        recorded["vocabulary size"] = config.base_vocab_size, _rows(model)
    for meaning, (expected, actual) in recorded.items():
        if expected not in (None, actual):
            raise ValueError(
                f"This adapter was trained for a base of {meaning} {expected}, but {_name(model)} has {actual}. Load "
                f"it on the base it was trained for: {config.base_model_name_or_path}. A new adapter needs a "
                "GatedLoraConfig of its own, in which the first upgrade writes down its base."
            )
    if found not in (None, config.tokenizer_fingerprint):
        raise ValueError(
            f"This adapter was trained with a tokenizer of fingerprint {config.tokenizer_fingerprint}, but the one of "
            f"{_name(model)} has {found}, so its token ids have other meanings. Load the adapter on the base it was "
            f"trained for: {config.base_model_name_or_path}."
        )


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer if it is at hand: in a local folder or, of its commit, in the local cache of the Hub."""
    commit = getattr(model.config, "_commit_hash", None)
    try:
        return AutoTokenizer.from_pretrained(model.config._name_or_path, revision=commit, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None  # the base was made in memory or comes without a tokenizer


def _rows(model: PreTrainedModel) -> int:
    return weight_shape(model.get_output_embeddings())[0]


def _name(model: PreTrainedModel) -> str:
    name = model.config._name_or_path
    return Path(name).name if name else type(model).__name__
