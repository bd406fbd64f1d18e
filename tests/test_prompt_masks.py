"""Prompts whose attention mask has holes, embeddings behind a cache, and token types: as in plain decoding."""

import pytest
import torch
from tiny_models import CACHE, prompt, tiny_base, upgraded
from tiny_models import generate as decode
from transformers import CONFIG_MAPPING, DynamicCache

from hf_mtp.base.tiny import tiny_model
from hf_mtp.evaluation.support import Rehearsal

STRATEGIES = ("quadratic", "linear", "auto")
HOLES = {
    "between tokens": [(0, 4), (1, 6), (1, 7)],
    "behind the tokens": [(1, 9), (1, 10)],
    "at the left and between": [(0, 0), (0, 5), (2, 0), (2, 1)],
}


def model_of(architecture: str):
    return upgraded(tiny_base(architecture, torch.float64, vocab_size=40), k=3)


def ids(length: int = 11, rows: int = 3) -> torch.LongTensor:
    return prompt(length, rows) % 30 + 1


def generate(model, **options):
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(**options)


def assert_exact(model, **options) -> torch.LongTensor:
    plain = generate(model, **options)
    model.base_model.draft = Rehearsal([row[None] for row in plain])
    for strategy in STRATEGIES:
        assert torch.equal(generate(model, **options, mtp=True, mtp_strategy=strategy), plain), strategy
    return plain


def mask_with(holes: list[tuple[int, int]]) -> torch.LongTensor:
    mask = torch.ones(3, 11, dtype=torch.long)
    for place in holes:
        mask[place] = 0
    return mask


@pytest.mark.parametrize("form", ["ids", "embeddings", "ids and a static cache"])
@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_a_mask_with_holes(architecture, holes, form):
    model, inputs = model_of(architecture), {"input_ids": ids()}
    if form == "embeddings":
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids()).detach()}
    elif "static" in form:
        inputs["cache_implementation"] = "static"
    hidden = assert_exact(model, **inputs, attention_mask=mask_with(HOLES[holes]))
    assert not torch.equal(hidden, generate(model, **inputs, attention_mask=torch.ones(3, 11, dtype=torch.long)))


def test_rows_that_ended_leave_holes_for_the_next_turn():
    """Padding behind an answer is hidden in the next turn, and the cache holds it."""
    model = model_of("llama")
    stop = decode(model, ids(), 8)[0, 13].item()  # ends one row early
    mask = torch.ones(3, 11, dtype=torch.long)

    def turns(**options):
        cache = DynamicCache()
        first = generate(model, input_ids=ids(), attention_mask=mask, eos_token_id=stop, **{CACHE: cache}, **options)
        text = torch.cat([first, ids(4)], dim=1)
        return generate(model, input_ids=text, attention_mask=(text != 0).long(), **{CACHE: cache}, **options)

    expected = turns()
    assert (expected[:, 11:-20] == 0).any()
    for strategy in STRATEGIES:
        assert torch.equal(turns(mtp=True, mtp_strategy=strategy), expected)


def test_a_mask_with_holes_of_a_model_that_reads_chains():
    model = upgraded(tiny_model(CONFIG_MAPPING["qwen3_next"]()).double(), k=3)
    with pytest.raises(NotImplementedError, match="an attention mask with holes.*Pad on the left"):
        generate(model, input_ids=ids(), attention_mask=mask_with(HOLES["between tokens"]), mtp=True)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_embeddings_behind_a_cache(architecture):
    model = model_of(architecture)
    embed = model.get_input_embeddings()

    def turns(**options):
        cache = DynamicCache(config=model.config)
        embeds = embed(ids()).detach()
        new = generate(model, inputs_embeds=embeds, max_new_tokens=5, **{CACHE: cache}, **options)
        embeds = torch.cat([embeds, embed(new).detach(), embed(ids(3)).detach()], dim=1)
        return generate(model, inputs_embeds=embeds, **{CACHE: cache}, **options)

    assert torch.equal(turns(mtp=True), turns())


@pytest.mark.parametrize("types", [0, 2, "of each token"])
def test_token_types_of_gpt2(types):
    model = model_of("gpt2")
    if types == "of each token":
        types_BT = torch.randint(0, 2, (3, 11), generator=torch.Generator().manual_seed(0))
    else:
        types_BT = torch.full((3, 11), types)
    typed = assert_exact(model, input_ids=ids(), token_type_ids=types_BT)
    assert not torch.equal(typed, generate(model, input_ids=ids()))


@pytest.mark.parametrize("form", ["embeddings", "ids and embeddings"])
@pytest.mark.parametrize("architecture", ["mamba2", "qwen3_next", "bloom"])
def test_embeddings_into_models_that_read_chains(architecture, form):
    base = tiny_base("bloom") if architecture == "bloom" else tiny_model(CONFIG_MAPPING[architecture]()).double()
    model = upgraded(base, k=3)
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids()).detach()}
    if form == "ids and embeddings":
        inputs["input_ids"] = ids()
    plain = generate(model, **inputs)
    model.base_model.draft = Rehearsal([row[None] for row in plain])
    assert torch.equal(generate(model, **inputs, mtp=True), plain)
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, :3] = 0
    assert torch.equal(generate(model, **inputs, attention_mask=mask, mtp=True)[0], plain[0])


def test_an_empty_prompt_says_so():
    with pytest.raises(ValueError, match="The prompt is empty. Start it with the tokenizer's bos token"):
        generate(model_of("llama"), input_ids=torch.empty(1, 0, dtype=torch.long), mtp=True)
