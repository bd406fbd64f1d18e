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
import copy
import importlib.util
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from base_report import answer_loss, licence_of, measure, write_card
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

from hf_mtp.base.machine import describe_machine

CODE_PACKAGES = (
    "numpy scipy pandas sympy networkx torch transformers peft trl accelerate datasets huggingface_hub".split()
)
BOS, USER, ASSISTANT, EOS, PAD = SPECIAL_TOKENS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<pad>"]
BOS_ID = SPECIAL_TOKENS.index(BOS)  # a tokenizer's special tokens come first
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
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        return loss + args.unlikelihood * unlikelihood(logits_BTV, ids_BT) if args.unlikelihood else loss

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


def unlikelihood(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """How likely the model thinks it to repeat a 4-gram where the text does not, per token.

    Token-level unlikelihood (Welleck et al., arXiv 1908.04319), with as candidates what followed the last three tokens
    earlier in the same text. Small models loop; this teaches them not to.

    Args:
        logits_BTV (`torch.Tensor` of shape `(B, T, V)`): After each token but the last.
        ids_BT (`torch.Tensor` of shape `(B, T + 1)`): The tokens.
    """
    text_BT = (ids_BT == BOS_ID).cumsum(dim=1)
    same_BTS = (ids_BT[:, :, None] == ids_BT[:, None, :]) & (text_BT[:, :, None] == text_BT[:, None, :])
    alike_BTS = same_BTS[:, :-1, :-1]  # the tokens here and there, and with each round the ones before them
    for _ in range(2):
        alike_BTS = same_BTS[:, :-1, :-1] & F.pad(alike_BTS[:, :-1, :-1], (1, 0, 1, 0))
    repeats_BTS = (alike_BTS & ~same_BTS[:, 1:, 1:]).tril(diagonal=-1)
    next_BTS = ids_BT[:, None, 1:].expand_as(repeats_BTS)
    probability_BTS = logits_BTV.softmax(dim=-1).gather(2, next_BTS)
    return -(torch.log1p(-probability_BTS.clamp(max=1 - 1e-4)) * repeats_BTS).sum() / repeats_BTS[:, :, 0].numel()


def save_bfloat16(model: LlamaForCausalLM, folder: Path) -> None:
    """Save a bfloat16 copy of `model`, which itself stays as it is."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)


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


def trainings(folder: Path) -> list[dict]:
    """The trainings that made an earlier result, the first one first."""
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))["trainings"]


def main() -> None:
    """Load the text, train the tokenizer and the model, measure them, write the folder."""
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    corpus, watched, test = load_corpora(args)
    texts = [text for examples in corpus.values() for example in examples for text in example]
    if args.init is None:
        earlier, tokenizer = [], make_tokenizer(texts, args.vocab_size)
        model = make_model(tokenizer)
    else:
        earlier, tokenizer = trainings(args.init), AutoTokenizer.from_pretrained(args.init)
        model = AutoModelForCausalLM.from_pretrained(args.init, dtype=torch.float32, attn_implementation="eager")
    model.to(args.device)
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
        "trainings": [
            *earlier,
            {
                "tokens": history[-1]["step"] * args.batch_size * CONTEXT,
                "window": CONTEXT,
                "minutes": round(minutes, 2),
                "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path | list)},
                "history": history,
            },
        ],
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
