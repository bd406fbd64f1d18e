"""The limits of a server, and its answers to invalid requests."""

import inspect
import json
from dataclasses import dataclass

from fastapi import HTTPException
from transformers import GenerationConfig, PreTrainedTokenizerBase

# Fields that would change the output and that the host's handlers ignore, with the values that change nothing. The
# host puts a `suffix` behind the text, which the model has not read.
NEUTRAL: dict[str, tuple] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": (),
    "functions": (),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Further ones of `/v1/responses`.
NEUTRAL_IN_RESPONSES: dict[str, tuple] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({},),
    "text": ({}, {"format": {"type": "text"}}),
}
# Of all requests, by whether they have tools.
NEUTRAL_OF_TOOLS: dict[bool, dict[str, tuple]] = {
    True: {"parallel_tool_calls": (True,), "tool_choice": ("auto",)},
    False: {"tool_choice": ("auto", "none")},
}
MOST_BIAS = 100  # as OpenAI's
# Settings of a `generation_config` that would be ignored or fail: what changes nothing, and what to send instead.
INSTEAD = {"max_length": ((None,), "max_new_tokens"), "num_return_sequences": ((None, 1), "n")}
TEMPLATE_VARIABLES = {"documents"}  # those that `apply_chat_template` also takes as an argument


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Args:
        body_bytes (`int`): Size of its body.
        prompt_tokens (`int`): Tokens of its prompt.
        new_tokens (`int`): New tokens.
        choices (`int`): Responses to one prompt, `n`.
    """

    body_bytes: int = 2**21
    prompt_tokens: int = 2**20
    new_tokens: int = 4096
    choices: int = 8


def bad_request(message: str, code: int = 400) -> HTTPException:
    """A client error that says what to change.

    Args:
        message (`str`): What was passed, and what is needed.
        code (`int`, *optional*, defaults to 400): The HTTP status.
    """
    return HTTPException(status_code=code, detail=message)


def refuse_ignored_fields(body: dict, neutral: dict[str, tuple]) -> None:
    """Raises for fields that would be ignored although they ask for another output.

    Args:
        body (`dict`): The body of the request.
        neutral (`dict[str, tuple]`): The fields, with the values that change nothing.
    """
    for name, values in (neutral | NEUTRAL_OF_TOOLS[bool(body.get("tools"))]).items():
        value = body.get(name)
        if value is not None and not any(_is(value, one) for one in values):
            raise bad_request(f"`{name}={value!r}` is not supported by this server. Leave it out.")


def refuse_other_tools(body: dict, template: str) -> None:
    """Raises for tools that the model would not see, and for those that it would see as functions without a name.

    Args:
        body (`dict`): The body of the request.
        template (`str`): The chat template.
    """
    tools = body.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise bad_request(f"`tools` must be a list of functions, but got {tools!r}.")
    if tools and "tools" not in template:
        raise bad_request("`tools` are not supported by this model: its chat template leaves them out. Send none.")
    for index, tool in enumerate(tools):
        kind, function = tool.get("type", "function"), tool.get("function", tool)
        if kind != "function":
            raise bad_request(f"`tools[{index}]` is of type {kind!r}, but this server supports only 'function'.")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_request(f"`tools[{index}]` must be a function with a `name`, but got {tool!r}.")


def refuse_template_arguments(body: dict) -> None:
    """Raises for `chat_template_kwargs` that are arguments of `apply_chat_template`, such as `truncation`.

    Args:
        body (`dict`): The body of the request.
    """
    given = body.get("chat_template_kwargs", {})
    if not isinstance(given, dict):
        raise bad_request(f"`chat_template_kwargs` must be an object, but got {given!r}.")
    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
    wrong = sorted((arguments - TEMPLATE_VARIABLES) & given.keys())
    if wrong:
        raise bad_request(
            "`chat_template_kwargs` must be variables of the chat template, such as `enable_thinking`, but got "
            f"{', '.join(f'`{name}`' for name in wrong)}. Leave it out."
        )


def check_generation_config(body: dict) -> None:
    """Raises for settings of `generation_config` that do not exist or would be ignored.

    Args:
        body (`dict`): The body of the request.
    """
    text = body.get("generation_config", "{}")
    try:
        given = json.loads(text)
    except (TypeError, ValueError):
        given = None
    if not isinstance(given, dict):
        raise bad_request(f"`generation_config` must be the JSON text of an object, but got {text!r}.")
    unknown = sorted(given.keys() - vars(GenerationConfig()).keys())
    if unknown:
        raise bad_request(f"`generation_config` has unknown settings: {', '.join(unknown)}. Leave them out.")
    for name, (values, instead) in INSTEAD.items():
        if given.get(name) not in values:
            raise bad_request(
                f"`{name}={given[name]!r}` of `generation_config` is not supported by this server. Send `{instead}` "
                "instead."
            )


def token_biases(body: dict, vocabulary: int) -> dict[tuple[int], float] | None:
    """The field `logit_bias` in the form of `sequence_bias`; `None` if it was left out or is empty.

    Args:
        body (`dict`): The body of the request.
        vocabulary (`int`): Number of tokens of the model.
    """
    given = body.get("logit_bias") or {}
    if not isinstance(given, dict):
        raise bad_request(f"`logit_bias` must be an object of token ids and their biases, but got {given!r}.")
    biases = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdecimal() and int(token) < vocabulary):
            raise bad_request(f"`logit_bias` takes token ids from 0 to {vocabulary - 1}, but got {token!r}.")
        name = f"logit_bias[{token}]"
        biases[int(token),] = float(number({name: bias}, name, -MOST_BIAS, MOST_BIAS) or 0)
    return biases or None


def whole_number(body: dict, name: str, least: int, most: int) -> int | None:
    """A field that must be a whole number; `None` if it was left out.

    Args:
        body (`dict`): The body of the request.
        name (`str`): Name of the field.
        least, most (`int`): The numbers that are taken.
    """
    return _within(body, name, least, most, int, "an integer")


def number(body: dict, name: str, least: float, most: float) -> float | None:
    """A field that must be a number; `None` if it was left out.

    Args:
        body (`dict`): The body of the request.
        name (`str`): Name of the field.
        least, most (`float`): The numbers that are taken.
    """
    return _within(body, name, least, most, int | float, "a number")


def refuse_no_text(body: dict, name: str) -> None:
    """Raises for a field that is neither a string nor a list of strings, nor left out.

    Args:
        body (`dict`): The body of the request.
        name (`str`): Name of the field.
    """
    value = body.get(name)
    strings = value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(string, str) for string in strings):
        raise bad_request(f"`{name}` must be a string or a list of strings, but got {value!r}.")


def truth(body: dict, name: str) -> bool:
    """A field that must be `true` or `false`, the default.

    Args:
        body (`dict`): The body of the request.
        name (`str`): Name of the field.
    """
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise bad_request(f"`{name}` must be true or false, but got {value!r}.")
    return value


def penalty(body: dict) -> None:
    """Raises for a `frequency_penalty` that cannot become a `repetition_penalty`, which is 1 higher and above 0.

    Args:
        body (`dict`): The body of the request.
    """
    if number(body, "frequency_penalty", -1, 2) == -1:
        raise bad_request("`frequency_penalty` must be above -1, but got -1.")


def _is(value, other) -> bool:
    """Whether two values of JSON are equal. In Python, `False` equals 0."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _within(body: dict, name: str, least: float, most: float, kind: type, called: str) -> int | float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
        raise bad_request(f"`{name}` must be {called} from {least} to {most}, but got {value!r}.")
    return value
