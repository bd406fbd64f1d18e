#!/usr/bin/env python
"""Where do texts in bfloat16 leave those of plain decoding, and were the two tokens a near-tie?

    python examples/smollm2/divergences.py DATA out/adapter docs/results/divergences.json --base smollm2

Decodes held-out prompts greedily, plainly and in several other ways: by `mtp=True` without and with `mtp_bitwise`, by
prompt lookup, and plainly in a batch. At the first token that differs, the base's logits of both tokens are compared,
in units of the rounding of their dtype. Two tokens within a few units are a near-tie: which of them is larger depends
on the order in which a product is summed up. The file is written after each prompt.
"""

import json

import torch
from measure import encoded, held_out_questions, parser_of
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mtp.evaluation.compare import decode, describe_machine

WAYS = {
    "auto": {"mtp": True},
    "auto, bitwise": {"mtp": True, "mtp_bitwise": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 8},
    "plain, in a batch": {},
}
ROWS = {"plain, in a batch": 4}  # all of them the same prompt


@torch.inference_mode()
def divergence(base, prompt_1T: torch.LongTensor, plain: list[int], other: list[int]) -> dict | None:
    """The first token that differs: its place, and the gap of both tokens' logits in units of rounding."""
    place = next((i for i, pair in enumerate(zip(plain, other, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return None
    text_1T = torch.cat([prompt_1T, torch.tensor([plain[:place]], dtype=torch.long)], dim=1)
    logit_V = base(text_1T, logits_to_keep=1).logits[0, -1]
    largest = logit_V.abs().max()
    unit = (torch.nextafter(largest, torch.tensor(torch.inf, dtype=largest.dtype)) - largest).item()
    gap = abs(logit_V[plain[place]].item() - logit_V[other[place]].item())
    return {"place": place, "gap": gap, "units": round(gap / unit, 2)}


def summary(rows: list[dict], speedup: float) -> dict:
    """One way: how many texts differ, by how much, and how fast it was, by the wall clock against plain decoding."""
    units = [row["divergence"]["units"] for row in rows if row["divergence"]]
    numbers = {"texts": len(rows), "different": len(units), "most_units": max(units, default=0.0)}
    return {**numbers, "speedup": round(speedup, 2), "divergences": rows}


def main() -> None:
    parser = parser_of(__doc__, prompts=8)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    for options in WAYS.values():  # what is measured once per model
        decode(model, encoded("What is 2 + 3?", tokenizer), 24, **options)
    found, seconds = {way: [] for way in WAYS}, dict.fromkeys(("plain", *WAYS), 0.0)
    questions = held_out_questions(args.data, args.prompts)
    for turn in zip(*questions.values(), strict=True):
        for domain, question in zip(questions, turn, strict=True):
            prompt = encoded(question, tokenizer)
            plain = decode(model, prompt, args.new_tokens)
            seconds["plain"] += plain.seconds
            for way, options in WAYS.items():
                answer = decode(model, prompt.repeat(ROWS.get(way, 1), 1), args.new_tokens, **options)
                different = divergence(base, prompt, plain.ids, answer.ids)
                found[way].append({"domain": domain, "divergence": different})
                seconds[way] += answer.seconds
            report = {"machine": describe_machine(), "dtype": str(base.dtype).removeprefix("torch.")}
            report["ways"] = {way: summary(rows, seconds["plain"] / seconds[way]) for way, rows in found.items()}
            args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print({way: f"{row['different']} of {row['texts']}" for way, row in report["ways"].items()}, flush=True)


if __name__ == "__main__":
    main()
