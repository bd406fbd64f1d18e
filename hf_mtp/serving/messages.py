"""Checks the messages of requests, and loads their images.

Knows the form of OpenAI's messages. Knows nothing of models.
"""

import asyncio
from collections.abc import Iterator

from transformers.image_utils import load_image

from .limits import bad_request

TEXT = ("text", "input_text", "output_text")
IMAGES = ("image_url", "input_image")
SOURCES = ("data:image/", "http://", "https://")  # not a path, which would be a file of the server
DOWNLOAD_SECONDS = 10
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
            content = item.get("content")
            for number, part in enumerate(content if isinstance(content, list) else []):
                yield f"{name}[{index}].content[{number}]", part
