"""Checks whether a model can read a batch of a training. Knows nothing of how it reads it."""

from ..adapter.tuner import GatedLoraTuner
from ..base.distributed import is_sharded
from ..layout.blocks import BlockLayout


def refuse_multimodal(tuner: GatedLoraTuner, base_inputs: dict, allows_tree: bool) -> None:
    """Raises a `NotImplementedError` if the model reads text only.

    Args:
        tuner ([`GatedLoraTuner`]): The upgraded model.
        base_inputs (`dict`): What the batch has besides text.
        allows_tree (`bool`): Whether the model can process branches.
    """
    name = type(tuner.model).__name__
    if not allows_tree:
        reason = f"{name} processes each block of masks as a separate text. Train it on text only."
    elif is_sharded(tuner):
        reason = (
            "the weights are sharded over processes. Use DDP or DeepSpeed ZeRO-2, where every process has all weights."
        )
    else:
        return
    raise NotImplementedError(f"The batch has {', '.join(sorted(base_inputs))} besides text, but {reason}")


def refuse_batches_of_sequences(tuner: GatedLoraTuner, layout: BlockLayout) -> None:
    """Raises if a model that allows no tree cannot read a batch.

    Raises:
        ValueError: A row holds several texts, or is padded at its start.
        NotImplementedError: The weights are sharded over processes.
    """
    name = type(tuner.model).__name__
    if not each_row_is_one_text(layout):
        raise ValueError(
            f"{name} supports one sequence per row, but rows of this batch hold several texts or are padded on the "
            "left. Set packing=False, and pad on the right."
        )
    if is_sharded(tuner):
        raise NotImplementedError(
            f"{name} processes each block of masks in a separate pass. Processes that shard its weights would "
            "deadlock, because they have different numbers of blocks. Use DDP or DeepSpeed ZeRO-2, where every "
            "process has all weights."
        )


def each_row_is_one_text(layout: BlockLayout) -> bool:
    """Whether each row is one text that starts in the first column."""
    return not bool((layout.segment_BT > 0).any() or (layout.segment_BT[:, 0] < 0).any())
