"""Tables and texts of docs/scenarios.md, from what examples/scenarios/run_all.py wrote."""

import textwrap

from tables import load, machine, table

WIDTH = 100
MISSING = "Not measured yet.\n"
BUSY = 0.75  # programs that run at the same time, on average


def scenarios() -> str:
    """What each scenario took, against plain decoding."""
    report = load("scenarios")
    rows = []
    for one in report["scenarios"]:
        runs, count = one["runs"], len(one["texts"])
        for name, run in runs.items():
            if name == "plain":
                continue
            speeds = [runs["plain"][clock] / run[clock] for clock in ("processor_seconds", "seconds")]
            rows.append(
                [
                    f"{one['scenario']}, {one['dtype']}",
                    {"mtp": "`mtp=True`", "bit for bit": "`mtp_bitwise=True`"}[name],
                    f"{run['tokens_per_pass']:.2f}",
                    *(f"{speed:.2f}x" for speed in speeds),
                    f"{run['same']}/{count}",
                ]
            )
    head = ["scenario", "method", "tokens per pass", "speedup by CPU time", "by wall clock", "same text"]
    notes = [f"{machine(report)}."]
    if not any("bit for bit" in one["runs"] for one in report["scenarios"]):
        notes.append("Short answers, without the bit for bit mode (`--quick`).")
    if report["load_average"] > BUSY:
        notes.append(
            f"**Busy machine:** the load average was {report['load_average']:.0f}. Trust CPU time rather than "
            "wall-clock time. `auto` measures the costs of passes in wall-clock time, so it chose worse than on an "
            "idle machine."
        )
    return table(head, rows) + "\n" + " ".join(notes) + "\n"


def found(scenario: str) -> dict | None:
    """The report of a scenario, if it was run."""
    return next((one for one in load("scenarios")["scenarios"] if one["scenario"] == scenario), None)


def text_of(scenario: str, only: int | None = None) -> str:
    """The prompts of a scenario and its answers by `mtp=True`, as a block."""
    one = found(scenario)
    if one is None:
        return MISSING
    pairs = list(zip(one["prompts"], one["texts"], strict=True))[:only]
    parts = [f"> {wrapped(prompt)}\n\n{wrapped(text.strip())}" for prompt, text in pairs]
    return "```text\n" + "\n\n".join(parts) + "\n```\n"


def wrapped(text: str) -> str:
    """Long lines of prose as several."""
    return "\n".join(textwrap.fill(line, WIDTH) if len(line) > WIDTH else line for line in text.splitlines())


def code_text() -> str:
    """Completed functions."""
    one = found("code completion")
    if one is None:
        return MISSING
    pairs = zip(one["prompts"], one["texts"], strict=True)
    return "```text\n" + "\n\n\n".join(f"{prompt}{text.rstrip()}" for prompt, text in pairs) + "\n```\n"


def mathematics_text() -> str:
    """Solved problems."""
    return text_of("step-by-step mathematics")


def long_form_text() -> str:
    """A long text."""
    return text_of("long-form writing")


def chat_text() -> str:
    """A conversation."""
    return text_of("real-time chat")


def data_text() -> str:
    """Generated data, half of it."""
    return text_of("batch generation of data", only=4)
