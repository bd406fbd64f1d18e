#!/usr/bin/env python
"""Draw the attention mask of training and of one quadratic decoding step, from the functions that make it.

python docs/figures/draw_mask.py        # writes docs/figures/mask.png
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from hf_mtp.layout.attention import CachedColumns, allowed_attention
from hf_mtp.layout.blocks import BlockLayout, decoding_layout
from hf_mtp.layout.mask_plan import choose_masks

# Blocked, regular to regular, mask to regular, mask to its own block; light to dark, safe for colour blindness.
COLOURS = ["#f4f4f4", "#b9d3ee", "#5b8fc9", "#f2a444"]
LEGEND = {
    "regular token → earlier regular tokens": COLOURS[1],
    "mask → regular tokens up to its anchor": COLOURS[2],
    "mask → its own block": COLOURS[3],
}


def kinds_of_attention(layout: BlockLayout, past: int = 0) -> torch.Tensor:
    """`(N, past + N)`: 0 where attention is blocked, else the number of its kind, 1 to 3."""
    zero, columns = torch.zeros(1, dtype=torch.long), layout.position_BN.shape[1]
    cached = CachedColumns(zero, zero + past, past + columns) if past else None
    allowed, is_mask = allowed_attention(layout, cached)[0], layout.block_BN[0] >= 0
    key_is_mask = torch.cat([torch.zeros(past, dtype=torch.bool), is_mask])
    kind = 1 + is_mask[:, None].long() + (is_mask[:, None] & key_is_mask)
    return torch.where(allowed, kind, 0)


def draw(axes: plt.Axes, layout: BlockLayout, regular_names: list[str], past_names: list[str], title: str) -> None:
    """Draws one mask: queries in rows, keys in columns, with names and position ids."""
    past = len(past_names)
    image = kinds_of_attention(layout, past)
    axes.pcolormesh(image.flip(0), cmap=ListedColormap(COLOURS), vmin=0, vmax=3, edgecolors="white", linewidth=1)
    names = regular_names + [f"m{int(step)}" for step in layout.step_BM[0]]
    positions = layout.position_BN[0].tolist()
    rows = len(names)
    axes.set_xticks([i + 0.5 for i in range(past + rows)], past_names + names, fontsize=8)
    axes.set_yticks(
        [rows - 0.5 - i for i in range(rows)],
        [f"{name}  ({position})" for name, position in zip(names, positions, strict=True)],
        fontsize=8,
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_aspect("equal", anchor="N")
    axes.set_title(title, fontsize=11, loc="left", pad=10)
    axes.set_ylabel("query (position id)", fontsize=8)
    axes.set_xlabel("key", fontsize=8)
    axes.xaxis.set_label_position("top")


def main(folder: Path) -> None:
    tokens = 6
    column = torch.arange(tokens)[None]
    training = BlockLayout.of_blocks(torch.tensor([[1, 2, 4]]), column, torch.zeros_like(column), k=2)
    decoding = decoding_layout(torch.arange(4, 7)[None], choose_masks(torch.ones(1, 3, 2), budget=6))

    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 6.4))
    draw(left, training, [f"x{i}" for i in range(1, 7)], [], "Training: a block of 2 masks after each sampled token")
    draw(
        right, decoding, ["x5", "d1", "d2"], ["x1", "x2", "x3", "x4"], "Quadratic decoding: a block after every draft"
    )
    patches = [Patch(color=colour, label=label) for label, colour in LEGEND.items()]
    figure.legend(handles=patches, loc="lower center", ncol=3, frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 0.95))
    figure.savefig(folder / "mask.png", dpi=110)


if __name__ == "__main__":
    main(Path(__file__).parent)
