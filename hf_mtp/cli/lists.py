"""Options that take several values, separated by commas."""

import typer


def words(value: str) -> list[str]:
    """The values of an option such as `auto,linear`.

    Args:
        value (`str`): The option.
    """
    return [word.strip() for word in value.split(",") if word.strip()]


def numbers(value: str | None, option: str) -> list[int] | None:
    """The numbers of an option such as `1,2,4,8`; `None` if it was not given.

    Args:
        value (`str`, *optional*): The option.
        option (`str`): Its name, for errors.

    Raises:
        `typer.BadParameter`: A value is no whole number.
    """
    if value is None:
        return None
    try:
        found = [int(word) for word in words(value)]
    except ValueError:
        found = []
    if not found:
        raise typer.BadParameter(f"{option} takes integers separated by commas, such as 1,4,8, but got {value!r}.")
    return found
