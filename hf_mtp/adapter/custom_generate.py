"""The file by which `base.generate(custom_generate=adapter)` of transformers decodes with an adapter."""

from pathlib import Path

CUSTOM_GENERATE = "custom_generate"  # where transformers looks for it, and the tag by which the Hub finds it

# transformers does not tell the file where it came from, so it says that itself.
_GENERATE = '''"""Written by hf_mtp: `model.generate(..., custom_generate=ADAPTER, trust_remote_code=True)`."""

from hf_mtp.attached import generate_with_adapter

ADAPTER = {adapter!r}
REVISION = {revision!r}


def generate(model, **kwargs):
    """The text of `model.generate`, in fewer forward passes."""
    return generate_with_adapter(model, ADAPTER, REVISION, **kwargs)
'''


def custom_generate_files(adapter: str, revision: str | None = None) -> dict[str, bytes]:
    """What an adapter's folder holds for `custom_generate`: contents by path.

    Args:
        adapter (`str`): Hub id or folder from which the adapter is to be loaded.
        revision (`str`, *optional*): Its commit on the Hub.
    """
    return {
        f"{CUSTOM_GENERATE}/generate.py": _GENERATE.format(adapter=adapter, revision=revision).encode(),
        f"{CUSTOM_GENERATE}/requirements.txt": b"hf_mtp\n",
    }


def write_custom_generate(folder: str | Path) -> None:
    """Writes the files into an adapter's folder, which they load the adapter from. They do not survive its moving.

    Args:
        folder (`str` or `Path`): The adapter's folder.
    """
    folder = Path(folder).resolve()
    (folder / CUSTOM_GENERATE).mkdir(exist_ok=True)
    for path, content in custom_generate_files(str(folder)).items():
        (folder / path).write_bytes(content)
