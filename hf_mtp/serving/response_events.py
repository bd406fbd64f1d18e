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
        self.items: list[dict] = []  # those that have ended
        self.ids: list[str] = []  # of all items
        self.start = 0  # of the current item's text in the text of all items of its kind, which the host passes on
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
        if event["type"] == ADDED:
            self.start = sum(len(_text(other)) for other in self.items if other["type"] == item["type"])
            self.ids.append(item["id"] if item["id"] not in self.ids else f"{item['id']}_{len(self.ids)}")
        event["output_index"] = len(self.ids) - 1
        for named, name in ((event, "item_id"), (item, "id")):
            if name in named:
                named[name] = self.ids[-1]
        for part in (event, event.get("part", {}), *item.get("content", [])):
            if "text" in part:
                part["text"] = part["text"][self.start :]
        if event["type"] == DONE:
            self.items.append(item)

    def _end(self, event: dict) -> None:
        response = event["response"]
        if len(self.items) > 1 and self.items[-1]["type"] == "message" and not _text(self.items[-1]):
            self.items.pop()
            self.held = [held for held in self.held if held["output_index"] < len(self.items)]
        most = self.config.max_new_tokens
        if most is not None and response["usage"]["output_tokens"] >= most:
            event["type"] = INCOMPLETE
            response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
            if self.items[-1]["type"] != "function_call":  # of which the host passes on whole ones only
                self.items[-1]["status"] = "incomplete"
        response["output"] = self.items

    def _release(self) -> list[dict]:
        held, self.held = self.held, []
        return held


def _text(item: dict) -> str:
    return "".join(part["text"] for part in item.get("content", ()))
