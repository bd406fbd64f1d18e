"""The results of an evaluation as tables in Markdown: [`table_page`], and the section of a model card."""

from collections.abc import Callable

from ...adapter.card import EVALUATION_BEGIN, EVALUATION_END
from ..markdown import machine_line, markdown_table
from ..methods import PLAIN, DecodingMethod
from .results import Results, Summary

BUSY = 0.75  # processes that wait for a processor besides this one, on average


def table_page(results: Results) -> str:
    """The whole of `table.md`: the paper's table, speed, all figures, acceptance and how they were measured.

    Args:
        results ([`Results`]): The results.
    """
    if not results.domains:
        return "# Evaluation\n\nThere are no results: the run was interrupted before the first prompt was finished.\n"
    sections = {
        "Tokens per pass": tokens_table(results),
        "Speed by the wall clock": speed_table(results),
        "Acceptance per position": acceptance_table(results),
        **({"Simulated and decoded": simulated_table(results)} if results.simulated else {}),
        "All figures": full_table(results),
        "How it was measured": notes(results),
    }
    title = f"# Evaluation of {results.settings.model} on {results.settings.suite['name']}\n"
    return "\n".join([title, *(f"## {name}\n\n{text}\n" for name, text in sections.items())])


def card_section(results: Results) -> str:
    """The section of a model card, between marks by which it is found again.

    Args:
        results ([`Results`]): The results.
    """
    tables = f"Tokens per pass:\n\n{tokens_table(results)}\n\nSpeed by the wall clock:\n\n{speed_table(results)}"
    return f"{EVALUATION_BEGIN}\n## Evaluation\n\n{tables}\n\n{notes(results)}\n{EVALUATION_END}\n"


def tokens_table(results: Results) -> str:
    """Tokens per pass by domain and method, pooled over answers."""
    return _by_method(results, lambda row: f"{row.tokens_per_pass:.2f}")


def speed_table(results: Results) -> str:
    """Speed against plain decoding by domain and method: the median over prompts, and the quartiles."""
    return _by_method(results, _speed)


def acceptance_table(results: Results) -> str:
    """How often the first, second ... draft of a pass was accepted, over all domains."""
    methods = {method: row.acceptance_per_position for method, row in results.overall.items()}
    drafting = {method: rates for method, rates in methods.items() if rates}
    if not drafting:
        return "No method drafted a token."
    positions = max(map(len, drafting.values()))
    rows = [
        [method, *(f"{rate:.2f}" for rate in rates), *[""] * (positions - len(rates))]
        for method, rates in drafting.items()
    ]
    return markdown_table(["method", *map(str, range(1, positions + 1))], rows)


def simulated_table(results: Results) -> str:
    """Tokens per pass that an evaluation in training computes from the same answers, beside the decoded ones."""
    method = DecodingMethod("quadratic", results.settings.adapter["k"]).name
    rows = []
    for domain, told in results.simulated.items():
        decoded = results.domains[domain][method].tokens_per_pass
        rows.append([domain, f"{told:.3f}", f"{decoded:.3f}", f"{100 * (told / decoded - 1):+.1f} %"])
    return markdown_table(["domain", "simulated", method, "difference"], rows)


def full_table(results: Results) -> str:
    """Every figure of every domain and method."""
    head = [
        "domain",
        "method",
        "tokens per pass",
        "mean of means",
        "speed",
        "tokens/s",
        "same text",
        "repeated 4-grams",
    ]
    rows = [
        [
            domain,
            method,
            f"{row.tokens_per_pass:.2f}",
            f"{row.tokens_per_pass_mean:.2f}",
            _speed(row),
            f"{row.tokens_per_second:.1f}",
            f"{row.identical}/{row.prompts}",
            f"{row.repeated_4grams:.2f}",
        ]
        for domain, methods in results.domains.items()
        for method, row in methods.items()
    ]
    return markdown_table(head, rows)


def notes(results: Results) -> str:
    """How the figures were measured, and what to know about them."""
    settings, adapter = results.settings, results.settings.adapter
    lines = [
        "Greedy decoding until the end-of-sequence token. Tokens per pass are new tokens divided by forward passes "
        "of the base, pooled over answers. They include the token that the base adds to each pass (the bonus "
        "token), the end-of-sequence token and prefill, so plain decoding has 1. Speed is the seconds of plain "
        "decoding divided by those of the method: the median over prompts, and the quartiles. Every prompt was "
        "decoded with all methods in turn, after a warm-up.",
        f"{results.overall[PLAIN].prompts} of {settings.suite['prompts']} prompts, at most {settings.max_new_tokens} "
        f"new tokens, batch {settings.batch_size}, {settings.dtype} on "
        f"{settings.machine.get('accelerator', settings.device)}; "
        f"{machine_line(settings.machine)}. Adapter {adapter['fingerprint']}, k={adapter['k']}, r={adapter['r']}.",
        *_warnings(results),
        *(f"Left out: {name}. {reason}" for name, reason in results.left_out.items()),
    ]
    return "\n\n".join(lines) + "\n"


def _by_method(results: Results, cell: Callable[[Summary], str]) -> str:
    """A row for each domain, a column for each method except plain decoding."""
    methods = [method for method in results.overall if method != PLAIN]
    rows = [[domain, *(cell(row[method]) for method in methods)] for domain, row in results.domains.items()]
    return markdown_table(["domain", *methods], rows)


def _speed(row: Summary) -> str:
    return f"{row.speedup:.2f}x ({row.speedup_low:.2f}-{row.speedup_high:.2f})"


def _warnings(results: Results) -> list[str]:
    found = [] if results.complete else ["**Partial:** the run was interrupted. Run the same command to resume."]
    if results.load_average is not None and results.load_average > BUSY:
        found.append(
            f"**Busy machine:** other programs were running when it started (load average {results.load_average}). "
            "This does not affect tokens per pass, except for `auto`, which uses measured costs. Each speedup "
            "compares runs close in time: trust it only if its quartiles are close."
        )
    return found
