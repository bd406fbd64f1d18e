"""What the quickstart's base model is worth: its losses, how fluent its greedy answers are, and its model card."""

import importlib.metadata
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hf_mtp.evaluation.measures import repeated_share

NEW_TOKENS = 128  # length of the measured greedy answers

Encoded = list[tuple[list[int], int]]  # token ids of each example, with the number of them that are the prompt


@torch.no_grad()
def answer_loss(model: LlamaForCausalLM, sequences: Encoded, batch_size: int = 16) -> float:
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


@torch.no_grad()
def greedy_answers(model: LlamaForCausalLM, sequences: Encoded) -> list[list[int]]:
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


def measure(folder: Path, watched: dict[str, Encoded], test: dict[str, Encoded]) -> dict[str, dict]:
    """Every number of the model card, from the saved bfloat16 weights computed with in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    results = {}
    for domain, sequences in test.items():
        answers = greedy_answers(model, sequences)
        results[domain] = {
            "watched_examples": len(watched[domain]),
            "watched_loss": answer_loss(model, watched[domain]),
            "test_loss": answer_loss(model, sequences),
            "greedy": generation_statistics(answers, [ids[n:] for ids, n in sequences], tokenizer.eos_token_id),
            "samples": [
                {"prompt": tokenizer.decode(ids[:n], skip_special_tokens=True), "answer": tokenizer.decode(answer)}
                for (ids, n), answer in zip(sequences[:4], answers, strict=False)
            ],
        }
    return results


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

The stored weights are bfloat16; the computation is in float32. Losses are in nats per answer token, on held-out text.
The validation text chose the checkpoint; the test text is the 40 rows of `../data/*_test.jsonl`. Greedy answers to
these 40 prompts have at most {new_tokens} tokens. A repeated 4-gram is one that occurred earlier in the same answer;
"in references" is its share in the reference answers.

| domain | validation loss | test loss | repeated 4-grams | in references | ended with `<|end|>` | tokens per answer |
|---|---|---|---|---|---|---|
{table}

`training.json` has these numbers, the losses during training, and sample answers.

## Training

{trainings}
- Unlikelihood (Welleck et al., arXiv 1908.04319) of repeating a 4-gram of the same text keeps a model this small from
  looping.
- The tokenizer is a byte-level BPE of {vocabulary:,} ids.
- Machine of the last training and of the measurements: {processor}, {threads} threads, {versions}.
- `../make_base.py` trains the model and writes this page.

## Data and licences

- maths: GSM8K's train split ({maths_examples:,} problems), MIT, Copyright (c) 2021 OpenAI.
- python: {python_examples:,} short documented functions of CPython {python_version}'s standard library (PSF-2.0) and
  of the packages below. Only the weights have seen these packages; none of their text is shipped here.

| package | licence |
|---|---|
{packages}

`../data/README.md` has the licence notices of the text that ships here.
"""


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
    trainings = [
        "- {tokens:,} tokens in windows of {window}, {minutes:.0f} minutes, with Muon and AdamW: {maths_share:.0%} "
        "maths, learning rate {learning_rate}, unlikelihood {unlikelihood}.".format(
            **{**training["arguments"], **training}
        )
        for training in record["trainings"]
    ]
    machine = record["machine"]
    card = CARD.format(
        parameters=record["parameters"],
        minutes=sum(training["minutes"] for training in record["trainings"]),
        new_tokens=NEW_TOKENS,
        table="\n".join(rows),
        trainings="\n".join(trainings),
        vocabulary=record["trainings"][0]["arguments"]["vocab_size"],
        processor=machine["processor"],
        threads=machine["threads"],
        versions=", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers")),
        maths_examples=record["training_examples"]["maths"],
        python_examples=record["training_examples"]["python"],
        python_version=machine["python"],
        packages="\n".join(f"| {name} | {licence} |" for name, licence in record["code_packages"].items()),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
