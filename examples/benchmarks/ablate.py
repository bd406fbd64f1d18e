#!/usr/bin/env python
"""Train short with one part of the recipe off at a time, and measure each on held-out text.

    python examples/benchmarks/ablate.py --base BASE --data DATA --output docs/results/ablation.json

Every run has the same number of steps, data and seed. The last line printed is one JSON document.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from report import finish

from hf_mtp.measuring import describe_machine

HERE = Path(__file__).resolve().parent
# Arguments of train_reference.py, by name of the run.
RUNS = {
    "default": [],
    "sampler off": ["--adapter", "sampler=False"],
    "latent consistency off": ["--set", "lcm_weight=0.0"],
    "sampler as in the paper (not residual)": ["--adapter", "sampler_residual=False"],
    "AdamW for all parameters": ["--set", "muon=False"],
    "targets from the data": ["--set", "targets='data'"],
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="base model: folder or Hub id")
    parser.add_argument("--data", required=True, help="folder with the text")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each run")
    parser.add_argument("--prompts", type=int, default=24, help="held-out texts per domain")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS), help="some of the runs")
    return parser.parse_args()


def run(name: str, args: argparse.Namespace, folder: Path) -> dict:
    """Trains and measures one variant, each in a process of its own."""
    common = ["--base", args.base, "--data", args.data, "--threads", str(args.threads)]
    train = [sys.executable, HERE / "train_reference.py", *common, "--output", folder, "--steps", str(args.steps)]
    subprocess.run([*train, *RUNS[name]], check=True, stdout=subprocess.DEVNULL)
    measure = [sys.executable, HERE / "measure_reference.py", *common, "--adapter", folder, "--simulate-only"]
    printed = subprocess.run(
        [*measure, "--prompts", str(args.prompts)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    report = json.loads(printed.splitlines()[-1])
    return {
        "name": name,
        "tokens_per_step": {
            domain: result["simulated"]["tokens_per_step"] for domain, result in report["domains"].items()
        },
        **{key: report["training"][key] for key in ("recipe", "adapter", "steps", "seconds", "masks_trained")},
    }


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    report = {"machine": describe_machine(), "steps": args.steps, "prompts": args.prompts, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            report["runs"].append(run(name, args, Path(folder, name.replace(" ", "_"))))
            print(name, report["runs"][-1]["tokens_per_step"], flush=True)
    finish(report, args.output)


if __name__ == "__main__":
    main()
