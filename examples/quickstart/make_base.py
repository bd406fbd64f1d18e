#!/usr/bin/env python
"""Train the quickstart's base model from scratch: a tokenizer and a Llama of about 4 million parameters.

    python make_base.py                                 # on the CPU; GSM8K comes from the Hugging Face Hub
    python make_base.py --device cuda --tokens 30e6     # a longer training on a GPU

The model learns the two domains of `make_data.py`: worked GSM8K problems, and short documented Python functions
of the standard library and of the installed, permissively licensed packages named by `--code-packages`. It knows
nothing about multi-token prediction: to the rest of the quickstart it is any causal language model of the Hub.

The folder it writes holds the model in bfloat16, its tokenizer, `training.json` with every measured number, and a
model card. The checkpoint kept is the one with the lowest loss on held-out text.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from make_data import (
    HERE,
    Example,
    from_json,
    functions_of,
    load_gsm8k,
    python_files,
    split_standard_library,
    unique,
    without,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CODE_PACKAGES = (
    "numpy scipy pandas sympy networkx torch transformers peft trl accelerate datasets huggingface_hub".split()
)
BOS, USER, ASSISTANT, EOS, PAD = SPECIAL_TOKENS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<pad>"]
CHAT_TEMPLATE = (
    "{{ '<|endoftext|>' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT = 512  # tokens of one packed training window
NEW_TOKENS = 128  # length of the measured greedy answers
MIN_LR_SHARE = 0.02

Corpus = dict[str, list[Example]]


# --- data ------------------------------------------------------------------------------------------------------


def load_corpora(args: argparse.Namespace) -> tuple[Corpus, Corpus, Corpus]:
    """(training, watched, test) examples by domain.

    Test examples are the bundled test files; watched ones are other held-out examples, which choose the
    checkpoint. No held-out answer is among the training answers.
    """
    domains = ("maths", "python")
    test = {domain: from_json(args.data / f"{domain}_test.jsonl") for domain in domains}
    python_train, python_held_out = split_standard_library()
    for package in args.code_packages:
        python_train += package_functions(package)
    held_out = {"maths": load_gsm8k("test", args.gsm8k_test), "python": python_held_out}
    watched = {domain: sorted(set(held_out[domain]) - set(test[domain])) for domain in domains}
    train = {"maths": load_gsm8k("train", args.gsm8k_train), "python": unique(python_train)}
    train = {domain: without(train[domain], test[domain] + watched[domain]) for domain in domains}
    return train, watched, test


def package_functions(package: str) -> list[Example]:
    """The short documented functions of an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"--code-packages names {package!r}, which is not installed: install it or leave it out")
    files = python_files(Path(spec.origin).parent)
    return [function for path in files for function in functions_of(path.read_text("utf-8", "replace"))]


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits numbers into digits, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> list[tuple[list[int], int]]:
    """Each example's token ids through the chat template, with the number of them that are the prompt."""
    prompts = tokenizer([f"{BOS}{USER}{e.prompt}{EOS}{ASSISTANT}" for e in examples], add_special_tokens=False)
    answers = tokenizer([e.answer + EOS for e in examples], add_special_tokens=False)
    return [
        (prompt + answer, len(prompt))
        for prompt, answer in zip(prompts["input_ids"], answers["input_ids"], strict=True)
    ]


def packed_windows(sequences: list[list[int]], seed: int) -> Iterator[list[int]]:
    """An endless stream of windows of `CONTEXT` tokens, cut from the reshuffled and joined `sequences`."""
    rng, buffer = random.Random(seed), []
    while True:
        for ids in rng.sample(sequences, len(sequences)):
            buffer += ids
            while len(buffer) >= CONTEXT:
                yield buffer[:CONTEXT]
                buffer = buffer[CONTEXT:]


# --- model and optimizers --------------------------------------------------------------------------------------


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small random Llama. It is wide and shallow, because every layer costs Python time when it generates."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # compiled, it trains faster than a CPU's fused attention
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # the residual stream must not grow with depth
            parameter.data.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def make_optimizers(model: LlamaForCausalLM, learning_rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, at twice the learning rate, and AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": [model.model.embed_tokens.weight], "weight_decay": weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    optimizers = [
        torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True),
        torch.optim.Muon(matrices, lr=2 * learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, steps: int) -> None:
    """A short linear warm-up to each group's peak, then a cosine to nearly zero."""
    warmup = min(1.0, (step + 1) / max(1, round(0.03 * steps)))
    cosine = MIN_LR_SHARE + (1 - MIN_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * warmup * cosine


# --- training --------------------------------------------------------------------------------------------------


def train(
    model: LlamaForCausalLM,
    streams: dict[str, Iterator[list[int]]],
    watch: Callable[[], dict[str, float]],
    args: argparse.Namespace,
) -> list[dict[str, float]]:
    """Train `model`, save it whenever its watched loss is the lowest yet, and return the losses along the way."""
    device = torch.device(args.device)
    optimizers = make_optimizers(model, args.learning_rate, args.weight_decay)
    steps = max(1, round(args.tokens / (args.batch_size * CONTEXT)))
    maths_rows = round(args.maths_share * args.batch_size)
    rows = ["maths"] * maths_rows + ["python"] * (args.batch_size - maths_rows)
    watch_every = math.ceil(steps / args.evaluations)

    def loss_of(ids_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1]
        logits_BTV = model.lm_head(hidden_BTD).float()
        return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())

    step_loss = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    history, best_loss = [], math.inf
    start = time.perf_counter()
    for step in range(steps):
        model.train()
        set_learning_rate(optimizers, step, steps)
        ids_BT = torch.tensor([next(streams[domain]) for domain in rows], device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = step_loss(ids_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if (step + 1) % watch_every == 0 or step + 1 == steps:
            losses, seconds = watch(), time.perf_counter() - start
            history.append({"step": step + 1, "train": round(loss.item(), 4), **losses})
            print(f"{step + 1}/{steps}", history[-1], f"{seconds:.0f} s", flush=True)
            if sum(losses.values()) < best_loss:
                best_loss = sum(losses.values())
                save_bfloat16(model, args.output)
    return history


def save_bfloat16(model: LlamaForCausalLM, folder: Path) -> None:
    """Save a bfloat16 copy of `model`, which itself stays as it is."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)


# --- measuring -------------------------------------------------------------------------------------------------


@torch.no_grad()
def answer_loss(model: LlamaForCausalLM, sequences: list[tuple[list[int], int]], batch_size: int = 16) -> float:
    """Mean loss in nats per answer token over encoded examples."""
    model.eval()
    total, count = 0.0, 0
    sequences = sorted(sequences, key=lambda item: len(item[0]))
    for begin in range(0, len(sequences), batch_size):
        batch = sequences[begin : begin + batch_size]
        longest = max(len(ids) for ids, _ in batch)
        ids_BT = torch.full((len(batch), longest), model.config.pad_token_id)
        labels_BT = torch.full((len(batch), longest), -100)
        for row, (ids, prompt_length) in enumerate(batch):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            labels_BT[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
        logits_BTV = model(input_ids=ids_BT.to(model.device)).logits[:, :-1].float()
        targets = labels_BT[:, 1:].to(model.device)
        total += F.cross_entropy(logits_BTV.mT, targets, ignore_index=-100, reduction="sum").item()
        count += int((targets != -100).sum())
    return round(total / count, 4)


def repeated_share(ids: list[int], n: int = 4) -> float:
    """The share of an answer's n-grams that stood in it before: 1 - distinct / total."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def greedy_answers(model: LlamaForCausalLM, sequences: list[tuple[list[int], int]]) -> list[list[int]]:
    """The greedy answer to each example's prompt, at most `NEW_TOKENS` tokens with the end token."""
    answers = []
    for ids, prompt_length in sequences:
        prompt = torch.tensor([ids[:prompt_length]], device=model.device)
        output = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        answers.append(output[0, prompt_length:].tolist())
    return answers


def generation_statistics(answers: list[list[int]], references: list[list[int]], eos_id: int) -> dict[str, float]:
    """How fluent greedy answers are: repetition, how many end by themselves, how long they are."""
    return {
        "answers": len(answers),
        "repeated_4grams": statistics.fmean(repeated_share(ids) for ids in answers),
        "repeated_4grams_of_references": statistics.fmean(repeated_share(ids) for ids in references),
        "ended_with_eos": statistics.fmean(ids[-1] == eos_id for ids in answers),
        "mean_tokens": statistics.fmean(map(len, answers)),
    }


def measure(folder: Path, watched: Corpus, test: Corpus) -> dict[str, dict]:
    """Every number of the model card, from the saved bfloat16 weights computed with in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    results = {}
    for domain in test:
        sequences = encode(tokenizer, test[domain])
        answers = greedy_answers(model, sequences)
        results[domain] = {
            "watched_examples": len(watched[domain]),
            "watched_loss": answer_loss(model, encode(tokenizer, watched[domain])),
            "test_loss": answer_loss(model, sequences),
            "greedy": generation_statistics(answers, [ids[n:] for ids, n in sequences], tokenizer.eos_token_id),
            "samples": [
                {"prompt": example.prompt, "answer": tokenizer.decode(ids)}
                for example, ids in zip(test[domain][:4], answers, strict=False)
            ],
        }
    return results


# --- the folder ------------------------------------------------------------------------------------------------

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# Quickstart base

A Llama of {parameters:,} parameters, trained from scratch in {minutes:.0f} minutes so that `make quickstart` can show
multi-token prediction without a download. It is an ordinary causal language model of `transformers`; nothing in it
knows about multi-token prediction.

```python
AutoModelForCausalLM.from_pretrained("examples/quickstart/base", dtype=torch.float32)
```

**What it is for:** a small base for examples and tests, in two domains: worked grade-school maths problems
and short Python functions. **What it is not for:** anything else. Its sums are mostly wrong, its functions seldom
work, and it knows nothing about the world. Do not use its answers.

## Measured

With the stored bfloat16 weights, computed in float32. Loss is in nats per answer token, on text that was not trained
on: "watched" chose the checkpoint, "test" is the 40 rows of `../data/*_test.jsonl`. Greedy answers to these 40 prompts
have at most {new_tokens} tokens. A repeated 4-gram is one that stood in the same answer before; "written" is the same
share in the reference answers.

| domain | watched loss | test loss | repeated 4-grams | written | ended with `<|end|>` | tokens per answer |
|---|---|---|---|---|---|---|
{table}

`training.json` has these numbers, the losses during training, and sample answers.

## Training

- {tokens:,} tokens in windows of {context}, {maths_share:.0%} maths, with Muon and AdamW.
- The tokenizer is a byte-level BPE of {vocabulary:,} ids.
- Machine: {machine}. {versions}.
- Made by `../make_base.py`.

## Data and licences

- maths: GSM8K's train split ({maths_examples:,} problems), MIT, Copyright (c) 2021 OpenAI.
- python: {python_examples:,} short documented functions of CPython {python_version}'s standard library (PSF-2.0) and
  of the packages below. Only the weights have seen these packages; none of their text is shipped here.

| package | licence |
|---|---|
{packages}

The notices of the text that is shipped are in `../data/README.md`.
"""


def machine(device: str) -> str:
    """The machine in words."""
    if device.startswith("cuda"):
        return f"one {torch.cuda.get_device_name()}"
    names = [line.split(":")[1].strip() for line in cpu_info() if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def cpu_info() -> list[str]:
    """The lines of Linux's processor description, none elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def licence_of(package: str) -> str:
    """The licence that an installed package states, in one line."""
    metadata = importlib.metadata.metadata(package)
    stated = (metadata["License-Expression"] or metadata["License"] or "").strip().split("\n")[0]
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier", []) if c.startswith("License")]
    return classifiers[0] if classifiers and (not stated or stated.startswith("Copyright")) else stated


def write_card(folder: Path, record: dict) -> None:
    """Write the model card from `training.json`'s record."""
    rows = [
        f"| {domain} | {r['watched_loss']:.2f} | {r['test_loss']:.2f} | {r['greedy']['repeated_4grams']:.2f} "
        f"| {r['greedy']['repeated_4grams_of_references']:.2f} | {r['greedy']['ended_with_eos']:.0%} "
        f"| {r['greedy']['mean_tokens']:.0f} |"
        for domain, r in record["results"].items()
    ]
    card = CARD.format(
        parameters=record["parameters"],
        minutes=record["training_minutes"],
        new_tokens=NEW_TOKENS,
        table="\n".join(rows),
        tokens=record["tokens"],
        context=CONTEXT,
        maths_share=record["arguments"]["maths_share"],
        vocabulary=record["arguments"]["vocab_size"],
        machine=record["machine"],
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        maths_examples=record["training_examples"]["maths"],
        python_examples=record["training_examples"]["python"],
        python_version=record["versions"]["Python"],
        packages="\n".join(f"| {name} | {licence} |" for name, licence in record["code_packages"].items()),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "base", help="folder to write to")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder of the bundled test files")
    parser.add_argument("--gsm8k-train", type=Path, help="GSM8K's train split as JSON Lines (default: from the Hub)")
    parser.add_argument("--gsm8k-test", type=Path, help="GSM8K's test split as JSON Lines (default: from the Hub)")
    parser.add_argument("--code-packages", nargs="*", default=CODE_PACKAGES, help="installed packages to learn from")
    parser.add_argument("--device", default="cpu", help="where to train, such as `cpu` or `cuda`")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--tokens", type=float, default=2.5e6, help="number of tokens to train on")
    parser.add_argument("--batch-size", type=int, default=8, help=f"windows of {CONTEXT} tokens in a step")
    parser.add_argument("--maths-share", type=float, default=0.5, help="share of maths in a batch; the rest is Python")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="AdamW's; Muon has twice that")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--evaluations", type=int, default=6, help="how often the held-out loss is watched")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="train without `torch.compile`")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Load the text, train the tokenizer and the model, measure them, write the folder."""
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    corpus, watched, test = load_corpora(args)
    texts = [text for examples in corpus.values() for example in examples for text in example]
    tokenizer = make_tokenizer(texts, args.vocab_size)
    encoded = {domain: [ids for ids, _ in encode(tokenizer, examples)] for domain, examples in corpus.items()}
    for domain, sequences in encoded.items():
        print(f"{domain}: {len(sequences)} examples, {sum(map(len, sequences)):,} tokens", flush=True)

    tokenizer.save_pretrained(args.output)
    model = make_model(tokenizer).to(args.device)
    watched_ids = {domain: encode(tokenizer, examples[:64]) for domain, examples in watched.items()}
    streams = {domain: packed_windows(sequences, args.seed) for domain, sequences in encoded.items()}
    start = time.perf_counter()
    history = train(model, streams, lambda: {d: answer_loss(model, ids) for d, ids in watched_ids.items()}, args)
    minutes = (time.perf_counter() - start) / 60

    record = {
        "parameters": model.num_parameters(),
        "training_examples": {domain: len(examples) for domain, examples in corpus.items()},
        "corpus_tokens": {domain: sum(map(len, sequences)) for domain, sequences in encoded.items()},
        "tokens": history[-1]["step"] * args.batch_size * CONTEXT,
        "training_minutes": round(minutes, 2),
        "machine": machine(args.device),
        "versions": {"Python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
        "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path | list)},
        "code_packages": {p: licence_of(p) for p in args.code_packages},
        "history": history,
        "results": measure(args.output, watched, test),
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_card(args.output, record)
    print(json.dumps(record["results"], indent=1))
    print(f"{args.output}: {sum(p.stat().st_size for p in args.output.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
