"""All of `generate` works with `mtp=True`: caches, embeddings, streamers, pipelines, and what may go wrong midway."""

import inspect
import time
from threading import Thread

import pytest
import torch
from tiny_models import CACHE, generate, prompt, tiny_base, upgraded
from tiny_text import tiny_tokenizer
from transformers import (
    CONFIG_MAPPING,
    DynamicCache,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from hf_mtp.base.tiny import tiny_model
from hf_mtp.cache.rollback import RollbackCache
from hf_mtp.decoding import sequence

STRATEGIES = ("quadratic", "linear", "auto")
SMALL = 5


def small_model(architecture: str = "llama", **options):
    """So few ids that random drafts are often right."""
    return upgraded(tiny_base(architecture, vocab_size=SMALL, **options), k=3)


def small_prompt(length: int = 11) -> torch.LongTensor:
    return prompt(length) % SMALL


# ---------------------------------------------------------------- caches


OFFLOADED = pytest.param(
    "offloaded",
    marks=pytest.mark.skipif(
        torch.version.cuda is not None and not torch.cuda.is_available(),
        reason="transformers' offloaded cache needs the GPU that this build of torch is for",
    ),
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("implementation", ["dynamic", "static", OFFLOADED])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
def test_cache_implementations(architecture, implementation, strategy):
    model = small_model(architecture)
    expected = generate(model, small_prompt(), 25)
    output = generate(model, small_prompt(), 25, mtp=True, mtp_strategy=strategy, cache_implementation=implementation)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("new_cache", [DynamicCache, lambda: None], ids=["given", "returned"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
def test_a_second_turn_reads_the_first_turns_cache(architecture, new_cache):
    model, cache, sequence = small_model(architecture), new_cache(), small_prompt()
    widths = []
    model.get_base_model().get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for turn in range(3):
        expected = generate(model, sequence, 12)
        widths.clear()
        output = generate(
            model,
            sequence,
            12,
            mtp=True,
            mtp_strategy="quadratic",
            return_dict_in_generate=True,
            **({} if cache is None else {CACHE: cache}),
        )
        assert torch.equal(output.sequences, expected)
        cache = output[CACHE]
        assert cache.get_seq_length() == output.sequences.shape[1] - 1
        if turn:  # the last token of the turn before, five new ones, and masks
            assert widths[0] == 6 + 3
        sequence = torch.cat([output.sequences, small_prompt(5)], dim=1)


def test_a_cache_goes_from_plain_decoding_to_mtp_and_back():
    model = small_model("gemma3_text")
    sequence, cache = small_prompt(), DynamicCache(config=model.config)
    for mtp in (False, True, False, True):
        expected = generate(model, sequence, 12)
        sequence = generate(model, sequence, 12, **{CACHE: cache}, mtp=mtp)
        assert torch.equal(sequence, expected)


def test_a_static_cache_is_filled():
    model = small_model()
    plain, fast = (StaticCache(config=model.config, max_cache_len=40) for _ in range(2))
    expected = generate(model, small_prompt(), 20, **{CACHE: plain})
    assert torch.equal(generate(model, small_prompt(), 20, **{CACHE: fast}, mtp=True), expected)
    for one, two in zip(plain.layers, fast.layers, strict=True):
        torch.testing.assert_close(one.keys, two.keys, atol=1e-4, rtol=1e-4)
    with pytest.raises(
        ValueError, match="has space for 40 tokens, but .* need up to 50. Create it with max_cache_len=50"
    ):
        generate(model, small_prompt(), 40, **{CACHE: StaticCache(config=model.config, max_cache_len=40)}, mtp=True)


def test_a_cache_that_holds_the_whole_prompt():
    model, cache = small_model(), DynamicCache()
    sequence = generate(model, small_prompt(), 5, **{CACHE: cache}, mtp=True)
    tokens = sequence.shape[1] - 1
    for length in (tokens, tokens - 4):
        message = f"already contains {tokens} tokens, and the prompt has {length}. Pass the whole text"
        with pytest.raises(ValueError, match=message):
            generate(model, sequence[:, :length], 5, **{CACHE: cache}, mtp=True)


@pytest.mark.parametrize("length", [9, 15])
def test_an_attention_mask_of_another_length_is_refused(length):
    with pytest.raises(ValueError, match=f"`attention_mask` has {length} columns, but the prompt .* have 11"):
        generate(small_model(), small_prompt(), 5, attention_mask=torch.ones(1, length).long(), mtp=True)


def test_rolling_back_copies_nothing():
    cache = RollbackCache(torch.zeros(2, dtype=torch.long))
    first = torch.arange(2 * 3.0).view(2, 1, 3, 1)
    cache.update(first, first, 0)
    cache.keep([3, 1])
    storage = cache.layers[0].keys.data_ptr()
    second = torch.tensor([[7.0, 8.0], [9.0, 10.0]]).view(2, 1, 2, 1)
    keys, _ = cache.update(second, second, 0)
    assert keys[0, 0, :, 0].tolist() == [0, 1, 2, 7, 8]
    assert keys[1, 0, :3, 0].tolist() == [3, 9, 10]
    assert cache.layers[0].keys.data_ptr() == storage
    cache.keep([0, 2])
    assert cache.rows.lengths == [3, 3]


# ---------------------------------------------------------------- inputs and outputs


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_prompt_embeddings(strategy):
    model = small_model()
    embeds = model.get_input_embeddings()(small_prompt())
    expected = model.generate(inputs_embeds=embeds, max_new_tokens=20, do_sample=False)
    output = model.generate(inputs_embeds=embeds, max_new_tokens=20, do_sample=False, mtp=True, mtp_strategy=strategy)
    assert torch.equal(output, expected)
    assert output.shape == (1, 20)


def test_embeddings_whose_ids_the_model_looks_up():
    base = tiny_model(CONFIG_MAPPING["gemma4_text"]())
    assert base.config.hidden_size_per_layer_input
    model = upgraded(base, dtype=torch.float64).double()
    embeds = model.get_input_embeddings()(small_prompt() % 30 + 1).detach()
    options = {"inputs_embeds": embeds, "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    output = model.generate(**options, mtp=True, mtp_strategy="quadratic")
    assert torch.equal(output, model.generate(**options))
    assert model.base_model.mtp_statistics.drafted


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hidden_states_and_attentions(strategy, architecture):
    model = small_model(architecture)
    model.get_base_model().set_attn_implementation("eager")
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}
    plain = generate(model, small_prompt(), 15, **wanted)
    fast = generate(model, small_prompt(), 15, mtp=True, mtp_strategy=strategy, **wanted)
    assert torch.equal(fast.sequences, plain.sequences)
    for fast_token, plain_token in zip(fast.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(fast_token, plain_token, atol=1e-4, rtol=1e-4)
    for fast_token, plain_token in zip(fast.attentions, plain.attentions, strict=True):
        for fast_layer, plain_layer in zip(fast_token, plain_token, strict=True):
            seen = plain_layer.shape[-1]  # a sliding cache of plain decoding holds fewer columns
            torch.testing.assert_close(fast_layer[..., -seen:], plain_layer, atol=1e-4, rtol=1e-4)


def test_generation_config_switches_it_on():
    model = small_model()
    expected = generate(model, small_prompt())
    model.generation_config.mtp, model.generation_config.mtp_strategy = True, "linear"
    assert torch.equal(generate(model, small_prompt()), expected)
    assert model.mtp_statistics.forward_passes > 0
    model.base_model.mtp_statistics = None
    assert torch.equal(generate(model, small_prompt(), mtp=False), expected)
    assert model.mtp_statistics is None


def test_pipeline():
    model, tokenizer = upgraded("llama", k=3), tiny_tokenizer(97)
    text = " ".join(f"w{i}" for i in range(10, 20))
    arguments = {"max_new_tokens": 8, "do_sample": False}
    expected = pipeline("text-generation", model=model, tokenizer=tokenizer)(text, **arguments)
    assert model.mtp_statistics is None
    model.generation_config.mtp = True
    assert pipeline("text-generation", model=model, tokenizer=tokenizer)(text, **arguments) == expected
    assert model.mtp_statistics.tokens == 8


@pytest.mark.parametrize("new_tokens", [1, 2, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_few_new_tokens(strategy, new_tokens):
    model = small_model()
    output = generate(model, small_prompt(), new_tokens, mtp=True, mtp_strategy=strategy)
    assert torch.equal(output, generate(model, small_prompt(), new_tokens))


@pytest.mark.parametrize("chunk", [1, 4, 11, 30])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "bloom"])
def test_prefill_in_chunks(architecture, chunk, monkeypatch):
    model, options = small_model(architecture), {"return_dict_in_generate": True, "output_hidden_states": True}
    plain = generate(model, small_prompt(), prefill_chunk_size=chunk, **options)
    generate(model, small_prompt(), mtp=True)  # trials and measurements
    passes, forward = [], model.get_base_model().forward

    def counting(input_ids, **inputs):
        passes.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **inputs)

    counting.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model.get_base_model(), "forward", counting)
    output = generate(model, small_prompt(), prefill_chunk_size=chunk, mtp=True, **options)
    assert torch.equal(output.sequences, plain.sequences)
    assert [states[0].shape for states in output.hidden_states] == [states[0].shape for states in plain.hidden_states]
    assert passes[: 10 // chunk] == [chunk] * (10 // chunk)


@pytest.mark.parametrize("new_tokens", [10**12, 25])
def test_an_end_token_long_before_the_length_limit(new_tokens, monkeypatch):
    monkeypatch.setattr(sequence, "MOST_RESERVED", 4)
    model, options = upgraded(), {"eos_token_id": 50, "do_sample": False, "max_new_tokens": new_tokens}
    plain = model.generate(prompt(), **options)
    assert plain.shape[1] - 11 > 3 * 4
    assert torch.equal(model.generate(prompt(), mtp=True, **options), plain)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_default_device(strategy):
    """As with `torch.set_default_device("cuda")` and a model on the CPU."""
    model, ids = small_model(), small_prompt()
    plain = generate(model, ids)
    generate(model, ids, mtp=True)  # the trial of the model's speculation mode makes a tiny model
    with torch.device("meta"):
        assert torch.equal(generate(model, ids, mtp=True, mtp_strategy=strategy), plain)


def test_max_time():
    model = small_model(max_position_embeddings=4096)
    output = generate(model, small_prompt(), 3000, mtp=True, max_time=0.2)
    assert 11 < output.shape[1] < 3011


# ---------------------------------------------------------------- what goes wrong midway


class Breaks(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > 14:
            raise RuntimeError("a criterion broke")
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Cancels(BaseStreamer):
    def __init__(self):
        self.groups = 0

    def put(self, value):
        self.groups += 1
        if self.groups > 3:
            raise KeyboardInterrupt

    def end(self):
        pass


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (RuntimeError, lambda: {"stopping_criteria": StoppingCriteriaList([Breaks()])}),
        (KeyboardInterrupt, lambda: {"streamer": Cancels()}),
    ],
    ids=["criterion", "streamer"],
)
def test_the_model_is_usable_after_an_error_midway(error, arguments):
    model = small_model()
    expected = generate(model, small_prompt())
    with pytest.raises(error):
        generate(model, small_prompt(), mtp=True, **arguments())
    assert model.base_model.gate.columns is None
    assert torch.equal(generate(model, small_prompt(), mtp=True), expected)
    assert torch.equal(generate(model, small_prompt()), expected)


def test_two_threads_decode_with_one_model():
    model = small_model()
    prompts = [small_prompt(length) for length in (5, 9)]
    expected = [generate(model, ids, 30) for ids in prompts]
    results = {}

    def run(index):
        for _ in range(3):
            results.setdefault(index, []).append(generate(model, prompts[index], 30, mtp=True))
            time.sleep(0)

    threads = [Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert all(torch.equal(output, expected[index]) for output in results[index])
