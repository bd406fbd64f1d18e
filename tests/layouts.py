"""Layouts of single decoding steps, as tests want them."""

import torch

from hf_mtp.layout.attention import CachedColumns
from hf_mtp.layout.blocks import BlockLayout, decoding_layout
from hf_mtp.layout.mask_plan import choose_masks
from hf_mtp.passes.training_pass import training_pass


def masked_states(tuner, input_ids, layout: BlockLayout, all_layers: bool = False, masks: int = 1024):
    """Hidden states of a training batch: two lists of `(B, T, D)` and `(B, M, D)`, read `masks` masks at a time."""
    reading = training_pass(tuner, input_ids, layout, all_layers, masks)
    parts = [reading.masks(chunk) for chunk in reading.chunks]
    return reading.regular, [torch.cat(layer, dim=1) for layer in zip(*parts, strict=True)]


def step_layout(regular: int, past: int, anchors: int, k: int, rows: int = 1) -> BlockLayout:
    """Whole blocks on the last `anchors` of `regular` tokens that follow `past` cached ones."""
    value = torch.zeros(rows, regular, k)
    value[:, regular - anchors :] = 1.0
    position = past + torch.arange(regular).expand(rows, -1)
    return decoding_layout(position, choose_masks(value, anchors * k))


def cached_columns(layout: BlockLayout, past: int) -> CachedColumns | None:
    """A cache without padding that holds `past` tokens in every row."""
    rows, columns = layout.position_BN.shape
    start = torch.zeros(rows, dtype=torch.long)
    return CachedColumns(start, start + past, past + columns) if past else None
