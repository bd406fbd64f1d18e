"""Scripts of `examples/` and `docs/`, which import one another by their short names, as modules of tests."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest


@contextmanager
def importable(*folders: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Lets scripts be imported by their short names. Afterwards these names are free again.

    Args:
        folders (`Path`): The folders of the scripts.

    Yields:
        A function that imports the script of a name.
    """
    names = {path.stem for folder in folders for path in folder.glob("*.py")}
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders:
            patch.syspath_prepend(folder)
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        try:
            yield importlib.import_module
        finally:
            for name in names:
                sys.modules.pop(name, None)
