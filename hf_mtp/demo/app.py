"""Loads an adapter and shows its races on a local page."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from ..evaluation.compare import describe_machine
from ..pretrained import load_upgraded
from .page import DEFAULT_TOKENS, STYLE, make_page
from .race import RaceTrack

FONT = ["system-ui", "sans-serif"]  # of the reader's own system: nothing is fetched from elsewhere


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo.

    Args:
        model (`str`): Hub id or folder of an adapter, or of its base.
        adapter (`str`, *optional*): Hub id or folder of the adapter, if `model` is a base.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): Address to listen on.
        port (`int`, *optional*, defaults to 7860): Port to listen on; 0 for any free one.
        dtype (`str`, *optional*, defaults to `"auto"`): Dtype of the base's weights.
    """

    model: str
    adapter: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    dtype: str = "auto"


class Demo:
    """The page of one adapter.

    Args:
        settings ([`DemoSettings`]): Its settings.

    Attributes:
        track ([`RaceTrack`]), page (`gradio.Blocks`), name (`str`): The model, the page, and what the base is called.

    Raises:
        OSError: The port is in use, or there is no such model.
        ValueError: This is no adapter, it does not fit its base, or its base decodes plainly.
    """

    def __init__(self, settings: DemoSettings):
        self.host, self.port = settings.host, free_port(settings.host, settings.port)  # before the model is loaded
        model, tokenizer = load_upgraded(settings.model, settings.adapter, settings.dtype)
        self.track = RaceTrack(model, tokenizer)
        self.track.warm_up(self.track.defaults("", DEFAULT_TOKENS))
        self.name = _name(model.get_base_model().name_or_path)
        self.page = make_page(self.track, self.name, _machine())

    @property
    def url(self) -> str:
        """The address for browsers."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/"

    def launch(self, wait: bool = True, in_browser: bool = False) -> None:
        """Shows the page.

        Args:
            wait (`bool`, *optional*, defaults to `True`): Whether to return only after Ctrl-C. If not, `page.close()`
                ends it.
            in_browser (`bool`, *optional*, defaults to `False`): Whether to open a browser.
        """
        self.page.launch(
            server_name=self.host,
            server_port=self.port,
            inbrowser=in_browser,
            prevent_thread_lock=not wait,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            theme=gr.themes.Base(font=FONT, font_mono=["monospace"]),
            css_paths=STYLE,
        )


def free_port(host: str, port: int) -> int:
    """The port, or any free one if it is 0.

    Args:
        host (`str`): Address to listen on.
        port (`int`): The port.

    Raises:
        OSError: Nothing can listen on it, for instance because it is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as listening:
            return listening.getsockname()[1]
    except OSError as error:
        raise OSError(
            f"Nothing can listen on port {port} of {host}: {os.strerror(error.errno)}. Choose another one with "
            "--port, or stop the process that uses it."
        ) from error


def _name(name: str) -> str:
    return Path(name).resolve().name if Path(name).is_dir() else name


def _machine() -> str:
    machine = describe_machine()
    threads = machine["threads"]
    cpu = f"{machine['processor']}, {threads} thread{'s' if threads > 1 else ''}"
    return machine.get("accelerator", cpu)
