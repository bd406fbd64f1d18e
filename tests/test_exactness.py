"""`generate(mtp=True)` returns what `generate(mtp=False)` returns, in fewer forward passes."""

from functools import cache

import pytest
import torch
from oracle import RIGHT, Oracle, expected_steps
from tiny_models import CACHE, CONFIGS, VOCAB, WITHOUT_BRANCHES, generate, prompt, tiny_base, upgraded
from tiny_text import tiny_tokenizer
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

PROMPT = 11
STRATEGIES = ("quadratic", "linear")
WITH_BRANCHES = [name for name in CONFIGS if name not in WITHOUT_BRANCHES]


@cache
def plain_output(architecture: str, dtype: torch.dtype, new_tokens: int = 20) -> torch.LongTensor:
    return generate(tiny_base(architecture, dtype), prompt(PROMPT), new_tokens)


def decoded_tokens_repeat_little(output: torch.LongTensor) -> bool:
    new = output[0, PROMPT:].tolist()
    return len(set(new)) > len(new) // 5


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("architecture", "k"), [*((name, 3) for name in WITH_BRANCHES), ("llama", 1), ("llama", 8), ("mistral", 8)]
)
def test_architectures(architecture, k, strategy, monkeypatch):
    expected = plain_output(architecture, torch.float32)
    assert decoded_tokens_repeat_little(expected)
    model = upgraded(architecture, k)
    assert torch.equal(generate(model, prompt(PROMPT), mtp=True, mtp_strategy=strategy), expected)
    Oracle(monkeypatch, expected, RIGHT["sometimes"])
    output = generate(model, prompt(PROMPT), mtp=True, mtp_strategy=strategy)
    assert torch.equal(output, expected)
    assert 0 < model.mtp_statistics.accepted < model.mtp_statistics.drafted


@pytest.mark.parametrize("architecture", ["gemma3_text", "gpt2", "llama", "mistral"])
def test_architectures_in_float64(architecture, monkeypatch):
    expected = plain_output(architecture, torch.float64)
    model = upgraded(architecture, k=3, dtype=torch.float64)
    for strategy in STRATEGIES:
        Oracle(monkeypatch, expected, RIGHT["sometimes"])
        output = generate(model, prompt(PROMPT), mtp=True, mtp_strategy=strategy)
        assert torch.equal(output, expected)


@pytest.mark.parametrize("strategy", ["linear", "auto"])
@pytest.mark.parametrize("architecture", sorted(WITHOUT_BRANCHES))
def test_architectures_without_branches_decode_linearly(architecture, strategy, monkeypatch):
    expected = plain_output(architecture, torch.float32)
    model = upgraded(architecture, k=3)
    Oracle(monkeypatch, expected, RIGHT["sometimes"])
    output = generate(model, prompt(PROMPT), mtp=True, mtp_strategy=strategy)
    assert torch.equal(output, expected)
    steps = expected_steps(RIGHT["sometimes"], PROMPT, 20, k=3, strategy="linear")
    assert model.mtp_statistics.steps == [accepted + 1 for _, accepted in steps]


@pytest.mark.parametrize("right", RIGHT)
def test_auto_is_exact_whatever_it_chooses(right, monkeypatch):
    model, expected = upgraded("llama", k=8), plain_output("llama", torch.float32, 60)
    for _ in range(5):  # it goes on learning from call to call
        Oracle(monkeypatch, expected, RIGHT[right])
        assert torch.equal(generate(model, prompt(PROMPT), 60, mtp=True, mtp_strategy="auto"), expected)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "gpt_oss", "mistral", "starcoder2"])
def test_output_many_windows_long(architecture, monkeypatch):
    expected = plain_output(architecture, torch.float32, new_tokens=40)
    for right in RIGHT.values():
        model = upgraded(architecture, k=8)
        Oracle(monkeypatch, expected, right)
        assert torch.equal(generate(model, prompt(PROMPT), 40, mtp=True, mtp_strategy="quadratic"), expected)


@pytest.mark.parametrize("length", [1, 2, 5, 40])
def test_prompt_lengths(length):
    model = upgraded("mistral", k=3)
    input_ids = prompt(length)
    for strategy in STRATEGIES:
        assert torch.equal(generate(model, input_ids, mtp=True, mtp_strategy=strategy), generate(model, input_ids))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_adapters_own_drafts(strategy):
    # A random adapter is rarely right among 97 tokens; among 5 it often is.
    accepted = drafted = 0
    for seed in range(5):
        model = upgraded(tiny_base("llama", seed=seed, vocab_size=5), k=4, seed=seed)
        input_ids = prompt(6) % 5
        output = generate(model, input_ids, 30, mtp=True, mtp_strategy=strategy)
        assert torch.equal(output, generate(model, input_ids, 30))
        accepted += model.mtp_statistics.accepted
        drafted += model.mtp_statistics.drafted
    assert 0.05 * drafted < accepted < drafted


@pytest.mark.parametrize("config", [{"sampler": False}, {"sampler_residual": False}, {"use_rslora": True}])
def test_adapter_options(config):
    model = upgraded(tiny_base("llama", vocab_size=5), k=3, **config)
    assert torch.equal(generate(model, prompt() % 5, mtp=True), generate(model, prompt() % 5))


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("new_tokens", [1, 2, 4, 20])
@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("right", RIGHT)
def test_statistics(right, strategy, k, new_tokens, monkeypatch):
    model = upgraded("llama", k=8)
    generate(model, prompt(), 1, mtp=True)  # asks the model, once, whether it takes branches
    passes = []
    model.get_base_model().register_forward_hook(lambda *args: passes.append(1))
    expected = plain_output("llama", torch.float32)[:, : PROMPT + new_tokens]
    Oracle(monkeypatch, expected, RIGHT[right])
    output = generate(model, prompt(PROMPT), new_tokens, mtp=True, mtp_strategy=strategy, mtp_k=k)
    assert torch.equal(output, expected)
    steps = expected_steps(RIGHT[right], PROMPT, new_tokens, k, strategy)
    statistics = model.mtp_statistics
    assert statistics.forward_passes == len(steps) == len(passes)
    assert statistics.steps == [accepted + 1 for _, accepted in steps]
    assert statistics.tokens == sum(statistics.steps) == new_tokens
    assert statistics.drafted == sum(drafted for drafted, _ in steps)
    assert statistics.accepted == sum(accepted for _, accepted in steps)
    for position in range(max(drafted for drafted, _ in steps)):
        assert statistics.drafted_per_position[position] == sum(drafted > position for drafted, _ in steps)
        assert statistics.accepted_per_position[position] == sum(accepted > position for _, accepted in steps)
    assert statistics.tokens_per_pass == new_tokens / len(steps)


def test_right_drafts_give_k_plus_one_tokens_per_pass(monkeypatch):
    model = upgraded("llama", k=4)
    Oracle(monkeypatch, plain_output("llama", torch.float32), RIGHT["always"])
    generate(model, prompt(PROMPT), 16, mtp=True, mtp_strategy="quadratic")
    assert model.mtp_statistics.steps == [1, 5, 5, 5]
    assert model.mtp_statistics.accepted_per_position == [3, 3, 3, 3]


def test_quadratic_needs_no_more_passes_than_linear(monkeypatch):
    passes = {}
    for strategy in STRATEGIES:
        model = upgraded("llama", k=4)
        Oracle(monkeypatch, plain_output("llama", torch.float32), RIGHT["sometimes"])
        generate(model, prompt(PROMPT), mtp=True, mtp_strategy=strategy)
        passes[strategy] = model.mtp_statistics.forward_passes
    assert passes["quadratic"] < passes["linear"] < 20


def test_statistics_are_those_of_the_latest_call():
    model = upgraded("llama")
    assert model.mtp_statistics is None
    generate(model, prompt(), 9, mtp=True)
    first = model.mtp_statistics
    generate(model, prompt(), 5, mtp=True)
    assert (first.tokens, model.mtp_statistics.tokens) == (9, 5)


# ---------------------------------------------------------------- everything that generate() takes


class BansEveryThirdChoice(LogitsProcessor):
    """A processor with a state: each third call it bans the best token and the tokens it has ever banned."""

    def __init__(self):
        self.calls, self.banned, self.seen = 0, [], []

    def __call__(self, input_ids, scores):
        self.calls += 1
        self.seen.append(input_ids.shape[1])
        if self.calls % 3 == 0:
            self.banned.append(scores.argmax().item())
        scores[:, self.banned] = -torch.inf
        return scores


class StopsAfterOddTokens(StoppingCriteria):
    """A criterion with a state: stops after five tokens with odd ids."""

    def __init__(self):
        self.calls, self.odd = 0, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        self.odd += input_ids[0, -1].item() % 2
        return torch.tensor([self.odd >= 5])


def greedy_options() -> dict:
    """Arguments of `generate`, by name; made anew for each call, since some have a state."""
    first, third, eighth = plain_output("llama", torch.float32)[0, [PROMPT, PROMPT + 3, PROMPT + 8]].tolist()
    return {
        "eos": {"eos_token_id": eighth},
        "several_eos": {"eos_token_id": [eighth, third]},
        "min_new_tokens": {"eos_token_id": third, "min_new_tokens": 6},
        "min_length": {"eos_token_id": third, "min_length": PROMPT + 9},
        "max_length": {"max_length": PROMPT + 7},
        "repetition_penalty": {"repetition_penalty": 3.0},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "bad_words": {"bad_words_ids": [[third], [eighth]]},
        "suppress_tokens": {"suppress_tokens": [third, eighth]},
        "sequence_bias": {"sequence_bias": [[[third], -9.0]]},
        "forced_eos": {"forced_eos_token_id": 7},
        "begin_suppress": {"begin_suppress_tokens": [first, third]},
        "exponential_decay": {"eos_token_id": third, "exponential_decay_length_penalty": (4, 1.5)},
        "remove_invalid_values": {"remove_invalid_values": True},
        "prefix_allowed_tokens": {"prefix_allowed_tokens_fn": lambda row, ids: [len(ids) % 7 + i for i in range(9)]},
        "stateful_processor": {"logits_processor": LogitsProcessorList([BansEveryThirdChoice()])},
        "stateful_criterion": {"stopping_criteria": StoppingCriteriaList([StopsAfterOddTokens()])},
        "stop_strings": {"stop_strings": [f"w{eighth}"], "tokenizer": tiny_tokenizer(VOCAB)},
        "generation_config": {"generation_config": GenerationConfig(max_new_tokens=13, repetition_penalty=2.0)},
    }


def arguments(name: str) -> dict:
    """The arguments called `name`, and a length where they give none."""
    own = greedy_options()[name]
    return own if name in ("max_length", "generation_config") else {"max_new_tokens": 20, **own}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", greedy_options())
def test_arguments_of_generate(name, strategy, monkeypatch):
    model = upgraded("llama", k=4)
    expected = model.generate(prompt(PROMPT), **arguments(name))
    for right in RIGHT.values():
        Oracle(monkeypatch, expected, right)
        output = model.generate(prompt(PROMPT), mtp=True, mtp_strategy=strategy, **arguments(name))
        assert torch.equal(output, expected)


def test_arguments_of_generate_change_the_output():
    model, without = upgraded("llama"), plain_output("llama", torch.float32)
    unchanged = {
        name for name in greedy_options() if torch.equal(model.generate(prompt(PROMPT), **arguments(name)), without)
    }
    assert unchanged == {"remove_invalid_values"}


def test_state_of_processors_and_criteria_is_as_after_plain_decoding(monkeypatch):
    model = upgraded("llama", k=4)
    plain, fast = (
        (LogitsProcessorList([BansEveryThirdChoice()]), StoppingCriteriaList([StopsAfterOddTokens()]))
        for _ in range(2)
    )
    expected = generate(model, prompt(PROMPT), logits_processor=plain[0], stopping_criteria=plain[1])
    Oracle(monkeypatch, expected, RIGHT["sometimes"])
    generate(model, prompt(PROMPT), mtp=True, logits_processor=fast[0], stopping_criteria=fast[1])
    assert vars(plain[0][0]) == vars(fast[0][0])
    assert vars(plain[1][0]) == vars(fast[1][0])


def test_eos_amid_accepted_drafts_ends_the_output(monkeypatch):
    model = upgraded("llama", k=8)
    expected = plain_output("llama", torch.float32)
    eos = expected[0, PROMPT + 4].item()
    Oracle(monkeypatch, expected, RIGHT["always"])
    output = generate(model, prompt(PROMPT), mtp=True, mtp_strategy="quadratic", eos_token_id=eos)
    assert output.tolist() == expected[:, : PROMPT + 5].tolist()
    assert (model.mtp_statistics.steps, model.mtp_statistics.accepted) == ([1, 4], 4)


def test_stop_strings_in_the_generation_config():
    model = upgraded("llama")
    stop = f"w{plain_output('llama', torch.float32)[0, PROMPT + 8].item()}"
    config = GenerationConfig(max_new_tokens=20, stop_strings=[stop])
    plain, fast = (
        model.generate(prompt(PROMPT), generation_config=config, tokenizer=tiny_tokenizer(VOCAB), mtp=mtp)
        for mtp in (False, True)
    )
    assert torch.equal(fast, plain)
    assert plain.shape[1] < PROMPT + 20


def test_positional_inputs_and_attention_mask():
    model = upgraded("llama")
    expected = plain_output("llama", torch.float32)
    assert torch.equal(model.generate(prompt(PROMPT), mtp=True, max_new_tokens=20), expected)
    inputs = {"input_ids": prompt(PROMPT), "attention_mask": torch.ones(1, PROMPT, dtype=torch.long)}
    assert torch.equal(model.generate(**inputs, mtp=True, max_new_tokens=20), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
def test_returned_dict(architecture, strategy, monkeypatch):
    model = upgraded(architecture, k=3, dtype=torch.float64)
    wanted = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.5,
    }
    plain = generate(model, prompt(PROMPT), **wanted)
    Oracle(monkeypatch, plain.sequences, RIGHT["sometimes"])
    fast = generate(model, prompt(PROMPT), mtp=True, mtp_strategy=strategy, **wanted)
    assert torch.equal(fast.sequences, plain.sequences)
    for name in ("scores", "logits"):
        assert len(fast[name]) == len(plain[name]) == 20
        torch.testing.assert_close(torch.cat(fast[name]), torch.cat(plain[name]))
    assert not torch.equal(torch.cat(fast.scores), torch.cat(fast.logits))
    assert fast.mtp_statistics is model.mtp_statistics
    assert fast.mtp_statistics.tokens == 20


def test_returned_dict_has_only_what_was_asked_for():
    model = upgraded("llama")
    output = generate(model, prompt(), mtp=True, return_dict_in_generate=True)
    assert output.scores is None
    assert output.logits is None


@pytest.mark.parametrize("right", RIGHT)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_returned_cache_is_that_of_plain_decoding(strategy, right, monkeypatch):
    model = upgraded("llama", k=3, dtype=torch.float64)
    plain = generate(model, prompt(PROMPT), return_dict_in_generate=True)
    Oracle(monkeypatch, plain.sequences, RIGHT[right])
    fast = generate(model, prompt(PROMPT), mtp=True, mtp_strategy=strategy, return_dict_in_generate=True)
    assert fast[CACHE].get_seq_length() == plain[CACHE].get_seq_length() == PROMPT + 19
    for fast_layer, plain_layer in zip(fast[CACHE].layers, plain[CACHE].layers, strict=True):
        torch.testing.assert_close(fast_layer.keys, plain_layer.keys)
        torch.testing.assert_close(fast_layer.values, plain_layer.values)


@pytest.mark.parametrize("beyond", [0, 1])
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
def test_up_to_the_last_learned_position(architecture, beyond, monkeypatch):
    # The last token is returned but never embedded, so that one more than the positions can be generated.
    last = {"n_positions": 24} if architecture == "gpt2" else {"max_position_embeddings": 24}
    model = upgraded(tiny_base(architecture, **last), k=8)
    new_tokens = 24 - PROMPT + beyond
    expected = generate(model, prompt(PROMPT), new_tokens)
    for strategy in STRATEGIES:
        for right in RIGHT.values():
            Oracle(monkeypatch, expected, right)
            output = generate(model, prompt(PROMPT), new_tokens, mtp=True, mtp_strategy=strategy)
            assert torch.equal(output, expected)


def test_mtp_off_is_the_bases_own_generate(monkeypatch):
    base, model = tiny_base("llama"), upgraded("llama")
    for arguments in ({}, {"mtp": False}):
        torch.manual_seed(0)
        expected = base.generate(prompt(), max_new_tokens=8, do_sample=True, num_return_sequences=2)
        torch.manual_seed(0)
        output = model.generate(prompt(), max_new_tokens=8, do_sample=True, num_return_sequences=2, **arguments)
        assert torch.equal(output, expected)
    assert model.mtp_statistics is None
