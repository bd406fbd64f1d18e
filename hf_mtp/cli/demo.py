"""`hf-mtp demo`: a race of plain decoding against multi-token prediction, in a browser."""

import threading
import webbrowser
from typing import Annotated

import typer
from typer import Argument, Option

from .verb import verb


@verb
def demo(
    model: Annotated[str, Argument(help="Hub id or folder of an adapter, or of a base model.")],
    adapter: Annotated[str | None, Option(help="Hub id or folder of the adapter, if the model is a base.")] = None,
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 7860,
    dtype: Annotated[str, Option(help="Dtype of the weights, such as bfloat16.")] = "auto",
    browser: Annotated[bool, Option("--browser", help="Open the page in a browser.")] = False,
) -> None:
    """Race plain decoding against multi-token prediction, side by side on a local page. Ctrl-C stops the server.

    The page shows drafts and which of them are accepted, with tokens per second and tokens per pass.

    Example:

        hf-mtp demo me/my-model-mtp --browser
    """
    try:
        from ..demo.app import Demo, DemoSettings
    except ImportError as error:
        raise ImportError(f"{error}. The demo needs more packages: pip install hf_mtp[demo]") from error
    from .session import quiet_hosts

    quiet_hosts()
    loaded = Demo(DemoSettings(model, adapter, host, port, dtype))
    typer.echo(f"Racing {adapter or model} at {loaded.url}. Ctrl-C stops the server.")
    if browser:
        threading.Timer(1, webbrowser.open, [loaded.url]).start()  # once the server runs
    loaded.run()
