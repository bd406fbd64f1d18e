"""The limits of a server, and its answers to invalid requests."""

from dataclasses import dataclass

from fastapi import HTTPException

# Fields that would change the output and that the host's handlers ignore, with the values that change nothing.
NEUTRAL: dict[str, tuple] = {
    "best_of": (1,),
    "echo": (False,),
    "function_call": (),
    "functions": (),
    "logprobs": (False,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto",),
    "top_logprobs": (0,),
}


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


def refuse_ignored_fields(body: dict) -> None:
    """Raises for fields that would be ignored although they ask for another output.

    Args:
        body (`dict`): The body of the request.
    """
    for name, neutral in NEUTRAL.items():
        value = body.get(name)
        if value is not None and value not in neutral:
            raise bad_request(f"`{name}={value!r}` is not supported by this server. Leave it out.")


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


def _within(body: dict, name: str, least: float, most: float, kind: type, called: str) -> int | float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
        raise bad_request(f"`{name}` must be {called} from {least} to {most}, but got {value!r}.")
    return value
