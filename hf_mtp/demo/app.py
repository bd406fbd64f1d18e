"""Loads an adapter and shows its races on a local page."""

from dataclasses import dataclass

import gradio as gr
import uvicorn
from fastapi import FastAPI

from ..base.inspection import base_name
from ..base.machine import describe_machine, threads_in_words
from ..pretrained import load_upgraded
from ..serving.port import listen, url_of
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
    """The page of one adapter, and its server.

    Args:
        settings ([`DemoSettings`]): Its settings.

    Attributes:
        track ([`RaceTrack`]), name (`str`): The model, and what its base is called.

    Raises:
        OSError: The port is in use, or there is no such model.
        ValueError: This is no adapter, it does not fit its base, or its base decodes plainly.
    """

    def __init__(self, settings: DemoSettings):
        self.socket = listen(settings.host, settings.port)  # before the model is loaded, which takes long
        try:
            model, tokenizer = load_upgraded(settings.model, settings.adapter, settings.dtype)
            self.track = RaceTrack(model, tokenizer)
            self.track.warm_up(self.track.defaults("", DEFAULT_TOKENS))
        except BaseException:
            self.socket.close()
            raise
        self.name = base_name(model.get_base_model())
        # Not `launch`: it gives up if the page does not come within three seconds, as on a busy machine.
        app = gr.mount_gradio_app(
            FastAPI(),
            make_page(self.track, self.name, _machine()),
            "/",
            footer_links=[],
            ssr_mode=False,
            theme=gr.themes.Base(font=FONT, font_mono=["monospace"]),
            css_paths=STYLE,
        )
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))

    @property
    def url(self) -> str:
        """The address for browsers."""
        return f"{url_of(self.socket)}/"

    def run(self) -> None:
        """Shows the page until Ctrl-C, SIGTERM or [`stop`]."""
        try:
            self._uvicorn.run(sockets=[self.socket])
        finally:
            self.track.stop()

    def stop(self) -> None:
        """Asks the server to stop. Any thread may call it."""
        self._uvicorn.should_exit = True


def _machine() -> str:
    machine = describe_machine()
    return machine.get("accelerator", f"{machine['processor']}, {threads_in_words(machine)}")
