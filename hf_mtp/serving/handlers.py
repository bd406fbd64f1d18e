"""The handlers of `transformers serve`, with checks of what they would ignore or fail on.

Beyond the host's: `seed` belongs to the request and not to the process, a temperature samples, and `n` responses.
"""

import asyncio

from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import Modality
from transformers.utils import logging

from .choices import joined, merged, whole_chat, whole_response, with_last_event, with_openai_errors
from .limits import (
    NEUTRAL,
    NEUTRAL_IN_RESPONSES,
    Limits,
    bad_request,
    check_generation_config,
    number,
    penalty,
    refuse_ignored_fields,
    refuse_no_text,
    refuse_other_tools,
    refuse_template_arguments,
    token_biases,
    truth,
    whole_number,
)
from .messages import check_messages, load_images, template_messages, with_instructions
from .response_events import as_documented

logger = logging.get_logger(__name__)

HOTTEST = 2  # as OpenAI's
# Not fields that clients can send: which of the choices for one prompt a request asks for, and whether its text is
# passed on at the end only.
NUMBER, WHOLE = "number", "whole"
CONFIG = "config"  # where a request of `/v1/responses` keeps its settings once they are known
LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens")  # one name per endpoint and age


class CheckedHandler:
    """Adds to a handler of the host.

    Args:
        limits ([`Limits`]): Of each request.
        args, kwargs: Those of the host's handler.
    """

    neutral, whole = NEUTRAL, None
    last_event = "data: [DONE]\n\n"  # of a stream; some clients take a stream without it for one that was cut off

    def __init__(self, *args, limits: Limits, **kwargs):
        super().__init__(*args, **kwargs)
        self.limits = limits

    async def handle_request(self, body: dict, request_id: str):
        """Checks a request and answers it. Arguments are those of the host's handler.

        Raises:
            HTTPException: 400 or 422, for a request that cannot be answered as it asks.
        """
        empty = {name for name, value in body.items() if value is None or (name, value) == ("tools", [])}
        body = {name: value for name, value in body.items() if name not in empty}  # as if they were left out
        body["stream"] = truth(body, "stream")  # the default of OpenAI, not of every handler
        refuse_ignored_fields(body, self.neutral)
        choices = whole_number(body, "n", 1, self.limits.choices) or 1
        whole_number(body, "seed", -(2**63), 2**64 - 1)
        number(body, "temperature", 0, HOTTEST)
        number(body, "top_p", 0, 1)
        for name in LENGTHS:
            whole_number(body, name, 1, self.limits.new_tokens)
        penalty(body)
        refuse_no_text(body, "stop")
        refuse_template_arguments(body)
        refuse_other_tools(body, self.template)
        check_generation_config(body)
        check_messages(body, self.model_manager.takes_images)
        super()._validate_request(body)  # before there is a field of our own in it
        await load_images(body)
        response = await self._answer_all(body, choices, request_id)
        if isinstance(response, StreamingResponse):
            response.body_iterator = with_last_event(response.body_iterator, self.last_event)
        return response

    @property
    def joins_stream(self) -> bool:
        """Whether a response that is not streamed is made of a stream.

        The host would look for fields in the tokens, with those of a stop string, and fail if a tool call was cut.
        """
        return self.whole is not None and self.model_manager.finds_fields

    def get_processor_inputs_from_messages(self, messages: list[dict], modality: Modality) -> list[dict]:
        """The messages as the chat template reads them. Arguments are those of the host's handler."""
        return template_messages(messages, modality, self.template)

    @property
    def template(self) -> str:
        """The chat template, or all of several."""
        return str(self.model_manager.chat_template)

    async def _answer_all(self, body: dict, choices: int, request_id: str):
        if choices == 1:
            return await self._answer(body, request_id)
        numbered = [{**body, NUMBER: index} for index in range(choices)]
        responses = await asyncio.gather(*(self._answer(each, request_id) for each in numbered))
        return merged(responses) if body["stream"] else joined(responses)

    async def _answer(self, body: dict, request_id: str):
        if body["stream"] or not self.joins_stream:
            return await self._answer_as_host(body, request_id)
        stream = await self._answer_as_host({**body, "stream": True, WHOLE: True}, request_id)
        return JSONResponse(await self.whole(stream.body_iterator))

    async def _answer_as_host(self, body: dict, request_id: str):
        try:
            response = await super().handle_request(body, request_id)
        except HTTPException:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, TemplateError) as error:
            logger.info("A request could not be read.", exc_info=True)
            text = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
            raise bad_request(f"The request cannot be read: {text}.".replace("..", ".")) from error
        except Exception as error:  # such as settings that need a package, which is not installed
            logger.warning("A request could not be started.", exc_info=True)
            raise HTTPException(status_code=500, detail=f"{type(error).__name__}: {error}") from error
        if isinstance(response, StreamingResponse):
            response.body_iterator = with_openai_errors(response.body_iterator)
        return response

    def _validate_request(self, body: dict) -> None:
        super()._validate_request({name: value for name, value in body.items() if name not in (NUMBER, WHOLE)})

    def _build_generation_config(self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False):
        # The host would seed torch's global generator. It takes biases in chats only, and refuses integers.
        own = {name: value for name, value in body.items() if name not in ("seed", "logit_bias")}
        config = super()._build_generation_config(own, model_generation_config, use_cb=use_cb)
        config.sequence_bias = token_biases(body, self.model_manager.vocabulary) or config.sequence_bias
        _sample_if_asked(config, body)
        asked = next((body[name] for name in LENGTHS if body.get(name) is not None), config.max_new_tokens)
        config.max_new_tokens = min(asked or self.limits.new_tokens, self.limits.new_tokens)
        config.mtp_seed, config.mtp_number = body.get("seed"), body.get(NUMBER, 0)
        config.mtp_whole = WHOLE in body
        return config


class CheckedChatHandler(CheckedHandler, ChatCompletionHandler):
    """Answers `/v1/chat/completions`."""

    whole = staticmethod(whole_chat)


class CheckedCompletionHandler(CheckedHandler, CompletionHandler):
    """Answers `/v1/completions`."""


class CheckedResponseHandler(CheckedHandler, ResponseHandler):
    """Answers `/v1/responses`."""

    whole, joins_stream = staticmethod(whole_response), True
    neutral, last_event = {**NEUTRAL, **NEUTRAL_IN_RESPONSES}, ""  # its streams end with an event of their own

    async def _answer_as_host(self, body: dict, request_id: str):
        body = with_instructions(body)
        response = await super()._answer_as_host(body, request_id)
        response.body_iterator = as_documented(response.body_iterator, body[CONFIG])
        return response

    def _build_generation_config(self, body: dict, *args, **kwargs):
        body[CONFIG] = super()._build_generation_config(body, *args, **kwargs)
        return body[CONFIG]


def _sample_if_asked(config: GenerationConfig, body: dict) -> None:
    """Samples if the request has a temperature above 0 or a `top_p`; without, the model's own settings count."""
    temperature = body.get("temperature")
    if temperature == 0:
        config.do_sample, config.temperature, config.top_p, config.top_k = False, 1.0, 1.0, 50
    elif temperature is not None or body.get("top_p") is not None:
        config.do_sample = True
