"""The tables of the real model, from what examples/smollm2/measure.py and columns.py wrote."""

import statistics

from tables import aim, load, machine, table

NAMES = {"maths": "maths (GSM8K)", "code": "code (MBPP)", "chat": "chat"}
OTHERS = ("prompt lookup", "early exit", "small draft")
STRATEGIES = ("linear", "quadratic", "auto")
K = (1, 2, 4, 8)


def smollm2() -> str:
    """The first screen: `auto` against plain decoding and against the fastest baseline."""
    report = load("smollm2")
    rows = []
    for domain, methods in report["domains"].items():
        auto, bitwise, (other, best) = methods["auto"], methods["auto, bitwise"], best_peer(methods)
        rows.append(
            [
                NAMES[domain],
                f"{auto['tokens_per_pass']:.2f}",
                f"**{auto['speedup']:.2f}x**",
                f"{over(auto, best):.2f}x ({other})",
                f"{same(auto)}, {same(best)}",
                f"{bitwise['speedup']:.2f}x, {same(bitwise)}",
            ]
        )
    head = ["text", "tokens per pass", "speedup", "against the fastest baseline", "same text (ours, baseline)"]
    return table([*head, "bit for bit: speedup, same text"], rows) + note(report)


def best_peer(methods: dict[str, dict]) -> tuple[str, dict]:
    """The fastest method that is not ours, and its numbers."""
    name = max(OTHERS, key=lambda name: methods[name]["speedup"])
    return name, methods[name]


def over(row: dict, other: dict) -> float:
    """How many times as fast one method is as another: the median over the prompts that both decoded."""
    pairs = zip(row["speedups"], other["speedups"], strict=False)
    return statistics.median(own / theirs for own, theirs in pairs)


def same(row: dict) -> str:
    """How many texts are those of plain decoding."""
    return f"{row['identical']}/{row['prompts']}"


def note(report: dict, what: str = "prompts of each kind") -> str:
    """What was measured on which machine."""
    prompts = max(len(methods["plain"]["speedups"]) for methods in report["domains"].values())
    return f"\n{prompts} {what}, {report['new_tokens']} new tokens, {report['dtype']}; {machine(report)}.\n"


def smollm2_methods() -> str:
    """Every method on every domain."""
    report = load("smollm2")
    rows = [
        [
            NAMES[domain],
            name,
            f"{row['speedup']:.2f}x",
            "–" if name == "early exit" else f"{row['tokens_per_pass']:.2f}",
            same(row),
        ]
        for domain, methods in report["domains"].items()
        for name, row in methods.items()
        if not name.startswith("plain")
    ]
    return table(["text", "method", "speed", "tokens per pass", "same text as plain"], rows) + note(report)


def ngram_table() -> str:
    """What masks and the n-gram table bring to `auto`, each alone and together."""
    report = load("ngram_table")
    names = [name for name in report["methods"] if name != "plain"]
    cells = [
        [NAMES[domain], *(f"{rows[name]['speedup']:.2f}x, {rows[name]['tokens_per_pass']:.2f}" for name in names)]
        for domain, rows in report["domains"].items()
    ]
    return table(["text", *names], cells) + note(report)


def divergences() -> str:
    """How near a tie the first tokens were that differ from plain decoding's in half precision."""
    report = load("smollm2")
    found, texts = gaps_of(report["rows"])
    rows = [
        [name, f"{len(gaps)} of {texts[name]}", f"{max(gaps, default=0):.1f}"]
        for name, gaps in found.items()
        if name != "plain"
    ]
    head = ["method", "texts that differ", "largest gap at the first difference, units of rounding"]
    return table(head, rows) + f"\n{machine(report)}; {report['dtype']}.\n"


def gaps_of(rows: list[dict]) -> tuple[dict[str, list[float]], dict[str, int]]:
    """By method: the gaps of all texts that differ, 0 where one text is the start of the other; and how many texts."""
    gaps: dict[str, list[float]] = {}
    texts: dict[str, int] = {}
    for row in rows:
        for name, answer in row["answers"].items():
            gaps.setdefault(name, []).extend(gap or 0.0 for gap in answer["gaps"])
            texts[name] = texts.get(name, 0) + answer["rows"]
    return gaps, texts


def peers() -> str:
    """The settings of others that were tried, and the best ones."""
    report = load("peers")
    rows = []
    for family, best in report["best"].items():
        tried = sum(name.startswith(f"{family}: ") for name in report["methods"])
        speeds = (methods[f"{family}: {best}"]["speedup"] for methods in report["domains"].values())
        rows.append([family, best, str(tried), *(f"{speed:.2f}x" for speed in speeds)])
    head = ["method", "best setting", "settings tried", *(NAMES[domain] for domain in report["domains"])]
    return table(head, rows) + note(report)


def by_k() -> str:
    """The paper's table on the real model: tokens per pass, and speed by the wall clock."""
    report = load("by_k")
    rows = []
    for kind, methods in report["domains"].items():
        for strategy in STRATEGIES:
            found = [methods[f"{strategy}, k={k}"] for k in K]
            rows.append([kind, strategy, *(f"{row['tokens_per_pass']:.2f}, {row['speedup']:.2f}x" for row in found)])
    return table(["text", "strategy", *(f"k = {k}" for k in K)], rows) + note(report)


def batches() -> str:
    """Batches, decoded by `auto` and plainly."""
    report = load("batches")
    rows = [
        [
            name,
            f"{methods['auto']['speedup']:.2f}x",
            f"{methods['auto']['tokens_per_pass']:.2f}",
            same(methods["auto"]),
        ]
        for name, methods in report["domains"].items()
    ]
    head = ["", "speed of `auto` against plain batches", "tokens per pass, all rows", "same text as plain"]
    return table(head, rows) + note(report, "batches of each size")


def temperatures() -> str:
    """What sampling keeps of greedy decoding's tokens per pass."""
    report = load("temperatures")
    rows = []
    for domain, methods in report["domains"].items():
        for strategy in dict.fromkeys(name.rpartition(", ")[0] for name in methods):
            greedy = methods[f"{strategy}, greedy"]["tokens_per_pass"]
            found = [methods[f"{strategy}, T = {t}"]["tokens_per_pass"] for t in (0.7, 1.0)]
            cells = (f"{tokens:.2f} ({tokens / greedy:.2f})" for tokens in found)
            rows.append([NAMES[domain], strategy, f"{greedy:.2f}", *cells])
    head = ["text", "strategy", "greedy", "T = 0.7 (over greedy)", "T = 1.0 (over greedy)"]
    return table(head, rows) + f"\n{machine(report)}; {report['dtype']}.\n"


def quadratic_tokens() -> str:
    """Tokens per pass of quadratic decoding, beside what we aimed at."""
    report, aims = load("tokens"), {"maths": 2.6, "code": 2.3, "chat": 1.8}
    rows = [
        [
            NAMES[domain],
            f"{methods['quadratic']['tokens_per_pass']:.2f}",
            aim(f"{aims[domain]}", methods["quadratic"]["tokens_per_pass"] >= aims[domain]),
            f"{methods['quadratic']['repeated_4grams']:.2f}",
        ]
        for domain, methods in report["domains"].items()
    ]
    return table(["text", "tokens per pass", "target", "repeated 4-grams"], rows) + note(report)


def in_float32() -> str:
    """How many texts are those of plain decoding in float32."""
    report = load("float32")
    rows = [
        [NAMES[domain], same(methods["auto"]), f"{methods['auto']['speedup']:.2f}x"]
        for domain, methods in report["domains"].items()
    ]
    return (
        table(["text", "same text as plain", "speed of `auto` against plain"], rows)
        + f"\n{machine(report)}; {report['dtype']}.\n"
    )


def columns() -> str:
    """What several kinds of drafts bring at several costs of passes."""
    report = load("columns")
    rows = [
        [costs, method, *(_replayed_cell(report["domains"][domain][costs][method]) for domain in NAMES)]
        for costs in report["costs"]
        for method in next(iter(report["domains"].values()))[costs]
    ]
    prompts = next(iter(report["domains"].values()))["prompts"]
    about = (
        f"{prompts} prompts of each domain, {report['new_tokens']} new tokens, greedy, {report['dtype']}; costs on "
    )
    return table(["costs", "drafts", *NAMES.values()], rows) + f"\n{about}{machine(report)}.\n"


def _replayed_cell(row: dict) -> str:
    counts = f", {row['tokens'] / row['passes']:.2f}" if "passes" in row else ""
    return f"{row['tokens'] / row['cost']:.2f}x{counts}"


def smollm2_recipe() -> str:
    """Short trainings for equal processor time, each with one change."""
    report = load("smollm2_recipe")
    rows = [
        [
            f"**{name}**" if number == 0 else name,
            *(f"{rate:.2f}" for rate in run["tokens_per_pass"].values()),
            str(run["steps"]),
            f"{run['masks_trained'] / 1000:.0f}k",
            f"{run['trainable_parameters'] / 1e6:.1f}M",
        ]
        for number, (name, run) in enumerate(report["runs"].items())
    ]
    head = ["run", *NAMES.values(), "steps", "masks", "parameters"]
    what = f"{report['seconds']:.0f} s of CPU time each, {report['prompts']} held-out prompts of each kind"
    return table(head, rows) + f"\n{what}; {machine(report)}.\n"


def smollm2_layers() -> str:
    """What an adapter loses without the LoRA of some layers."""
    report = load("layers")
    whole = report["left_out"]["nothing"]["tokens_per_pass"]
    rows = [
        [
            group,
            str(found["layers"]),
            *(f"{rate:.2f} ({rate / whole[name] - 1:+.0%})" for name, rate in found["tokens_per_pass"].items()),
        ]
        for group, found in report["left_out"].items()
    ]
    head = ["without the LoRA of", "layers", *NAMES.values()]
    return table(head, rows) + f"\n{report['prompts']} held-out prompts of each kind; {machine(report)}.\n"
