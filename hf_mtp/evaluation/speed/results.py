"""The results of an evaluation, and the schema of `results.json`.

The fields of these classes are the schema. docs/evaluation.md describes them; a change of their meaning raises
[`SCHEMA`]'s number.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..documents import from_fields, load_document, write_document
from ..measures import ALL, acceptance_per_position, quartiles, tokens_per_pass
from ..methods import PLAIN

SCHEMA = "hf_mtp.evaluation/1"
FILE = "results.json"


@dataclass
class Answer:
    """One answer.

    Args:
        prompt (`str`): Name of the prompt in the suite.
        prompt_tokens (`int`): Length of the prompt.
        tokens (`int`): New tokens, the end token included.
        ended (`bool`): Whether it ended by itself, before `max_new_tokens`.
        first_difference (`int`, *optional*): First new token that differs from plain decoding; `None` if none does.
        repeated_4grams (`float`): The share of 4-grams that occurred earlier in the same answer.
        ids (`list[int]`, *optional*): The new tokens; `None` if they are those of plain decoding.
    """

    prompt: str
    prompt_tokens: int
    tokens: int
    ended: bool
    first_difference: int | None
    repeated_4grams: float
    ids: list[int] | None


@dataclass
class Call:
    """One call of `generate`: one prompt, or a batch of them, decoded with one method.

    Args:
        domain (`str`): Domain of its prompts.
        method (`str`): Name of the decoding method.
        seconds (`float`): Wall-clock time.
        forward_passes (`int`): Forward passes of the base, those over the prompts included.
        row_passes (`int`): The same, counted once for each row that had not ended.
        drafted_per_position, accepted_per_position (`list[int]`): Drafts that were verified, and those accepted, by
            their position in a pass. Empty for plain decoding and prompt lookup.
        answers (`list[Answer]`): One for each row.
    """

    domain: str
    method: str
    seconds: float
    forward_passes: int
    row_passes: int
    drafted_per_position: list[int]
    accepted_per_position: list[int]
    answers: list[Answer]


@dataclass
class Summary:
    """All calls of one method on one domain.

    Args:
        prompts (`int`): Number of answers.
        tokens, passes (`int`): New tokens and forward passes of all rows.
        tokens_per_pass (`float`): Their ratio: pooled over answers, the bonus token and the end token included.
        tokens_per_pass_mean (`float`): The mean over calls of each call's own ratio.
        seconds (`float`): Wall-clock time of all calls.
        tokens_per_second (`float`): New tokens divided by it.
        speedup (`float`): Median over calls of the seconds of plain decoding divided by those of this method, for the
            same prompts.
        speedup_low, speedup_high (`float`): Lower and upper quartile. A busy machine shows as a wide range.
        speedup_in_total (`float`): Total seconds of plain decoding divided by those of this method.
        identical (`int`): Answers equal to those of plain decoding.
        acceptance_per_position (`list[float]`): How often the first, second ... draft of a pass was accepted.
        repeated_4grams (`float`): Mean share of repeated 4-grams.
    """

    prompts: int
    tokens: int
    passes: int
    tokens_per_pass: float
    tokens_per_pass_mean: float
    seconds: float
    tokens_per_second: float
    speedup: float
    speedup_low: float
    speedup_high: float
    speedup_in_total: float
    identical: int
    acceptance_per_position: list[float]
    repeated_4grams: float


@dataclass
class Settings:
    """What was measured. A run can resume an earlier one only if all settings are equal.

    Args:
        model (`str`): Hub id of the base, or the name of its folder.
        adapter (`dict`): `fingerprint` of the adapter's weights, `k`, `r`, and `base`, the fingerprint of the base's.
        dtype (`str`): Dtype of the base's weights.
        device (`str`): Device of the base's embeddings.
        suite (`dict`): `name`, `fingerprint`, number of `prompts`, and `tokens`, the fingerprint of their tokens.
        methods (`list[dict]`): `name`, `strategy` and `k` of each decoding method.
        batch_size (`int`): Maximum number of prompts per call.
        max_new_tokens (`int`): Maximum number of new tokens per answer.
        machine (`dict`): Processor, threads, accelerator, Python and versions of libraries.
    """

    model: str
    adapter: dict
    dtype: str
    device: str
    suite: dict
    methods: list[dict]
    batch_size: int
    max_new_tokens: int
    machine: dict


@dataclass
class Results:
    """Results of an evaluation: the content of `results.json`.

    Args:
        settings ([`Settings`]): What was measured.
        complete (`bool`): Whether all prompts were answered. `False` after an interrupt.
        warm_up (`dict[str, float]`): Seconds of the warm-up call of each method, which has one-time costs.
        left_out (`dict[str, str]`): Methods and prompts that could not be measured, and why.
        seconds (`float`): Wall-clock time of the whole run, the warm-up not included.
        load_average (`float`, *optional*): Processes that were waiting for a processor at the start of the run, by the
            system's one-minute average.
        domains (`dict[str, dict[str, Summary]]`): Summaries by domain and method. The domain `"all"` has all of them.
        simulated (`dict[str, float]`): By domain, the tokens per pass that an evaluation in training computes from the
            same answers, for quadratic decoding with the adapter's k. Empty if that method was not measured.
        calls (`list[Call]`): Every call of `generate`.
        schema (`str`): Name and version of this schema.
    """

    settings: Settings
    complete: bool
    warm_up: dict[str, float]
    left_out: dict[str, str]
    seconds: float
    load_average: float | None
    domains: dict[str, dict[str, Summary]] = field(default_factory=dict)
    simulated: dict[str, float] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    schema: str = SCHEMA

    @property
    def overall(self) -> dict[str, Summary]:
        """The summaries of all domains together, by method."""
        return self.domains.get(ALL) or next(iter(self.domains.values()))

    def save(self, folder: Path) -> None:
        """Writes `results.json`, with one call on each line.

        Args:
            folder (`Path`): An existing folder.
        """
        write_document(folder / FILE, self, "calls")


def load_results(path: Path) -> Results:
    """Reads a `results.json`, and checks it against the schema.

    Args:
        path (`Path`): The file, or its folder.

    Raises:
        ValueError: It is not valid JSON, has another schema, or a field is missing or unknown.
        OSError: There is no such file.
    """
    return load_document(path, FILE, SCHEMA, _results_of)


def _results_of(content: dict) -> Results:
    domains = {
        domain: {method: from_fields(Summary, row) for method, row in rows.items()}
        for domain, rows in content["domains"].items()
    }
    calls = [call_of(row) for row in content["calls"]]
    settings = from_fields(Settings, content["settings"])
    return from_fields(Results, {**content, "settings": settings, "domains": domains, "calls": calls})


def call_of(content: dict) -> Call:
    """A [`Call`] from its JSON.

    Args:
        content (`dict`): The JSON.
    """
    return from_fields(Call, {**content, "answers": [from_fields(Answer, row) for row in content["answers"]]})


def summarize_calls(calls: list[Call]) -> dict[str, dict[str, Summary]]:
    """Summaries by domain and method, with `"all"` for all domains together if there are several.

    Args:
        calls (`list[Call]`): For the same prompts with every method; those of each method in the same order.
    """
    domains = list(dict.fromkeys(call.domain for call in calls))
    methods = list(dict.fromkeys(call.method for call in calls))
    groups = {domain: [call for call in calls if call.domain == domain] for domain in domains}
    if len(groups) > 1:
        groups[ALL] = calls
    return {
        domain: {
            method: _summary(
                [call for call in group if call.method == method], [call for call in group if call.method == PLAIN]
            )
            for method in methods
        }
        for domain, group in groups.items()
    }


def _summary(calls: list[Call], plain: list[Call]) -> Summary:
    answers = [answer for call in calls for answer in call.answers]
    tokens = [sum(answer.tokens for answer in call.answers) for call in calls]
    passes, seconds = [call.row_passes for call in calls], sum(call.seconds for call in calls)
    speedups = [one.seconds / call.seconds for one, call in zip(plain, calls, strict=True)]
    low, middle, high = quartiles(speedups)
    return Summary(
        prompts=len(answers),
        tokens=sum(tokens),
        passes=sum(passes),
        **tokens_per_pass(tokens, passes),
        seconds=seconds,
        tokens_per_second=sum(tokens) / seconds,
        speedup=middle,
        speedup_low=low,
        speedup_high=high,
        speedup_in_total=sum(call.seconds for call in plain) / seconds,
        identical=sum(answer.first_difference is None for answer in answers),
        acceptance_per_position=acceptance_per_position(
            [call.drafted_per_position for call in calls], [call.accepted_per_position for call in calls]
        ),
        repeated_4grams=sum(answer.repeated_4grams for answer in answers) / len(answers),
    )
