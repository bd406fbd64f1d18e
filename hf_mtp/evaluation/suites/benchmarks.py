"""Public benchmarks as prompts: where each is on the Hub, and how a row of it becomes a prompt.

A row keeps the benchmark's own columns, so a local copy of its file works in the same way. Answers are not graded:
these prompts say how fast a model answers them. Benchmarks of several turns give their first turn.
"""

from collections.abc import Callable
from dataclasses import dataclass

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Benchmark:
    """A dataset, and how to read it.

    Args:
        domain (`str`): The domain of all rows, or of rows for which `domain_of` gives none.
        hub_id (`str`): Its name on the Hub, or `"json"` with `data_files`.
        prompt_of (`Callable`): The text of a row's prompt.
        columns (`tuple[str, ...]`): Columns that `prompt_of` reads.
        split (`str`): The split to use.
        config (`str`, *optional*): The configuration to use.
        data_files (`str`, *optional*): Address of the one file, if the dataset is not in a form that `datasets` loads
            by its name.
        reference (`str`, *optional*): Column of the reference answer.
        category (`str`, *optional*): Column that takes the place of `domain`.
    """

    domain: str
    hub_id: str
    prompt_of: Callable[[dict], str]
    columns: tuple[str, ...]
    split: str = "test"
    config: str | None = None
    data_files: str | None = None
    reference: str | None = None
    category: str | None = None


def _column(name: str) -> dict:
    """The prompt is one column."""
    return {"prompt_of": lambda row: row[name], "columns": (name,)}


def _first_turn(name: str) -> dict:
    """The prompt is the first of several turns."""
    return {"prompt_of": lambda row: row[name][0], "columns": (name,)}


def _multiple_choice(row: dict) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False))
    return f"{row['question']}\n\n{choices}\n\nExplain your choice, then give the letter of the answer."


def _complete_the_function(row: dict) -> str:
    return f"Complete this Python function:\n\n```python\n{row['prompt'].rstrip()}\n```"


_SPEC_BENCH = "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl"
_ALPACA_EVAL = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"

BENCHMARKS = {
    "mmlu": Benchmark(
        "knowledge",
        "cais/mmlu",
        prompt_of=_multiple_choice,
        columns=("question", "choices"),
        config="all",
        reference="answer",
    ),
    "popqa": Benchmark("knowledge", "akariasai/PopQA", **_column("question"), reference="possible_answers"),
    "truthfulqa": Benchmark(
        "knowledge",
        "truthfulqa/truthful_qa",
        **_column("question"),
        split="validation",
        config="generation",
        reference="best_answer",
    ),
    "gsm8k": Benchmark("maths", "openai/gsm8k", **_column("question"), config="main", reference="answer"),
    "humaneval": Benchmark(
        "code",
        "openai/openai_humaneval",
        prompt_of=_complete_the_function,
        columns=("prompt",),
        reference="canonical_solution",
    ),
    "alpacaeval": Benchmark(
        "chat",
        "json",
        **_column("instruction"),
        split="train",
        data_files=_ALPACA_EVAL,
        reference="output",
    ),
    "ifeval": Benchmark("chat", "google/IFEval", **_column("prompt"), split="train"),
    "mt-bench": Benchmark("chat", "HuggingFaceH4/mt_bench_prompts", **_first_turn("prompt"), split="train"),
    "xstest": Benchmark("safety", "Paul/XSTest", **_column("prompt"), split="train"),
    "spec-bench": Benchmark(
        "other", "json", **_first_turn("turns"), split="train", data_files=_SPEC_BENCH, category="category"
    ),
    "speed-bench": Benchmark(
        "other", "nvidia/SPEED-Bench", **_first_turn("turns"), config="qualitative", category="category"
    ),
}

# Several benchmarks under one name. `paper` has those of the domains of arXiv 2507.11851.
COLLECTIONS = {"paper": ("mmlu", "popqa", "truthfulqa", "gsm8k", "humaneval", "alpacaeval", "ifeval", "xstest")}
