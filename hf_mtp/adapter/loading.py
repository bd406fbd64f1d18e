"""Rejects invalid adapter files: pickles, broken files, and weights that do not fit their config."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import file_exists, hf_hub_download, is_offline_mode, try_to_load_from_cache
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME

from .ngram_table import NGRAMS_NAME, NgramTable


def refuse_unsafe_file(name: str, subfolder: str | None = None, **kwargs) -> None:
    """Raises if the weights of an adapter are a pickle or, in a folder, no whole safetensors file.

    Args:
        name (`str`): The adapter's folder or repository.
        subfolder (`str`, *optional*): Where in it.
        kwargs: `revision`, `token` and `cache_dir` of the Hub.

    Raises:
        ValueError: It has `adapter_model.bin` and no `adapter_model.safetensors`, or the latter is truncated.
    """
    has_file = _files_of(name, subfolder, **kwargs)
    if not has_file(SAFETENSORS_WEIGHTS_NAME) and has_file(WEIGHTS_NAME):
        raise ValueError(
            f"{name} contains {WEIGHTS_NAME}, a pickle, which can run code when loaded. Adapters are loaded from "
            f"{SAFETENSORS_WEIGHTS_NAME} only: convert the file with the `safetensors` library."
        )
    weights = Path(name, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
    if not weights.is_file():
        return
    try:
        with safe_open(weights, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{weights} is not a valid safetensors file ({error}): it is truncated or was modified. Download it "
            "again, or train again."
        ) from error


def refuse_without_weights(name: str | Path, subfolder: str | None = None) -> None:
    """Raises for a folder with the config of an adapter and no weights. PEFT would look for a repository of its name.

    Args:
        name (`str` or `Path`): The adapter's folder, or a repository, in which case nothing happens.
        subfolder (`str`, *optional*): Where in it.

    Raises:
        ValueError: There are none.
    """
    folder = Path(name, subfolder or "")
    if (folder / PEFT_CONFIG_NAME).is_file() and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{folder} has an {PEFT_CONFIG_NAME} but no {SAFETENSORS_WEIGHTS_NAME}: the copy or download is "
            "incomplete. Download it again, or copy the file, too."
        )


def read_config(file: str | Path) -> dict:
    """The fields of an `adapter_config.json`. PEFT's error of one that is broken does not say which file it is.

    Args:
        file (`str` or `Path`): The file.

    Raises:
        ValueError: It is not valid JSON, or no object.
    """
    try:
        fields = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:  # of the JSON or of the encoding
        raise ValueError(
            f"{file} is not valid JSON ({error}): it is truncated or was modified. Download it again, or copy it from "
            "another checkpoint of the same training."
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} must hold a JSON object, the fields of an adapter's config. Download it again.")
    return fields


def load_ngrams(name: str, subfolder: str | None = None, **kwargs) -> NgramTable | None:
    """The n-gram table of an adapter, if it has one.

    Args:
        name (`str`): The adapter's folder or repository.
        subfolder (`str`, *optional*): Where in it.
        kwargs: `revision`, `token` and `cache_dir` of the Hub.

    Raises:
        ValueError: The file is truncated, or holds something else.
    """
    if not _files_of(name, subfolder, **kwargs)(NGRAMS_NAME):
        return None
    file = Path(name, subfolder or "", NGRAMS_NAME)
    if not file.is_file():
        hub = {key: value for key, value in kwargs.items() if key in ("revision", "token", "cache_dir")}
        file = hf_hub_download(name, NGRAMS_NAME, subfolder=subfolder, **hub)
    return NgramTable.load(file)


def _files_of(
    name: str,
    subfolder: str | None = None,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | Path | None = None,
    **kwargs,
) -> Callable[[str], bool]:
    """Tells which files an adapter has: in its folder, in its repository, or, offline, in the cache of that."""
    folder = Path(name, subfolder or "")
    if folder.is_dir():
        return lambda file: (folder / file).is_file()
    inside = f"{subfolder}/" if subfolder else ""
    if is_offline_mode():
        return lambda file: isinstance(try_to_load_from_cache(name, inside + file, cache_dir, revision), str)
    return lambda file: file_exists(name, inside + file, revision=revision, token=token)


def refuse_weights_unlike(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raises for weights that an adapter cannot have.

    Args:
        weights (`dict[str, torch.Tensor]`): What a file holds, under the names of the model's.
        expected (`dict[str, torch.Tensor]`): The adapter's in the model, whose shapes count.

    Raises:
        ValueError: A tensor is missing, unknown, of another shape or not finite.
    """
    both = [key for key in expected if key in weights]
    problems = {
        "lack": sorted(expected.keys() - weights.keys()),
        "have the unknown": sorted(weights.keys() - expected.keys()),
        "have the wrong shape for": [key for key in both if weights[key].shape != expected[key].shape],
        "have values that are not finite in": [key for key in both if not _is_finite(weights[key])],
    }
    for problem, keys in problems.items():
        if keys:
            raise ValueError(
                f"The adapter's weights {problem} {len(keys)} tensor(s), such as {keys[0]!r}: the file is truncated, "
                "was modified, or belongs to another base or config. Download it again, or train again."
            )


def refuse_model_folder(folder: str | Path) -> None:
    """Raises a `ValueError` if an adapter is to be saved into a folder that holds a model, such as its base."""
    if Path(folder, CONFIG_NAME).is_file():
        refuse_beside_a_model(f"The folder {folder}")


def refuse_beside_a_model(place: str) -> None:
    """Raises a `ValueError` that says why no adapter may be beside a model.

    Args:
        place (`str`): What holds the model, for the error.
    """
    raise ValueError(
        f"{place} holds a model ({CONFIG_NAME}). With an adapter beside it, the model could not be loaded from there "
        "any more, because transformers would take it for the adapter. Choose another place for the adapter."
    )


def refuse_to_save(weights: dict[str, torch.Tensor], dtype: str | None) -> None:
    """Raises for weights that would be refused when they are loaded again.

    Args:
        weights (`dict[str, torch.Tensor]`): What a file is to hold.
        dtype (`str`, *optional*): The `save_dtype` that they were cast to.

    Raises:
        ValueError: A tensor is not finite.
    """
    keys = [key for key, tensor in weights.items() if not _is_finite(tensor)]
    if keys:
        advice = (
            "They became NaN or infinite in training: go back to an earlier checkpoint, with a lower learning rate."
        )
        if dtype is not None:
            advice += f" If they are finite in memory, `save_dtype={dtype!r}` is too narrow: use 'bfloat16'."
        raise ValueError(
            f"The adapter's weights are not finite in {len(keys)} tensor(s), such as {keys[0]!r}, so the file could "
            f"not be loaded. {advice}"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "meta" or bool(torch.isfinite(tensor).all())
