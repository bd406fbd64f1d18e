"""Hidden states, attentions, scores and logits: plain decoding's shapes and values, however a prompt is read."""

import pytest
import torch
from tiny_models import CACHE, prompt, tiny_base, upgraded
from transformers import CONFIG_MAPPING, StaticCache

from hf_mtp.base.tiny import tiny_model
from hf_mtp.evaluation.support import Rehearsal

TREES = ("llama", "mistral", "gemma3_text", "gpt2")
CHAINS = ("bloom", "mamba2", "qwen3_next", "mamba", "jamba")
HOLE = torch.ones(1, 11, dtype=torch.long)
HOLE[0, 5] = 0


def model_of(architecture: str):
    if architecture in ("bloom", *TREES):
        base = tiny_base(architecture, torch.float64, vocab_size=40)
        base.set_attn_implementation("eager")
    else:
        base = tiny_model(CONFIG_MAPPING[architecture]()).double()
    return upgraded(base, k=3)


def ids(rows: int = 1) -> torch.LongTensor:
    return prompt(11, rows) % 30 + 1


def generate(model, **options):
    attends = not any(kind in model.config.model_type for kind in ("mamba", "rwkv"))
    return model.generate(
        **options,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=attends,
    )


def assert_alike(found, expected) -> None:
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_alike(*pair)
    elif expected is None:
        assert found is None
    else:  # some layers compute in float32
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-5)


def assert_all_alike(model, strategy: str, own_cache=dict, **options) -> None:
    plain = generate(model, **options, **own_cache())
    model.base_model.draft = Rehearsal([row[None] for row in plain.sequences])
    output = generate(model, **options, **own_cache(), mtp=True, mtp_strategy=strategy)
    for name in ("sequences", "scores", "logits", "hidden_states", "attentions"):
        assert_alike(getattr(output, name), getattr(plain, name))


@pytest.mark.parametrize("how", ["text", "batch", "own positions", "hole", "static", "own static", "embeddings"])
@pytest.mark.parametrize("architecture", TREES)
def test_trees(architecture, how):
    model, own_cache = model_of(architecture), dict
    options = {
        "text": {"input_ids": ids()},
        "batch": {"input_ids": ids(3)},
        "own positions": {"input_ids": ids(), "position_ids": torch.arange(11)[None] + 5},
        "hole": {"input_ids": ids(), "attention_mask": HOLE},
        "static": {"input_ids": ids(), "cache_implementation": "static"},
        "own static": {"input_ids": ids()},
        "embeddings": {"inputs_embeds": model.get_input_embeddings()(ids(2)).detach()},
    }[how]
    if how == "own static":

        def own_cache():
            return {CACHE: StaticCache(config=model.config, max_cache_len=40)}

    assert_all_alike(model, "quadratic", own_cache, **options)


@pytest.mark.parametrize("how", ["text", "batch", "hole"])
def test_a_model_of_several_hidden_states_per_token(how):
    model = upgraded(tiny_model(CONFIG_MAPPING["gemma3n_text"]()).double(), k=3)
    options = {"input_ids": ids(3 if how == "batch" else 1)}
    if how == "hole":
        options["attention_mask"] = HOLE
    plain = generate(model, **options)
    assert plain.hidden_states[0][1].dim() == 4
    model.base_model.draft = Rehearsal([row[None] for row in plain.sequences])
    output = generate(model, **options, mtp=True, mtp_strategy="quadratic")
    assert_alike((output.sequences, output.hidden_states), (plain.sequences, plain.hidden_states))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("architecture", CHAINS)
def test_chains(architecture, rows):
    assert_all_alike(model_of(architecture), "linear", input_ids=ids(rows))


@pytest.mark.parametrize("architecture", ["bloom", "qwen3_next"])
def test_rows_of_chains_without_their_padding(architecture):
    """What stands at padding is zeros; all else is what the row alone gives."""
    model, mask, text = model_of(architecture), torch.ones(2, 11, dtype=torch.long), ids(2)
    mask[1, :3], text[1, :3] = 0, 0
    alone = generate(model, input_ids=text[1:, 3:])
    output = generate(model, input_ids=text, attention_mask=mask, mtp=True, mtp_strategy="linear")
    for token, (found, expected) in enumerate(zip(output.hidden_states, alone.hidden_states, strict=True)):
        for layer, of_layer in zip(found, expected, strict=True):
            start = 3 if token == 0 else 0
            assert not layer[1, :start].any()
            torch.testing.assert_close(layer[1, start:], of_layer[0], rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("architecture", ["bloom", "qwen3_next"])
def test_padding_of_all_rows_of_chains_counts(architecture, rows):
    model, mask = model_of(architecture).float(), torch.ones(2, 11, dtype=torch.long)
    mask[0, :3], mask[1, :5] = 0, 0
    options = {"input_ids": ids(2)[:rows] * mask[:rows], "attention_mask": mask[:rows]}
    plain, output = generate(model, **options), generate(model, **options, mtp=True, mtp_strategy="linear")
    for name in ("hidden_states", "attentions"):
        pairs = zip(getattr(output, name), getattr(plain, name), strict=True)
        shapes = [[[state.shape for state in layers] for layers in pair] for pair in pairs]
        assert all(found == expected for found, expected in shapes)
    start = slice(5, None)
    for pair in zip(output.attentions[1], plain.attentions[1], strict=True):
        torch.testing.assert_close(*(weights[..., start] for weights in pair), rtol=1e-3, atol=5e-5)
