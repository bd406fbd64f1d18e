"""Caches that users pass to `generate`, and those that it returns: what plain decoding leaves in them, or nothing."""

import pytest
import torch
from tiny_models import CACHE, prompt, tiny_base, upgraded
from transformers import (
    CONFIG_MAPPING,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.generation import StoppingCriteria

from hf_mtp.base.tiny import tiny_model
from hf_mtp.cache.rollback import RollbackCache
from hf_mtp.decoding.checks import QuantizedLayer, refuse_cache
from hf_mtp.evaluation.support import Rehearsal

NEW = 12
KINDS = ("dynamic", "dynamic without config", "static", "longer static", "early static", "layers")


def model_of(architecture: str):
    if architecture in CONFIG_MAPPING and architecture not in ("llama", "mistral", "gemma3_text", "gpt2", "bloom"):
        return upgraded(tiny_model(CONFIG_MAPPING[architecture]()).double(), k=3)
    return upgraded(tiny_base(architecture, torch.float64, vocab_size=40), k=3)


def ids(length: int = 11, rows: int = 1) -> torch.LongTensor:
    return prompt(length, rows) % 30 + 1


def cache_of(kind: str, model, batch: int = 1) -> Cache:
    config = model.config.get_text_config(decoder=True)
    if "static" in kind:
        made = StaticCache(config=config, max_cache_len=100 if "longer" in kind else 48)
        if "early" in kind:
            heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            made.early_initialization(batch, heads, size, torch.float64, torch.device("cpu"))
        return made
    if kind == "layers":
        return Cache(layers=[DynamicLayer() for _ in range(config.num_hidden_layers)])
    return DynamicCache(config=config) if kind == "dynamic" else DynamicCache()


def contents(cache: Cache) -> list[torch.Tensor]:
    """All that the layers of a cache hold, without what is behind the tokens of a static one."""
    tensors = []
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
            tensors += [state.clone() for state in states if state is not None]
        if getattr(layer, "keys", None) is not None and layer.is_initialized:
            held = min(int(layer.get_seq_length()), layer.keys.shape[-2])
            tensors += [layer.keys[..., :held, :].clone(), layer.values[..., :held, :].clone()]
    return tensors


def assert_same(one: Cache, other: Cache) -> None:
    for found, expected in zip(contents(one), contents(other), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)  # some layers compute in float32


def generate(model, input_ids, **options):
    options.setdefault("attention_mask", torch.ones_like(input_ids))
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(input_ids=input_ids, **options)


def turns(model, cache: Cache, rows: int = 1, **options):
    """Two turns of a conversation on one cache."""
    first = generate(model, ids(rows=rows), **{CACHE: cache}, **options)
    return generate(model, torch.cat([first, ids(3, rows)], dim=1), **{CACHE: cache}, **options)


# ---------------------------------------------------------------- what users pass


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gemma3n_text"])
def test_two_turns_on_ones_own_cache(architecture, kind, rows):
    model = model_of(architecture)
    plain, own = cache_of(kind, model, rows), cache_of(kind, model, rows)
    expected = turns(model, plain, rows)
    model.base_model.draft = Rehearsal(list(expected[:, None]))
    assert torch.equal(turns(model, own, rows, mtp=True, mtp_strategy="quadratic"), expected)
    assert own.get_seq_length() == plain.get_seq_length()
    assert_same(own, plain)


@pytest.mark.parametrize("architecture", ["bloom", "qwen3_next"])
def test_two_turns_on_a_cache_of_a_model_that_reads_chains(architecture):
    model = model_of(architecture)
    plain, own = cache_of("dynamic", model), cache_of("dynamic", model)
    expected = turns(model, plain)
    model.base_model.draft = Rehearsal([expected])
    assert torch.equal(turns(model, own, mtp=True), expected)
    assert_same(own, plain)


class FailingProcessor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= 16:
            raise RuntimeError
        return scores


class FailingCriterion(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= 16:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


class FailingStreamer(TextStreamer):
    def __init__(self):
        self.calls = 0

    def put(self, value):
        self.calls += 1
        if self.calls > 4:
            raise KeyboardInterrupt

    def end(self):
        raise AssertionError("nothing has ended")


FAILURES = {
    "error in a processor": ({"logits_processor": LogitsProcessorList([FailingProcessor()])}, RuntimeError),
    "interrupt in a criterion": (
        {"stopping_criteria": StoppingCriteriaList([FailingCriterion()])},
        KeyboardInterrupt,
    ),
    "interrupt in a streamer": ({"streamer": "failing"}, KeyboardInterrupt),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "dynamic"), ("gemma3_text", "static"), ("qwen3_next", "dynamic")],
)
def test_a_failure_leaves_ones_own_cache_as_it_was(architecture, kind, turn, failure):
    options, error = FAILURES[failure]
    if "streamer" in options:
        options = {"streamer": FailingStreamer()}
    model = model_of(architecture)
    cache, text = cache_of(kind, model), ids()
    if turn == 2:
        text = torch.cat([generate(model, ids(), **{CACHE: cache}, max_new_tokens=2), ids(2)], dim=1)
    before = contents(cache)
    with pytest.raises(error):
        generate(model, text, **{CACHE: cache}, **options, mtp=True)
    after = contents(cache)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    # So it can be used for what should have been done.
    expected = generate(model, text)
    assert torch.equal(generate(model, text, **{CACHE: cache}, mtp=True), expected)


def test_a_failure_while_the_cache_is_filled(monkeypatch):
    model, cache = model_of("llama"), DynamicCache()
    generate(model, ids(), **{CACHE: cache}, max_new_tokens=2)
    before = contents(cache)

    def update(self, *args, **kwargs):
        raise torch.OutOfMemoryError("in the second layer")

    second = cache.layers[1]
    text = torch.cat([ids(), ids(5)], dim=1)
    monkeypatch.setattr(type(second), "update", update)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, text, **{CACHE: cache}, mtp=True)
    monkeypatch.undo()
    assert all(torch.equal(*pair) for pair in zip(before, contents(cache), strict=True))


# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize("architecture", ["llama", "bloom", "mamba2", "qwen3_next", "mamba", "jamba"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_cache_of_a_batch_is_returned(architecture, padded):
    if padded and architecture == "bloom":
        pytest.skip("plain decoding of padded rows in float64 differs from that of the rows alone")
    model = model_of(architecture)
    text, mask = ids(rows=3), torch.ones(3, 11, dtype=torch.long)
    if padded:
        mask[1, :3] = mask[2, :1] = 0
        text = text * mask
    options = {"attention_mask": mask, "return_dict_in_generate": True}
    plain = generate(model, text, **options)
    model.base_model.draft = Rehearsal([row[None] for row in plain.sequences])
    output = generate(model, text, **options, mtp=True, mtp_strategy="linear")
    assert torch.equal(output.sequences, plain.sequences)
    if not padded:  # else what stands at padding is nobody's business
        assert_same(output[CACHE], plain[CACHE])
    # It serves for the next turn as plain decoding's own.
    if architecture in ("mamba2", "mamba"):  # a state does not say how many tokens it holds
        return
    text = torch.cat([plain.sequences, ids(3, rows=3)], dim=1)
    mask = torch.cat([mask, torch.ones(3, NEW + 3, dtype=torch.long)], dim=1)
    again = [generate(model, text, attention_mask=mask, **{CACHE: each[CACHE]}) for each in (plain, output)]
    assert torch.equal(*again)


def test_padding_is_the_same_in_every_returned_cache():
    model = model_of("llama")
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "return_dict_in_generate": True, "mtp": True}
    made = [
        generate(model, ids(rows=2) * mask, **options, mtp_strategy=strategy)[CACHE]
        for strategy in ("quadratic", "linear")
    ]
    assert_same(*made)


def test_a_quantized_cache_is_refused():
    rounded = type("Rounded", (QuantizedLayer,), {})
    rounded.__abstractmethods__ = frozenset()  # the packages that quantize are not needed to refuse
    cache = DynamicCache()
    cache.layers, cache._is_user_defined = [object.__new__(rounded)], True
    with pytest.raises(ValueError, match="quantized.*rounds keys and values"):
        refuse_cache(cache, columns=9)


# ---------------------------------------------------------------- offloading


class Underway:
    """The stream of an offloaded cache whose first layer is on its way back: it arrives when somebody waits."""

    def __init__(self, layer):
        self.layer, self.states = layer, (layer.keys, layer.values)
        layer.keys, layer.values = (torch.full_like(states, torch.nan) for states in self.states)

    def synchronize(self) -> None:
        for place, states in zip((self.layer.keys, self.layer.values), self.states, strict=True):
            place.copy_(states)


def filled(cache: Cache, columns: int = 6, rows: int = 2) -> Cache:
    generator = torch.Generator().manual_seed(0)
    for index in range(2):
        cache.update(*torch.randn(2, rows, 1, columns, 4, generator=generator), index)
    return cache


def rollback() -> RollbackCache:
    cache = filled(RollbackCache(torch.zeros(2, dtype=torch.long)))
    cache.keep([6, 6])
    return cache


def read_as(way: str, cache: Cache) -> Cache:
    if way == "adopt":
        made = RollbackCache(torch.zeros(2, dtype=torch.long))
        made.adopt(cache)
        return made
    if way == "give_back":
        return cache.give_back(DynamicCache())
    if way == "gather":
        cache.keep([-3, -3])
        cache.gather([[0, 2], [0, 1]])
    else:
        cache.select_rows([1])
    return cache


@pytest.mark.parametrize("way", ["adopt", "give_back", "gather", "select_rows"])
def test_a_layer_on_its_way_back_to_the_device_is_waited_for(way):
    make = (lambda: filled(DynamicCache())) if way == "adopt" else rollback
    expected, cache = read_as(way, make()), make()
    cache.offloading, cache.prefetch_stream = True, Underway(cache.layers[0])
    for found, layer in zip(read_as(way, cache).layers, expected.layers, strict=True):
        assert torch.equal(found.keys, layer.keys) and torch.equal(found.values, layer.values)


def test_offloaded_layers_are_given_back_on_the_device_of_the_model():
    class Given(DynamicCache):
        def update(self, keys, values, index):
            places.extend([keys.device.type, values.device.type])

    cache, places = rollback(), []
    for layer in cache.layers:
        layer.device = torch.device("meta")  # stands for a GPU: the layer's storage is on the CPU
    cache.give_back(Given())
    assert places == ["meta"] * 4
