#!/usr/bin/env python
"""Which columns pay? Decodes held-out texts again by the schedule of `auto`, with several kinds of drafts and costs.

    python examples/smollm2/columns.py DATA docs/results/columns.json --base smollm2

The base answers each prompt greedily, and at every token of the answer the adapter's candidates are recorded. The real
decode loop then decodes the record again (see `replay.py`): with n-grams alone, with drafts from masks, with both, and
with siblings. Tokens per pass and columns are counted. A speedup is tokens divided by the costs of the passes. Costs
are measured on this machine, or assumed. *Hindsight* is the best that a schedule could do if it knew which drafts are
right. `--record` keeps what the model said. Prints a table; the file has all numbers.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from held_out import held_out_questions
from methods import NEARLY_FREE
from peft import PeftModel
from replay import Text, hindsight, replay
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from hf_mtp.base.machine import describe_machine
from hf_mtp.cache.rollback import RollbackCache
from hf_mtp.decoding.batch import Batch
from hf_mtp.decoding.drafters.masks import MaskDrafter
from hf_mtp.decoding.loop import DecodingLoop
from hf_mtp.decoding.schedule.adaptive import AdaptiveSchedule
from hf_mtp.decoding.schedule.costs import PassCosts
from hf_mtp.decoding.sequence import Sequence
from hf_mtp.decoding.verifier import Verifier
from hf_mtp.layout.blocks import IGNORE, segments, training_layout
from hf_mtp.passes.decoding_pass import DecodingPass
from hf_mtp.passes.training_pass import training_pass

METHODS = {
    "n-grams": {"masks": False},
    "masks": {"ngrams": False, "siblings": 0},
    "both": {"siblings": 0},
    "both, siblings": {},
}
HERE = Path(__file__).parent
OTHERS = 3  # recorded candidates of each mask, besides the first
ROUNDS = 5  # measurements of the costs


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the held-out sets")
    parser.add_argument("output", type=Path, help="file for the numbers, JSON")
    parser.add_argument("--base", required=True, help="the model's folder")
    parser.add_argument("--adapter", type=Path, default=HERE / "adapter", help="folder of the adapter (%(default)s)")
    parser.add_argument("--prompts", type=int, default=40, help="prompts of each domain (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="length of an answer at most (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--record", type=Path, help="JSON Lines of texts and candidates: read if there, else written")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    measured = median_costs(model, encoded("What is 2 + 3?", tokenizer))
    plain = measured.plain
    costs = {
        "measured": measured,
        "masks as regular tokens": PassCosts(plain, plain[1:]),
        "columns nearly free": NEARLY_FREE,
    }
    report = {
        "machine": describe_machine(),
        "dtype": str(base.dtype).removeprefix("torch."),
        "new_tokens": args.new_tokens,
        "costs": {name: vars(curve) for name, curve in costs.items()},
        "domains": {},
    }
    for domain, texts in recorded(args, model, tokenizer).items():
        report["domains"][domain] = {"prompts": len(texts)} | {
            name: results(texts, curve, model.base_model.active_mtp_config.k) for name, curve in costs.items()
        }
        print_rows(domain, report["domains"][domain], costs)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def encoded(question: str, tokenizer) -> torch.LongTensor:
    """`(1, T)`: the conversation that begins with a question."""
    conversation = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )["input_ids"]


def results(texts: list[Text], costs: PassCosts, k: int) -> dict[str, dict]:
    """What each method brings, and what hindsight would."""
    methods = {method: vars(replay(texts, costs, k, **options)) for method, options in METHODS.items()}
    tokens, best = hindsight(texts, costs, k)
    return {**methods, "hindsight": {"tokens": tokens, "cost": best}}


def print_rows(domain: str, found: dict, costs: dict[str, PassCosts]) -> None:
    for name in costs:
        for method, row in found[name].items():
            counts = f", {row['tokens'] / row['passes']:.2f} tokens per pass" if "passes" in row else ""
            print(f"{domain:6} {name:24} {method:15} {row['tokens'] / row['cost']:.2f}x{counts}", flush=True)


# ---------------------------------------------------------------- what the model says


def recorded(args: argparse.Namespace, model: PeftModel, tokenizer) -> dict[str, list[Text]]:
    """The texts of each domain with their candidates."""
    if args.record is not None and args.record.is_file():
        rows = [json.loads(line) for line in args.record.read_text(encoding="utf-8").splitlines()]
    else:
        questions = held_out_questions(args.data, args.prompts)
        rows = []
        for turn in zip(*questions.values(), strict=True):
            for domain, question in zip(questions, turn, strict=True):
                rows.append({"domain": domain, **record(model, encoded(question, tokenizer), args.new_tokens)})
                if args.record is not None:
                    with args.record.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    texts: dict[str, list[Text]] = {}
    for row in rows:
        by_anchor = [dict(zip(row["anchors"], row[name], strict=True)) for name in ("candidates", "confidences")]
        texts.setdefault(row["domain"], []).append(Text(row["ids"], row["prompt"], *by_anchor))
    return texts


@torch.inference_mode()
def record(model: PeftModel, prompt_1T: torch.LongTensor, new_tokens: int) -> dict:
    """The base's answer to a prompt, and the candidates of a block of masks on each of its tokens."""
    base, tuner = model.get_base_model(), model.base_model
    k, prompt = tuner.active_mtp_config.k, prompt_1T.shape[1]
    ids_1S = base.generate(
        input_ids=prompt_1T, attention_mask=torch.ones_like(prompt_1T), max_new_tokens=new_tokens, do_sample=False
    )
    ids_1T = torch.nn.functional.pad(ids_1S, (0, 2))  # so that the last tokens have targets, too
    labels_1T = ids_1T.clone()
    labels_1T[:, :prompt] = IGNORE
    position_1T = torch.arange(ids_1T.shape[1])[None]
    layout = training_layout(labels_1T, position_1T, segments(None, position_1T), k)
    reading = training_pass(tuner, ids_1T, layout, all_layers=False, masks=1024)
    state_AkD = torch.cat([reading.masks(chunk)[-1] for chunk in reading.chunks], dim=1)[0].unflatten(0, (-1, k))
    anchor_A = layout.anchor_BM[0, ::k]
    inside_A = anchor_A < ids_1S.shape[1] - 1
    anchor_A, state_AkD = anchor_A[inside_A], state_AkD[inside_A]
    drafts = tuner.draft(ids_1S[0, anchor_A + 1], state_AkD, siblings=OTHERS)
    candidate_AkC = torch.cat([drafts.token_BK[:, :, None], drafts.sibling_BKC], dim=2)
    return {
        "prompt": prompt,
        "ids": ids_1S[0].tolist(),
        "anchors": anchor_A.tolist(),
        "candidates": candidate_AkC.tolist(),
        "confidences": drafts.confidence_BK.tolist(),
    }


@torch.inference_mode()
def median_costs(model: PeftModel, prompt_1T: torch.LongTensor) -> PassCosts:
    """What passes cost by the measurement that `auto` makes, repeated."""
    tuner, length = model.base_model, prompt_1T.shape[1] + 32
    k = tuner.active_mtp_config.k
    schedule = AdaptiveSchedule(k)
    verifier = Verifier(LogitsProcessorList(), StoppingCriteriaList([MaxLengthCriteria(length)]), rows=1)
    drafters = [MaskDrafter(tuner, schedule.mask_acceptance, verifier.processors)]
    loop = DecodingLoop(DecodingPass(tuner), schedule, drafters, verifier, k)
    row = Sequence(prompt_1T[0], 0, 0, 32, GenerationConfig(), LogitsProcessorList())
    batch = Batch([row], RollbackCache(torch.zeros(1, dtype=torch.long)), prompt_1T)
    loop.step(batch)
    found = []
    for _ in range(ROUNDS):
        loop.measure_costs(batch, lambda seconds: seconds)
        found.append(schedule.costs)
    return PassCosts(*(_medians([getattr(costs, name) for costs in found]) for name in ("plain", "masked")))


def _medians(rounds: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    points = zip(*rounds, strict=True)
    return [(point[0][0], round(statistics.median(cost for _, cost in point), 4)) for point in points]


if __name__ == "__main__":
    main()
