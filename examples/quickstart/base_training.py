"""The training of the quickstart's base model: optimizers, learning rate and loss."""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from base_corpus import CONTEXT
from base_tokenizer import BOS_ID
from transformers import LlamaForCausalLM

MIN_LR_SHARE = 0.02


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
    step_loss = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    history, best_loss = [], math.inf
    start = time.perf_counter()
    for step in range(steps):
        model.train()
        set_learning_rate(optimizers, step, steps)
        ids_BT = torch.tensor([next(streams[domain]) for domain in rows], device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = step_loss(model, ids_BT, args.unlikelihood)
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


def loss_of(model: LlamaForCausalLM, ids_BT: torch.Tensor, weight: float) -> torch.Tensor:
    """Cross-entropy of the next token, plus `weight` times [`unlikelihood`]."""
    hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1]
    logits_BTV = model.lm_head(hidden_BTD).float()
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
    return loss + weight * unlikelihood(logits_BTV, ids_BT) if weight else loss


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
