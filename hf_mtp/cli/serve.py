"""`hf-mtp serve`: an OpenAI-compatible server for an adapter."""

import os
import sys
from enum import Enum
from typing import Annotated

import typer
from typer import Argument, Option

from .strategy import Strategy
from .verb import verb

KEY = "HF_MTP_API_KEY"
# Options that vLLM's server does not have, or has under other names and with other meanings.
NOT_OF_VLLM = ("max_prompt_tokens", "max_new_tokens", "max_body_bytes", "shutdown_seconds", "device", "log_level")


class Engine(str, Enum):
    """What decodes."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


class LogLevel(str, Enum):
    """What uvicorn logs."""

    CRITICAL = "critical"
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    DEBUG = "debug"
    TRACE = "trace"


@verb
def serve(
    context: typer.Context,
    adapter: Annotated[str, Argument(help="Hub id or folder of an adapter. Clients name it as the model.")],
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8000,
    strategy: Annotated[Strategy, Option(help="Decoding strategy, as mtp_strategy of generate.")] = Strategy.AUTO,
    max_batch: Annotated[
        int, Option(min=1, help="Maximum number of requests in the batch. Further requests are queued.")
    ] = 16,
    max_prompt_tokens: Annotated[
        int | None, Option(min=1, help="Maximum length of a prompt. By default the context.")
    ] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum length of a response.")] = 4096,
    max_body_bytes: Annotated[int, Option(min=1, help="Maximum size of a request.")] = 2**21,
    shutdown_seconds: Annotated[int, Option(min=0, help="How long running requests may continue after Ctrl-C.")] = 30,
    dtype: Annotated[str, Option(help="Dtype of the weights, such as bfloat16.")] = "auto",
    device: Annotated[str, Option(help="Device, such as cuda:0. By default an accelerator, if any.")] = "auto",
    log_level: Annotated[LogLevel, Option(help="Log level of uvicorn; info logs each request.")] = LogLevel.WARNING,
    engine: Annotated[Engine, Option(help="Decode in this process, or in vLLM.")] = Engine.TRANSFORMERS,
    vllm_python: Annotated[
        str, Option(help="Python of an environment with vLLM.", show_default="this Python")
    ] = sys.executable,
    vllm_options: Annotated[list[str] | None, Argument(help="Further options of vLLM, after --.")] = None,
) -> None:
    """Serve an adapter to OpenAI clients. Requests share one batch, and each gets the base model's own output.

    The environment variable HF_MTP_API_KEY sets the key that clients must send. /metrics is for Prometheus, /health
    for a load balancer. After Ctrl-C, running requests may finish.

    Example:

        hf-mtp serve me/my-model-mtp --port 8000
        hf-mtp serve me/my-model-mtp --engine vllm --vllm-python vllm/bin/python -- --tensor-parallel-size 2
    """
    if engine is Engine.VLLM:
        given = [name for name in NOT_OF_VLLM if context.get_parameter_source(name).name == "COMMANDLINE"]
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise typer.BadParameter(f"{names} would be ignored with --engine vllm. Pass options of vLLM after --.")
        from ..serving.vllm_server import VllmSettings, serve_with_vllm

        key, options = os.environ.get(KEY), vllm_options or []
        settings = VllmSettings(adapter, host, port, key, strategy.value, max_batch, dtype, vllm_python, options)
        raise typer.Exit(serve_with_vllm(settings))
    if vllm_options:
        raise typer.BadParameter(
            f"{' '.join(vllm_options)} are not options of `hf-mtp serve`. To pass options to vLLM, add --engine vllm."
        )
    try:
        from ..serving.limits import Limits
        from ..serving.server import Server, ServerSettings
    except ImportError as error:
        raise ImportError(f"{error}. The server needs more packages: pip install hf_mtp[serve]") from error
    limits = Limits(max_body_bytes, max_prompt_tokens or 2**20, max_new_tokens)
    settings = ServerSettings(
        adapter,
        host,
        port,
        os.environ.get(KEY),
        strategy.value,
        max_batch,
        limits,
        dtype,
        device,
        shutdown_seconds,
        log_level.value,
    )
    if log_level is LogLevel.WARNING:
        from transformers.utils import logging

        logging.set_verbosity_error()  # the host warns of each request
    server = Server(settings)
    access = "" if settings.api_key else f" Anyone can use it, because {KEY} is not set."
    typer.echo(f"Serving {adapter} at {server.url}.{access}")
    server.run()
