"""Tables of docs/benchmarks.md: the reference adapter, what its passes cost, and the recipe that trained it."""

from tables import load, machine, table

NAMES = {"maths": "maths (GSM8K)", "chat": "chat", "python": "Python"}


def greedy() -> str:
    """Both strategies, all domains."""
    report = load("reference")
    rows = [
        [
            NAMES[domain],
            strategy,
            f"{row['tokens_per_step']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['identical']}/{row['prompts']}",
            f"{row['repeated_4grams']:.2f}",
        ]
        for domain, result in report["domains"].items()
        for strategy, row in result.items()
        if strategy in ("quadratic", "linear")
    ]
    head = ["domain", "strategy", "tokens per step", "wall-clock against plain", "identical", "repeated 4-grams"]
    return table(head, rows) + f"\n{machine(report)}.\n"


def simulated() -> str:
    """Held-out text, the base's argmax as the truth."""
    report = load("reference")
    rows = []
    for domain, result in report["domains"].items():
        values = result["simulated"]
        accuracy = " ".join(f"{values[f'accuracy_{step}']:.2f}" for step in range(1, 9))
        rows.append([NAMES[domain], f"{values['tokens_per_block']:.2f}", accuracy])
    return table(["domain", "tokens per block", "accuracy of masks 1 to 8"], rows)


def training() -> str:
    """How the reference adapter was trained."""
    run = load("reference")["training"]
    settings = ", ".join(f"`{name}={value}`" for name, value in run["settings"].items())
    rows = [
        ["time", f"{run['seconds'] / 60:.1f} minutes on {run['threads']} threads"],
        ["steps", f"{run['steps']:,}"],
        ["masks trained on", f"{run['masks_trained']:,}, {run['masks_trained'] / run['seconds']:,.0f} per second"],
        [
            "trainable parameters",
            f"{run['trainable_parameters']:,} (k={run['adapter']['k']}, r={run['adapter'].get('r', 128)})",
        ],
        ["settings", settings],
    ]
    return table(["", ""], rows)


def decoding() -> str:
    """Speed of every exact way to decode, compared with plain decoding."""
    report = load("decoding")
    rows = []
    for domain, result in report["domains"].items():
        chance = f"T = {result['temperature']}" if result["do_sample"] else "greedy"
        rows += decoding_rows(f"{NAMES[domain]}, {chance}", result["ways"], report)
    rows += decoding_rows("maths, T = 1", report["temperature 1"], report)
    rows += decoding_rows("maths, untrained adapter", report["untrained"], report)
    for size, ways in report["batches"].items():
        rows += decoding_rows(f"maths, batch of {size}", ways, report)
    head = ["text", "method", "speed", "tokens per pass", "identical to plain"]
    return table(head, rows) + f"\n{machine(report)}. k={report['arguments']['k']}, r={report['arguments']['r']}.\n"


def decoding_rows(title: str, ways: dict[str, dict], report: dict) -> list[list[str]]:
    """A row for each way except plain decoding, whose speed is 1."""
    sampled = title.count("T =")
    return [
        [
            title,
            name,
            f"{row['speedup']:.2f}x",
            f"{row['tokens_per_pass']:.2f}",
            "sampled" if sampled else ("all" if row["identical"] == ways["plain"]["identical"] else "NOT ALL"),
        ]
        for name, row in ways.items()
        if name != "plain"
    ]


def sampling() -> str:
    """Rejection sampling against noise that drafting and verification share."""
    report = load("sampling")
    found = {(row["temperature"], row["mask"], row["way"]): row["rate"] for row in report["rates"]}
    ways = list(dict.fromkeys(row["way"] for row in report["rates"]))
    places = sorted({(temperature, mask) for temperature, mask, _ in found})
    head = ["", *(f"T = {temperature}, mask {mask}" for temperature, mask in places)]
    rows = [[_counted(way), *(f"{found[(*place, way)]:.3f}" for place in places)] for way in ways]
    note = f"\n{report['tokens']:,} tokens of {report['texts']} answers; {machine(report)}.\n"
    return table(head, rows) + note


def _counted(way: str) -> str:
    """`1 candidate` and `2 candidates` instead of `1 candidate(s)` and `2 candidate(s)`."""
    return way.replace(" 1 candidate(s)", " 1 candidate").replace("(s)", "s")


def rounding() -> str:
    """What makes passes over several columns round differently."""
    report = load("rounding")
    rows = [
        [variant, *(f"{count} of {report['columns']}" for count in counts.values())]
        for variant, counts in report["equal"].items()
    ]
    masks = [f"{masks} masks" if masks != "0" else "no masks" for masks in next(iter(report["equal"].values()))]
    orders = ", ".join(f"{row['all_up_to']} ({row['outputs']} × {row['inputs']})" for row in report["products"])
    note = f"Most rows with which a product sums in the order of a single row, by outputs × inputs: {orders}"
    return table(["pass", *masks], rows) + f"\n{note}. {machine(report)}; {report['dtype']}.\n"


def passes() -> str:
    """What a pass with masks costs, milliseconds."""
    report = load("pass")
    kinds = ("bare base", "with masks", "drafting", "without LoRA")
    rows = [
        [str(row["columns"]), *(f"{row[kind]:.1f}" for kind in kinds), f"{_whole(row) / row['bare base']:.2f}x"]
        for row in report["rows"]
    ]
    head = ["columns", *kinds, "with masks and drafting, over the bare base"]
    return table(head, rows) + f"\n{machine(report)}; {report['dtype'].removeprefix('torch.')}.\n"


def _whole(row: dict) -> float:
    return row["with masks"] + row["drafting"]


def revisions() -> str:
    """Decoding by this version against the one before, paired."""
    report = load("revisions")
    rows = [
        [
            way,
            f"{row['seconds_before']:.2f} s",
            f"{row['seconds_now']:.2f} s",
            f"{row['faster']:.2f}x",
            f"{row['lowest']:.2f} to {row['highest']:.2f}",
            f"{row['identical']}/{row['prompts']}",
        ]
        for way, row in report["ways"].items()
    ]
    head = ["method", "before", "now", "before / now", "range", "same text"]
    return table(head, rows) + f"\n{machine(report)}; {report['dtype']}.\n"


def ablation() -> str:
    """The gain and the cost of each single change."""
    report = load("ablation")
    rows = [
        [
            f"{run['group']}: {run['name']}" if run["group"] != run["name"] else f"**{run['name']}**",
            *(f"{run['tokens_per_step'][domain]:.2f}" for domain in NAMES),
            f"{run['cpu_seconds']:.0f}",
            f"{run['masks_trained'] / 1000:.0f}k",
            f"{run['trainable_parameters'] / 1e6:.2f}M",
            f"{run['training_memory_mib']}",
        ]
        for run in report["runs"]
    ]
    head = ["run", *NAMES.values(), "CPU seconds", "masks", "parameters", "memory, MiB"]
    return table(head, rows) + f"\n{report['steps']} steps each. {machine(report)}.\n"


def gate() -> str:
    """The base's own loss before and after training, with and without the gate."""
    rows = [
        [run["name"], *(f"{run['base_loss_before'][d]:.4f} → {run['base_loss_after'][d]:.4f}" for d in NAMES)]
        for run in load("ablation")["runs"]
        if run["group"] == "gate"
    ]
    return table(["nats per token of the base, before → after", *NAMES.values()], rows)


def recipes() -> str:
    """The settings before and after the ablation, trained side by side."""
    reports = {name: load(f"recipe_{name}") for name in ("before", "now")}
    rows = []
    for name, report in reports.items():
        results = [report["domains"][domain]["simulated"] for domain in NAMES]
        training = report["training"]
        rows.append(
            [
                name,
                *(f"{result['tokens_per_step']:.2f}" for result in results),
                *(f"{result['tokens_per_block']:.2f}" for result in results),
                f"{training['steps']:,}",
                f"{training['masks_trained'] / 1e6:.2f}M",
            ]
        )
    before, now = ([float(cell) for cell in row[1:7]] for row in rows)
    rows.append(["gain", *(f"{100 * (b / a - 1):+.0f} %" for a, b in zip(before, now, strict=True)), "", ""])
    head = ["settings", *NAMES.values(), *(f"{name}, per block" for name in NAMES.values()), "steps", "masks"]
    return table(head, rows) + f"\n{machine(reports['now'])}.\n"


def foreseen() -> str:
    """Tokens per step that an evaluation predicts for the base's own answers, and those of decoding them."""
    report = load("recipe_now")
    rows = []
    for domain, name in NAMES.items():
        row = report["domains"][domain]["quadratic"]
        told, took = row["foreseen_tokens_per_step"], row["tokens_per_step"]
        rows.append(
            [
                name,
                f"{told:.3f}",
                f"{took:.3f}",
                f"{100 * (told / took - 1):+.1f} %",
                f"{row['identical']}/{row['prompts']}",
            ]
        )
    return table(["domain", "evaluation", "decoding", "difference", "identical"], rows) + f"\n{machine(report)}.\n"
