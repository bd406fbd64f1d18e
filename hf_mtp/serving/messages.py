"""Checks the messages of requests, loads their images, and brings them into the form that chat templates read.

Knows the form of OpenAI's messages. Knows nothing of models.
"""

import asyncio
import json
from collections.abc import Iterator

from transformers.cli.serving.utils import BaseHandler, Modality
from transformers.image_utils import load_image

from .limits import bad_request

TEXT = ("text", "input_text", "output_text")
IMAGES = ("image_url", "input_image")
SOURCES = ("data:image/", "http://", "https://")  # not a path, which would be a file of the server
DOWNLOAD_SECONDS = 10
INSTRUCTING = ("system", "developer")  # roles
MOST_SHOWN = 100  # characters of what was passed


def check_messages(body: dict, takes_images: bool) -> None:
    """Refuses messages that cannot be read, and parts of messages that the host's handlers would leave out.

    Args:
        body (`dict`): The body of a request, with `messages` or `input` if it has any.
        takes_images (`bool`): Whether the base reads images.
    """
    messages = body.get("messages")
    if messages is None and "messages" not in body:
        messages = []
    elif not isinstance(messages, list) or not messages:
        raise bad_request(f"`messages` must be a list of one or more messages, but got {messages!r}.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad_request(f"Each message needs a `role` and a `content`, but got {message!r}.")
        if not isinstance(message.get("content", ""), str | list | None):
            raise bad_request(f"The `content` of a message must be a string or a list of parts, but got {message!r}.")
        if message.get("function_call") is not None:
            raise bad_request(
                "`function_call` of a message is not supported by this server. Send `tool_calls` instead."
            )
    for place, part in _parts(body):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind in TEXT or (takes_images and kind in IMAGES):
            continue
        reads, kinds = ("text and images", "'text' or 'image_url'") if takes_images else ("text", "'text'")
        raise bad_request(
            f"`{place}` is of type {kind!r}, but this model reads only {reads}. Send parts of type {kinds}."
        )


async def load_images(body: dict) -> None:
    """Replaces the URLs of images by the images. They are downloaded while other requests are answered.

    Args:
        body (`dict`): The body of a request whose messages were checked.
    """
    images = [(place, part) for place, part in _parts(body) if part["type"] in IMAGES]
    loaded = await asyncio.gather(*(asyncio.to_thread(_loaded, place, part) for place, part in images))
    for (_, part), image in zip(images, loaded, strict=True):
        part["image_url"] = image


def with_instructions(body: dict) -> dict:
    """A request of `/v1/responses` whose `instructions` stand before a system message of its own, and replace none.

    Args:
        body (`dict`): The body of a request.
    """
    instructions, items = body.get("instructions"), body.get("input")
    first = items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}
    if not instructions or first.get("role") not in INSTRUCTING:
        return body
    content = first.get("content") or ""
    content = (
        f"{instructions}\n\n{content}"
        if isinstance(content, str)
        else [{"type": "input_text", "text": instructions}, *content]
    )
    return {**body, "instructions": None, "input": [{**first, "content": content}, *items[1:]]}


def template_messages(messages: list[dict], modality: Modality, template: str) -> list[dict]:
    """Messages in the form that chat templates read. The host's have no text beside tool calls, and no thoughts.

    Args:
        messages (`list[dict]`): Messages of a chat.
        modality (`Modality`): What the base reads.
        template (`str`): The chat template. A developer's message is one of the system where it knows none, since such
            a template would leave it out.
    """
    knows_developers, made = "developer" in template, []
    for message in messages:
        calls = [_with_arguments(call) for call in message.get("tool_calls") or []]
        (text,) = BaseHandler.get_processor_inputs_from_messages([{**message, "tool_calls": None}], modality)
        own = text | ({"tool_calls": calls} if calls else {})
        if message["role"] == "developer" and not knows_developers:
            own["role"] = "system"
        others = {name: value for name, value in message.items() if value not in (None, [])}
        made.append({**others, **own})
    return made


def _with_arguments(call: dict) -> dict:
    """A tool call whose arguments are an object, as templates need it. Clients leave the text of none empty."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_request(f"Each of `tool_calls` needs a `function` with a `name` and `arguments`, but got {call!r}.")
    arguments = given = function.get("arguments", "")
    if isinstance(given, str):
        try:
            arguments = json.loads(given) if given.strip() else {}
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise bad_request(
            f"The `arguments` of the tool call {function['name']!r} must be the JSON text of an object, but got "
            f"{given!r}."
        )
    return {**call, "function": {**function, "arguments": arguments}}


def _loaded(place: str, part: dict):
    """The image of a part of a message."""
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str) or not url.startswith(SOURCES):
        shown = repr(url) if url is None or len(repr(url)) <= MOST_SHOWN else f"{repr(url)[:MOST_SHOWN]}..."
        raise bad_request(f"The URL of `{place}` must start with {', '.join(SOURCES)}, but got {shown}.")
    try:
        return load_image(url, timeout=DOWNLOAD_SECONDS)
    except Exception as error:  # of PIL, base64 or the network
        cause = error.__context__ or error
        reason = f"{type(cause).__name__}: {str(cause)[:MOST_SHOWN]}"
        raise bad_request(f"`{place}` cannot be loaded as an image ({reason}). Send a PNG or JPEG file.") from error


def _parts(body: dict) -> Iterator[tuple[str, dict]]:
    """The parts of all messages, and what to call them."""
    for name in ("messages", "input"):
        items = body.get(name)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            continue
        if name == "input" and items and "role" not in items[0]:  # the parts of one message
            yield from ((f"{name}[{index}]", part) for index, part in enumerate(items))
            continue
        for index, item in enumerate(items):
            content = item.get("content") if item.get("type") != "reasoning" else None  # whose parts are thoughts
            for number, part in enumerate(content if isinstance(content, list) else []):
                yield f"{name}[{index}].content[{number}]", part
