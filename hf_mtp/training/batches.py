"""Turns a collator's batch into inputs of the objective. Knows nothing of losses."""

from transformers import PreTrainedConfig

from ..base.inspection import is_media
from ..layout.blocks import IGNORE

# Collators add these for attention kernels that handle several texts per row. Masks use their own attention.
KERNEL_INPUTS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "seq_lengths"}


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
