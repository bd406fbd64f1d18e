#!/usr/bin/env python
"""Would a tree of drafts pay? What several candidates per position would bring, against what their columns cost.

    python examples/benchmarks/measure_tree.py --base BASE --data DATA --adapter out/reference \\
        --output docs/results/tree.json

Decoding verifies one chain of drafts. A tree would verify some second or third candidates beside it, one column each.
On held-out text, the base's own argmax being the truth: how often the truth is a draft's first, second ... candidate;
from these rates, the accepted drafts of the best tree (Cai et al., arXiv 2401.10774, section 2.3.3) and of a chain.
Then the seconds of a forward pass by its columns, on this machine. The gain is an upper bound: masks that hang on the
further candidates, without which decoding has no drafts after them, are not charged.
Prints tables; the last line is one JSON document.
"""

import argparse
import heapq
import inspect
import statistics
import time
from pathlib import Path

import torch
from peft import PeftModel
from reference_data import DOMAINS, test_dataset
from report import finish
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_mtp.base.caches import cache_name
from hf_mtp.evaluation.compare import describe_machine
from hf_mtp.layout.blocks import IGNORE, segments, training_layout
from hf_mtp.objective.compute import drafted_features
from hf_mtp.passes.training_pass import training_pass

CANDIDATES = 4  # per position
SIZES = (8, 9, 10, 12, 16, 24, 32)  # drafts
PREFIX, ROUNDS = 192, 15  # tokens in the cache, and passes, when columns are timed


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="base model: folder or Hub id")
    parser.add_argument("--data", required=True, type=Path, help="folder with the text")
    parser.add_argument("--adapter", required=True, type=Path, help="folder of the adapter")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--texts", type=int, default=40, help="held-out examples per domain")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args()


@torch.inference_mode()
def candidate_rates(model: PeftModel, tokenizer, dataset) -> list[list[float]]:
    """How often the truth is each draft's first, second ... candidate: one list per place in a block.

    A block hangs on every token; each draft is made from the true token before it, as in the objective.
    """
    tuner = model.base_model
    k, unembedding = tuner.active_mtp_config.k, tuner.model.get_output_embeddings()
    hits_kC, seen_k = torch.zeros(k, CANDIDATES), torch.zeros(k)
    for row in dataset:
        prompt, answer = (
            tokenizer(row[name], add_special_tokens=False).input_ids for name in ("prompt", "completion")
        )
        ids_1T = torch.tensor([prompt + answer])[:, :384]
        labels_1T = ids_1T.clone()
        labels_1T[:, : len(prompt)] = IGNORE
        position_1T = torch.arange(ids_1T.shape[1])[None]
        layout = training_layout(labels_1T, position_1T, segments(None, position_1T), k)
        if not layout.masks:  # the prompt alone is as long as the text is cut
            continue
        target_M = layout.target_columns(labels_1T)[0]
        mask_R = (target_M != IGNORE).nonzero()[:, 0]
        column_R = target_M[mask_R] - 1
        reading = training_pass(tuner, ids_1T, layout, all_layers=False, masks=layout.masks)
        truth_R = unembedding(reading.regular[-1][0, column_R]).argmax(dim=-1)
        hidden_BMD = reading.masks(layout)[-1]
        if tuner.sampler_head() is not None:
            hidden_BMD = drafted_features(tuner, ids_1T, layout, hidden_BMD)
        right_RC = unembedding(hidden_BMD[0, mask_R]).topk(CANDIDATES, dim=-1).indices == truth_R[:, None]
        place_R = layout.step_BM[0, mask_R] - 1
        hits_kC.index_add_(0, place_R, right_RC.float())
        seen_k.index_add_(0, place_R, torch.ones(len(place_R)))
    return (hits_kC / seen_k[:, None]).tolist()


def best_tree(rates: list[list[float]]) -> list[float]:
    """The probability that each draft of the best tree is accepted, likeliest first; all lie below their parents."""
    # A path is (probability, candidates chosen); the heap holds those whose parents and better siblings are taken.
    heap, probabilities = [(-rates[0][0], (0,), 1.0)], []
    while heap and len(probabilities) < max(SIZES):
        negative, path, parent = heapq.heappop(heap)
        probabilities.append(-negative)
        if path[-1] + 1 < CANDIDATES:  # the next sibling
            heapq.heappush(heap, (-parent * rates[len(path) - 1][path[-1] + 1], (*path[:-1], path[-1] + 1), parent))
        if len(path) < len(rates):  # the first child
            heapq.heappush(heap, (negative * rates[len(path)][0], (*path, 0), -negative))
    return probabilities


def chain(rates: list[list[float]]) -> list[float]:
    """The same for the chain of first candidates."""
    probabilities, reached = [], 1.0
    for candidates in rates:
        reached *= candidates[0]
        probabilities.append(reached)
    return probabilities


@torch.inference_mode()
def seconds_by_columns(base, columns: list[int]) -> dict[int, float]:
    """Median seconds of the base's forward pass over so many tokens behind a prefix, in turns."""
    seconds = {count: [] for count in columns}
    name = cache_name(inspect.signature(base.forward).parameters)
    for number in range(ROUNDS + 2):
        for count in columns:
            cache = DynamicCache()
            base(input_ids=torch.zeros(1, PREFIX, dtype=torch.long), **{name: cache})
            start = time.perf_counter()
            base(input_ids=torch.zeros(1, count, dtype=torch.long), **{name: cache})
            if number >= 2:  # the first ones warm up
                seconds[count].append(time.perf_counter() - start)
    return {count: statistics.median(values) for count, values in seconds.items()}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    columns = seconds_by_columns(base, [1, *(1 + size for size in SIZES)])
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    report = {
        "machine": describe_machine(),
        "arguments": {"texts": args.texts, "prefix": PREFIX, "candidates": CANDIDATES},
        "seconds_by_columns": {str(count): round(seconds, 6) for count, seconds in columns.items()},
        "domains": {},
    }
    for domain in DOMAINS:
        rates = candidate_rates(model, tokenizer, test_dataset(args.data, tokenizer, domain, args.texts))
        line, tree = chain(rates), best_tree(rates)
        tokens = {"chain": 1 + sum(line)} | {str(size): 1 + sum(tree[:size]) for size in SIZES}
        report["domains"][domain] = {
            "rates": [[round(rate, 4) for rate in place] for place in rates],
            "tokens_per_step": {name: round(value, 4) for name, value in tokens.items()},
        }
        print_rows(domain, rates, tokens, columns)
    finish(report, args.output)


def print_rows(domain: str, rates: list[list[float]], tokens: dict[str, float], columns: dict[int, float]) -> None:
    first = " ".join(f"{rate:.2f}" for rate in rates[0])
    print(f"{domain:8} first draft: the truth is candidate 1 to {CANDIDATES} at rates {first}")
    chain_columns = columns[1 + len(rates)]
    print(f"{domain:8} chain of {len(rates)}: {tokens['chain']:.2f} tokens per step")
    for size in SIZES:
        gain, price = tokens[str(size)] / tokens["chain"], columns[1 + size] / chain_columns
        print(f"{domain:8} tree of {size:2}: {tokens[str(size)]:.2f} tokens, {gain:.2f}x, for {price:.2f}x the time")


if __name__ == "__main__":
    main()
