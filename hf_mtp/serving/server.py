"""An OpenAI-compatible server for an adapter, from the parts of `transformers serve`."""

from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from transformers.cli.serving.server import build_server
from transformers.cli.serving.transcription import TranscriptionHandler

from ..base.threads import in_own_thread
from ..decoding.generate import STRATEGIES
from .handlers import CheckedChatHandler, CheckedCompletionHandler, CheckedResponseHandler
from .limits import Limits
from .manager import AdapterManager, BatchedManager, BatchedState
from .metrics import Metrics
from .middleware import ApiKey, WholeBody, error_response
from .port import listen, url_of

TEXT_ENDPOINTS = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/load_model", "/health"}


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server.

    Args:
        adapter (`str`): Hub id or folder of the adapter. It is also the id of the model for clients.
        host (`str`), port (`int`): Where to listen; port 0 is any free one.
        api_key (`str`, *optional*): Key that clients must send. If `None`, no key is needed.
        strategy (`str`): As `mtp_strategy` of `generate`.
        max_rows (`int`): Maximum number of requests in the batch.
        limits ([`Limits`]): Of each request.
        dtype, device (`str`): The dtype of the weights, and where they are.
        shutdown_seconds (`int`): How long running requests may take after Ctrl-C.
        log_level (`str`): Of uvicorn.
    """

    adapter: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    strategy: str = "auto"
    max_rows: int = 16
    limits: Limits = field(default_factory=Limits)
    dtype: str = "auto"
    device: str = "auto"
    shutdown_seconds: int = 30
    log_level: str = "warning"


class Server:
    """A server that has its port and its model, and runs until it is stopped.

    Args:
        settings ([`ServerSettings`]): Its settings.

    Raises:
        OSError: The port is in use, or there is no such model.
        ValueError: The strategy is unknown, this is no adapter, or it does not fit its base.
    """

    def __init__(self, settings: ServerSettings):
        if settings.strategy not in STRATEGIES:
            raise ValueError(f"`strategy` must be one of {', '.join(STRATEGIES)}, but got {settings.strategy}.")
        self.settings, self.metrics = settings, Metrics()
        self.socket = listen(settings.host, settings.port)  # before the model is loaded, which takes long
        try:
            models = in_own_thread(
                lambda: AdapterManager(device=settings.device, dtype=settings.dtype, force_model=settings.adapter)
            )  # which loads the model
        except BaseException:
            self.socket.close()
            raise
        manager = BatchedManager(settings.limits, self.metrics, settings.strategy, settings.max_rows)
        self.model, processor = models.load_model_and_processor(models.process_model_name(settings.adapter))
        self.tokenizer = getattr(processor, "tokenizer", processor)
        manager.start(self.model)
        self.state = BatchedState(manager)
        self.app = self._app(models)
        config = uvicorn.Config(
            self.app,
            log_level=settings.log_level,
            timeout_graceful_shutdown=settings.shutdown_seconds,
            lifespan="off",  # the model stays; a second Ctrl-C would interrupt the lifespan with a traceback
        )
        self._uvicorn = uvicorn.Server(config)

    @property
    def url(self) -> str:
        """The address for clients."""
        return f"{url_of(self.socket)}/v1"

    def run(self) -> None:
        """Answers requests until Ctrl-C, SIGTERM or [`stop`]. Running requests are finished first."""
        try:
            self._uvicorn.run(sockets=[self.socket])
        finally:
            self.state.shutdown()

    def stop(self) -> None:
        """Asks the server to stop. Any thread may call it."""
        self._uvicorn.should_exit = True

    def _app(self, models: AdapterManager) -> FastAPI:
        shared, limits = (models, self.state), self.settings.limits
        app = build_server(
            models,
            CheckedChatHandler(*shared, limits=limits),
            completion_handler=CheckedCompletionHandler(*shared, limits=limits),
            response_handler=CheckedResponseHandler(*shared, limits=limits),
            transcription_handler=TranscriptionHandler(*shared),
            systemone_handler=None,
            generation_state=self.state,
        )
        _keep_text_endpoints(app)
        _speak_openai(app)

        @app.get("/v1/models/{name:path}")
        def model(name: str) -> dict:
            found = [each for each in models.list_models() if each["id"] == name]
            if not found:
                raise HTTPException(404, f"This server has only the model {self.settings.adapter}, but got {name}.")
            return found[0]

        @app.get("/metrics")
        def metrics() -> Response:
            return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

        app.add_middleware(WholeBody, most_bytes=limits.body_bytes)
        if self.settings.api_key:
            app.add_middleware(ApiKey, key=self.settings.api_key)
        return app


def _keep_text_endpoints(app: FastAPI) -> None:
    """Drops the host's endpoints for speech, decisions and unloading, which an adapter has no use for."""
    app.router.routes[:] = [route for route in app.router.routes if route.path in TEXT_ENDPOINTS]


def _speak_openai(app: FastAPI) -> None:
    """Gives errors the form that OpenAI's clients know."""

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException):
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return error_response(str(error.detail), error.status_code, kind)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception):
        return error_response(f"{type(error).__name__}: {error}", 500, "server_error")

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError):
        problem, given = error.errors()[0], request.headers.get("content-type")
        text = f"The body must be a JSON object: {problem['msg']}."
        if isinstance(problem.get("input"), bytes):  # FastAPI reads no JSON of other types
            text = "The body must be JSON with the header `Content-Type: application/json`"
            text += f", but this header is {given!r}." if given else ", but there is no such header."
        return error_response(text, 400)
