#!/usr/bin/env python
"""Train the adapter for SmolLM2: the model answers the prompts, and the adapter learns to foresee its answers.

    python examples/smollm2/train.py prompts.jsonl out --base smollm2 --minutes 60

Runs on a GPU where there is one and on a CPU elsewhere. Killed at any time, the same command goes on: answers are kept
batch by batch, the training by checkpoints. `--answers` and `--start` go on from the answers and the adapter of
another run. Writes `out/adapter`, and beside it `training.json` (settings, machine and log) and `training_curves.png`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from held_out import rows_of
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from hf_mtp import GatedLoraConfig, MTPConfig, MTPTrainer, regenerate_responses
from hf_mtp.base.machine import describe_machine

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ANSWERS = {"greedy": {}, "sampled": {"do_sample": True, "temperature": 0.8}}  # one half of the prompts each
# Every layer with a LoRA makes a pass of decoding slower. These are the ones that are worth their time, see README.md.
ADAPTER = {
    "k": 8,
    "r": 20,
    "lora_alpha": 40,
    "target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj"],
    "layers_to_transform": [*range(5, 30)],
    "save_dtype": "bfloat16",
}
SETTINGS = {
    "learning_rate": 2e-3,
    "muon_learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # a share
    "max_length": 640,
    "pad_to_multiple_of": 8,
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 5,
    "bf16": True,
}
# Large batches fill a GPU; on a CPU more steps are worth more.
BATCHES = {
    "cuda": {"per_device_train_batch_size": 64, "anchors_per_sequence": 64, "masks_per_part": 32_768},
    "cpu": {"per_device_train_batch_size": 4, "anchors_per_sequence": 32, "masks_per_part": 1024},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="what prompts.py wrote")
    parser.add_argument("output", type=Path, help="folder for answers, checkpoints and the adapter")
    parser.add_argument("--base", required=True, help="the model's folder")
    parser.add_argument("--minutes", type=float, default=60, help="training time, without the answers (%(default)s)")
    parser.add_argument("--answer-batch", type=int, default=64, help="prompts answered at a time (%(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=256, help="tokens of an answer at most (%(default)s)")
    parser.add_argument("--answers", type=Path, help="answers of another run (JSON Lines), instead of new ones")
    parser.add_argument("--start", type=Path, help="an adapter to go on from, as far as it has the same layers")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="other settings of MTPConfig")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    base, tokenizer = load_base(args.base)
    if args.answers is not None:
        answers = Dataset.from_list(rows_of(args.answers)).shuffle(args.seed)
    else:
        rows = Dataset.from_list(rows_of(args.prompts))
        answers = answer(base, tokenizer, rows, args.output, args.answer_batch, args.answer_tokens, args.seed)
    settings = SETTINGS | BATCHES[base.device.type]
    settings |= {name: json.loads(value) for name, _, value in (pair.partition("=") for pair in args.set)}
    model = upgrade(base, ADAPTER, args.seed, args.start)
    trainer = make_trainer(model, tokenizer, answers, args.output, args.minutes, settings, seed=args.seed)
    resume(trainer, args.output)
    save(trainer, args.output, settings)


def load_base(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in bfloat16, on the GPU if there is one, and its tokenizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    return model, AutoTokenizer.from_pretrained(folder)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    output: Path,
    batch_size: int,
    max_new_tokens: int,
    seed: int,
) -> Dataset:
    """The model's own answers, every other one sampled."""
    parts = []
    for number, (name, options) in enumerate(ANSWERS.items()):
        part = prompts.select(range(number, len(prompts), len(ANSWERS)))
        folder = output / "answers" / name
        sizes = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "seed": seed}
        parts.append(regenerate_responses(model, tokenizer, part, folder, **sizes, **options))
    return concatenate_datasets(parts).shuffle(seed)


def upgrade(base: PreTrainedModel, adapter: dict, seed: int, start: Path | None = None) -> PeftModel:
    """The base, by its name on the Hub, with an adapter whose weights are those of `start` where it has them."""
    torch.manual_seed(seed)
    model = get_peft_model(base, GatedLoraConfig(**adapter))
    model.active_peft_config.base_model_name_or_path = HUB_ID
    if start is not None:
        weights = load_file(start / "adapter_model.safetensors")
        wanted = get_peft_model_state_dict(model)
        set_peft_model_state_dict(model, {name: weights[name] for name in wanted if name in weights})
    return model


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Dataset,
    output: Path,
    minutes: float,
    settings: dict,
    eval_dataset: dict[str, Dataset] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    seed: int = 0,
) -> MTPTrainer:
    """A trainer that the clock ends."""
    # On Hopper GPUs cuDNN's backward pass of masked attention gives NaN for some lengths: pytorch/pytorch#196678.
    torch.backends.cuda.enable_cudnn_sdp(False)
    config = {"save_steps": 500, "save_total_limit": 1, "report_to": [], "num_train_epochs": 1000} | settings
    return MTPTrainer(
        model=model,
        args=MTPConfig(output_dir=str(output), max_minutes=minutes, seed=seed, use_cpu=not torch.cuda.is_available(),
                       **config),
        train_dataset=answers,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
    )  # fmt: skip


def resume(trainer: MTPTrainer, output: Path) -> None:
    """Trains, from the newest checkpoint if there is any."""
    trainer.train(resume_from_checkpoint=any(output.glob("checkpoint-*")) or None)


def save(trainer: MTPTrainer, output: Path, settings: dict) -> None:
    """Writes the adapter, and how it came about."""
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).save_pretrained(output / "adapter")
    log = [entry for entry in trainer.state.log_history if "tokens_per_pass" in entry]
    seconds = sum(entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry)
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "adapter": ADAPTER,
        "settings": settings,
        "texts": len(trainer.train_dataset),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "masks_trained": round(sum(entry["mask_tokens"] for entry in log) * trainer.args.logging_steps),
        "log": log,
    }
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
