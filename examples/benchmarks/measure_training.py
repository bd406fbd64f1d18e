#!/usr/bin/env python
"""Time and memory of training, against TRL's `SFTTrainer` with a plain LoRA of the same rank, on the same data.

    python examples/benchmarks/measure_training.py --base BASE --data DATA --output docs/results/training.json

One context length, blocks on a quarter of the positions. Every method trains in a process of its own, a few steps at a
time, in turns, so that whatever else the machine does hits all alike; medians over all steps but the first. A trained
position is a token of the loss for TRL and a mask with a target for us. Memory is the peak of the resident set above
what it was before training. Then memory alone: of longer texts, and of more blocks, with and without parts; and the
sizes of adapter files beside well-known bases, from their shapes alone.
Prints a table; the last line is one JSON document.
"""

import argparse
import resource
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from processes import MIB, in_a_process
from reference_data import train_dataset
from report import finish
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_mtp import GatedLoraConfig, MTPConfig, MTPTrainer
from hf_mtp.base.machine import describe_machine
from hf_mtp.objective.losses import ROWS_PER_CHUNK

K, RANK, BATCH = 8, 32, 4
COMMON = {
    "per_device_train_batch_size": BATCH,
    "learning_rate": 1e-4,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": True,
    "disable_tqdm": True,
}
METHODS = {
    "hf_mtp": {},
    "TRL, its defaults (gradient checkpointing)": {"gradient_checkpointing": True},
    "TRL, without gradient checkpointing": {"gradient_checkpointing": False},
}
# Hidden size, layers, heads and so on of well-known models, for their shapes.
BASES = {
    "Llama 3.2 1B": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "Qwen3 4B": Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "Llama 3.1 8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "Llama 3.1 70B": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="base model: folder or Hub id")
    parser.add_argument("--data", required=True, type=Path, help="folder with the text")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--context", type=int, default=384, help="tokens per row, all inside the loss")
    parser.add_argument("--rounds", type=int, default=3, help="how often each method takes its turn")
    parser.add_argument("--steps", type=int, default=6, help="steps per turn, the first of which is not counted")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args()


def rows_of(tokenizer, folder: Path, length: int, rows: int) -> Dataset:
    """Rows of `length` tokens of text, one text after the other."""
    ids = []
    for row in train_dataset(folder, tokenizer, sequences=400):
        ids += tokenizer(row["prompt"] + row["completion"]).input_ids
    ids = (ids * -(-length * rows // len(ids)))[: length * rows]
    return Dataset.from_dict({"input_ids": torch.tensor(ids).view(rows, length).tolist()})


class StepSeconds(TrainerCallback):
    """Wall-clock and processor seconds of each step."""

    def __init__(self):
        self.seconds, self.processor_seconds = [], []

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.start[0])
        self.processor_seconds.append(time.process_time() - self.start[1])


def train(method: str, args: argparse.Namespace, tokenizer, dataset: Dataset, **settings) -> dict:
    """A few steps: seconds of each, positions trained per step, and memory."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    memory, steps = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, StepSeconds()
    length = len(dataset[0]["input_ids"])
    options = {**COMMON, "max_length": length, "max_steps": args.steps, **METHODS[method], **settings}
    arguments = {"train_dataset": dataset, "processing_class": tokenizer, "callbacks": [steps]}
    with tempfile.TemporaryDirectory() as folder:
        if method == "hf_mtp":
            options = {"anchors_per_sequence": length // 4, "training_curves": False, **options}
            model = get_peft_model(base, GatedLoraConfig(k=K, r=RANK, lora_alpha=2 * RANK))
            trainer = MTPTrainer(model=model, args=MTPConfig(output_dir=folder, **options), **arguments)
        else:
            model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
            trainer = SFTTrainer(model=model, args=SFTConfig(output_dir=folder, **options), **arguments)
        trainer.train()
    log = trainer.state.log_history[0]
    return {
        "seconds": steps.seconds[1:],
        "processor_seconds": steps.processor_seconds[1:],
        "positions": log["mask_tokens"]
        if method == "hf_mtp"
        else options["per_device_train_batch_size"] * (length - 1),
        "memory_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 / MIB,
    }


def compare(args: argparse.Namespace, tokenizer, dataset: Dataset) -> list[dict]:
    """All methods, in turns."""
    turns = {method: [] for method in METHODS}
    for number in range(args.rounds):
        for method in list(METHODS)[:: 1 if number % 2 == 0 else -1]:
            turns[method].append(in_a_process(partial(train, method, args, tokenizer, dataset)))
            print(method, turns[method][-1], flush=True)
    rows = []
    for method, results in turns.items():
        positions = results[0]["positions"]
        row = {
            "method": method,
            "positions_per_step": positions,
            "memory_mib": round(max(r["memory_mib"] for r in results)),
        }
        for name in ("seconds", "processor_seconds"):
            middle = statistics.median(seconds for result in results for seconds in result[name])
            row |= {f"{name}_per_step": round(middle, 4), f"{name}_per_1000_positions": 1000 * middle / positions}
        rows.append(row)
    return rows


def memory_of_long_texts(args: argparse.Namespace, tokenizer) -> list[dict]:
    """One row per step: of more tokens, and of more blocks, in parts and at once."""
    rows = []
    for length, anchors, masks_per_part in (
        (1024, 64, 1024),
        (2048, 64, 1024),
        (4096, 64, 1024),
        (8192, 64, 1024),
        (2048, 256, 1024),
        (2048, 1024, 1024),
        (2048, 256, 10**6),
        (2048, 1024, 10**6),
    ):
        dataset = rows_of(tokenizer, args.data, length, 2)
        settings = {"anchors_per_sequence": anchors, "masks_per_part": masks_per_part, "max_steps": 1}
        result = in_a_process(
            partial(train, "hf_mtp", args, tokenizer, dataset, per_device_train_batch_size=1, **settings)
        )
        in_parts = masks_per_part < 10**6
        rows.append(
            {"tokens": length, "blocks": anchors, "in_parts": in_parts, "memory_mib": round(result["memory_mib"])}
        )
        print(rows[-1], flush=True)
    return rows


def adapter_sizes() -> list[dict]:
    """Bytes of an adapter of rank 16 beside those of its base, from shapes alone."""
    rows = []
    for name, config in BASES.items():
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            parameters = sum(p.numel() for p in base.parameters())
            model = get_peft_model(base, GatedLoraConfig(k=K, r=16, lora_alpha=32), low_cpu_mem_usage=True)
        adapter = {n: p for n, p in model.named_parameters() if "lora_" in n}
        row = {"base": name, "base_bytes": 2 * parameters}
        row["sampler_parameters"] = sum(p.numel() for n, p in adapter.items() if "sampler" in n)
        row["adapter_parameters"] = sum(p.numel() for p in adapter.values())
        row["adapter_bytes"] = sum(p.numel() * p.element_size() for p in adapter.values())
        rows.append(row)
        print(row, row["adapter_bytes"] / row["base_bytes"], flush=True)
    return rows


def on_paper(tokens: int = 32_768, masks: int = 512) -> list[dict]:
    """Bytes that training one row takes, by what they are for: bfloat16, one part of the masks at a time."""
    rows = []
    for name, bits, attention in (
        ("Llama 3.2 1B", 16, "sdpa"),
        ("Qwen3 4B", 16, "flex_attention"),
        ("Llama 3.1 8B", 4, "sdpa"),
        ("Llama 3.1 8B", 4, "flex_attention"),
        ("Llama 3.1 70B", 4, "flex_attention"),
    ):
        config = BASES[name]
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            parameters = sum(p.numel() for p in base.parameters())
            table = base.get_output_embeddings().weight.numel()
            model = get_peft_model(base, GatedLoraConfig(k=K, r=16, lora_alpha=32), low_cpu_mem_usage=True)
        adapter = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
        layers, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        head = getattr(config, "head_dim", None) or width // config.num_attention_heads
        queries, groups = config.num_attention_heads * head, config.num_key_value_heads * head
        columns = tokens + masks
        rows.append(
            {
                "base": name,
                "bits": bits,
                "attention": attention,
                # Embeddings stay as they are; the rest has bits / 8 bytes, and scales.
                "weights": 2 * parameters if bits == 16 else 2 * table + round(0.56 * (parameters - table)),
                "keys_and_values": 2 * 2 * layers * groups * tokens,
                # Of keys and values with the part's own; and once for each query's head, where sdpa gets a mask.
                "copies": 2 * 2 * layers * (groups + (queries if attention == "sdpa" else 0)) * columns,
                # What a layer keeps for its backward pass: two norms in float32, inputs and outputs of linear layers.
                "states": layers * masks * (2 * (8 * width + 3 * queries + 2 * groups + 4 * inner) + 4 * 2 * width),
                "logits": 3 * 4 * ROWS_PER_CHUNK * config.vocab_size,
                "adapter": 4 * 4 * adapter,
            }
        )
    return rows


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # threads that have started do not survive a fork
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    dataset = rows_of(tokenizer, args.data, args.context, BATCH * args.steps)
    report = {
        "machine": {**describe_machine(), "threads": args.threads},
        "context": args.context,
        "k": K,
        "rank": RANK,
        "batch": BATCH,
        "adapters": in_a_process(adapter_sizes),
        "on_paper": in_a_process(on_paper),
        "methods": compare(args, tokenizer, dataset),
        "memory": memory_of_long_texts(args, tokenizer),
    }
    finish(report, args.output)


if __name__ == "__main__":
    main()
