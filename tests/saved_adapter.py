"""A small adapter that an earlier version saved, and what it drafts: adapters load for ever.

`python tests/saved_adapter.py` writes `tests/data/saved_adapter`. It was run once, on commit 1cae296. Run it again
only for a version whose adapters hold something new.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

FOLDER = Path(__file__).parent / "data" / "saved_adapter"
DRAFTS = "drafts.safetensors"
K, VOCAB = 2, 32
INPUT_IDS = torch.tensor([[3, 1, 4, 1, 5, VOCAB, VOCAB + 1]])  # and two masks


@torch.no_grad()
def base() -> PreTrainedModel:
    """The base of the adapter, whose weights no release of transformers draws in another way."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return drawn(LlamaForCausalLM(config)).eval()


@torch.no_grad()
def drawn(model: torch.nn.Module, only: str = "") -> torch.nn.Module:
    """The model, with weights whose names hold `only` drawn from the order of their names."""
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted((n, p) for n, p in model.named_parameters() if only in n):
        parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model


@torch.no_grad()
def drafts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Logits of the masks by the base's unembedding, and by the sampler head after the token 7."""
    tuner = model.base_model
    outputs = model(INPUT_IDS, output_hidden_states=True)
    previous = tuner.model.get_input_embeddings()(torch.tensor([[7] * K]))
    refined = tuner.sampler_head()(previous, outputs.hidden_states[-1][:, -K:])
    return {"masks": outputs.logits[0, -K:].clone(), "sampler": tuner.unembedding()(refined)[0]}


if __name__ == "__main__":
    from peft import get_peft_model

    from hf_mtp import GatedLoraConfig

    model = drawn(get_peft_model(base(), GatedLoraConfig(k=K, r=2, lora_alpha=4)), only="lora_").eval()
    model.save_pretrained(FOLDER)
    (FOLDER / "README.md").unlink()
    save_file(drafts(model), FOLDER / DRAFTS)
