"""Explains why an adapter on the Hub cannot be loaded."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError
from peft.utils import CONFIG_NAME

_LOG_IN = "log in with `hf auth login`, or pass `token`"


def refuse_without_access(name: str, **hub) -> None:
    """Raises if a repository is missing or not accessible. PEFT would report a missing `adapter_config.json` instead.

    Args:
        name (`str`): Hub id, or a folder, in which case nothing happens.
        hub: `revision`, `token`, `cache_dir` and the like.

    Raises:
        OSError: The repository is gated, private or missing.
    """
    if Path(name).is_dir():
        return
    try:
        hf_hub_download(name, CONFIG_NAME, **hub)
    except GatedRepoError as error:
        raise OSError(
            f"{name} is a gated repository, and you do not have access. Request access at "
            f"https://huggingface.co/{name}, then {_LOG_IN}."
        ) from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{name} is neither a folder nor a repository on the Hub that you have access to. If it is private, "
            f"{_LOG_IN}."
        ) from error
    except HFValidationError as error:
        raise OSError(
            f"{name} is neither a folder nor the id of a repository on the Hub. Is it spelled right?"
        ) from error
    except EntryNotFoundError:  # it is no adapter, or there is no network: others say so
        return
