"""Finds tool calls and thoughts in the text of a response as it comes, with the parser of transformers.

A text that ends within a tool call, or in which a call is not valid, stays text. The parser alone raises an error.
"""

import json
import re
from collections.abc import Callable, Iterable

from transformers.cli.serving.utils import ToolCall, response_events_to_chunks
from transformers.utils import logging

logger = logging.get_logger(__name__)


def fits(template: dict, prompt: str) -> bool:
    """Whether a response template is one for a prompt, by the text before the response that it names.

    transformers also chooses templates by the type of a model, whose prompts may have another form: then it would take
    the whole prompt for a part of the response.

    Args:
        template (`dict`): The response template.
        prompt (`str`): The prompt, special tokens included.
    """
    anchors = template.get("start_anchor") or []
    if isinstance(anchors, str):
        anchors = [anchors]
    pattern = "|".join(map(re.escape, anchors)) or template.get("start_anchor_pattern") or ""
    return re.search(pattern, prompt) is not None


class FieldStream:
    """Turns text into what the handlers of transformers stream: text, thoughts and tool calls.

    Args:
        parser ([`~transformers.utils.chat_parsing.ResponseParser`]): Finds the fields.
        special (`Iterable[str]`): Special tokens. They have been read by the parser, but are no text.
    """

    def __init__(self, parser, special: Iterable[str]):
        self.parser, self.special = parser, [*special]
        self._is_broken, self._part = False, ""
        self._unread = ""  # text that was not passed on

    def start(self) -> list:
        """What the prompt has begun."""
        return response_events_to_chunks(self.parser.initial_events)

    def feed(self, text: str) -> list:
        """Adds text, and returns what is new.

        Args:
            text (`str`): The text, special tokens included.
        """
        self._unread += text
        return self._read(lambda: self.parser.feed(text))

    def end(self) -> list:
        """What is new once no more text comes."""
        return self._read(lambda: self.parser.finalize()[1])

    def _read(self, parse: Callable[[], list[dict]]) -> list:
        if not self._is_broken:
            try:
                events = parse()
                items = [_checked(item) for item in response_events_to_chunks(events)]
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                logger.info("A field of the response cannot be read: %s", error)
                self._is_broken = True
            else:
                self._pass_over(events)
                return items
        text, self._unread = self._unread, ""
        for token in self.special:
            text = text.replace(token, "")
        return [text] if text else []

    def _pass_over(self, events: list[dict]) -> None:
        """Drops the unread text up to the end of what was passed on."""
        for event in events:
            passed_on, is_part = event.get("text", ""), event.get("dirty")  # of a tool call, which is passed on whole
            if is_part:
                self._part += passed_on
            elif event["type"] == "region_close":
                passed_on, self._part = self._part, ""
            while passed_on not in self._unread:  # its start was held back from the prompt
                passed_on = passed_on[1:]
            if passed_on and not is_part:
                self._unread = self._unread.partition(passed_on)[2]


def _checked(item):
    """A part of a response; of a tool call, with arguments that clients can read. They read `null` as no object.

    Raises:
        ValueError: It is a tool call without a name, or whose arguments are no object.
    """
    if not isinstance(item, ToolCall):
        return item
    arguments = json.loads(item.arguments)
    if not isinstance(item.name, str) or not isinstance(arguments, dict | None):
        raise ValueError(f"{item} is no call of a function.")
    return item if arguments is not None else ToolCall(item.name, "{}")
