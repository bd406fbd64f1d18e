"""The quickstart's job, from the base model to the picture.

    load the base -> upgrade -> train -> save -> load again -> answer with and without mtp -> show

Training, measuring, drawing and the terminal have modules of their own; this one knows them all.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import transformers
from display import print_fastest, print_for_the_hub, print_results, print_sample, progress
from draw import draw_tokens_per_step
from peft import PeftModel, get_peft_model
from rich.console import Console
from training import Report, make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_mtp import GatedLoraConfig
from hf_mtp.evaluation.compare import (
    Record,
    decode_all,
    decode_both_ways,
    describe_machine,
    summarize,
    tokens_per_step,
)

HERE = Path(__file__).resolve().parent
BASE = HERE / "base"
SOURCES = {"maths": "maths (GSM8K, MIT)", "python": "python (CPython's standard library, PSF-2.0)"}
RANK = 32  # much for a base of this size, little for its file
CURVE_SECONDS = 60  # for all k below the trained one
MOST_THREADS = 8  # a base of this size keeps no more busy
# Shows what the adapter can do; the default, "auto", computes fewer masks where these cost more time than they save.
QUADRATIC = {"mtp_strategy": "quadratic"}


def run(args: argparse.Namespace, console: Console) -> int:
    """All of it. Returns the exit status: 1 if some output with `mtp=True` was not the base model's own."""
    set_up_libraries()
    args.output.mkdir(parents=True, exist_ok=True)
    phases = Phases()
    tokenizer = AutoTokenizer.from_pretrained(BASE)

    with phases.timed("train"):
        training = train_and_save(args, tokenizer, console)

    # From here on, everything is as for somebody who downloaded the adapter.
    model = PeftModel.from_pretrained(load_base(), args.output).eval()
    rows = {domain: read_rows(domain, "test")[: args.prompts] for domain in SOURCES}
    prompts = {domain: [encode(tokenizer, row) for row in rows[domain]] for domain in SOURCES}

    with phases.timed("compare"):
        records = compare(model, prompts, args, console)
    summaries = {domain: summarize(records[domain]) for domain in SOURCES}
    with phases.timed("fewer drafts"):
        few = prompts_within(CURVE_SECONDS, args.k, records)
        by_k = measure_by_k(model, first(few, prompts), first(few, records), args, console)

    picture = args.output / "tokens_per_step.png"
    draw_tokens_per_step(by_k["tokens_per_step"], few, picture)
    write_results(args, training, summaries, {"prompts": few, **by_k}, records, phases.seconds)
    complete_model_card(model, summaries, args.output)

    print_results(console, summaries, args.k, args.new_tokens)
    print_fastest(console, by_k["speedup_in_total"])
    show_typical_sample("python", rows["python"], records["python"], tokenizer, console)
    console.print(
        f"The adapter, {picture.name} and all numbers, results.json, are in {args.output}.\n", soft_wrap=True
    )
    return closing_words(summaries, console)


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


# ---------------------------------------------------------------- what is there


def load_base() -> PreTrainedModel:
    """The small base model, loaded as one from the Hub would be."""
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def read_rows(domain: str, split: str) -> list[dict]:
    """The bundled text: a conversational prompt and completion per row."""
    with (HERE / "data" / f"{domain}_{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def first(count: int, by_domain: dict[str, list]) -> dict[str, list]:
    """The first few of each domain."""
    return {domain: items[:count] for domain, items in by_domain.items()}


def encode(tokenizer: PreTrainedTokenizerBase, row: dict) -> torch.LongTensor:
    """A row's prompt as token ids, `(1, T)`."""
    return tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


# ---------------------------------------------------------------- the job's parts


def train_and_save(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, console: Console) -> dict:
    """Upgrades the base, trains the adapter on both domains and saves it. Returns what to remember of the training."""
    with progress(console, "Preparing the train rows"):
        config = GatedLoraConfig(k=args.k, r=RANK, lora_alpha=2 * RANK, train_datasets=list(SOURCES.values()))
        model = get_peft_model(load_base(), config)
        rows = [row for domain in SOURCES for row in read_rows(domain, "train")]
        trainer = make_trainer(model, tokenizer, rows, args.output, args.minutes, args.steps)

    with progress(console, "Training the adapter", total=1) as bar:
        report = Report(
            trainer,
            lambda share, logs: bar.show(
                share, f"loss {logs['loss']:.2f}, {logs['tokens_per_step']:.2f} tokens per step" if logs else ""
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
        "batch_size": trainer.args.per_device_train_batch_size,
        "anchors_per_sequence": trainer.args.anchors_per_sequence,
        "learning_rate": trainer.args.learning_rate,
        "history": [logs for logs in trainer.state.log_history if "loss" in logs],
    }


def compare(
    model: PeftModel, prompts: dict[str, list[torch.LongTensor]], args: argparse.Namespace, console: Console
) -> dict[str, list[Record]]:
    """Answers each domain's prompts with and without `mtp=True`."""
    with progress(console, "Answering with and without mtp", total=sum(map(len, prompts.values()))) as bar:
        return {
            domain: decode_both_ways(model, prompts[domain], args.new_tokens, on_prompt=bar.advance, **QUADRATIC)
            for domain in prompts
        }


def prompts_within(seconds: float, k: int, records: dict[str, list[Record]]) -> int:
    """How many prompts per domain can be answered with each smaller k in so many seconds, by what they took with k."""
    seconds_per_prompt = sum(statistics.fmean(r.seconds_mtp for r in records[domain]) for domain in records)
    fitting = int(seconds / (max(1, k - 1) * seconds_per_prompt))
    return max(1, min(fitting, min(map(len, records.values()))))


def measure_by_k(
    model: PeftModel,
    prompts: dict[str, list[torch.LongTensor]],
    records: dict[str, list[Record]],
    args: argparse.Namespace,
    console: Console,
) -> dict[str, dict[str, dict[int, float]]]:
    """`tokens_per_step` and `speedup_in_total` of each domain by `mtp_k`, up to the trained k, measured before."""
    by_k = {name: {domain: {} for domain in prompts} for name in ("tokens_per_step", "speedup_in_total")}
    with progress(console, "Answering with fewer drafts", total=(args.k - 1) * sum(map(len, prompts.values()))) as bar:
        for domain in prompts:
            known = summarize(records[domain])
            for k in range(1, args.k):
                options = {"mtp": True, "mtp_k": k, **QUADRATIC}
                answers = decode_all(model, prompts[domain], args.new_tokens, on_prompt=bar.advance, **options)
                seconds = sum(answer.seconds for answer in answers)
                by_k["tokens_per_step"][domain][k] = tokens_per_step(answers)
                by_k["speedup_in_total"][domain][k] = known["seconds_plain"] / seconds
            for name, curves in by_k.items():
                curves[domain][args.k] = known[name]
    return by_k


def show_typical_sample(
    domain: str, rows: list[dict], records: list[Record], tokenizer: PreTrainedTokenizerBase, console: Console
) -> None:
    """Prints the answer whose tokens per step are the median of its domain's."""
    middle = statistics.median_low(record.tokens_per_step for record in records)
    index = next(i for i, record in enumerate(records) if record.tokens_per_step == middle)
    record = records[index]
    pieces = text_of_steps(tokenizer, record.ids, record.steps)
    print_sample(console, rows[index]["prompt"][-1]["content"], pieces, record.new_tokens, domain)


def text_of_steps(tokenizer: PreTrainedTokenizerBase, ids: list[int], steps: list[int]) -> list[str]:
    """The text that each forward pass added. What a tokenizer does at the start of a text, it does once."""
    pieces, end, before = [], 0, ""
    for tokens in steps:
        end += tokens
        text = tokenizer.decode(ids[:end])
        pieces.append(text[len(before) :])
        before = text
    return pieces


def closing_words(summaries: dict[str, dict], console: Console) -> int:
    """Says what to type for a model of the Hub, or that something is wrong. Returns the exit status."""
    different = sum(summary["prompts"] - summary["identical"] for summary in summaries.values())
    if different:
        console.print(
            f"[bold red]{different} answers differ from plain decoding.[/] That must not happen in float32: please "
            "open an issue with results.json."
        )
        return 1
    print_for_the_hub(console)
    return 0


# ---------------------------------------------------------------- what is written


def write_results(
    args: argparse.Namespace,
    training: dict,
    summaries: dict[str, dict],
    by_k: dict[str, int | dict[str, dict[int, float]]],
    records: dict[str, list[Record]],
    seconds: dict[str, float],
) -> None:
    """Writes every number to `results.json`, with the machine and the versions that gave them."""
    results = {
        "what": "greedy decoding of held-out prompts, float32, batch 1, quadratic, with and without mtp=True",
        "machine": describe_machine(),
        "arguments": {name: value for name, value in vars(args).items() if not isinstance(value, Path)},
        "seconds": seconds,
        "domains": {
            domain: {
                **summaries[domain],
                "per_prompt": [dataclasses.asdict(record) for record in records[domain]],
            }
            for domain in summaries
        },
        "by_k": by_k,
        "training": training,
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def complete_model_card(model: PeftModel, summaries: dict[str, dict], folder: Path) -> None:
    """Writes the measured tokens per step into the adapter's configuration and model card."""
    config = model.peft_config["default"]
    config.tokens_per_step = {domain: round(summary["tokens_per_step"], 2) for domain, summary in summaries.items()}
    model.save_pretrained(folder)
