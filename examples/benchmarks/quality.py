#!/usr/bin/env python
"""Is the base's quality untouched? Logits on a corpus, and two tasks of lm-evaluation-harness, beside a plain LoRA.

    pip install "hf_mtp[eval]"
    python examples/smollm2/base.py smollm2
    python examples/benchmarks/quality.py --base smollm2 --adapter examples/smollm2/adapter \\
        --output docs/results/quality.json

Four models are compared: the base; the base with the adapter, decoded with `mtp=True`; the same after some more steps
of training; and the base with a plain LoRA of the same rank on the same layers, trained for as many steps on the same
text. Logits are compared bit by bit, on text that no training sees. The tasks are the questions beside this script: as
a choice between four answers, and as an answer in the model's own words, which is right if the right choice is in it.
Prints a table; the last line is one JSON document.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from report import finish
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from hf_mtp import MTPConfig, MTPTrainer
from hf_mtp.base.machine import describe_machine
from hf_mtp.evaluation.decoded import counted_forward_passes
from hf_mtp.evaluation.run import adapter_fingerprint

QUESTIONS = Path(__file__).with_name("questions.jsonl")
TEXT = Path(__file__).parents[1] / "quickstart" / "data"
LENGTH, NEW_TOKENS, LEARNING_RATE = 160, 24, 2e-4
# Unlike `auto`, quadratic decoding takes the same passes on every machine. Bit for bit, also in half precision.
MTP = {"mtp": True, "mtp_strategy": "quadratic", "mtp_k": 4, "mtp_bitwise": True}
CHOICE, WORDS = "choice", "own words"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="base model: folder or Hub id")
    parser.add_argument("--adapter", required=True, help="its adapter: folder or Hub id")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--texts", type=int, default=6, help="texts of the corpus (%(default)s)")
    parser.add_argument("--questions", type=int, default=12, help="questions of each task (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps of each training (%(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="texts of a step (%(default)s)")
    return parser.parse_args()


# ---------------------------------------------------------------- text


def rows_of(kind: str, count: int) -> list[dict]:
    """Conversations about maths and Python in turn."""
    files = [(TEXT / f"{domain}_{kind}.jsonl").read_text(encoding="utf-8") for domain in ("maths", "python")]
    pairs = zip(*(map(json.loads, file.splitlines()) for file in files), strict=False)
    return [row for pair in pairs for row in pair][:count]


def corpus(tokenizer: PreTrainedTokenizerBase, count: int) -> list[torch.LongTensor]:
    """Held-out texts, `(1, T)` each."""
    texts = [
        tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True, return_tensors="pt")
        for row in rows_of("test", count)
    ]
    return [text["input_ids"][:, :LENGTH] for text in texts]


@torch.inference_mode()
def compare_logits(base: PreTrainedModel, model: PreTrainedModel | PeftModel, texts: list[torch.LongTensor]) -> dict:
    """How many texts have the base's logits, bit by bit, and the largest difference of a logit."""
    equal, largest = 0, 0.0
    for ids_1T in texts:
        expected_1TV, found_1TV = base(ids_1T).logits, model(input_ids=ids_1T).logits
        equal += torch.equal(expected_1TV, found_1TV)
        largest = max(largest, (expected_1TV - found_1TV).abs().max().item())
    return {"equal": equal, "largest_difference": largest}


# ---------------------------------------------------------------- tasks


def has_right_choice(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether an answer in own words has the right choice in it."""
    return {"right": float(doc["choices"][doc["label"]].lower() in results[0].lower())}


def tasks(scratch: str) -> dict[str, dict]:
    """The harness's configs of both tasks."""
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(QUESTIONS)}, "cache_dir": scratch},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"}
    words = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        "process_results": has_right_choice,
        "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
    }
    return {CHOICE: {"task": "choice", **shared, **choice}, WORDS: {"task": "words", **shared, **words}}


def answer_all(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    gen_kwargs: dict | None,
    scratch: str,
) -> dict[str, dict]:
    """By task: the score, the forward passes, and what the model said to each question."""
    if gen_kwargs:  # a first call tries what the model can do, in passes that do not count
        model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=2, **gen_kwargs)
    lm, found = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), {}
    for name, task in tasks(scratch).items():
        with counted_forward_passes(model) as forward_passes:
            result = simple_evaluate(
                lm,
                tasks=[task],
                task_manager=TaskManager(include_defaults=False),
                limit=limit,
                gen_kwargs=gen_kwargs if name == WORDS else None,
                apply_chat_template=True,
                bootstrap_iters=0,
            )
        (samples,) = result["samples"].values()
        (scores,) = result["results"].values()
        found[name] = {
            "score": scores["acc,none" if name == CHOICE else "right,none"],
            "passes": forward_passes(),
            "said": [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])],
        }
    return found


# ---------------------------------------------------------------- training


def train(model: PeftModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, scratch: str) -> PeftModel:
    """Trains the active adapter for some steps: by `MTPTrainer` if it is ours, and by TRL's own trainer if not."""
    is_ours = is_upgraded(model)
    config, trainer = (MTPConfig, MTPTrainer) if is_ours else (SFTConfig, SFTTrainer)
    own = {"anchors_per_sequence": 16, "training_curves": False} if is_ours else {"learning_rate": LEARNING_RATE}
    settings = config(
        output_dir=scratch,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        max_length=LENGTH,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_steps=4,
        report_to=[],
        **own,
    )
    texts = Dataset.from_list(rows_of("train", args.steps * args.batch))
    trainer(model=model, args=settings, train_dataset=texts, processing_class=tokenizer).train()
    return model.eval()


def is_upgraded(model: PreTrainedModel | PeftModel) -> bool:
    return hasattr(model.base_model, "active_mtp_config")


def plain_lora(base: PreTrainedModel, like: PeftModel) -> PeftModel:
    """A plain LoRA of the rank, the scale and the layers of an adapter of ours."""
    torch.manual_seed(0)
    ours = like.active_peft_config
    sizes = {"r": ours.r, "lora_alpha": ours.lora_alpha, "target_modules": ours.target_modules}
    return get_peft_model(base, LoraConfig(**sizes, task_type="CAUSAL_LM"))


def load_base(args: argparse.Namespace) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(args.base, dtype="auto").eval()


def models(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, scratch: str
) -> Iterator[tuple[str, PreTrainedModel | PeftModel, dict | None]]:
    """Name, model, and arguments of `generate`, each made when its turn comes."""
    yield "base", base, None
    upgraded = PeftModel.from_pretrained(load_base(args), args.adapter, is_trainable=True).eval()
    yield "upgraded", upgraded, MTP
    yield "upgraded, trained further", train(upgraded, tokenizer, args, scratch), MTP
    yield "plain LoRA, trained", train(plain_lora(load_base(args), upgraded), tokenizer, args, scratch), None


# ---------------------------------------------------------------- report


def compared(found: dict[str, dict], base: dict[str, dict]) -> dict[str, dict]:
    """By task: score, passes, and how many answers (texts, or log-likelihoods of the choices) are not the base's."""
    return {
        task: {
            "score": row["score"],
            "passes": row["passes"],
            "changed": sum(mine != its for mine, its in zip(row["said"], base[task]["said"], strict=True)),
        }
        for task, row in found.items()
    }


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    tokenizer, base = AutoTokenizer.from_pretrained(args.base), load_base(args)
    texts, rows, expected = corpus(tokenizer, args.texts), [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, model, gen_kwargs in models(base, tokenizer, args, scratch):
            logits = compare_logits(base, model, texts)
            found = answer_all(model, tokenizer, args.questions, gen_kwargs, scratch)
            expected = expected or found
            adapter = adapter_fingerprint(model) if is_upgraded(model) else None
            rows.append({"name": name, "adapter": adapter, "logits": logits, "tasks": compared(found, expected)})
            print(f"{name:26} {logits} {rows[-1]['tasks']}", flush=True)
    report = {
        "machine": describe_machine(),
        "dtype": str(base.dtype).removeprefix("torch."),
        "decoding": MTP,
        "corpus": {"texts": len(texts), "tokens": sum(ids_1T.shape[1] for ids_1T in texts)},
        "questions": args.questions,
        "new_tokens": NEW_TOKENS,
        "training": {"steps": args.steps, "texts": args.steps * args.batch, "plain_learning_rate": LEARNING_RATE},
        "models": rows,
    }
    finish(report, args.output)


if __name__ == "__main__":
    main()
