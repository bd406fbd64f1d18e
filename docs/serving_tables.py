"""The table of docs/serving.md, from what examples/benchmarks/measure_server.py wrote."""

from tables import load, machine, table


def server() -> str:
    """One client at a time, and many."""
    report = load("server")
    rows = [
        [
            load["clients"],
            f"{load['tokens_per_second']:.0f}",
            f"{load['rows_per_pass']:.1f}",
            f"{load['tokens_per_pass']:.2f}",
            f"{load['median_seconds']:.2f}",
            load["requests"],
            load["failures"],
            load["other_than_plain"],
        ]
        for load in report["loads"]
    ]
    head = [
        "clients", "tokens per second", "rows per pass", "tokens per pass and row", "median seconds of a request",
        "requests", "failures", "other text than plain decoding's",
    ]  # fmt: skip
    about = (
        f"Many clients get {report['gain']:.1f} times the tokens per second of one. One client waits "
        f"{report['overhead']['overhead']:.1%} longer than `generate` in the same process takes. "
        f"{report['prompts']} prompts, up to {report['new_tokens']} tokens, "
        f"{str(report['dtype']).removeprefix('torch.')}; {machine(report)}."
    )
    return table(head, rows) + f"\n{about}\n"
