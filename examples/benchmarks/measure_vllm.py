#!/usr/bin/env python
"""An adapter inside vLLM: its tokens and passes against hf_mtp's own decoding, its start, and what passes cost.

    python examples/benchmarks/measure_vllm.py --base BASE --adapter ADAPTER --prompts PROMPTS.jsonl \
        --vllm-python .venv-vllm/bin/python --output docs/results/vllm.json

Run it with the Python of hf_mtp. `make test-vllm` makes the other one. In float32, greedy, all prompts in one batch.
Engines with and without masks take turns. Each starts several times, and the shortest start counts: in seconds of the
clock and of the processor, without imports. The last line is one JSON document.
`--output` is written after each round.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
SIZES = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 1024,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 512 << 20,
    "block_size": 32,
    "disable_log_stats": False,
}
METHODS = ("plain", "linear", "auto")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="base model: folder or Hub id")
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument("--prompts", required=True, type=Path, help="JSON lines with a conversation in `prompt`")
    parser.add_argument("--vllm-python", required=True, help="Python of an environment with vLLM")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--rows", type=int, default=6, help="prompts (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens per prompt (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each engine (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    return parser.parse_args()


# ---------------------------------------------------------------- in hf_mtp's environment


def own_decoding(args: argparse.Namespace) -> tuple[list[dict], str]:
    """Prompts, tokens of plain decoding, and passes of linear decoding; and the fingerprint of the adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_mtp.evaluation.run import adapter_fingerprint

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    rows = []
    for line in lines[:: max(1, len(lines) // args.rows)][: args.rows]:
        ids = tokenizer.apply_chat_template(
            json.loads(line)["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        options = {**ids, "max_new_tokens": args.new_tokens, "do_sample": False, "eos_token_id": None}
        start = ids["input_ids"].shape[1]
        plain = model.generate(**options)[0, start:].tolist()
        linear = model.generate(**options, mtp=True, mtp_strategy="linear")[0, start:].tolist()
        steps = model.base_model.mtp_statistics.steps
        rows.append({"prompt": ids["input_ids"][0].tolist(), "plain": plain, "linear": linear, "steps": steps})
        print(f"hf_mtp, prompt {len(rows)}: {len(steps)} passes", flush=True)
    return rows, adapter_fingerprint(model)


def in_vllm(args: argparse.Namespace, task: dict) -> dict:
    """The outcomes of [`engines`], by method, from a process with vLLM."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.json"
        path.write_text(json.dumps(task))
        paths = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": str(args.threads)}
        command = [args.vllm_python, __file__, "engines", str(path)]
        subprocess.run(command, check=True, env={**os.environ, **ENGINE, **paths}, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text())


def main() -> None:
    from report import finish, save

    from hf_mtp.export.vllm import export_vllm

    args = parse_args()
    rows, adapter = own_decoding(args)
    runs: dict[str, list[dict]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        export_vllm(args.adapter, Path(folder) / "adapter", args.base)
        task = {"base": args.base, "folder": f"{folder}/adapter", "new_tokens": args.new_tokens}
        for number in range(args.rounds):
            prompts = [row["prompt"] for row in rows] if number == 0 else []
            for method, outcome in in_vllm(args, {**task, "prompts": prompts}).items():
                runs[method].append(outcome)
                print(f"vLLM, round {number + 1}, {method}: started in {outcome['seconds']:.1f} s", flush=True)
            report = {"adapter": adapter, **report_of(args, rows, runs)}
            save(report, args.output)
    finish(report, args.output)


def report_of(args: argparse.Namespace, rows: list[dict], runs: dict[str, list[dict]]) -> dict:
    """What was measured so far. Only the first engines decoded the prompts."""
    from hf_mtp.base.machine import describe_machine

    plain, linear, auto = (runs[method][0] for method in METHODS)
    pairs = {
        "vLLM without hf_mtp": (linear, plain["tokens"]),
        "hf_mtp, plain": (linear, [row["plain"] for row in rows]),
        "hf_mtp, linear": (linear, [row["linear"] for row in rows]),
        "vLLM, auto": (auto, plain["tokens"]),
    }
    return {
        "machine": {**describe_machine(), "threads": args.threads},
        "load_average": round(os.getloadavg()[0], 1),
        "vllm": plain["version"],
        "prompts": len(rows),
        "new_tokens": args.new_tokens,
        "identical": {
            name: sum(one == two for one, two in zip(outcome["tokens"], tokens, strict=True))
            for name, (outcome, tokens) in pairs.items()
        },
        "passes": {"vLLM": sum(linear["passes"].values()), "hf_mtp": sum(len(row["steps"]) for row in rows)},
        "start": {
            method: {clock: min(run[clock] for run in of_method) for clock in ("seconds", "processor_seconds")}
            for method, of_method in runs.items()
        },
        "rounds": len(runs["plain"]),
        "costs": auto["costs"],
        "k": linear["k"],
        "rates": linear["rates"],
        "code_lines": code_lines(Path(__file__).parents[2] / "hf_mtp" / "serving" / "vllm"),
    }


def code_lines(folder: Path) -> int:
    """Lines of Python with code: without blank lines, comments and docstrings."""
    import ast
    import tokenize

    total = 0
    for path in folder.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = [
            node.body[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
        ]
        prose = {line for text in documented for line in range(text.lineno, text.end_lineno + 1)}
        with path.open("rb") as file:
            tokens = [token for token in tokenize.tokenize(file.readline) if token.string.strip()]
        code = {
            line
            for token in tokens
            if token.type not in (tokenize.COMMENT, tokenize.ENCODING)
            for line in range(token.start[0], token.end[0] + 1)
        }
        total += len(code - prose)
    return total


# ---------------------------------------------------------------- in vLLM's environment


def engines(path: Path) -> None:
    """Runs an engine of each method in a copy of this process, because vLLM keeps state that is process-wide.

    Writes the outcomes over the task, by method.
    """
    import vllm  # noqa: F401 - once for all

    task, outcomes = json.loads(path.read_text()), {}
    for method in METHODS:
        child = multiprocessing.get_context("fork").Process(target=engine, args=(task, method, path))
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"The engine of the method {method!r} ended with {child.exitcode}; its output is above.")
        outcomes[method] = json.loads(path.read_text())
    path.write_text(json.dumps(outcomes))


def engine(task: dict, method: str, path: Path) -> None:
    """Runs an engine, and writes its outcome."""
    import vllm

    from hf_mtp.serving.vllm.arguments import engine_arguments

    masked = method != "plain"
    own = engine_arguments(task["folder"], strategy=method) if masked else {}
    start, processor = time.perf_counter(), time.process_time()
    llm = vllm.LLM(**{**own, **SIZES, "model": task["base"]})
    outcome = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - processor}
    outcome["version"] = vllm.__version__
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    if masked:
        count_passes(runner, outcome)
    if task["prompts"]:
        options = vllm.SamplingParams(temperature=0, max_tokens=task["new_tokens"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
        outcome["tokens"] = [list(one.outputs[0].token_ids) for one in llm.generate(prompts, options, use_tqdm=False)]
    if masked:
        outcome["k"], outcome["rates"] = runner.drafter.k, runner.mask_schedule.acceptance.rates
        costs = runner.mask_schedule.costs
        outcome["costs"] = costs and {"plain": costs.plain, "masked": costs.masked}
    path.write_text(json.dumps(outcome))


def count_passes(runner, outcome: dict) -> None:
    """Counts the passes that gave each request a token."""
    passes, propose = outcome.setdefault("passes", {}), runner.propose_draft_token_ids

    def counted(output, tokens, *args):
        for req_id, new in zip(runner.input_batch.req_ids, tokens, strict=True):
            passes[req_id] = passes.get(req_id, 0) + bool(new)
        return propose(output, tokens, *args)

    runner.propose_draft_token_ids = counted


if __name__ == "__main__":
    if sys.argv[1:2] == ["engines"]:
        engines(Path(sys.argv[2]))
    else:
        main()
