"""Layouts of single decoding steps, as tests want them."""

import torch

from hf_mtp.layout import BlockLayout, decoding_layout
from hf_mtp.masks import CachedColumns
from hf_mtp.slots import choose_slots


def step_layout(regular: int, past: int, anchors: int, k: int, rows: int = 1) -> BlockLayout:
    """Whole blocks on the last `anchors` of `regular` tokens that follow `past` cached ones."""
    value = torch.zeros(rows, regular, k)
    value[:, regular - anchors :] = 1.0
    position = past + torch.arange(regular).expand(rows, -1)
    return decoding_layout(position, choose_slots(value, anchors * k))


def cached_columns(layout: BlockLayout, past: int) -> CachedColumns | None:
    """A cache without padding that holds `past` tokens in every row."""
    rows, columns = layout.position_BN.shape
    start = torch.zeros(rows, dtype=torch.long)
    return CachedColumns(start, start + past, past + columns) if past else None
