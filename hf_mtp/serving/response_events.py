"""The events of `/v1/responses` as OpenAI documents them: one number per item, and a status that tells a cut text.

The host gives several items one number, which OpenAI's client refuses. It opens an empty message behind tool calls,
and calls every text complete. Knows the form of events. Knows nothing of models.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from transformers import GenerationConfig

from .choices import as_event, events_of

ADDED, DONE = "response.output_item.added", "response.output_item.done"
COMPLETED, INCOMPLETE = "response.completed", "response.incomplete"


async def as_documented(stream: AsyncGenerator[str, None], config: GenerationConfig) -> AsyncGenerator[str, None]:
    """A stream of `/v1/responses` whose items have numbers of their own, and whose end says whether it was cut.

    Args:
        stream (`AsyncGenerator[str, None]`): Events of the host's handler.
        config ([`~transformers.GenerationConfig`]): The settings of the request. Its `max_new_tokens` is `None` once
            the text has ended by itself.
    """
    events, sent = ResponseEvents(config), 0
    async with aclosing(events_of(stream)) as given:
        async for event in given:
            ready = events.take(event)
            for number, each in enumerate(ready, start=sent):
                each["sequence_number"] = number
            sent += len(ready)
            if ready:
                yield "".join(map(as_event, ready))


class ResponseEvents:
    """Corrects the events of one response. Those that end an item wait until it is known whether it is the last one.

    Args:
        config ([`~transformers.GenerationConfig`]): The settings of the request.
    """

    def __init__(self, config: GenerationConfig):
        self.config = config
        self.items: dict[int, dict] = {}  # those that have ended, by their numbers
        self.ids: list[str] = []  # of all items
        # By the host's name of an item, which several may share: the number of the latest one, and where its text
        # starts in the text of all that are of its kind, which the host passes on.
        self.places: dict[str, tuple[int, int]] = {}
        self.held: list[dict] = []

    def take(self, event: dict) -> list[dict]:
        """Takes the host's next event, and returns those that can be sent.

        Args:
            event (`dict`): The event, which is changed.
        """
        if "output_index" in event:
            self._place(event)
            self.held.append(event)
            return self._release() if event["type"].endswith(".delta") else []
        if event["type"] == COMPLETED:
            self._end(event)
        return [*self._release(), event]

    def _place(self, event: dict) -> None:
        """Gives an event the number and the text of its own item."""
        item = event.get("item", {})
        name = event.get("item_id") or item["id"]
        if event["type"] == ADDED:
            start = sum(len(_text(other)) for other in self.items.values() if other["type"] == item["type"])
            self.places[name] = len(self.ids), start
            self.ids.append(name if name not in self.ids else f"{name}_{len(self.ids)}")
        event["output_index"], start = self.places[name]
        for named, key in ((event, "item_id"), (item, "id")):
            if key in named:
                named[key] = self.ids[event["output_index"]]
        for part in (event, event.get("part", {}), *item.get("content", [])):
            if "text" in part:
                part["text"] = part["text"][start:]
        if event["type"] == DONE:
            self.items[event["output_index"]] = item

    def _end(self, event: dict) -> None:
        response, last = event["response"], len(self.ids) - 1
        if last and self.items[last]["type"] == "message" and not _text(self.items[last]):
            del self.items[last]
            self.held = [held for held in self.held if held["output_index"] != last]
        response["output"] = [self.items[number] for number in sorted(self.items)]
        most = self.config.max_new_tokens
        if most is not None and response["usage"]["output_tokens"] >= most:
            event["type"] = INCOMPLETE
            response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
            *_, latest = self.items.values()  # to end
            if latest["type"] != "function_call":  # of which the host passes on whole ones only
                latest["status"] = "incomplete"

    def _release(self) -> list[dict]:
        held, self.held = self.held, []
        return held


def _text(item: dict) -> str:
    return "".join(part["text"] for part in item.get("content", ()))
