"""The tables of the peers that were trained, from what examples/benchmarks/peers.py wrote."""

from smollm2_tables import NAMES
from tables import load, machine, table

TRAINING = {  # which training a method needs
    "Medusa-style heads": "medusa",
    "EAGLE-style head": "eagle",
    "two passes": "ours",
    "ours, auto": "ours",
    "ours, quadratic": "ours",
    "two passes, adapter as shipped": "shipped",
    "ours as shipped, auto": "shipped",
    "ours as shipped, quadratic": "shipped",
}
PARTIAL_PASSES = ("early exit",)  # their drafts are passes over a part of the base


def trained_peers() -> str:
    """Every method: setting, tokens per pass of the base, speed and sameness on each domain, and what it costs."""
    report = load("peers_trained")
    rows = []
    for name in next(iter(report["domains"].values())):
        if name != "plain":
            training = report["trained"].get(TRAINING.get(name), {})
            rows.append(
                [
                    name,
                    report["best"][name],
                    *(_cell(name, methods[name]) for methods in report["domains"].values() if name in methods),
                    _same(report, name),
                    f"{training['parameters'] / 1e6:.1f}M" if training else "–",
                    f"{training['minutes']:.1f}" if "minutes" in training else "–",
                    _memory(report["memory_mib"], name),
                ]
            )
    head = ["method", "setting", *(NAMES[domain] for domain in report["domains"]), "same text"]
    head += ["trained parameters", "minutes", "memory"]
    return table(head, rows) + _note(report)


def _cell(name: str, row: dict) -> str:
    tokens = "–" if name in PARTIAL_PASSES else f"{row['tokens_per_pass']:.2f}"
    return f"{tokens}, {row['speedup']:.2f}x"


def _same(report: dict, name: str) -> str:
    found = [methods[name] for methods in report["domains"].values() if name in methods]
    return f"{sum(row['identical'] for row in found)}/{sum(row['prompts'] for row in found)}"


def _memory(memory: dict[str, float | None], name: str) -> str:
    known = [memory.get(method) for method in ("plain", name)]
    return "–" if None in known else f"{known[1] - known[0]:+.0f} MiB"


def _note(report: dict) -> str:
    prompts = max(len(methods["plain"]["speedups"]) for methods in report["domains"].values())
    kind = "busy" if max(report["load"]) > report["processors"] + 0.5 else "quiet"
    busy = f"a {kind} machine (load {report['load'][0]:g} to {report['load'][1]:g}, {report['processors']} processors)"
    return (
        f"\n{prompts} prompts of each kind, {report['new_tokens']} new tokens, {report['dtype']}, on {busy}; "
        f"{machine(report)}.\n"
    )
