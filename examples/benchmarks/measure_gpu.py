#!/usr/bin/env python
"""What a pass with masks costs on a GPU, and what the paper's acceptance rates would make of it by the clock.

    python examples/benchmarks/measure_gpu.py --output docs/results/gpu.json      # a Llama of 8B, random bf16 weights
    python examples/benchmarks/measure_gpu.py --shape tiny --device cpu           # does the script run?

First correctness: a small float32 model decodes the same tokens with and without masks, static cache, compiled. Then
one pass with masks (verification and drafting included) against one plain pass, both over a static cache and compiled,
batch 1: with all masks of quadratic decoding, and with the 2k that are most useful. Then whole decodings in which
drafts are accepted at given rates: those of the paper's table, and `--rates`. Prints a table; the last line is one
JSON document.
"""

import argparse
import inspect
import itertools
import statistics
import time
from pathlib import Path

import torch
from peft import get_peft_model
from report import finish
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, StaticCache

from hf_mtp import GatedLoraConfig
from hf_mtp.base.caches import cache_name
from hf_mtp.base.machine import describe_machine
from hf_mtp.cache.rollback import RollbackCache
from hf_mtp.decoding.drafters.base import no_drafts
from hf_mtp.decoding.verification import verify_together
from hf_mtp.layout.blocks import decoding_layout
from hf_mtp.layout.mask_plan import choose_masks
from hf_mtp.passes.decoding_pass import DecodingPass

SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
    },
}
# New tokens per pass for each domain: Samragh et al., arXiv 2507.11851, table 1.
PAPER = {
    "knowledge": {4: 2.18, 8: 2.38},
    "math": {4: 3.75, 8: 5.22},
    "code": {4: 3.87, 8: 5.35},
    "chat": {4: 2.31, 8: 2.52},
    "safety": {4: 2.52, 8: 2.79},
}
WARM_UP, REPEATS, CHECKS = 5, 30, 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prefix", type=int, default=1024, help="tokens before the measured passes")
    parser.add_argument("--new-tokens", type=int, default=256, help="length of the decodings at the paper's rates")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument(
        "--passes",
        type=lambda text: tuple(map(int, text.split(":"))),
        nargs="*",
        default=[(8, 16), (8, 72), (4, 8), (4, 20)],
        help="k and masks of the passes to measure, such as 8:16",
    )
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="further tokens per pass to replay")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    return parser.parse_args()


def make_model(shape: str, device: str, dtype: torch.dtype, k: int, rank: int):
    """A random Llama with a random adapter."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, bos_token_id=None, eos_token_id=None)
    with torch.device(device):
        base = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    return get_peft_model(base, GatedLoraConfig(k=k, r=rank, init_lora_weights=False)).to(device).eval()


def compile_config(device: str) -> CompileConfig:
    return CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead" if device == "cuda" else None)


def check_exactness(device: str) -> int:
    """Compares greedy outputs with and without masks. Returns how many were the same, of `CHECKS`; they must all
    be."""
    same = 0
    for seed in range(CHECKS):
        model = make_model("tiny", device, torch.float32, k=8, rank=4)
        prompt = torch.randint(0, 97, (1, 11), generator=torch.Generator().manual_seed(seed)).to(device)
        arguments = {"max_new_tokens": 40, "do_sample": False}
        expected = model.generate(prompt, **arguments)
        options = {"cache_implementation": "static", "compile_config": compile_config(device)}
        same += torch.equal(
            model.generate(prompt, mtp=True, mtp_strategy="quadratic", **arguments, **options), expected
        )
        torch._dynamo.reset()
    return same


def seconds_of(run, device: str) -> float:
    """Median wall clock of a call, after warm-up."""
    times = []
    for _ in range(WARM_UP + REPEATS):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class PlainDecoding:
    """One token per pass over a static cache."""

    def __init__(self, model, prefix: torch.LongTensor, new_tokens: int, device: str):
        self.base = model.get_base_model()
        self.cache = StaticCache(config=self.base.config, max_cache_len=prefix.shape[1] + new_tokens + 64)
        self.past = {cache_name(inspect.signature(self.base.forward).parameters): self.cache}
        self.base(prefix, **self.past, use_cache=True, logits_to_keep=1)
        self.forward = self.base.get_compiled_call(compile_config(device))
        self.token = prefix[:, -1:].clone()
        self.position = torch.full((1, 1), prefix.shape[1], device=prefix.device)

    def __call__(self) -> None:
        logits = self.forward(input_ids=self.token, **self.past, use_cache=True, position_ids=self.position).logits
        self.token = logits[:, -1:].argmax(dim=-1)
        self.position += 1
        for layer in self.cache.layers:  # the same length for each pass that is measured
            layer.cumulative_length.sub_(1)


class MaskedDecoding:
    """Passes over a static cache, in which as many drafts count as accepted as the caller says.

    Args:
        masks (`int`): Masks of each pass but the first; (k + 1) * k in quadratic decoding.
    """

    def __init__(self, model, prefix: torch.LongTensor, k: int, masks: int, new_tokens: int, device: str):
        tuner = model.base_model
        self.k, self.masks = k, masks
        columns = prefix.shape[1] + new_tokens + (k + 1) ** 2 + k
        self.cache = RollbackCache(torch.zeros(1, dtype=torch.long, device=prefix.device), columns=columns)
        self.forward = DecodingPass(tuner, compiled=tuner.model.get_compiled_call(compile_config(device)))
        self.drafts, self.regular = no_drafts(1, prefix.device), prefix
        self(accepted=0)

    def __call__(self, accepted: int, keep: bool = True) -> None:
        accepted = min(accepted, self.drafts.count)
        first = self.regular.shape[1] - 1 - self.drafts.count
        # The block on the token where decoding ends is whole, so that there are always k drafts.
        value_BRk = torch.rand(1, 1 + self.drafts.count, self.k, device=self.regular.device) / 2
        value_BRk[:, accepted] = 1
        plan = choose_masks(value_BRk, self.masks if self.drafts.count else self.k)
        layout = decoding_layout(self.cache.rows.next_places(self.regular.shape[1]), plan, first=first)
        output = self.forward(self.regular, layout, self.cache, logits_rows=1 + self.drafts.count)
        tokens, *_ = verify_together(output.logits_BRV, self.drafts, None, [])
        tokens.tolist()  # where decoding waits for the device
        if keep:
            self.cache.keep([first + 1 + accepted])
        column = plan.column_BRk[:, accepted]
        states, logits = output.block(column), output.block_logits(column)
        self.drafts = self.forward.tuner.draft(tokens[:, accepted], states, logits_BKV=logits)
        self.regular = torch.cat([tokens[:, :1], self.drafts.token_BK], dim=1)


def at_rate(decoding: MaskedDecoding, tokens_per_pass: float, new_tokens: int, device: str) -> tuple[float, int]:
    """Seconds and passes of a decoding whose passes give so many tokens on average."""
    _wait(device)
    start, done = time.perf_counter(), 0
    for passes in itertools.count(1):
        new = int(passes * tokens_per_pass) - int((passes - 1) * tokens_per_pass)
        decoding(accepted=min(new - 1, decoding.k))
        done += new
        if done >= new_tokens:
            _wait(device)
            return time.perf_counter() - start, passes


def measure(args: argparse.Namespace, model, prefix: torch.LongTensor, k: int, masks: int, plain: float) -> dict:
    """What passes with so many masks cost, and what they bring at several tokens per pass."""
    torch._dynamo.reset()
    decoding = MaskedDecoding(model, prefix, k, masks, args.new_tokens, args.device)
    masked = seconds_of(lambda: decoding(accepted=0, keep=False), args.device)
    speedups = {}
    for rate in sorted({*(rates[k] for rates in PAPER.values()), *args.rates}):
        if rate > k + 1:
            continue
        decoding = MaskedDecoding(model, prefix, k, masks, args.new_tokens + 2 * k, args.device)
        decoding(accepted=0)
        seconds, passes = at_rate(decoding, rate, args.new_tokens, args.device)
        speedups[rate] = plain * args.new_tokens / seconds
    return {"milliseconds": 1000 * masked, "cost": masked / plain, "speedups": speedups}


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    same = check_exactness(args.device)
    print(f"correctness: {same}/{CHECKS} outputs identical", flush=True)
    if same < CHECKS:
        raise SystemExit("Outputs differ: no speed counts.")
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = make_model(args.shape, args.device, dtype, k=8, rank=args.rank)
    prefix = torch.randint(0, SHAPES[args.shape]["vocab_size"], (1, args.prefix), device=args.device)
    report = {
        "machine": describe_machine(),
        "arguments": {name: value for name, value in vars(args).items() if name != "output"},
        "identical": same,
        "passes": {},
    }
    plain = seconds_of(PlainDecoding(model, prefix, args.new_tokens, args.device), args.device)
    report["plain_milliseconds"] = 1000 * plain
    for k, masks in args.passes:
        name = f"k={k}, {masks} masks"
        report["passes"][name] = row = measure(args, model, prefix, k, masks, plain)
        print(f"{name}: a pass costs {row['cost']:.2f} plain ones ({row['milliseconds']:.2f} ms)", flush=True)
        for rate, speedup in row["speedups"].items():
            print(f"  {speedup:.2f}x at {rate} tokens per pass", flush=True)
    finish(report, args.output)


if __name__ == "__main__":
    main()
