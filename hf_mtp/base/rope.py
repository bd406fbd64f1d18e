"""Rotary position embeddings that depend on the length of the text."""

from transformers import PreTrainedConfig


def rope_switches(config: PreTrainedConfig) -> list[int]:
    """Lengths at which rotary embeddings change: once ("longrope"), or with every token from there on ("dynamic").

    They depend on the last position of a pass. So a pass across such a length differs from one token at a time, and so
    does any pass over several tokens beyond a length of the second kind.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Of the text model.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    once = [p["original_max_position_embeddings"] for p in sets if p.get("rope_type") == "longrope"]
    ever = [config.max_position_embeddings for p in sets if p.get("rope_type") == "dynamic"]
    return once + ever
