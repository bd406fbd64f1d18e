"""What of a collator's batch the training reads."""

from transformers import PreTrainedConfig

from ..base.inspection import is_media
from ..layout.blocks import IGNORE

# What collators add for attention kernels that see several texts in a row. Masks have an attention of their own.
OF_KERNELS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "seq_lengths"}


def objective_inputs(inputs: dict, config: PreTrainedConfig) -> dict:
    """A batch as [`~hf_mtp.objective.compute.batch_objective`] takes it.

    Args:
        inputs (`dict`): What the collator made: `input_ids`, labels and all that the base is given beside.
        config ([`~transformers.PreTrainedConfig`]): The base's. It may name ids that stand for images, which no mask
            is asked to predict.
    """
    batch = {name: value for name, value in inputs.items() if name not in OF_KERNELS}
    labels = batch["input_ids"] if batch.get("labels") is None else batch["labels"]
    return {**batch, "labels": labels.masked_fill(is_media(config, batch["input_ids"]), IGNORE)}
