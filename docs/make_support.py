#!/usr/bin/env python
"""Try a tiny random model of every causal type in the installed transformers; writes docs/results/support.json.

    python docs/make_support.py && python docs/make_tables.py

Takes a few minutes. `hf_mtp.check_support` tries a single model.
"""

import argparse
import json
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hf_mtp import check_support
from hf_mtp.base.machine import describe_machine

RESULT = Path(__file__).parent / "results" / "support.json"

# Settings of released models, for types whose config alone makes another kind of model or none.
AS_RELEASED = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16, "num_hidden_layers": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16, "num_hidden_layers": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16, "num_hidden_layers": 32},
}
# Settings that may change the speculation mode of a type; tried in addition to its own.
VARIANTS = {"falcon": {"alibi": True}}
AS_DECODER = {"is_decoder": True}


def rows_to_try() -> list[tuple[str, dict, str]]:
    """Model type, settings, and a name for the settings if the type also has a row without them."""
    rows = []
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows.append((model_type, AS_RELEASED.get(model_type, {}), ""))
        variant = VARIANTS.get(model_type, {})
        if getattr(CONFIG_MAPPING[model_type], "is_decoder", None) is False:
            variant = AS_DECODER
        if variant:
            rows.append((model_type, variant, ", ".join(f"{name}={value}" for name, value in variant.items())))
    return rows


def try_one(model_type: str, settings: dict, variant: str) -> dict:
    """Tries one model type and returns a row of the result."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    row = {"model_type": model_type, "variant": variant, "mode": None, "strategy": None, "checks": {}}
    try:
        report = check_support(CONFIG_MAPPING[model_type](**settings))
    except Exception as error:  # some configs cannot even be made without arguments
        return {
            **row,
            "reason": f"its config alone cannot be made: {' '.join(str(error).split())[:200]}",
            "is_exact": True,
        }
    return {
        **row,
        "mode": report.mode,
        "strategy": report.strategy,
        "reason": report.reason,
        "checks": report.checks,
        "is_exact": report.is_exact,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many at a time (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULT, help="where to write (%(default)s)")
    args = parser.parse_args()
    start, rows = time.perf_counter(), rows_to_try()
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(try_one, *zip(*rows, strict=True)))
    # `is_decoder` makes a difference only where the type itself was refused.
    refused = {row["model_type"] for row in results if not row["variant"] and row["strategy"] is None}
    decoder = ", ".join(f"{name}={value}" for name, value in AS_DECODER.items())
    results = [row for row in results if row["variant"] != decoder or row["model_type"] in refused]
    report = {"machine": describe_machine(), "seconds": round(time.perf_counter() - start, 1), "rows": results}
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in results:
        if not row["is_exact"]:
            print(f"NOT EXACT: {row}")
    print(f"{len(results)} rows in {report['seconds']:.0f} s: {args.output}")


if __name__ == "__main__":
    main()
