#!/usr/bin/env python
"""How often a sampled draft is accepted: by rejection sampling, and by the noise that drafting and verification share.

    python examples/benchmarks/measure_sampling.py PROMPTS --base BASE --adapter ADAPTER \\
        --output docs/results/sampling.json

PROMPTS is a JSON Lines file of conversations (`prompt`) with the model's own answers (`completion`). On these texts,
at tokens taken at random, let p be the base's distribution of the token after next, and q that of the first mask.
Rejection sampling accepts a draft from q with probability sum(min(p, q)). With shared noise, a draft is accepted if
adding one noise to log p and to log q has the same maximum; with n candidates, if the maximum of the former is among
the n largest of the latter. Rejection sampling's rate is the best that a draft from q can reach. A power of q may
reach more, because a mask is less certain than the base.
Prints a table; the last line is one JSON document.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from report import finish
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mtp.adapter.sampler import SHORTLIST
from hf_mtp.base.machine import describe_machine
from hf_mtp.decoding.noise import PositionNoise
from hf_mtp.layout.blocks import IGNORE, segments, training_layout
from hf_mtp.objective.compute import drafted_features
from hf_mtp.passes.training_pass import training_pass

TEMPERATURES, CANDIDATES, POWERS, DRAWS, PLACES = (0.7, 1.0), (1, 2, 3), (1.25, 1.5, 2.0), 16, (1, 2)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="JSON Lines of held-out conversations and the model's own answers")
    parser.add_argument("--base", required=True, help="base model: folder or Hub id")
    parser.add_argument("--adapter", required=True, type=Path, help="folder of the adapter")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--texts", type=int, default=40, help="texts at most (%(default)s)")
    parser.add_argument("--anchors", type=int, default=12, help="tokens of each text (%(default)s)")
    return parser.parse_args()


@torch.inference_mode()
def logits_of(model: PeftModel, ids_1T: torch.LongTensor, start: int, anchors: int, generator: torch.Generator):
    """For some tokens of a text: logits of the base and of the drafts, `(A, V)` each, by place in the block."""
    tuner = model.base_model
    labels_1T, position_1T = ids_1T.clone(), torch.arange(ids_1T.shape[1])[None]
    labels_1T[:, :start] = IGNORE
    k = tuner.active_mtp_config.k
    layout = training_layout(labels_1T, position_1T, segments(None, position_1T), k, anchors, generator)
    reading = training_pass(tuner, ids_1T, layout, all_layers=False, masks=layout.masks)
    features_MD = drafted_features(tuner, ids_1T, layout, reading.masks(layout)[-1])[0]
    target_M, unembedding = layout.target_columns(labels_1T)[0], tuner.unembedding()
    for place in PLACES:
        mask_A = ((layout.step_BM[0] == place) & (target_M != IGNORE)).nonzero()[:, 0]
        base_AD = reading.regular[-1][0, target_M[mask_A] - 1]
        yield place, unembedding(base_AD).float(), unembedding(features_MD[mask_A]).float()


def rates(base_AV: torch.Tensor, draft_AV: torch.Tensor, temperature: float, seed: int) -> dict[str, torch.Tensor]:
    """How likely a draft is accepted at each token, `(A,)`, by each method."""
    p_AV, q_AV = (logits / temperature for logits in (base_AV, draft_AV))
    found = {"rejection sampling": torch.minimum(p_AV.softmax(-1), q_AV.softmax(-1)).sum(-1)}
    noise = PositionNoise(seed, 0, p_AV.shape[1], p_AV.device)
    methods = {f"shared noise, {count} candidate(s)": (1.0, count) for count in CANDIDATES}
    methods |= {f"shared noise, 1 candidate, q to the power of {power}": (power, 1) for power in POWERS}
    shortlist = q_AV.topk(SHORTLIST, dim=-1)
    hits = {method: torch.zeros(len(p_AV)) for method in methods}
    for draw in range(DRAWS):
        noise_V = noise.at(draw)
        noise.forget_before(draw + 1)
        chosen_A1 = (p_AV + noise_V).argmax(dim=-1, keepdim=True)
        for method, (power, count) in methods.items():
            best_AC = (power * shortlist.values + noise_V[shortlist.indices]).topk(count, dim=-1).indices
            hits[method] += (shortlist.indices.gather(1, best_AC) == chosen_A1).any(dim=-1) / DRAWS
    return found | hits


def main() -> None:
    args = parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    rows = [json.loads(line) for line in args.prompts.read_text(encoding="utf-8").splitlines()][: args.texts]
    generator, found = torch.Generator().manual_seed(0), {}
    for number, row in enumerate(rows):
        ids = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]]
        start = len(ids[0])
        ids[0] += tokenizer(row["completion"][0]["content"], add_special_tokens=False)["input_ids"]
        ids_1T = torch.tensor(ids)[:, :384]
        if ids_1T.shape[1] < start + 16:
            continue
        for place, base_AV, draft_AV in logits_of(model, ids_1T, start, args.anchors, generator):
            for temperature in TEMPERATURES:
                for method, rate_A in rates(base_AV, draft_AV, temperature, seed=number).items():
                    found.setdefault((temperature, place, method), []).append(rate_A)
    table = [
        {
            "temperature": temperature,
            "mask": place,
            "method": method,
            "rate": round(torch.cat(values).mean().item(), 4),
        }
        for (temperature, place, method), values in sorted(found.items())
    ]
    for row in table:
        print(f"T={row['temperature']}  mask {row['mask']}  {row['method']:32} {row['rate']:.3f}")
    tokens = sum(len(values) for values in found[TEMPERATURES[0], 1, "rejection sampling"])
    finish({"machine": describe_machine(), "texts": len(rows), "tokens": tokens, "rates": table}, args.output)


if __name__ == "__main__":
    main()
