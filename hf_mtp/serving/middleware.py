"""Layers around the server: the API key, the size of bodies, and clients that go away.

Each is an ASGI application around another one.
"""

import asyncio
import hmac
from contextlib import suppress

from fastapi.responses import JSONResponse
from transformers.utils import logging

logger = logging.get_logger(__name__)

OPEN = ("/health", "/metrics")  # no key is asked for


def error_response(message: str, status: int, kind: str = "invalid_request_error") -> JSONResponse:
    """An error in the form of OpenAI's.

    Args:
        message (`str`): What is wrong.
        status (`int`): The HTTP status.
        kind (`str`, *optional*): OpenAI's type of the error.
    """
    message = message.encode(errors="backslashreplace").decode()  # it may quote half a surrogate pair
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status_code=status)


class ApiKey:
    """Answers 401 to requests without the key.

    Args:
        app: The application.
        key (`str`): The key, which clients send as `Authorization: Bearer KEY`.
    """

    def __init__(self, app, key: str):
        self.app, self.key = app, key.encode()

    async def __call__(self, scope, receive, send):
        """Answers a request or passes it on."""
        if scope["type"] == "http" and scope["path"] not in OPEN:
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.key):
                response = error_response("The API key is missing or wrong.", 401, "authentication_error")
                return await response(scope, receive, send)
        return await self.app(scope, receive, send)


class WholeBody:
    """Reads a body before the application runs, up to a size, and cancels the application when the client goes away.

    Without it, a response that is not streamed would be generated to its end for nobody.

    Args:
        app: The application.
        most_bytes (`int`): Larger bodies get 413.
    """

    def __init__(self, app, most_bytes: int):
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope, receive, send):
        """Answers a request or passes it on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            await self._answer(scope, receive, send)
        except asyncio.CancelledError:  # by a second Ctrl-C; uvicorn would print a traceback
            logger.info("A request was cut off, because the server stopped at once.")

    async def _answer(self, scope, receive, send) -> None:
        body = await self._read(scope, receive)
        if body is None:
            message = f"The body is larger than {self.most_bytes} bytes. Send less text."
            return await error_response(message, 413)(scope, receive, send)
        gone, is_read = asyncio.Event(), False

        async def receive_again():
            nonlocal is_read
            if not is_read:
                is_read = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        answering = asyncio.ensure_future(self.app(scope, receive_again, send))
        leaving = asyncio.ensure_future(_until_gone(receive, gone))
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                answering.cancel()
            with suppress(asyncio.CancelledError):
                await answering
        finally:
            answering.cancel()
            leaving.cancel()

    async def _read(self, scope, receive) -> bytes | None:
        """The body; `None` if it is too large."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.most_bytes:
            return None
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.most_bytes:
                return None
        return bytes(body)


async def _until_gone(receive, gone: asyncio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()
