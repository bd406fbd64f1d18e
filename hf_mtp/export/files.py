"""The files of an adapter, read without its base, and new folders that appear complete or not at all."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, load_peft_weights

from ..adapter.config import GatedLoraConfig
from ..adapter.loading import refuse_without_weights
from ..pretrained import is_adapter


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's folder or repository holds.

    Args:
        name (`str`): Where it came from.
        config ([`GatedLoraConfig`]): The adapter.
        weights (`dict[str, torch.Tensor]`): Its tensors by their names in the file, on the CPU.
    """

    name: str
    config: GatedLoraConfig
    weights: dict[str, torch.Tensor]


def read_adapter(name: str) -> AdapterFiles:
    """Reads the files of one of our adapters.

    Args:
        name (`str`): Hub id or folder.

    Raises:
        ValueError: There is no adapter, it is none of ours, or its file is a pickle or truncated.
        OSError: The repository is gated, private or missing.
    """
    if not is_adapter(name):
        raise ValueError(
            f"{name} is not an adapter: it has no adapter_config.json. Pass the Hub id or folder of an adapter."
        )
    kind = PeftConfig.from_pretrained(name)
    if not isinstance(kind, GatedLoraConfig):
        raise ValueError(
            f"{name} is an adapter of type {getattr(kind.peft_type, 'value', kind.peft_type)!r}, but only adapters "
            "of hf_mtp ('GATED_LORA') can be exported. Convert a Uno adapter with `hf-mtp export --from uno` first."
        )
    config = GatedLoraConfig.from_pretrained(name)
    refuse_without_weights(name)
    # The sampler head has the name of the adapter in the file.
    weights = {
        re.sub(r"(?<=lora_sampler_heads\.)[^.]+", "default", key): tensor
        for key, tensor in load_peft_weights(name, device="cpu").items()
    }
    return AdapterFiles(name, config, weights)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A context with a hidden folder to write to, which becomes `folder` at the end, unless the body raises.

    An empty folder stays the folder that it is: it may be the current one of a shell, a link or a mounted volume.

    Args:
        folder (`str` or `Path`): Must be empty or missing.

    Raises:
        FileExistsError: It is a file, or a folder that holds something.
    """
    folder = Path(folder).resolve()
    exists = folder.exists()
    if exists and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not an empty folder, and existing files are never overwritten. Choose another "
            "folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder if exists else folder.parent, prefix=f".{folder.name}.") as parent:
        temporary = Path(parent, folder.name)
        temporary.mkdir()
        yield temporary
        if not exists:
            temporary.rename(folder)
            return
        for path in sorted(
            temporary.iterdir(), key=lambda path: path.name == CONFIG_NAME
        ):  # which makes it an adapter
            path.rename(folder / path.name)
