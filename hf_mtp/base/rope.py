"""Rotary position embeddings and attention scales that depend on the length of the text."""

from transformers import PreTrainedConfig


def rope_switches(config: PreTrainedConfig) -> list[int]:
    """Text lengths at which a text model's rotary embeddings change.

    Embeddings of type "longrope" change once; those of type "dynamic" change with every token from that length on.
    They depend on the last position of a pass. So a pass that crosses such a length differs from decoding one token at
    a time, and so does any pass over several tokens beyond a "dynamic" length. In a batch, the longest row decides for
    all rows.

    Args:
        config ([`~transformers.PreTrainedConfig`]): The model's config, or its text model's.
    """
    config = config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    once = [p["original_max_position_embeddings"] for p in sets if p.get("rope_type") == "longrope"]
    dynamic = [config.max_position_embeddings for p in sets if p.get("rope_type") == "dynamic"]
    return once + dynamic


def scaled_columns(config: PreTrainedConfig) -> int | None:
    """Number of columns after which a text model scales its attention in another way; `None` if it never does.

    Llama 4 scales the queries of its layers without rotary embeddings by the column in the cache, in steps of so many
    columns, and not by the position. It counts the columns of the longest row, padding included. So a draft of a tree
    may be scaled like a later token, and shorter rows of a batch like the longest one.

    Args:
        config ([`~transformers.PreTrainedConfig`]): The model's config, or its text model's.
    """
    config = config.get_text_config(decoder=True)
    return getattr(config, "floor_scale", None) if getattr(config, "attn_temperature_tuning", False) else None
