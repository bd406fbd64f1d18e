"""Texts that are only measured on, and which prompts are too close to them to be trained on."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEASURED = 40  # prompts of each domain that results are reported for
WORDS_IN_A_ROW = 13  # a prompt that shares so many with a held-out text is the same text, as GPT-3's authors counted
MBPP_HELD_OUT = range(1, 601)


class HeldOut:
    """Texts that must not be trained on.

    Args:
        texts (`Iterable[str]`): The prompts to measure on.
    """

    def __init__(self, texts: Iterable[str]):
        self.runs: set[tuple[str, ...]] = set()
        self.whole: set[tuple[str, ...]] = set()
        for text in texts:
            words = words_of(text)
            self.whole.add(words)
            self.runs.update(runs(words))

    def __contains__(self, text: str) -> bool:
        """Whether a text is one of them, or shares [`WORDS_IN_A_ROW`] words in a row with one."""
        words = words_of(text)
        return words in self.whole or not self.runs.isdisjoint(runs(words))


def words_of(text: str) -> tuple[str, ...]:
    """Letters and digits only, in lower case."""
    return tuple(re.findall(r"\w+", text.lower()))


def runs(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every [`WORDS_IN_A_ROW`] words in a row; none of a shorter text."""
    return (words[start : start + WORDS_IN_A_ROW] for start in range(len(words) - WORDS_IN_A_ROW + 1))


def held_out_texts(data: Path) -> Iterator[str]:
    """The held-out prompts of a data folder.

    Args:
        data (`Path`): Folder with `gsm8k_test.jsonl`, `mbpp.jsonl`, `chat_test.jsonl` and `specbench.jsonl`.

    Raises:
        FileNotFoundError: One of them is missing, so that nobody would know what to leave out.
    """
    yield from (row["question"] for row in rows_of(data / "gsm8k_test.jsonl"))
    yield from (row["text"] for row in rows_of(data / "mbpp.jsonl") if row["task_id"] in MBPP_HELD_OUT)
    yield from (row["prompt"] for row in rows_of(data / "chat_test.jsonl"))
    for row in rows_of(data / "specbench.jsonl"):
        yield from row["turns"]
    yield from (row["prompt"] for row in rows_of(HERE / "questions.jsonl"))


def held_out_questions(data: Path, count: int, for_settings: bool = False) -> dict[str, list[str]]:
    """Held-out prompts of each domain, taken at equal distances.

    Args:
        data (`Path`): Folder with `gsm8k_test.jsonl`, `mbpp.jsonl` and `chat_test.jsonl`.
        count (`int`): How many of each domain, at most [`MEASURED`].
        for_settings (`bool`, *optional*, defaults to `False`):
            Whether to take prompts that no result is reported for, to choose settings on.

    Returns:
        `dict[str, list[str]]`: Domain to prompts.
    """
    everything = {
        "maths": [row["question"] for row in rows_of(data / "gsm8k_test.jsonl")],
        "code": [row["text"] for row in rows_of(data / "mbpp.jsonl") if row["task_id"] in MBPP_HELD_OUT],
        "chat": [row["prompt"] for row in rows_of(data / "chat_test.jsonl")],
    }
    questions = {}
    for domain, texts in everything.items():
        measured = spread(texts, MEASURED)
        questions[domain] = spread(
            [text for text in texts if text not in measured] if for_settings else measured, count
        )
    return questions


def own_questions(count: int) -> dict[str, list[str]]:
    """The first prompts of each of the five kinds in `questions.jsonl`, which we wrote ourselves."""
    questions: dict[str, list[str]] = {}
    for row in rows_of(HERE / "questions.jsonl"):
        questions.setdefault(row["domain"], []).append(row["prompt"])
    return {domain: texts[:count] for domain, texts in questions.items()}


def spread(texts: list[str], count: int) -> list[str]:
    """As many texts, at equal distances."""
    return texts[:: max(1, len(texts) // count)][:count]


def rows_of(path: Path) -> list[dict]:
    """The rows of a JSON Lines file.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. README.md beside this script lists the files of a data folder.")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
