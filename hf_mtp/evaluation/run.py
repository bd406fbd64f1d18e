"""What every measurement says of its run, and the refusal to mix it with another run in one folder."""

import dataclasses
import hashlib
from pathlib import Path

from peft import PeftModel

from ..adapter.base_identity import base_fingerprint
from ..base.inspection import base_name, input_device
from ..base.machine import describe_machine
from .suites.suite import Suite


def describe_run(model: PeftModel, suite: Suite) -> dict[str, str | dict]:
    """What every measurement says of its model, its prompts and the machine: some of the fields of [`Settings`].

    Args:
        model ([`~peft.PeftModel`]): An upgraded model.
        suite ([`Suite`]): The prompts.
    """
    config = model.base_model.active_mtp_config
    return {
        "model": _name_of(model),
        "adapter": {
            "fingerprint": adapter_fingerprint(model),
            "k": config.k,
            "r": config.r,
            "base": base_fingerprint(model),
        },
        "dtype": str(model.get_base_model().dtype).removeprefix("torch."),
        "device": str(input_device(model).type),
        "suite": {"name": suite.name, "fingerprint": suite.fingerprint, "prompts": len(suite.prompts)},
        "machine": describe_machine(),
    }


def adapter_fingerprint(model: PeftModel) -> str:
    """16 hexadecimal digits that change with any weight of the active adapter and with its n-gram table.

    They do not change with the dtype in which the weights are held.

    Args:
        model ([`~peft.PeftModel`]): An upgraded model.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if f".{model.active_adapter}." in name:
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    table = model.active_peft_config.ngrams
    for array in () if table is None else (table.contexts, table.tokens, table.probabilities):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def refuse_other_run(folder: Path, mine, found) -> None:
    """Raises if a folder has the results of a run with other settings.

    Args:
        folder (`Path`): The folder.
        mine ([`Settings`] or [`ProbeSettings`]): What is to be measured.
        found (of the same class): What the folder's results measured.

    Raises:
        ValueError: The two differ.
    """
    mine, other = dataclasses.asdict(mine), dataclasses.asdict(found)
    different = [name for name in mine if mine[name] != other[name]]
    if different:
        listed = "; ".join(f"{name} was {other[name]}, but is now {mine[name]}" for name in different)
        raise ValueError(
            f"The folder {folder} contains the results of a different run: {listed}. Choose another output folder, "
            "or delete this one."
        )


def make_folder(folder: Path) -> None:
    """Makes the folder of results, before the work that would be lost without it.

    Args:
        folder (`Path`): The folder.

    Raises:
        OSError: It is a file, or cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, but results need a folder. Choose another `output`.")
    folder.mkdir(parents=True, exist_ok=True)


def _name_of(model: PeftModel) -> str:
    """The Hub id of the base, or the name of its folder without the path to it; the class of one made in memory."""
    return base_name(model.get_base_model())
