"""Tables of docs/support.md, from what make_support.py wrote."""

from tables import load, machine, table

SUPPORT_CHECKS = ("quadratic", "linear", "batch", "static cache", "eager attention")


def support_counts() -> str:
    """How many model types decode in which way."""
    report = load("support")
    types = [row for row in report["rows"] if not row["variant"]]
    counts = [
        ("`auto` is quadratic", sum(row["strategy"] == "quadratic" for row in types)),
        ("`auto` is linear", sum(row["strategy"] == "linear" for row in types)),
        (
            "`auto` is plain, `linear` recomputes the whole sequence",
            sum(row["mode"] == "recomputed chain" for row in types),
        ),
        ("plain only", sum(row["mode"] == "none" for row in types)),
        ("not supported", sum(row["strategy"] is None for row in types)),
        ("all", len(types)),
        ("output differs from plain decoding anywhere", sum(not row["is_exact"] for row in report["rows"])),
    ]
    about = f"\n{machine(report)}. The sweep took {report['seconds']:.0f} seconds.\n"
    return table(["", "model types"], [[name, f"{count}"] for name, count in counts]) + about


def support() -> str:
    """The model types that can be upgraded."""
    rows = []
    for row in load("support")["rows"]:
        if row["strategy"] is not None:
            cells = (_support_cell(row["checks"][check]) for check in SUPPORT_CHECKS)
            rows.append([_support_name(row), row["strategy"], row["mode"], *cells])
    return table(["model type", "`auto`", "mode", *SUPPORT_CHECKS], rows)


def refused() -> str:
    """The model types that cannot be upgraded, and why."""
    rows = [
        [_support_name(row), row["reason"].replace("|", "\\|")]
        for row in load("support")["rows"]
        if row["strategy"] is None
    ]
    return table(["model type", "why"], rows)


def _support_name(row: dict) -> str:
    return f"`{row['model_type']}`" + (f" ({row['variant']})" if row["variant"] else "")


def _support_cell(result: str) -> str:
    return "exact" if result == "exact" else "–" if result.startswith("refused") else result
