#!/usr/bin/env python
"""All five scenarios, one after the other; writes what they printed as JSON.

    python examples/scenarios/run_all.py docs/results/scenarios.json && python docs/make_tables.py

The batch is decoded in float32, too, where its text has to be the same. The file is written after each scenario.
`--quick` is for a busy machine: answers of a third of the length, without the bit for bit mode and without float32.
"""

import argparse
import json
import os
from pathlib import Path

import chat
import code_completion
import data_generation
import long_form
import mathematics
import torch
from scenario import METHODS, Scenario, add_options, load, show

from hf_mtp.base.machine import describe_machine

SCENARIOS = [module.SCENARIO for module in (code_completion, mathematics, long_form, chat, data_generation)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file for the report")
    add_options(parser)
    parser.add_argument("--quick", action="store_true", help="shorter, and with fewer methods")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    everything = {"machine": describe_machine(), "load_average": os.getloadavg()[0], "scenarios": []}
    again = {} if args.quick else {"float32": [data_generation.SCENARIO]}
    for dtype, scenarios in {args.dtype: SCENARIOS, **again}.items():
        model, tokenizer = load(args.base, args.adapter, dtype)
        for scenario in scenarios:
            report = report_of(scenario, model, tokenizer, args)
            everything["scenarios"].append(report)
            args.output.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


def report_of(scenario: Scenario, model, tokenizer, args: argparse.Namespace) -> dict:
    """The report of one scenario, which is also printed."""
    new_tokens, methods = (
        (scenario.new_tokens // 3, ("plain", "mtp")) if args.quick else (scenario.new_tokens, METHODS)
    )
    report = scenario.report(model, tokenizer, new_tokens, args.repeats, methods)
    print(f"\n{scenario.name}, {report['dtype']}\n")
    show(report)
    return report


if __name__ == "__main__":
    main()
