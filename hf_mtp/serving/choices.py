"""Several choices for one prompt: joins responses of the host's handlers, each of which has a single choice.

Knows the form of responses. Knows nothing of models or of how requests are decoded.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse

EVENT, ERROR = "data: ", 'data: {"error": '


async def with_openai_errors(stream: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """A stream whose error, if it ends with one, has the form that OpenAI's clients read. The host's is a text only.

    Args:
        stream (`AsyncGenerator[str, None]`): Events of a handler of the host.
    """
    async with aclosing(stream):
        async for text in stream:
            before, mark, error = text.partition(ERROR)  # within a text, the quotes would be escaped
            if mark:
                message = json.loads(error.strip().removesuffix("}"))
                text = before + as_event({"error": {"message": message, "type": "server_error"}})
            yield text


async def with_last_event(stream: AsyncGenerator[str, None], event: str) -> AsyncGenerator[str, None]:
    """A stream that ends with an event of its own.

    Args:
        stream (`AsyncGenerator[str, None]`): Events.
        event (`str`): The last event; nothing if empty.
    """
    async with aclosing(stream):
        async for text in stream:
            yield text
    if event:
        yield event


async def whole_chat(stream: AsyncGenerator[str, None]) -> dict:
    """One response of the chunks of a chat.

    Args:
        stream (`AsyncGenerator[str, None]`): Events of one choice.

    Raises:
        HTTPException: 500, if the stream ends with an error.
    """
    message, texts = {"role": "assistant"}, {"content": "", "reasoning_content": ""}
    async for chunk in events_of(stream):
        if "error" in chunk:
            raise HTTPException(status_code=500, detail=chunk["error"]["message"])
        choice = chunk["choices"][0]
        for name in texts:
            texts[name] += choice["delta"].get(name) or ""
        calls = [{k: v for k, v in call.items() if k != "index"} for call in choice["delta"].get("tool_calls") or []]
        if calls:
            message.setdefault("tool_calls", []).extend(calls)
    message |= {"content": texts["content"]} | {name: text for name, text in texts.items() if text}
    choices = [{"finish_reason": choice["finish_reason"], "index": 0, "message": message}]
    kept = {name: chunk[name] for name in ("id", "created", "model", "usage")}
    return {**kept, "object": "chat.completion", "choices": choices}


async def whole_response(stream: AsyncGenerator[str, None]) -> dict:
    """One response of the events of `/v1/responses`. Arguments and errors are those of [`whole_chat`]."""
    async for event in events_of(stream):
        if event["type"] == "error":
            raise HTTPException(status_code=500, detail=event["message"])
    return event["response"]


async def events_of(stream: AsyncGenerator[str, None]) -> AsyncGenerator[dict, None]:
    """The events of a stream, read.

    Args:
        stream (`AsyncGenerator[str, None]`): Events of a handler of the host.
    """
    async with aclosing(stream):
        async for text in stream:
            for event in text.strip().split("\n\n"):
                yield json.loads(event.removeprefix(EVENT))


def as_event(event: dict) -> str:
    """An event as text of a stream.

    Args:
        event (`dict`): The event.
    """
    return f"{EVENT}{json.dumps(event)}\n\n"


def joined(responses: list[JSONResponse]) -> JSONResponse:
    """One response with the choices of all.

    Args:
        responses (`list[JSONResponse]`): Responses to one prompt.
    """
    bodies = [json.loads(response.body) for response in responses]
    choices = [{**body["choices"][0], "index": index} for index, body in enumerate(bodies)]
    return JSONResponse({**bodies[0], "choices": choices, "usage": _total([body["usage"] for body in bodies])})


def merged(responses: list[StreamingResponse]) -> StreamingResponse:
    """One stream with the chunks of all choices in the order in which they come. Its last chunk has the usage of all.

    Args:
        responses (`list[StreamingResponse]`): Streams of responses to one prompt.
    """
    streams = [response.body_iterator for response in responses]
    return StreamingResponse(_merged_events(streams), media_type="text/event-stream")


async def _merged_events(streams: list[AsyncGenerator[str, None]]) -> AsyncGenerator[str, None]:
    """The events of all streams. An error in one of them ends all."""
    queue, usages = asyncio.Queue(), []
    readers = [asyncio.create_task(_read(stream, index, queue)) for index, stream in enumerate(streams)]
    try:
        while len(usages) < len(streams):
            chunk = await queue.get()
            if isinstance(chunk, Exception):
                raise chunk
            if chunk.get("usage"):
                usages.append(chunk.pop("usage"))
            if len(usages) == len(streams):
                chunk["usage"] = _total(usages)
            yield as_event(chunk)
            if "error" in chunk:
                return
    finally:  # the client may have gone; a stream that is cancelled takes its row out of the batch
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _read(stream: AsyncGenerator[str, None], index: int, queue: asyncio.Queue) -> None:
    """Passes on the chunks of one choice, under its number."""
    try:
        async for chunk in events_of(stream):
            for choice in chunk.get("choices", ()):
                choice["index"] = index
            queue.put_nowait(chunk)
    except Exception as error:
        queue.put_nowait(error)


def _total(usages: list[dict]) -> dict:
    """The usage of all choices, which share a prompt."""
    prompt, new = usages[0]["prompt_tokens"], sum(usage["completion_tokens"] for usage in usages)
    return {**usages[0], "completion_tokens": new, "total_tokens": prompt + new}
