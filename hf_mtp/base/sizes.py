"""Shrinks the sizes of a config: equal sizes stay equal, and different ones keep their order.

The kind of a size is known by its name in the configs of transformers, never by architecture. Sizes of one kind
(widths, numbers of heads, ranks ...) shrink by one ratio, so that most sums and products of them still hold.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from transformers import PreTrainedConfig

VOCAB, POSITIONS, WINDOW = 40, 128, 8
SPECIAL = VOCAB - 4  # a token id within all shrunk vocabularies
WIDTH, HEADS, HEAD_WIDTH, EXPERTS, STATE_HEADS = 64, 4, 16, 16, 8

# The first pattern that matches the whole name of an integer gives its kind.
_KINDS = {
    "vocabulary": r".*vocab.*",
    "state heads": r"mamba_n_heads|mamba_num_heads|n_mamba_heads",
    "state head width": r"mamba_d_head|mamba_head_?dim",
    "head width": r"rotary_dim|kv_channels|.*head_dim|dim_head|d_kv|d_head|attention_head_size|query_pre_attn_scalar",
    "heads": r"(?!index_).*heads?(_per_layer)?|num_query_groups",
    "width": r"(.*hidden|.*embedding)_(size|dim).*|.*embed_(proj_)?dim|dim_model_base|d_model|n_embd|emb_dim|dim"
    r"|lru_width|d_inner|mamba_d_ssm|.*intermediate_size.*|.*ffn_dim|ffn_hidden_size|inner_dim|dim_ff|d_?ff|mlp_dim"
    r"|feed_forward_size|n_inner|adapter_(in|out)_dim|adapter_input_size",
    "rank": r".*rank",
    "experts": r".*(experts|expert_num)|num_experts_per_tok(en)?|moe_topk|moe_k|.*top_k|.*topk_blocks",
    "groups": r"n_group|topk_group|num_expert_group|o_groups|.*n_groups|.*ngroups",
    # Shorter than any text, even where a window is as long as the positions: rotary embeddings continue past them.
    "window": r".*(chunk|block|window)_size|sliding_window|local_attention|index_topk|.*compressed.*_attention",
}
# Sizes that need no fixed ratio to any other.
_LIMITS = {
    r"max_position_embeddings|n_positions|max_seq_len|context_length|model_max_length|n_ctx": POSITIONS,
    r".*(d_state|state_size)": 8,
    r"index_n_heads": 16,  # with fewer, many keys get the same score, and which are chosen depends on rounding
    r".*_(period|interval|pattern)": 2,
    r".*_offset|n_layers_per_.*": 1,
}


class SmallSizes:
    """Maps each size of a config, or of a config nested in it, to its small size."""

    def __init__(self, config: PreTrainedConfig):
        self.of_kinds = _small_by_kind(_by_kind(config.to_dict()), config.get_text_config(decoder=True))

    def __call__(self, name: str, value: int, siblings: dict) -> int:
        """The small size of the field `name`. `siblings` are all values of the config that has it."""
        kind = _kind_of(name, siblings)
        if kind is not None:
            return min(value, self.of_kinds[kind].get(value, value))
        limit = next((limit for pattern, limit in _LIMITS.items() if re.fullmatch(pattern, name)), value)
        return min(value, limit)


def _kind_of(name: str, siblings: dict) -> str | None:
    if "state_size" in siblings and name in ("num_heads", "head_dim"):
        return "state heads" if name == "num_heads" else "state head width"
    return next((kind for kind, pattern in _KINDS.items() if re.fullmatch(pattern, name)), None)


def _by_kind(config: dict) -> dict[str, set[int]]:
    """All sizes of each kind in a config and the configs nested in it."""
    values = defaultdict(set)
    for name, value, siblings in _numbers(config):
        if (kind := _kind_of(name, siblings)) is not None:
            values[kind].add(value)
        if kind == "state heads":  # the width of all heads together
            widths = [width for other, width in siblings.items() if _kind_of(other, siblings) == "state head width"]
            values["width"].update(value * width for width in widths)
    return values


def _numbers(config: dict) -> Iterator[tuple[str, int, dict]]:
    """Name, value and siblings of each positive integer, including those in lists and nested configs."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not isinstance(number, bool) and number > 0:
                yield name, number, config


def _size(text: PreTrainedConfig, name: str) -> int | None:
    value = text.to_dict().get(text.attribute_map.get(name, name))
    return value if isinstance(value, int) else None


def _small_by_kind(values: dict[str, set[int]], text: PreTrainedConfig) -> dict[str, dict[int, int]]:
    width, heads = _size(text, "hidden_size") or WIDTH, _size(text, "num_attention_heads") or HEADS
    head_width = _size(text, "head_dim") or max(1, width // heads)
    of_text = _by_kind(text.to_dict())["heads"]
    small_heads = max(HEADS, 2 << len([value for value in of_text if 1 < value < heads]))
    small_heads = 1 << (min(small_heads, heads).bit_length() - 1)
    small_head_width = WIDTH // small_heads
    if heads * head_width != width:
        small_head_width = 2 * small_head_width if heads * head_width > width else small_head_width // 2
    vocabulary = _size(text, "vocab_size") or VOCAB
    vocabularies = {value: VOCAB for value in values["vocabulary"] if value > VOCAB}
    sizes = {
        "vocabulary": _apart(vocabularies | {vocabulary: VOCAB}, 1, vocabulary),
        "width": _scaled(values["width"], width, WIDTH, step=16),
        "rank": _scaled(values["rank"], width, WIDTH, step=8),
        "head width": _scaled(values["head width"], head_width, small_head_width, step=4),
        # Heads of other parts, such as a vision tower, have no order among those of the text.
        "heads": {value: HEADS if value >= heads else 2 for value in values["heads"]}
        | _powers(of_text, heads, small_heads),
        "experts": _scaled(values["experts"], max(values["experts"], default=1), EXPERTS, step=1, least=2),
        "groups": _powers(values["groups"], max(values["groups"], default=1), 1 << len(values["groups"] - {1})),
        "window": {
            value: max(2, WINDOW >> place) for place, value in enumerate(sorted(values["window"], reverse=True))
        },
    }
    sizes |= _states(values, sizes["width"])
    if width <= WIDTH:  # small already, and so is everything that depends on it
        sizes |= {kind: {} for kind in ("width", "rank", "head width", "heads", "state heads", "state head width")}
    return sizes


def _scaled(values: set[int], anchor: int, small: int, step: int, least: int | None = None) -> dict[int, int]:
    """Scales `values` by `small / anchor`, in whole steps, kept distinct, at most to 8 times `small`."""
    if anchor <= small:
        return {}
    least = step if least is None else least
    sizes = {
        value: min(8 * small, max(min(value, least), round(small * value / anchor / step) * step)) for value in values
    }
    return _apart(sizes | {anchor: small}, step, anchor)


def _apart(sizes: dict[int, int], step: int, anchor: int) -> dict[int, int]:
    """Moves sizes to the order of their keys, at least one step apart. The anchor's size stays."""
    above, below = [], []
    for value in sorted(sizes):
        (above if value > anchor else below).append(value)
    for value, larger in pairwise([anchor, *above]):
        sizes[larger] = max(sizes[larger], sizes[value] + step)
    for smaller, value in reversed(list(pairwise(below))):
        sizes[smaller] = max(step, min(sizes[smaller], sizes[value] - step))
    return sizes


def _powers(values: set[int], anchor: int, small: int) -> dict[int, int]:
    """Maps values to powers of two, so that smaller ones divide larger ones. One stays one."""
    sizes = {anchor: small}
    for value, larger in reversed(list(pairwise(sorted({v for v in values if v < anchor} | {anchor})))):
        sizes[value] = 1 if value == 1 else max(1, sizes[larger] // 2)
    for value, larger in pairwise(sorted({v for v in values if v > anchor} | {anchor})):
        sizes[larger] = 2 * sizes[value]
    return sizes


def _states(values: dict[str, set[int]], small_width: dict[int, int]) -> dict[str, dict[int, int]]:
    """Heads of a recurrent state and their width. The model's code compares their product with another width."""
    heads, head_width = max(values["state heads"], default=1), max(values["state head width"], default=1)
    whole = small_width.get(heads * head_width, STATE_HEADS * HEAD_WIDTH)
    small = min(heads, STATE_HEADS if whole >= WIDTH else 2)
    return {"state heads": {heads: small}, "state head width": {head_width: max(1, whole // small)}}
