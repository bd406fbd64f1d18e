"""The quickstart's job.

    fetch a real model -> answer side by side -> train an adapter for the small base -> save -> load -> try it

Training, answering and the terminal have modules of their own; this one knows them all.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import transformers
from display import print_for_the_hub, print_results, print_why, progress, why_slower
from peft import PeftModel, get_peft_model
from rich.console import Console
from side_by_side import answer_side_by_side, encoded
from training import Report, make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_mtp import GatedLoraConfig
from hf_mtp.base.machine import bfloat16_is_faster, describe_machine
from hf_mtp.evaluation.compare import Record, compare, decode, same_weights, summarize

HERE = Path(__file__).resolve().parent
BASE = HERE / "base"
SMOLLM2 = HERE.parent / "smollm2"
KINDS = ("maths", "code", "chat")  # of the prompts in questions.jsonl
SOURCES = {"maths": "maths (GSM8K, MIT)", "python": "python (CPython's standard library, PSF-2.0)"}
RANK = 32  # much for a base of this size, little for its file
MOST_THREADS = 8  # bases of these sizes keep no more busy
WARM_UP_TOKENS = 24  # `mtp=True` measures what passes cost when a model first decodes


def run(args: argparse.Namespace, console: Console) -> int:
    """All of it. Returns the exit status: 1 if an output in float32 was not the base model's own."""
    set_up_libraries()
    args.output.mkdir(parents=True, exist_ok=True)
    phases, results = Phases(), {}

    with phases.timed("fetch"):
        reason = fetch(args, console)
    if reason is None:
        with phases.timed("answer"):
            results["smollm2"] = show_real_model(args, console)
    else:
        console.print(f"\nSmolLM2 is not available. {reason}\nUsing the small base instead.", soft_wrap=True)

    with phases.timed("train"):
        results["training"] = train_and_save(args, console)
    with phases.timed("try"):
        results["small base"] = show_trained(args, console, is_stand_in=reason is not None)
    write_results(args, results, phases.seconds)
    console.print(f"\nSaved the adapter, its curves and results.json to {args.output}.\n", soft_wrap=True)
    return closing_words(results, console)


def set_up_libraries() -> None:
    """Uses the cores, and silences what the host libraries say to their own developers."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(MOST_THREADS, os.cpu_count() or 1))
    datasets.disable_progress_bars()  # our own are shown instead
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\b")


class Phases:
    """How long each part of the job took."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Within, time counts for the part called `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


# ---------------------------------------------------------------- the real model


def fetch(args: argparse.Namespace, console: Console) -> str | None:
    """Gets SmolLM2 unless it is there. Returns why that failed, or `None`."""
    if (args.base / "config.json").is_file():
        return None
    with progress(console, "Fetching SmolLM2 (93 MB)"):
        command = [sys.executable, str(SMOLLM2 / "base.py"), str(args.base), *(["--hub"] if args.hub else [])]
        done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["No reason was given."])[-1]


def show_real_model(args: argparse.Namespace, console: Console) -> dict:
    """Answers prompts side by side. Returns the numbers of each kind of prompt."""
    with progress(console, "Loading SmolLM2"):
        is_fast = bfloat16_is_faster()
        base = load(args.base, torch.bfloat16 if is_fast else torch.float32)
        model = PeftModel.from_pretrained(same_weights(base), SMOLLM2 / "adapter").eval()
        tokenizer = AutoTokenizer.from_pretrained(args.base)
        warm_up(base, model, tokenizer)
    dtype = "bfloat16" if is_fast else "float32, because this CPU multiplies bfloat16 matrices no faster"
    console.print(f"\nSmolLM2-135M-Instruct in {dtype}; {torch.get_num_threads()} threads, greedy.\n", soft_wrap=True)
    records: dict[str, list[Record]] = {kind: [] for kind in KINDS}
    rows = [json.loads(line) for line in (SMOLLM2 / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["domain"] in records and len(records[row["domain"]]) < args.prompts:
            record = answer_side_by_side(base, model, tokenizer, row["prompt"], args.new_tokens, console)
            records[row["domain"]].append(record)
    title = f"SmolLM2-135M-Instruct, plain decoding against mtp=True, up to {args.new_tokens} new tokens"
    summaries = show_summaries(base, records, title, console)
    if is_fast and any(row["identical"] < row["prompts"] for row in summaries.values()):
        print_why(
            console,
            "In bfloat16, rounding depends on the number of tokens in a pass, so two nearly equal logits may swap "
            "places. Then the output differs. With mtp_bitwise=True, or in float32, it is the same.",
        )
    return {"dtype": str(base.dtype).removeprefix("torch."), "domains": summaries, "per_prompt": as_dicts(records)}


def show_summaries(
    base: PreTrainedModel, records: dict[str, list[Record]], title: str, console: Console
) -> dict[str, dict]:
    """Prints a table, and the reason if `mtp=True` was slower anywhere. Returns what the table shows."""
    summaries = {kind: summarize(found) for kind, found in records.items()}
    print_results(console, title, summaries)
    slow = [row for row in summaries.values() if row["speedup_in_total"] < 1]
    if slow:
        tokens_per_pass = statistics.fmean(row["tokens_per_step"] for row in slow)
        print_why(console, why_slower(time_of_pass(base, 9) / time_of_pass(base, 1), tokens_per_pass))
    return summaries


@torch.inference_mode()
def time_of_pass(base: PreTrainedModel, tokens: int, repeats: int = 9) -> float:
    """Seconds of a forward pass over so many tokens, the median of a few."""
    ids_1T, times = torch.arange(tokens)[None], []
    for _ in range(repeats):
        start = time.perf_counter()
        base(ids_1T)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A base model, loaded as one from the Hub would be."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def warm_up(base: PreTrainedModel, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Decodes a little both ways, so that nothing that happens once is timed."""
    prompt_1T = encoded(tokenizer, "What is 2 + 3?")
    decode(base, prompt_1T, 4)
    decode(model, prompt_1T, WARM_UP_TOKENS, mtp=True)


# ---------------------------------------------------------------- training


def read_rows(domain: str, split: str) -> list[dict]:
    """The bundled text: a conversational prompt and completion per row."""
    with (HERE / "data" / f"{domain}_{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train_and_save(args: argparse.Namespace, console: Console) -> dict:
    """Upgrades the base, trains the adapter on both domains and saves it. Returns what to remember of the training."""
    console.print()
    with progress(console, "Preparing a training"):
        config = GatedLoraConfig(k=args.k, r=RANK, lora_alpha=2 * RANK, train_datasets=list(SOURCES.values()))
        model = get_peft_model(load(BASE, torch.float32), config)
        rows = [row for domain in SOURCES for row in read_rows(domain, "train")]
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        trainer = make_trainer(model, tokenizer, rows, args.output, args.minutes, args.steps)

    with progress(console, "Training an adapter", total=1) as bar:
        report = Report(
            trainer,
            lambda share, logs: bar.show(
                share, f"loss {logs['loss']:.2f}, {logs['tokens_per_step']:.2f} tokens per pass" if logs else ""
            ),
        )
        trainer.add_callback(report)
        trainer.train()
    if report.share < 1:
        raise KeyboardInterrupt  # the trainer took it for a wish to stop early, and saved a checkpoint
    model.save_pretrained(args.output)

    trainable, everything = model.get_nb_trainable_parameters()
    return {
        "steps": trainer.state.global_step,
        "rows": len(rows),
        "trainable_parameters": trainable,
        "base_parameters": everything - trainable,
        "bf16": trainer.args.bf16,
        "history": [logs for logs in trainer.state.log_history if "loss" in logs],
    }


def show_trained(args: argparse.Namespace, console: Console, is_stand_in: bool) -> dict:
    """Answers held-out prompts with the adapter that was saved, as for somebody who downloaded it."""
    base = load(BASE, torch.float32)
    model = PeftModel.from_pretrained(same_weights(base), args.output).eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    warm_up(base, model, tokenizer)
    records: dict[str, list[Record]] = {}
    for domain in SOURCES:
        prompts = [row["prompt"][-1]["content"] for row in read_rows(domain, "test")[: args.prompts]]
        if is_stand_in:
            answers = (answer_side_by_side(base, model, tokenizer, p, args.new_tokens, console) for p in prompts)
        else:
            answers = (answer(base, model, encoded(tokenizer, p), args.new_tokens) for p in prompts)
        records[domain] = [*answers]
    title = f"The small base with the new adapter, plain decoding against mtp=True, up to {args.new_tokens} new tokens"
    summaries = show_summaries(base, records, title, console)
    config = model.peft_config["default"]
    config.tokens_per_step = {domain: round(row["tokens_per_step"], 2) for domain, row in summaries.items()}
    model.save_pretrained(args.output)  # the model card has these numbers, too
    return {"dtype": "float32", "domains": summaries, "per_prompt": as_dicts(records)}


def answer(base: PreTrainedModel, model: PeftModel, prompt_1T: torch.LongTensor, max_new_tokens: int) -> Record:
    """One prompt both ways."""
    return compare(decode(base, prompt_1T, max_new_tokens), decode(model, prompt_1T, max_new_tokens, mtp=True))


# ---------------------------------------------------------------- the end


def closing_words(results: dict, console: Console) -> int:
    """Says what to type for a model of the Hub, or that something is wrong. Returns the exit status."""
    reports = [results[name] for name in ("smollm2", "small base") if name in results]
    rows = [row for report in reports if report["dtype"] == "float32" for row in report["domains"].values()]
    different = sum(row["prompts"] - row["identical"] for row in rows)
    if different:
        console.print(
            f"[bold red]{different} answers differ from plain decoding.[/] That must not happen in float32: please "
            "open an issue with results.json."
        )
        return 1
    print_for_the_hub(console)
    return 0


def as_dicts(records: dict[str, list[Record]]) -> dict[str, list[dict]]:
    """The numbers of every prompt."""
    return {kind: [dataclasses.asdict(record) for record in found] for kind, found in records.items()}


def write_results(args: argparse.Namespace, results: dict, seconds: dict[str, float]) -> None:
    """Writes every number to `results.json`, with the machine and the versions that gave them."""
    about = {
        "what": "greedy decoding, batch 1, with and without mtp=True, default strategy",
        "machine": describe_machine(),
        "arguments": {name: value for name, value in vars(args).items() if not isinstance(value, Path)},
        "seconds": seconds,
    }
    (args.output / "results.json").write_text(json.dumps(about | results, indent=1) + "\n", encoding="utf-8")
