"""Tables of docs/serving.md and docs/demo.md, from what measure_server.py and measure_demo.py wrote."""

from tables import aim, load, machine, table

LOAD_ROWS = {
    "tokens per second": lambda load: f"{load['tokens_per_second']:.0f}",
    "seconds per request, median": lambda load: f"{load['median_seconds']:.2f}",
    "rows per pass": lambda load: f"{load['rows_per_pass']:.1f}",
    "tokens per pass and row": lambda load: f"{load['tokens_per_pass']:.2f}",
    "CPU time of the server per token": lambda load: f"{load['cpu_milliseconds_per_token']:.1f} ms",
    "requests": lambda load: f"{load['requests']:,}",
    "failed": lambda load: f"{load['failures']:,}",
    "responses that differ from plain decoding": lambda load: f"{load['other_than_plain']:,}",
    "responses to another prompt": lambda load: f"{load['of_another_prompt']:,}",
}


def server() -> str:
    """One client at a time, and many, of a toy."""
    return _server("server")


def server_smollm2() -> str:
    """The same of a real model."""
    return _server("server_smollm2")


def _server(name: str) -> str:
    report = load(name)
    one, many = loads = report["loads"]
    head = ["", *(f"{load['clients']} client{'s' if load['clients'] > 1 else ''}" for load in loads)]
    rows = [[name, *(show(load) for load in loads)] for name, show in LOAD_ROWS.items()]
    overhead, gain = report["overhead"], many["tokens_per_second"] / one["tokens_per_second"]
    lost = sum(load["failures"] + load["of_another_prompt"] for load in loads)
    aims = (
        aim("at most 5 % of overhead", overhead["overhead"] <= 0.05),
        aim(f"1.5 times the tokens per second with {many['clients']} clients", gain >= 1.5),
        aim("no request fails or gets the response to another", lost == 0),
    )
    about = (
        f"One client waits {overhead['one_client_seconds']:.2f} s for a response that `generate` in its own process "
        f"computes in {overhead['in_process_seconds']:.2f} s, an overhead of {overhead['overhead']:.1%}. "
        f"{many['clients']} clients get {gain:.1f} times the tokens per second of one. Aims: {'; '.join(aims)}.\n\n"
        f"A base of {report['parameters'] / 1e6:.0f} million parameters, {report['dtype']}; {report['prompts']} "
        f"prompts, greedy, at most {report['new_tokens']} new tokens; {one['seconds']:.0f} and {many['seconds']:.0f} "
        f"seconds; load average {report['load_average']:.1f} before; {machine(report)}."
    )
    return table(head, rows) + f"\n{about}\n"


def demo() -> str:
    """How soon the demo shows a token, and whether its races are fair."""
    report = load("demo")
    rows = [
        [f"{window} window: {what}", *(f"{times[name][of]:.2f} s" for of in ("least", "median", "most"))]
        for window, times in report["first_token"].items()
        for name, what in (("seconds", "from the press to the first token"), ("processor_seconds", "CPU time"))
    ]
    presses = report["first_token"]["wide"]["seconds"]["presses"]
    slowest = max(times["seconds"]["most"] for times in report["first_token"].values())
    ratio = report["seconds_in_race_over_alone"]
    about = (
        f"{presses} presses on each window. {aim('We aimed at a first token within 2 seconds', slowest <= 2)}. In a "
        f"race, each side's own clock showed {ratio['plain']:.2f} times (plain decoding) and {ratio['mtp']:.2f} times "
        f"(multi-token prediction) the seconds that it took alone, for {report['new_tokens']} new tokens.\n\n"
        f"{report['base']}, {report['dtype']}; load average {report['load_average']:.1f} before; {machine(report)}."
    )
    return table(["", "least", "median", "most"], rows) + f"\n{about}\n"
