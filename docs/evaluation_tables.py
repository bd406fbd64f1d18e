"""Tables of docs/evaluation.md, from what `hf-mtp verify`, `hf-mtp evaluate` and `hf-mtp probe` wrote."""

from tables import RESULTS, aim, load, machine, table

from hf_mtp.evaluation.ranks.report import papers_claim, rank_table
from hf_mtp.evaluation.ranks.results import load_probe
from hf_mtp.evaluation.speed.results import load_results
from hf_mtp.evaluation.speed.tables import simulated_table, speed_table, tokens_table


def verification() -> str:
    """What `hf-mtp verify` found on SmolLM2."""
    rows, reports = [], load("verify")["reports"]
    for report in reports:
        for one in report["comparisons"]:
            units = [divergence["units"] for divergence in one["divergences"]]
            ties = sum(divergence["tie"] for divergence in one["divergences"])
            gaps = (
                f"{ties} of {len(units)} at ties, within {max(units):g} unit{'' if max(units) == 1 else 's'}"
                if units
                else "–"
            )
            equal = f"{one['answers'] - len(units)} of {one['answers']}"
            rows.append([report["dtype"], one["mode"], one["method"], equal, gaps])
    tests = " and ".join(f"p = {report['p_value']:.2f} in {report['dtype']}" for report in reports)
    head = ["dtype", "decoding", "method", "equal answers", "differences"]
    note = f"Up to {reports[0]['max_new_tokens']} tokens; two-sample test: {tests}; {machine(reports[0])}."
    return f"{table(head, rows)}\n{note}\n"


def commands() -> str:
    """How long the commands take on the toy, beside what we aimed at."""
    report = load("commands")
    aims = {"hf-mtp --help": 1, "hf-mtp verify": 60, "hf-mtp evaluate --suite quick": 180, "hf-mtp probe": 120}
    rows = [
        [f"`{name}`", f"{report['seconds'][name]:.1f} s", aim(f"{most} s", report["seconds"][name] <= most)]
        for name, most in aims.items()
    ]
    return table(["command", "time", "target"], rows) + f"\n{machine(report)}.\n"


def quality() -> str:
    """Logits, scores and passes of upgraded models and of a plain LoRA, beside their base's."""
    report = load("quality")
    texts, questions = report["corpus"]["texts"], report["questions"]
    rows = [
        [row["name"], f"{row['logits']['equal']} of {texts}", *(_task_cell(task) for task in row["tasks"].values())]
        for row in report["models"]
    ]
    head = [
        "model",
        "texts with the base's logits",
        *(f"{task}: right, changed, passes" for task in report["models"][0]["tasks"]),
    ]
    about = (
        f"{questions} questions, answers of up to {report['new_tokens']} tokens; {texts} texts of "
        f"{report['corpus']['tokens']:,} tokens; trainings of {report['training']['steps']} steps on "
        f"{report['training']['texts']} texts; {report['dtype']}, {report['decoding']['mtp_strategy']} decoding with "
        f"k={report['decoding']['mtp_k']}, bit for bit"
    )
    return table(head, rows) + f"\n{about}; {machine(report)}.\n"


def evaluated_tokens() -> str:
    """Tokens per pass of `hf-mtp evaluate` on SmolLM2."""
    return tokens_table(load_results(RESULTS / "evaluation.json")) + "\n"


def evaluated_speed() -> str:
    """Speed of the same run."""
    results = load_results(RESULTS / "evaluation.json")
    settings = results.settings
    about = (
        f"{settings.suite['prompts']} prompts of `{settings.suite['name']}`, up to {settings.max_new_tokens} tokens"
    )
    note = f"{about}, {settings.dtype}; {machine({'machine': settings.machine})}."
    overhead = results.seconds / sum(call.seconds for call in results.calls) - 1
    target = aim("The target was 2 %", overhead <= 0.02)
    measuring = f"Measuring took {overhead:.2%} more time than the calls of `generate`. {target}."
    return f"{speed_table(results)}\n\n{note} {measuring}\n"


def simulated_and_decoded() -> str:
    """Tokens per pass that an evaluation in training computes from the answers, and those of decoding them."""
    return simulated_table(load_results(RESULTS / "evaluation.json")) + "\n"


def probed_ranks() -> str:
    """Ranks of SmolLM2's own future tokens, by source."""
    results = load_probe(RESULTS / "probe.json")
    settings = results.settings
    about = f"{len(results.texts)} prompts of `{settings.suite['name']}`, up to {settings.max_new_tokens} tokens"
    note = f"{about}, k={settings.k}, {settings.dtype}; {machine({'machine': settings.machine})}."
    return f"{rank_table(results)}\n\n{note}\n\n{papers_claim(results)}\n"


def _task_cell(task: dict) -> str:
    return f"{task['score']:.2f}, {task['changed']}, {task['passes']:,}"
