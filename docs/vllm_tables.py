"""The tables of the integration with vLLM, from what examples/benchmarks/measure_vllm.py wrote."""

from tables import aim, load, machine, table

from hf_mtp.decoding.schedule.costs import PassCosts
from hf_mtp.serving.vllm.schedule import MaskSchedule

REQUESTS = (1, 2, 4, 8, 16, 32)
SAME = {
    "vLLM without hf_mtp": "`linear`: same tokens as vLLM without hf_mtp",
    "hf_mtp, plain": "`linear`: same tokens as plain decoding by hf_mtp",
    "hf_mtp, linear": "`linear`: same tokens as linear decoding by hf_mtp",
    "vLLM, auto": "`auto`: same tokens as vLLM without hf_mtp",
}


def vllm() -> str:
    """Tokens, passes and start on a real model."""
    report = load("vllm")
    passes, start, lines = report["passes"], report["start"], report["code_lines"]
    over = {clock: start["auto"][clock] - start["plain"][clock] for clock in start["plain"]}
    rows = [[SAME[name], f"{same} of {report['prompts']} prompts"] for name, same in report["identical"].items()]
    rows += [
        ["`linear`: passes, and those of linear decoding by hf_mtp", f"{passes['vLLM']} and {passes['hf_mtp']}"],
        [
            "`auto`: extra start-up time over vLLM without hf_mtp",
            f"{over['seconds']:.1f} s ({over['processor_seconds']:.1f} s of CPU time)",
        ],
        ["lines of code", str(lines)],
    ]
    is_same = set(report["identical"].values()) == {report["prompts"]}
    aims = (
        aim("the same tokens for every prompt", is_same),
        aim("passes within 1 %", abs(passes["vLLM"] / passes["hf_mtp"] - 1) <= 0.01),
        aim("a start at most 5 s longer", over["seconds"] <= 5),
        aim("at most 450 lines", lines <= 450),
    )
    note = (
        f"Aims: {'; '.join(aims)}.\n\nSmolLM2-135M-Instruct, float32, greedy, {report['prompts']} prompts in one "
        f"batch, {report['new_tokens']} new tokens, k={report['k']}, vLLM {report['vllm']}; shortest of "
        f"{report['rounds']} starts; load average {report['load_average']:.1f}; {machine(report)}."
    )
    return table(["", ""], rows) + f"\n{note}\n"


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
    why = "Masks do not pay at these costs, so `auto` decodes plainly: vLLM's LoRA is slow on a CPU. "
    verdict = "" if any(masks != "0" for _, masks, *_ in rows) else why
    return table(head, rows) + f"\n{verdict}{note}. {machine(report)}; attention left out.\n"
