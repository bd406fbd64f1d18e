"""Makes a case for the tests of the vLLM integration: `python tests/with_vllm/cases.py FOLDER ARCHITECTURE`.
With `-partial` behind the architecture, only some layers have a LoRA.

A case is a tiny base, an adapter, its export, and what hf_mtp's linear decoding makes of some prompts. It is made in
hf_mtp's own environment.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_text import tiny_tokenizer
from tiny_training import trainer

from hf_mtp import GatedLoraConfig
from hf_mtp.decoding.drafters.masks import MaskDrafter
from hf_mtp.export.vllm import export_vllm

K, NEW_TOKENS, LENGTHS = 4, 40, (3, 18, 30, 45, 70)
BASE_STEPS, ADAPTER_STEPS = 200, 80
FIRST_WORD = 6
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "vocab_size": 97,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# LoRA on some layers only, and there on a part of what vLLM packs into one matrix product.
PARTIAL_LORA = {"target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj"], "layers_to_transform": [1]}
ARCHITECTURES = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gemma3_text": {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 32,
    },
}


def make(folder: Path, name: str) -> None:
    """Writes `base`, `adapter`, `exported` and `reference.json`."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    architecture, _, is_partial = name.partition("-")
    config = AutoConfig.for_model(architecture, **{**SIZES, **ARCHITECTURES[architecture]})
    base = counting(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    base.save_pretrained(folder / "base")
    tiny_tokenizer(SIZES["vocab_size"]).save_pretrained(folder / "base")
    model = trained(base, folder, **(PARTIAL_LORA if is_partial else {}))
    model.save_pretrained(folder / "adapter")
    export_vllm(str(folder / "adapter"), folder / "exported", str(folder / "base"))
    rows = [reference(model, base, prompt(length)) for length in LENGTHS]
    document = {"k": K, "new_tokens": NEW_TOKENS, "rows": rows, "sampling": enumeration(base, rows[1]["prompt"])}
    (folder / "reference.json").write_text(json.dumps(document))


def counts(rows: int, length: int, seed: int) -> torch.LongTensor:
    """`(rows, length)` words that count on by 1 to 5, with a jump now and then."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 6, (rows, 1), generator=generator).repeat(1, length)
    jumps = torch.rand(rows, length, generator=generator) < 0.1
    steps[jumps] = torch.randint(6, 90, (int(jumps.sum()),), generator=generator)
    return FIRST_WORD + steps.cumsum(1) % (SIZES["vocab_size"] - FIRST_WORD)


def prompt(length: int) -> list[int]:
    """Words that no training has seen in this order."""
    return counts(1, length, 1000 + length)[0].tolist()


def counting(base):
    """Trains the base to count on."""
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for step in range(BASE_STEPS):
        ids = counts(32, 32, step)
        base(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return base.eval()


def greedy(model, ids: list[int], **kwargs) -> list[int]:
    """New tokens of greedy decoding."""
    input_ids = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            **kwargs,
        )
    return out[0, len(ids) :].tolist()


def trained(base, folder: Path, **config):
    """An adapter that is sometimes right: it has seen some texts of the base."""
    model = get_peft_model(base, GatedLoraConfig(k=K, r=8, lora_alpha=16, **config))
    data = Dataset.from_list([{"input_ids": row} for row in counts(64, 48, 7).tolist()])
    options = {
        "max_steps": ADAPTER_STEPS,
        "logging_steps": ADAPTER_STEPS,
        "max_length": 128,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
    }
    trainer(folder / "training", data, model, **options).train()
    return model.eval()


def reference(model, base, ids: list[int]) -> dict:
    """The tokens of plain decoding, and the steps and drafts of linear decoding."""
    drafts, propose = [], MaskDrafter.propose

    def logged(self, outcome, counts):
        result = propose(self, outcome, counts)
        drafts.append(result.tokens[0])
        return result

    with mock.patch.object(MaskDrafter, "propose", logged):
        tokens = greedy(model, ids, mtp=True, mtp_strategy="linear")
    plain = greedy(model, ids)
    assert tokens == plain
    return {
        "prompt": ids,
        "tokens": tokens,
        "steps": model.base_model.mtp_statistics.steps,
        "drafts": drafts,
        "penalized": greedy(model, ids, repetition_penalty=1.3),
    }


@torch.no_grad()
def enumeration(base, ids: list[int], depth: int = 3, top_k: int = 4, temperature: float = 2.0) -> dict:
    """The probabilities of all first `depth` tokens that sampling may draw."""
    level = {(): 1.0}
    for _ in range(depth):
        logits = base(torch.tensor([[*ids, *start] for start in level])).logits[:, -1]
        value, token = logits.topk(top_k)
        level = {
            (*start, t): before * p
            for (start, before), probabilities, tokens in zip(
                level.items(), (value / temperature).softmax(-1).tolist(), token.tolist(), strict=True
            )
            for t, p in zip(tokens, probabilities, strict=True)
        }
    options = {"top_k": top_k, "temperature": temperature, "max_tokens": depth}
    return {"prompt": ids, "options": options, "probabilities": [[list(start), p] for start, p in level.items()]}


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2])
