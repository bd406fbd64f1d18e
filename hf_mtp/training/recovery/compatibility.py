"""Whether two trainings train the same adapter: those of two processes, or a checkpoint's and the one resuming it."""

import math
from collections.abc import Sequence
from dataclasses import asdict

from ...model import GatedLoraModel
from ...objective.recipe import Recipe

# Fields of the adapter's config that decide what its weights mean.
FIELDS = (
    "k",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "sampler",
    "sampler_residual",
    "base_hidden_size",
    "base_vocab_size",
    "tokenizer_fingerprint",
)
LAYERS, BASE = "layers with a LoRA", "weights of the base"
SAMPLES = 32  # numbers by which the weights of two bases are told apart


def describe(model: GatedLoraModel) -> dict:
    """What has to be the same where an adapter's training goes on, in JSON's terms.

    Args:
        model ([`GatedLoraModel`]): The upgraded model, not sharded yet.
    """
    config = model.active_mtp_config
    described = {name: getattr(config, name) for name in FIELDS}
    described[LAYERS] = sorted(model.gated_layers())
    table = model.model.get_input_embeddings().weight.detach()
    if table.device.type == "meta" or hasattr(table, "full_tensor") or not table.numel():  # elsewhere, or in parts
        return described
    values = table.flatten()[:: max(1, table.numel() // SAMPLES)][:SAMPLES]
    return {**described, BASE: values.float().cpu().tolist()}


def describe_objective(recipe: Recipe, anchors: int | None) -> dict:
    """What has to be the same in all processes of one training, too."""
    return {**{f"{name} (recipe)": value for name, value in asdict(recipe).items()}, "anchors_per_sequence": anchors}


def differences(one: dict, other: dict) -> dict[str, tuple]:
    """By name, the two values of what is known of both and not the same."""
    both = [(name, value, other[name]) for name, value in one.items() if name in other]
    return {name: (here, there) for name, here, there in both if not _same(name, here, there)}


def refuse_disagreement(described: Sequence[dict]) -> None:
    """Raises unless all processes train the same.

    Args:
        described (`Sequence[dict]`): What each process trains, in the order of their ranks.

    Raises:
        ValueError: Two differ.
    """
    for rank, other in enumerate(described):
        if different := differences(described[0], other):
            raise ValueError(
                f"Processes 0 and {rank} of this training do not train the same: "
                f"{_in_words(different, 'in process 0', f'in process {rank}')}. Start all of them with the same "
                "script, arguments and base."
            )


def refuse_to_resume(checkpoint: str, there: dict, here: dict) -> None:
    """Raises if a checkpoint is of another adapter than the one to be trained.

    Args:
        checkpoint (`str`): Its name.
        there (`dict`): What the checkpoint's training trained, as far as it is known.
        here (`dict`): What is to be trained.

    Raises:
        ValueError: They differ.
    """
    if different := differences(there, here):
        raise ValueError(
            f"{checkpoint} cannot be resumed by this training: "
            f"{_in_words(different, 'in the checkpoint', 'in the model')}. Nothing was changed. Upgrade the base that "
            "it was trained on with the checkpoint's config, or train anew in another `output_dir`."
        )


def describe_steps(processes: int, sequences: int) -> dict:
    """How the work of a step is spread, in JSON's terms.

    Args:
        processes (`int`): How many share it.
        sequences (`int`): Rows of a batch, times accumulated batches, times processes.
    """
    return {"processes": processes, "sequences_per_step": sequences}


def what_changes(there: dict, here: dict) -> str | None:
    """What is not as in an uninterrupted training if the steps are spread differently, in words; `None` if nothing.

    Args:
        there, here (`dict`): Of the checkpoint and of this training, from [`describe_steps`].
    """
    different = differences(there, here)
    if "sequences_per_step" in different:
        old, new = different["sequences_per_step"]
        return (
            f"Steps were of {old} sequences and are of {new} from here on: the learning rate was chosen for other "
            "steps, and the place in the dataset is counted in steps of the new length, so that some of its rows are "
            "seen twice or not at all. To change nothing, choose `per_device_train_batch_size` and "
            f"`gradient_accumulation_steps` so that with {here['processes']} process(es) a step has {old}."
        )
    if "processes" in different:
        old, new = different["processes"]
        return (
            f"The checkpoint was written by {old} process(es), and {new} go on. Steps are of the same sequences, but "
            "masks and dropout are drawn anew, so that losses are not to the bit those of an uninterrupted training."
        )
    return None


def _same(name: str, one, other) -> bool:
    if name == BASE:  # in perhaps another precision
        return all(math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-4) for a, b in zip(one, other, strict=False))
    return one == other


def _in_words(different: dict[str, tuple], at_one: str, at_other: str) -> str:
    def words(name: str, one, other) -> str:
        if name == BASE:
            return f"the {name} are others"
        if name == LAYERS:
            return f"the {name} are others: {len(one)} {at_one} and {len(other)} {at_other}"
        return f"`{name}` is {one!r} {at_one} and {other!r} {at_other}"

    return "; ".join(words(name, *values) for name, values in different.items())
