"""Says why an adapter on the Hub cannot be read."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError
from peft.utils import CONFIG_NAME

_LOG_IN = "log in by `hf auth login`, or pass `token`"


def refuse_without_access(name: str, **hub) -> None:
    """Raises if a repository may not be read, or there is none. PEFT would say that it has no `adapter_config.json`.

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
            f"{name} is a gated repository, and you may not read it. Ask for access at https://huggingface.co/{name}, "
            f"then {_LOG_IN}."
        ) from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"There is no folder {name}, and no repository of that name on the Hub that you may read. If it is "
            f"private, {_LOG_IN}."
        ) from error
    except (EntryNotFoundError, HFValidationError):  # it is no adapter, or there is no network: others say so
        return
