#!/usr/bin/env python
"""Train the quickstart's base model from scratch: a tokenizer and a Llama of about 4 million parameters.

    python make_base.py                                 # on the CPU; GSM8K comes from the Hugging Face Hub
    python make_base.py --device cuda --tokens 30e6     # a longer training on a GPU
    python make_base.py --init base --tokens 2e6 --learning-rate 1e-3 --unlikelihood 1     # trains it further

The model learns the two domains of `make_data.py`: worked GSM8K problems, and short documented Python functions
of the standard library and of the installed, permissively licensed packages named by `--code-packages`. It knows
nothing about multi-token prediction: to the rest of the quickstart it is any causal language model of the Hub.

The folder it writes holds the model in bfloat16, its tokenizer, `training.json` with every measured number, and a
model card. The checkpoint kept is the one with the lowest loss on held-out text.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from base_corpus import CODE_PACKAGES, CONTEXT, Corpus, load_corpora, packed_windows
from base_report import answer_loss, licence_of, measure, write_card
from base_tokenizer import encode, make_tokenizer
from base_training import train
from make_data import HERE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_mtp.base.machine import describe_machine


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, help="folder of an earlier result, to train it further")
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
    parser.add_argument(
        "--unlikelihood", type=float, default=1.0, help="weight of the loss that keeps it from looping"
    )
    parser.add_argument("--evaluations", type=int, default=6, help="how often the held-out loss is watched")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="train without `torch.compile`")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


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


def model_and_tokenizer(args: argparse.Namespace, corpus: Corpus) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """New ones, or those of `--init`."""
    if args.init is None:
        texts = [text for examples in corpus.values() for example in examples for text in example]
        tokenizer = make_tokenizer(texts, args.vocab_size)
        return make_model(tokenizer).to(args.device), tokenizer
    model = AutoModelForCausalLM.from_pretrained(args.init, dtype=torch.float32, attn_implementation="eager")
    return model.to(args.device), AutoTokenizer.from_pretrained(args.init)


def trainings(folder: Path | None) -> list[dict]:
    """The trainings that made an earlier result, the first one first; none without a folder."""
    return [] if folder is None else json.loads((folder / "training.json").read_text("utf-8"))["trainings"]


def this_training(args: argparse.Namespace, history: list[dict[str, float]], minutes: float) -> dict:
    """What `training.json` says of a training."""
    return {
        "tokens": history[-1]["step"] * args.batch_size * CONTEXT,
        "window": CONTEXT,
        "minutes": round(minutes, 2),
        "arguments": {name: value for name, value in vars(args).items() if not isinstance(value, Path | list)},
        "history": history,
    }


def main() -> None:
    """Load the text, train the tokenizer and the model, measure them, write the folder."""
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    corpus, watched, test = load_corpora(args)
    model, tokenizer = model_and_tokenizer(args, corpus)
    encoded = {domain: [ids for ids, _ in encode(tokenizer, examples)] for domain, examples in corpus.items()}
    watched_ids, test_ids = (
        {domain: encode(tokenizer, examples) for domain, examples in split.items()} for split in (watched, test)
    )
    for domain, sequences in encoded.items():
        print(f"{domain}: {len(sequences)} examples, {sum(map(len, sequences)):,} tokens", flush=True)

    tokenizer.save_pretrained(args.output)
    few = {domain: ids[:64] for domain, ids in watched_ids.items()}
    streams = {domain: packed_windows(sequences, args.seed) for domain, sequences in encoded.items()}
    start = time.perf_counter()
    history = train(model, streams, lambda: {domain: answer_loss(model, ids) for domain, ids in few.items()}, args)
    minutes = (time.perf_counter() - start) / 60

    record = {
        "parameters": model.num_parameters(),
        "training_examples": {domain: len(examples) for domain, examples in corpus.items()},
        "corpus_tokens": {domain: sum(map(len, sequences)) for domain, sequences in encoded.items()},
        "trainings": [*trainings(args.init), this_training(args, history, minutes)],
        "machine": describe_machine(),
        "code_packages": {p: licence_of(p) for p in args.code_packages},
        "results": measure(args.output, watched_ids, test_ids),
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_card(args.output, record)
    print(json.dumps(record["results"], indent=1))
    print(f"{args.output}: {sum(p.stat().st_size for p in args.output.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
