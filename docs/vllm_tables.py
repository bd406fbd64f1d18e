"""The tables of the integration with vLLM, from what examples/benchmarks/measure_vllm.py wrote."""

from tables import load, machine, table

from hf_mtp.decoding.schedule.costs import PassCosts
from hf_mtp.serving.vllm.schedule import MaskSchedule

REQUESTS = (1, 2, 4, 8, 16, 32)


def vllm() -> str:
    """Tokens, passes and start on a real model."""
    report = load("vllm")
    passes, start = report["passes"], report["start"]
    over = {clock: start["auto"][clock] - start["plain"][clock] for clock in start["plain"]}
    rows = [
        [f"same tokens as {name}", f"{same} of {report['prompts']} prompts"]
        for name, same in report["identical"].items()
    ]
    rows += [
        ["passes, against hf_mtp's linear decoding", f"{passes['vLLM']} and {passes['hf_mtp']}"],
        [
            "longer start than vLLM alone",
            f"{over['seconds']:.1f} s, of these {over['processor_seconds']:.1f} s of the processor",
        ],
        ["lines of code", str(report["code_lines"])],
    ]
    note = f"SmolLM2-135M-Instruct, float32, {report['new_tokens']} new tokens, k={report['k']}, vLLM {report['vllm']}"
    return table(["", ""], rows) + f"\n{note}; {machine(report)}.\n"


def vllm_load() -> str:
    """What the rule chooses at these costs, by the number of requests."""
    report = load("vllm")
    schedule = MaskSchedule(report["k"])
    points = [[tuple(point) for point in report["costs"][name]] for name in ("plain", "masked")]
    schedule.costs = PassCosts(*points)
    for place, rate in enumerate(report["rates"]):
        schedule.acceptance.rates[place] = rate
        schedule.acceptance.survival[place] = rate * (schedule.acceptance.survival[place - 1] if place else 1.0)
    rows = []
    for requests in REQUESTS:
        _, masks = schedule.plan(requests)
        columns, price = schedule.columns(requests, masks), schedule.price(requests, masks)
        rows.append([str(requests), str(masks), f"{columns:.0f}", f"{schedule.price(requests, 0) / price:.2f}"])
    head = ["requests", "masks of each", "columns of a pass", "tokens for the same cost, against no masks (modelled)"]
    costs = ", ".join(f"{columns}: {cost:.2f}" for columns, cost in schedule.costs.masked)
    plain = ", ".join(f"{columns}: {cost:.2f}" for columns, cost in schedule.costs.plain)
    note = f"Cost of passes by columns, in passes over one token: without masks {plain}; with masks {costs}"
    return table(head, rows) + f"\n{note}. {machine(report)}; attention left out.\n"
