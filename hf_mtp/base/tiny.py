"""Builds a tiny random model of the same kind as a given one, from its config alone.

Sizes shrink by their names in the configs of transformers (layers, widths, heads, experts ...), never by architecture.
At least one layer of each kind in the config is kept. Some configs leave out sizes that their model needs, or have
kinds of layers that come in pairs; other ways to shrink them are tried.
"""

import itertools
import re

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .randomness import own_randomness
from .sizes import EXPERTS, HEAD_WIDTH, HEADS, SPECIAL, SmallSizes

LAYERS = 2
MOST_PARAMETERS = 5_000_000

_LAYERS = re.compile(r"(num_|n_)?((hidden|decoder|encoder)_)?layers?|num_(en|de)coder_layers|num_blocks")
_LAYER_IDS = re.compile(r".*layer_(ids|indices|idxs)|.*attn_idxs|(mlp_only|moe|cross_attention)_layers")
# The first of these layers are of one kind, the others of another.
_FIRST_LAYERS = re.compile(
    r"first_k_dense_replace|num_dense_layers|max_window_layers|.*layer_((start|end)_index|index_(start|end))"
)
_TOKENS = re.compile(r".*_(token_id|token_index|token_ids)")
# Sizes that some configs leave open.
_OPEN = {
    "head_dim": HEAD_WIDTH,
    "num_key_value_heads": HEADS // 2,
    "num_experts_per_tok": 2,
    "n_routed_experts": EXPERTS,
    "num_experts": EXPERTS,
    "n_shared_experts": 1,
}
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def tiny_model(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """A tiny random model of the kind that a config describes, in evaluation mode and, if its code allows, float64.

    The weights are large enough that one token is clearly the most likely, and which one depends on the input.

    Args:
        config ([`~transformers.PreTrainedConfig`]): The config, which is not changed.
        model_class (`type`, *optional*): The model class; if `None`, the one of `AutoModelForCausalLM`.

    Raises:
        ValueError: No tiny model of this kind can be built.
    """
    failure = None
    # Some models do not run in float64.
    for dtype, fill, of_each_kind in itertools.product((torch.float64, torch.float32), (False, True), (1, 2)):
        try:
            model = _random_model(tiny_config(config, fill, of_each_kind), dtype, model_class)
            model(input_ids=torch.tensor([[1, 2, 3]]))
            return model
        except Exception as error:  # a config may lead to any error of its model's code
            failure = failure or error
    raise ValueError(f"A tiny random {config.model_type} could not be made: {failure}") from failure


def tiny_config(config: PreTrainedConfig, fill: bool = False, of_each_kind: int = 1) -> PreTrainedConfig:
    """A copy of a config with small sizes, see [`SmallSizes`].

    Args:
        config ([`~transformers.PreTrainedConfig`]): The config, which is not changed.
        fill (`bool`, *optional*, defaults to `False`): Whether to set sizes that the config leaves open.
        of_each_kind (`int`, *optional*, defaults to 1): Number of layers of each kind to keep.
    """
    return type(config).from_dict(_shrunk(config, SmallSizes(config), fill, of_each_kind))


def _random_model(config: PreTrainedConfig, dtype: torch.dtype, model_class: type | None) -> PreTrainedModel:
    make = AutoModelForCausalLM.from_config if model_class is None else model_class._from_config
    with torch.device("meta"):
        size = sum(p.numel() for p in make(config, dtype=None).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"it would have {size:,} parameters: some of its sizes are unknown")
    with own_randomness(seed=0), torch.no_grad():
        # `dtype=...` would change the default dtype of the whole process for a moment.
        model = make(config, dtype=None, experts_implementation="eager").to(dtype).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.normal_(0, 2 * module.weight.shape[-1] ** -0.5)
    model.config.dtype = dtype
    return model


def _shrunk(config: PreTrainedConfig, sizes: SmallSizes, fill: bool, of_each_kind: int) -> dict:
    """The values of a small config, and of the configs nested in it."""
    values = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    depth = next((values[name] for name in _DEPTHS if isinstance(values.get(name), int)), None)
    kept = _kept_layers(values, depth, of_each_kind)
    small = {}
    for name, value in values.items():
        part = config.__dict__.get(name)
        if isinstance(part, PreTrainedConfig):
            value = _shrunk(part, sizes, fill, of_each_kind)
        elif _LAYER_IDS.fullmatch(name) and value:
            value = [place for place, layer in enumerate(kept) if layer in value]
        elif isinstance(value, list) and depth and len(value) == depth:
            value = [_small(name, value[layer], values, kept, sizes) for layer in kept]
        elif name == "per_layer_config" and value:
            value = {
                f"{place:02}": {
                    key: _small(key, size, {**values, **value[f"{layer:02}"]}, kept, sizes)
                    for key, size in value[f"{layer:02}"].items()
                }
                for place, layer in enumerate(kept)
                if f"{layer:02}" in value
            }
        elif isinstance(value, dict):
            value = {key: _small(str(key), size, values, kept, sizes) for key, size in value.items()}
        elif _TOKENS.fullmatch(name) and value is not None:
            value = SPECIAL
        elif value is None and fill:
            value = _OPEN.get(name)
        small[name] = _small(name, value, values, kept, sizes)
    return small


def _small(name: str, value, values: dict, kept: list[int], sizes: SmallSizes):
    """The small size of an integer; any other value is unchanged."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if name == "num_kv_shared_layers":  # the last ones
        return sum(layer >= values["num_hidden_layers"] - value for layer in kept)
    if _FIRST_LAYERS.fullmatch(name):
        return sum(layer < value for layer in kept)
    if _LAYERS.fullmatch(name):
        return min(value, len(kept) if value == values.get("num_hidden_layers", value) else LAYERS)
    return sizes(name, value, values)


def _kept_layers(values: dict, depth: int | None, of_each_kind: int) -> list[int]:
    """The layers to keep: the first of each kind, and at least two.

    Layers are of one kind if they agree in all lists with an entry per layer, and in whether they share the keys and
    values of other layers. Kinds that alternate stay for one full cycle.
    """
    if not depth:
        return list(range(LAYERS))
    lists = [
        value
        for name, value in values.items()
        if isinstance(value, list) and len(value) == depth and not _LAYER_IDS.fullmatch(name)
    ]
    chosen = [value for name, value in values.items() if _LAYER_IDS.fullmatch(name) and value]
    bounds = [value for name, value in values.items() if _FIRST_LAYERS.fullmatch(name) and isinstance(value, int)]
    bounds.append(depth - (values.get("num_kv_shared_layers") or 0))
    kinds = [
        (
            *(layer < bound for bound in bounds),
            *(layer in value for value in chosen),
            *(str(value[layer]) for value in lists),
        )
        for layer in range(depth)
    ]
    around = max((len(value) for name, value in values.items() if name.endswith("block_types") and value), default=0)
    least = max(LAYERS, around) if around < depth else LAYERS
    kept = {layer for layer, kind in enumerate(kinds) if kinds[:layer].count(kind) < of_each_kind}
    for layer in range(depth):
        if len(kept) >= least:
            break
        kept.add(layer)
    return sorted(kept)
