"""Tables of what training takes, from what examples/benchmarks/measure_training.py wrote."""

from tables import load, machine, table

PAPER = {
    "weights": "weights",
    "keys_and_values": "keys and values",
    "copies": "copies for one chunk of masks",
    "states": "states of one chunk of masks",
    "logits": "logits of 1,024 rows",
    "adapter": "adapter, gradients, AdamW",
}


def training_cost() -> str:
    """Time and memory, compared with TRL's SFTTrainer and a plain LoRA."""
    report = load("training")
    rows = [
        [
            row["method"],
            f"{row['positions_per_step']:,.0f}",
            f"{row['seconds_per_step']:.2f} s",
            f"{1000 * row['seconds_per_1000_positions']:.0f} ms",
            f"{row['memory_mib']:,} MiB",
        ]
        for row in report["methods"]
    ]
    head = ["method", "trained positions per step", "a step", "1,000 positions", "peak memory"]
    return table(head, rows) + f"\n{machine(report)}.\n"


def training_memory() -> str:
    """Peak memory by length and by number of blocks."""
    rows = [
        [
            f"{row['tokens']:,}",
            f"{row['blocks']:,}",
            "in chunks" if row["in_parts"] else "at once",
            f"{row['memory_mib']:,} MiB",
        ]
        for row in load("training")["memory"]
    ]
    return table(["tokens", "blocks of 8 masks", "backward", "peak memory"], rows)


def on_paper() -> str:
    """Computed memory of a long context, by item."""
    rows = [
        [
            f"{row['base']}{' in 4 bits' if row['bits'] == 4 else ''}, {row['attention']}",
            *(f"{row[name] / 2**30:.1f}" for name in PAPER),
            f"**{sum(row[name] for name in PAPER) / 2**30:.1f}**",
        ]
        for row in load("training")["on_paper"]
    ]
    return table(["base", *PAPER.values(), "total, GiB"], rows)


def adapter_sizes() -> str:
    """Sizes of adapters of rank 16, in percent of their bases."""
    rows = [
        [
            row["base"],
            f"{row['adapter_parameters'] / 1e6:.0f}M",
            *(f"{100 * size * row['adapter_parameters'] / row['base_bytes']:.1f} %" for size in (2, 4)),
        ]
        for row in load("training")["adapters"]
    ]
    return table(["base, in bfloat16", "parameters at r = 16", "file in bfloat16", "file in float32"], rows)
