"""The file by which `base.generate(custom_generate=adapter)` of transformers decodes with an adapter."""

from pathlib import Path

CUSTOM_GENERATE = "custom_generate"  # where transformers looks for it, and the tag by which the Hub finds it

# transformers does not tell the file where it came from. A file on the Hub says that itself, with the commit.
_OF_REPOSITORY = '''"""Written by hf_mtp: `model.generate(..., custom_generate=ADAPTER, trust_remote_code=True)`."""

from hf_mtp.attached import generate_with_adapter

ADAPTER = {adapter!r}
REVISION = {revision!r}


def generate(*args, model, **kwargs):
    """The text of `model.generate`, in fewer forward passes."""
    return generate_with_adapter(model, ADAPTER, REVISION, *args, **kwargs)
'''
# A folder may be moved or uploaded by other tools, so its file names no place.
_OF_FOLDER = '''"""Written by hf_mtp: `model.generate(..., custom_generate=FOLDER, trust_remote_code=True)`.

The adapter is beside this file: in the folder, or the repository on the Hub, that the call names.
"""

from hf_mtp.attached import generate_with_adapter, place_in_call


def generate(*args, model, **kwargs):
    """The text of `model.generate`, in fewer forward passes."""
    return generate_with_adapter(model, place_in_call(), kwargs.get("revision"), *args, **kwargs)
'''


def custom_generate_files(adapter: str | None = None, revision: str | None = None) -> dict[str, bytes]:
    """What an adapter's folder or repository holds for `custom_generate`: contents by path.

    Args:
        adapter (`str`, *optional*): Hub id from which the adapter is to be loaded. If `None`, it is loaded from
            the folder or repository that the call names.
        revision (`str`, *optional*): Its commit on the Hub.
    """
    text = _OF_FOLDER if adapter is None else _OF_REPOSITORY.format(adapter=adapter, revision=revision)
    return {f"{CUSTOM_GENERATE}/generate.py": text.encode(), f"{CUSTOM_GENERATE}/requirements.txt": b"hf_mtp\n"}


def write_custom_generate(folder: str | Path) -> None:
    """Writes the files into an adapter's folder. They work wherever it is moved, copied or uploaded.

    Args:
        folder (`str` or `Path`): The adapter's folder.
    """
    Path(folder, CUSTOM_GENERATE).mkdir(exist_ok=True)
    for path, content in custom_generate_files().items():
        Path(folder, path).write_bytes(content)
