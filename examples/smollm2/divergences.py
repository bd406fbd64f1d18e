#!/usr/bin/env python
"""Where do texts in bfloat16 leave those of plain decoding, and were the two tokens a near-tie?

    python examples/smollm2/divergences.py DATA out/adapter docs/results/divergences.json --base smollm2

Decodes held-out prompts greedily, plainly, by `mtp=True` and by prompt lookup. At the first token that differs, the
base's logits of both tokens are compared, in units of the rounding of their dtype. Two tokens within a few units are a
near-tie: which of them is larger depends on the order in which a product is summed up.
"""

import json

import torch
from measure import encoded, held_out_questions, parser_of
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mtp.evaluation.compare import decode, describe_machine

WAYS = {"auto": {"mtp": True}, "prompt lookup": {"prompt_lookup_num_tokens": 8}}


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


def main() -> None:
    args = parser_of(__doc__, prompts=8).parse_args()
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    found = {way: [] for way in WAYS}
    for domain, questions in held_out_questions(args.data, args.prompts).items():
        for question in questions:
            prompt = encoded(question, tokenizer)
            plain = decode(model, prompt, args.new_tokens)
            for way, options in WAYS.items():
                answer = decode(model, prompt, args.new_tokens, **options)
                different = divergence(base, prompt, plain.ids, answer.ids)
                found[way].append({"domain": domain, "divergence": different})
    report = {"machine": describe_machine(), "dtype": str(base.dtype).removeprefix("torch."), "ways": {}}
    for way, rows in found.items():
        units = [row["divergence"]["units"] for row in rows if row["divergence"]]
        report["ways"][way] = {"texts": len(rows), "different": len(units), "most_units": max(units, default=0.0)}
        report["ways"][way]["divergences"] = rows
        print(
            f"{way}: {len(units)} of {len(rows)} texts differ, by {max(units, default=0.0)} units of rounding at most"
        )
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
