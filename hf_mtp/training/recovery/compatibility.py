"""Checks that two trainings train the same adapter: two processes, or a checkpoint and the training that resumes it.

Knows nothing of files or trainers.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict

from ...model import GatedLoraModel
from ...objective.recipe import Recipe

# Fields of the adapter's config that determine the meaning of its weights.
FIELDS = (
    "k",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "masks",
    "sampler",
    "sampler_residual",
    "sampler_recurrent",
    "base_hidden_size",
    "base_vocab_size",
    "tokenizer_fingerprint",
)
LAYERS, BASE = "layers with a LoRA", "weights of the base"
SAMPLES = 32  # weights by which two bases are compared


def describe(model: GatedLoraModel) -> dict:
    """JSON-serializable facts about an adapter that must be the same when its training is resumed.

    Args:
        model ([`GatedLoraModel`]): The upgraded model, before sharding.
    """
    config = model.active_mtp_config
    facts = {name: getattr(config, name) for name in FIELDS}
    facts[LAYERS] = sorted(model.gated_layers())
    table = model.model.get_input_embeddings().weight.detach()
    if table.device.type == "meta" or hasattr(table, "full_tensor") or not table.numel():  # offloaded or sharded
        return facts
    values = table.flatten()[:: max(1, table.numel() // SAMPLES)][:SAMPLES]
    return {**facts, BASE: values.float().cpu().tolist()}


def describe_objective(recipe: Recipe, anchors: int | None) -> dict:
    """Further facts that must be the same in all processes of one training."""
    return {**{f"{name} (recipe)": value for name, value in asdict(recipe).items()}, "anchors_per_sequence": anchors}


def differences(one: dict, other: dict) -> dict[str, tuple]:
    """The two values of each fact that both know and that differs, by name."""
    both = [(name, value, other[name]) for name, value in one.items() if name in other]
    return {name: (here, there) for name, here, there in both if not _same(name, here, there)}


def refuse_different_processes(facts: Sequence[dict]) -> None:
    """Raises a `ValueError` unless all processes train the same adapter with the same objective.

    Args:
        facts (`Sequence[dict]`): Facts about the training of each process, in the order of ranks.
    """
    for rank, other in enumerate(facts):
        if different := differences(facts[0], other):
            raise ValueError(
                f"Processes 0 and {rank} do not run the same training: "
                f"{_in_words(different, 'in process 0', f'in process {rank}')}. Start all of them with the same "
                "script, arguments and base."
            )


def refuse_incompatible_checkpoint(checkpoint: str, there: dict, here: dict) -> None:
    """Raises a `ValueError` if a checkpoint holds another adapter than the model.

    Args:
        checkpoint (`str`): Name of the checkpoint.
        there, here (`dict`): Facts about the checkpoint's adapter, as far as known, and about the model's.
    """
    if different := differences(there, here):
        raise ValueError(
            f"{checkpoint} cannot be resumed by this training: "
            f"{_in_words(different, 'in the checkpoint', 'in the model')}. Nothing was changed. Upgrade the base of "
            "the checkpoint with the checkpoint's config, or start a new training in another `output_dir`."
        )


def describe_steps(processes: int, sequences: int) -> dict:
    """JSON-serializable facts about the size of an optimizer step.

    Args:
        processes (`int`): Number of processes.
        sequences (`int`): Rows of a batch, times accumulated batches, times processes.
    """
    return {"processes": processes, "sequences_per_step": sequences}


def step_size_warning(there: dict, here: dict) -> str | None:
    """How other step sizes make the resumed training differ from an uninterrupted one; `None` if they do not.

    Args:
        there, here (`dict`): From [`describe_steps`], of the checkpoint and of this training.
    """
    different = differences(there, here)
    if "sequences_per_step" in different:
        old, new = different["sequences_per_step"]
        return (
            f"Steps had {old} sequences and have {new} from here on. The learning rate was chosen for the old size. "
            "The position in the dataset is counted in steps of the new size, so some rows are seen twice or not at "
            "all. To change nothing, choose `per_device_train_batch_size` and `gradient_accumulation_steps` so that "
            f"with {here['processes']} process(es) a step has {old}."
        )
    if "processes" in different:
        old, new = different["processes"]
        return (
            f"The checkpoint was written by {old} process(es) and is resumed by {new}. Steps have the same sequences, "
            "but different masks and dropout, so losses are not bit-identical to those of an uninterrupted training."
        )
    return None


def _same(name: str, one, other) -> bool:
    if name == BASE:  # the precision may differ
        return all(math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-4) for a, b in zip(one, other, strict=False))
    return one == other


def _in_words(different: dict[str, tuple], at_one: str, at_other: str) -> str:
    def words(name: str, one, other) -> str:
        if name == BASE:
            return f"the {name} differ"
        if name == LAYERS:
            return f"the {name} differ: {len(one)} {at_one} and {len(other)} {at_other}"
        return f"`{name}` is {one!r} {at_one} and {other!r} {at_other}"

    return "; ".join(words(name, *values) for name, values in different.items())
