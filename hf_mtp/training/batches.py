"""Turns a collator's batch into inputs of the objective. Knows nothing of losses."""

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig

from ..base.inspection import is_media
from ..layout.blocks import IGNORE

# Collators add these for attention kernels that handle several texts per row. Masks use their own attention.
KERNEL_INPUTS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "seq_lengths"}


def without_repeated_rows(inputs: dict, accelerator: Accelerator) -> dict:
    """A batch of an evaluation, with rows outside the loss that were evaluated before.

    accelerate fills up the last batches with rows from the beginning, so that all processes have as many.

    Args:
        inputs (`dict`): The batch of this process.
        accelerator ([`~accelerate.Accelerator`]): It knows how many rows the last batches of all processes have.
    """
    state, rows = accelerator.gradient_state, len(inputs["input_ids"])
    if not state.end_of_dataloader or state.remainder < 1:
        return inputs
    known = state.remainder - accelerator.process_index * rows
    if known >= rows:
        return inputs
    labels = inputs["input_ids"] if inputs.get("labels") is None else inputs["labels"]
    is_repeated = torch.arange(rows, device=labels.device)[:, None] >= known
    return {**inputs, "labels": labels.masked_fill(is_repeated, IGNORE)}


def objective_inputs(inputs: dict, config: PreTrainedConfig) -> dict:
    """Arguments of [`~hf_mtp.objective.compute.batch_objective`] for one batch.

    Args:
        inputs (`dict`): The collator's batch: `input_ids`, optional labels, and other inputs of the base.
        config ([`~transformers.PreTrainedConfig`]): The base's. It names the ids that stand for images, which masks do
            not learn to predict.
    """
    batch = {name: value for name, value in inputs.items() if name not in KERNEL_INPUTS}
    labels = batch["input_ids"] if batch.get("labels") is None else batch["labels"]
    return {**batch, "labels": labels.masked_fill(is_media(config, batch["input_ids"]), IGNORE)}
