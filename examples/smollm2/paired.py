"""Decodes every prompt with every method, in turn, and sums up.

The methods take turns in coming first, and each prompt is compared with itself, so that a machine that is slower for a
while is so for all of them. Knows nothing of what is measured and why.
"""

import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from methods import Method, Models
from tqdm import tqdm

from hf_mtp.evaluation.exactness.divergence import divergence_at
from hf_mtp.evaluation.measures import first_difference, repeated_share

WARM_UP_TOKENS = 24  # `auto` measures what passes cost when it first decodes


class Record:
    """Rows in a file beside the output, so that a measurement that was interrupted goes on.

    Args:
        output (`Path`): File for the report, written at the end.
        settings (`dict`): What is measured, and how. Rows that were measured otherwise are dropped.
    """

    def __init__(self, output: Path, settings: dict):
        self.output, self.part = output, output.with_name(f".{output.name}.part")
        self.settings, self.rows = json.loads(json.dumps(settings)), []
        if self.part.is_file():
            saved = json.loads(self.part.read_text(encoding="utf-8"))
            if saved["settings"] == self.settings:
                self.rows = saved["rows"]
            else:
                print(f"{self.part} was measured with other settings; it is replaced.")

    def has(self, domain: str, turn: int) -> bool:
        """Whether the prompts of this turn are measured."""
        return any(row["domain"] == domain and row["turn"] == turn for row in self.rows)

    def add(self, row: dict) -> None:
        """One more turn of a domain is measured."""
        self.rows.append(row)
        write_json(self.part, {"settings": self.settings, "rows": self.rows})

    def finish(self, report: dict, is_complete: bool) -> None:
        """Writes the report. The rows stay if some are missing, so that the same command can add them."""
        write_json(self.output, report)
        if is_complete:
            self.part.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Writes a file, all or nothing, with each of the content's `rows` on a line of its own."""
    head = json.dumps({name: value for name, value in content.items() if name != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in content["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    draft.replace(path)


def measure(
    models: Models,
    methods: dict[str, Method],
    groups: dict[str, list[list[str]]],
    record: Record,
    new_tokens: int,
    rare_turns: int,
    minutes: float | None = None,
) -> None:
    """Decodes until all is measured, or the time is over.

    Args:
        models ([`Models`]): What decodes.
        methods (`dict[str, Method]`): The methods by name. `"plain"` is what the others are compared with.
        groups (`dict[str, list[list[str]]]`): Domain to prompts, in groups that are decoded as one batch.
        record ([`Record`]): Gets the rows.
        new_tokens (`int`): Most new tokens.
        rare_turns (`int`): Groups of each domain that rare methods decode.
        minutes (`float`, *optional*): After so much time no further turn begins. A turn is a group of each domain.
    """
    warm_up(models, methods, groups)
    start, turns = time.monotonic(), max(map(len, groups.values()))
    with tqdm(total=sum(map(len, groups.values()))) as bar:
        for turn in range(turns):
            if minutes is not None and time.monotonic() - start > 60 * minutes:
                tqdm.write(f"{minutes} minutes are over: {turn} of {turns} turns are measured.")
                break
            present = {name: method for name, method in methods.items() if turn < rare_turns or not method.is_rare}
            for domain, texts in groups.items():
                if turn < len(texts) and not record.has(domain, turn):
                    answers = one_turn(models, present, texts[turn], turn, new_tokens)
                    record.add({"domain": domain, "turn": turn, "answers": answers})
                bar.update(turn < len(texts))


def one_by_one(questions: dict[str, list[str]]) -> dict[str, list[list[str]]]:
    """Groups of one prompt each, by domain."""
    return {domain: [[text] for text in texts] for domain, texts in questions.items()}


def warm_up(models: Models, methods: dict[str, Method], groups: dict[str, list[list[str]]]) -> None:
    """Lets every method decode a little with every size of group, so that nothing that happens once is timed."""
    for size in {len(texts) for domain in groups.values() for texts in domain}:
        inputs = encoded(["What is 2 + 3?"] * size, models)
        for method in tqdm(methods.values(), desc="warm-up", leave=False):
            models.decode(method, inputs, WARM_UP_TOKENS)


def one_turn(
    models: Models, methods: dict[str, Method], texts: list[str], turn: int, new_tokens: int
) -> dict[str, dict]:
    """What each method took for the same prompts, and how its answers compare with plain decoding's."""
    inputs = encoded(texts, models)
    names = [*methods]
    names = names[turn % len(names) :] + names[: turn % len(names)]
    found = {}
    for name in names:
        torch.manual_seed(turn)
        found[name] = models.decode(methods[name], inputs, new_tokens)
    answers = {}
    for name in methods:
        rows, passes, seconds = found[name]
        answers[name] = {
            "rows": len(rows),
            "tokens": sum(map(len, rows)),
            "passes": passes,
            "seconds": round(seconds, 4),
            "repeated_4grams": round(statistics.fmean(map(repeated_share, rows)), 4),
        }
        if "plain" in found and methods[name].is_greedy:
            answers[name] |= compared(models, inputs, found["plain"][0], rows)
    return answers


def encoded(texts: list[str], models: Models) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, `(B, T)`, of conversations that begin with these texts."""
    conversations = [[{"role": "user", "content": text}] for text in texts]
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": len(texts) > 1}
    found = models.tokenizer.apply_chat_template(conversations, **options).to(models.base.device)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def compared(models: Models, inputs: dict, plain: list[list[int]], other: list[list[int]]) -> dict:
    """How many rows are the same, and in the others how near a tie the first two different tokens were."""
    gaps = []
    for row, (expected, found) in enumerate(zip(plain, other, strict=True)):
        if expected != found:
            prompt_T = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
            gaps.append(gap(models.base, prompt_T, expected, found))
    return {"identical": len(plain) - len(gaps), "gaps": gaps}


def gap(base, prompt_T: torch.LongTensor, plain: list[int], other: list[int]) -> float | None:
    """The gap between the base's logits of the first two tokens that differ, in units of their dtype's rounding.

    `None` if one answer is the start of the other.
    """
    return divergence_at(base, "", prompt_T.tolist(), plain, other, first_difference(plain, other)).units


def summarize(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """Domain to method to numbers, from the rows of a record."""
    domains: dict[str, dict[str, dict]] = {}
    for domain in dict.fromkeys(row["domain"] for row in rows):
        turns = [row["answers"] for row in rows if row["domain"] == domain]
        names = dict.fromkeys(name for answers in turns for name in answers)
        domains[domain] = {name: summary([answers for answers in turns if name in answers], name) for name in names}
    return domains


def summary(turns: list[dict], name: str) -> dict:
    """One method on one domain. A speedup is the median of the turns' own ratios of seconds per token."""
    own = [answers[name] for answers in turns]
    result = {
        "prompts": sum(answer["rows"] for answer in own),
        "tokens_per_pass": round(total(own, "tokens") / total(own, "passes"), 3),
        "seconds": round(total(own, "seconds"), 2),
        "repeated_4grams": round(statistics.fmean(answer["repeated_4grams"] for answer in own), 3),
    }
    if "plain" in turns[0]:
        speedups = [pace(answers["plain"]) / pace(answers[name]) for answers in turns]
        result |= {"speedup": round(statistics.median(speedups), 3), "speedups": [round(s, 3) for s in speedups]}
    if "identical" in own[0]:
        gaps = [gap for answer in own for gap in answer["gaps"] if gap is not None]
        result |= {"identical": total(own, "identical"), "largest_gap": max(gaps, default=0.0)}
    return result


def fastest_setting(domains: dict[str, dict[str, dict]], family: str, settings: Iterable[str]) -> str:
    """The setting of a family of methods with the largest speedup, as the geometric mean over domains.

    Args:
        domains (`dict`): Made by [`summarize`]. The methods have the names `FAMILY: SETTING`.
        family (`str`): The family.
        settings (`Iterable[str]`): Its settings.
    """

    def mean_speedup(setting: str) -> float:
        return statistics.geometric_mean(methods[f"{family}: {setting}"]["speedup"] for methods in domains.values())

    return max(settings, key=mean_speedup)


def total(answers: list[dict], name: str) -> float:
    """The sum of one number."""
    return sum(answer[name] for answer in answers)


def pace(answer: dict) -> float:
    """Seconds per token."""
    return answer["seconds"] / answer["tokens"]
