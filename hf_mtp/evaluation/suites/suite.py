"""Prompt suites: the built-in one, public benchmarks, and the user's own.

A row of a suite has `prompt`, a text or the turns of a conversation, and optionally `name`, `domain` and `reference`.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from .benchmarks import BENCHMARKS, COLLECTIONS, Benchmark
from .rows import SUFFIXES, read_rows

QUICK = Path(__file__).with_name("data") / "quick.jsonl"
COLUMNS = ("name", "domain", "prompt", "reference")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt of a suite.

    Args:
        name (`str`): Unique in the suite.
        domain (`str`): Measures are reported for each domain.
        prompt (`str` or `list[dict]`): A text that the model continues, or the turns of a conversation.
        reference (`str`, *optional*): A reference answer. Kept, but not used to measure.
    """

    name: str
    domain: str
    prompt: str | list[dict]
    reference: str | None = None


@dataclass(frozen=True)
class Suite:
    """A named list of prompts.

    Args:
        name (`str`): Its name.
        prompts (`tuple[SuitePrompt, ...]`): At least one.
    """

    name: str
    prompts: tuple[SuitePrompt, ...]

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any prompt, its name, its domain or the order."""
        content = [[row.name, row.domain, row.prompt] for row in self.prompts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def limited(self, limit: int | None) -> "Suite":
        """The suite with at most `limit` prompts of each domain, taken at equal distances.

        Args:
            limit (`int`, *optional*): At least 1; all prompts if `None`.
        """
        if limit is None:
            return self
        if limit < 1:
            raise ValueError(
                f"`limit`, the maximum number of prompts per domain, must be at least 1, but got {limit}."
            )
        kept = [row for rows in self.by_domain().values() for row in _spread(rows, limit)]
        return Suite(self.name, tuple(kept))

    def by_domain(self) -> dict[str, list[SuitePrompt]]:
        """The prompts of each domain, in order."""
        domains = {}
        for row in self.prompts:
            domains.setdefault(row.domain, []).append(row)
        return domains


def load_suite(name: str, limit: int | None = None, data: Path | None = None) -> Suite:
    """Loads a suite.

    Args:
        name (`str`): `"quick"`, which ships with the package; a benchmark: `"mmlu"`, `"popqa"`, `"truthfulqa"`,
            `"gsm8k"`, `"humaneval"`, `"alpacaeval"`, `"ifeval"`, `"mt-bench"`, `"xstest"`, `"spec-bench"`,
            `"speed-bench"`; `"paper"`, the benchmarks of arXiv 2507.11851; a file; or a dataset of the Hub with a
            column `prompt`, as `"owner/name"`, `"owner/name:split"` or `"owner/name:config:split"`.
        limit (`int`, *optional*): Maximum number of prompts per domain, taken at equal distances.
        data (`Path`, *optional*): A folder with local copies of benchmarks, such as `gsm8k.jsonl`, in their own
            columns. They take the place of the Hub.

    Raises:
        ValueError: There is no such suite, a column is missing, or there are no rows.
        OSError: A file or a dataset cannot be read.
    """
    if name == "quick":
        return suite_of_rows(name, read_rows(QUICK)).limited(limit)
    if name in BENCHMARKS:
        return Suite(name, tuple(_benchmark(name, data))).limited(limit)
    if name in COLLECTIONS:
        return _collection(name, limit, data)
    path = Path(name)
    if path.is_file():
        return suite_of_rows(path.name, read_rows(path)).limited(limit)
    if path.suffix in SUFFIXES or name.count("/") != 1:
        raise ValueError(
            f"Unknown suite {name!r}. Pass 'quick', 'paper', one of {', '.join(BENCHMARKS)}, an existing file "
            f"({', '.join(SUFFIXES)}) or a dataset of the Hub as 'owner/name'."
        )
    return suite_of_rows(name, _hub_rows(name)).limited(limit)


def suite_of_rows(name: str, rows: Iterable[dict]) -> Suite:
    """Makes a suite of rows with the columns of the schema.

    Args:
        name (`str`): Name of the suite.
        rows (`Iterable[dict]`): Rows with `prompt`, and optionally `name`, `domain` and `reference`.

    Raises:
        ValueError: There are no rows, a row has no prompt, or two rows have the same name.
    """
    prompts = tuple(_prompt_of(row, number, name) for number, row in enumerate(rows, start=1))
    if not prompts:
        raise ValueError(f"The suite {name} has no rows. It needs at least one, with a column 'prompt'.")
    names = [row.name for row in prompts]
    double = next((row for row in names if names.count(row) > 1), None) if len(set(names)) < len(names) else None
    if double is not None:
        raise ValueError(f"Two rows of the suite {name} have the name {double!r}. Names must be unique.")
    return Suite(name, prompts)


def _prompt_of(row: dict, number: int, suite: str) -> SuitePrompt:
    where = f"Row {number} of the suite {suite}"
    if "prompt" not in row:
        columns = ", ".join(map(repr, row)) or "none"
        raise ValueError(
            f"{where} has no column 'prompt'. Its columns are {columns}. Rename the one with the prompt: a suite has "
            f"{', '.join(map(repr, COLUMNS))}, all but 'prompt' optional."
        )
    prompt = row["prompt"]
    if not prompt or not isinstance(prompt, str | list):
        raise ValueError(f"{where} needs a prompt: a text, or the turns of a conversation. It has {prompt!r}.")
    if isinstance(prompt, list):
        _check_turns(prompt, where)
    _check_characters(prompt, where)
    named = str(row["name"]) if row.get("name") not in (None, "") else f"{number}"
    return SuitePrompt(named, str(row.get("domain") or "all"), prompt, row.get("reference"))


def _check_turns(turns: list, where: str) -> None:
    for turn in turns:
        is_turn = isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str)
        if not is_turn:
            raise ValueError(
                f"{where}: each turn of a conversation needs 'role' ({', '.join(ROLES)}) and 'content', a text. Got "
                f"{turn!r}."
            )


def _check_characters(prompt: str | list[dict], where: str) -> None:
    """Raises for half of a character, which JSON can hold and a tokenizer cannot read."""
    for text in [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: character {error.start} of its prompt is {text[error.start]!r}, half of a character, as of "
                "a text that was cut off. Remove it."
            ) from error


def _collection(name: str, limit: int | None, data: Path | None) -> Suite:
    """Several benchmarks. Those of one domain share its limit equally."""
    domains: dict[str, list[str]] = {}
    for part in COLLECTIONS[name]:
        domains.setdefault(BENCHMARKS[part].domain, []).append(part)
    prompts = []
    for parts in domains.values():
        share = None if limit is None else -(-limit // len(parts))
        loaded = [Suite(part, tuple(_benchmark(part, data))).limited(share).prompts for part in parts]
        in_turn = [row for rows in zip_longest(*loaded) for row in rows if row is not None]
        prompts += in_turn[:limit]
    return Suite(name, tuple(prompts))


def _benchmark(name: str, data: Path | None) -> list[SuitePrompt]:
    """The prompts of a benchmark, from its local copy if there is one."""
    benchmark = BENCHMARKS[name]
    local = _local_copy(name, data)
    rows = _load(benchmark, name) if local is None else read_rows(local)
    if not rows:
        raise ValueError(f"The benchmark {name} has no rows in {local or benchmark.hub_id}.")
    missing = [column for column in benchmark.columns if column not in rows[0]]
    if missing:
        raise ValueError(
            f"The benchmark {name} in {local or benchmark.hub_id} lacks the column(s) {', '.join(missing)}. It has "
            f"{', '.join(map(str, rows[0]))}."
        )
    return [_row_of_benchmark(benchmark, name, row, number) for number, row in enumerate(rows, start=1)]


def _row_of_benchmark(benchmark: Benchmark, name: str, row: dict, number: int) -> SuitePrompt:
    turns = [{"role": "user", "content": benchmark.prompt_of(row)}]
    domain = str(row.get(benchmark.category) or benchmark.domain)
    reference = row.get(benchmark.reference)
    return SuitePrompt(f"{name}-{number}", domain, turns, None if reference is None else str(reference))


def _local_copy(name: str, data: Path | None) -> Path | None:
    if data is None:
        return None
    if not data.is_dir():
        raise ValueError(f"The folder of local copies, {data}, does not exist.")
    return next((path for suffix in SUFFIXES if (path := data / f"{name}{suffix}").is_file()), None)


def _load(benchmark: Benchmark, name: str) -> list[dict]:
    from datasets import load_dataset

    files = {} if benchmark.data_files is None else {"data_files": benchmark.data_files}
    try:
        return load_dataset(benchmark.hub_id, benchmark.config, split=benchmark.split, **files).to_list()
    except Exception as error:  # of the network, of the Hub or of a builder: `datasets` has no common base class
        raise OSError(
            f"The benchmark {name} ({benchmark.data_files or benchmark.hub_id}) could not be loaded: {error} Without "
            f"a network, put a copy of it as {name}.jsonl into a folder, and pass that folder as `data` (--data)."
        ) from error


def _hub_rows(name: str) -> list[dict]:
    """Rows of a dataset of the Hub, or in a folder: of the split that is named, or of `test`, or of the first one."""
    from datasets import load_dataset

    hub_id, _, rest = name.partition(":")
    config, _, split = rest.rpartition(":")
    try:
        found = load_dataset(hub_id, config or None)
    except Exception as error:
        raise OSError(f"The dataset {hub_id} could not be loaded: {error}") from error
    split = split or ("test" if "test" in found else next(iter(found)))
    if split not in found:
        raise ValueError(f"The dataset {hub_id} has no split {split!r}. It has {', '.join(found)}.")
    return found[split].to_list()


def _spread(rows: list[SuitePrompt], count: int) -> list[SuitePrompt]:
    """`count` rows at equal distances."""
    if len(rows) <= count:
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]
