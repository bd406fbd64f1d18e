"""Runs PEFT's own tests of LoRA against `GatedLoraConfig` (`make test-peft`). The only download is PEFT's source."""

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
# All that test LoRA on language models. The other files test other methods, other kinds of models, or need a GPU.
FILES = ("config", "decoder_models", "hub_features", "initialization", "target_parameters", "tuners_utils")


def peft_source(folder: Path) -> Path:
    """Folder of the source distribution of the installed PEFT, downloaded into `folder` unless it is there."""
    source = folder / f"peft-{version('peft')}"
    package = source / "tests" / "__init__.py"  # which the distribution lacks, although its tests import each other
    if not package.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
        pip += ["--no-deps", "--no-binary=peft", f"--dest={folder}", f"peft=={version('peft')}"]
        subprocess.run(pip, check=True)
        with tarfile.open(source.with_name(f"{source.name}.tar.gz")) as archive:
            archive.extractall(folder, filter="data")
        package.touch()
    return source


def main(folder: str, *arguments: str) -> int:
    """Returns pytest's exit status.

    Args:
        folder (`str`): Where PEFT's source is kept for the next time.
        arguments (`str`): Passed on to pytest.
    """
    source = peft_source(Path(folder).resolve())
    with TemporaryDirectory() as hub:
        environment = {
            **os.environ,
            "HF_HOME": hub,
            "HF_HUB_CACHE": f"{hub}/hub",
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        }
        subprocess.run([sys.executable, HERE / "tiny_hub.py", f"{hub}/hub"], env=environment, check=True)
        pytest = [sys.executable, "-m", "pytest", "-p", "against_gated_lora", "-p", "no:cacheprovider"]
        pytest += ["-c", os.devnull, f"--rootdir={source}", "-q", "--tb=short", "--disable-warnings"]
        files = [f"tests/test_{name}.py" for name in FILES]
        return subprocess.run([*pytest, *files, *arguments], cwd=source, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
