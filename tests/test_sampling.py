"""Sampling with `mtp=True`: one seed gives one text, however it is decoded, and texts have the base's distribution."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from oracle import sampled_text
from test_noise import p_value
from tiny_models import adapter_parameters, prompt, randomised, tiny_base, upgraded
from transformers import LogitsProcessor, LogitsProcessorList

from hf_mtp import GatedLoraConfig
from hf_mtp.decoding import generate
from hf_mtp.decoding.drafters.masks import SHARPNESS
from hf_mtp.decoding.noise import PositionNoise
from hf_mtp.objective.recipe import get_recipe
from hf_mtp.objective.request import ObjectiveRequest

STRATEGIES = ("quadratic", "linear", "auto")
SMALL, NEW_TOKENS = 8, 24  # so few ids that drafts are often right
SEED = 5
PROCESSORS = {
    "none": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "suppress_tokens": {"suppress_tokens": [1, 4, 5]},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "all": {"temperature": 1.3, "top_p": 0.9, "top_k": 6, "repetition_penalty": 1.2, "suppress_tokens": [2]},
}


@pytest.fixture(scope="module")
def model():
    return upgraded(tiny_base("llama", torch.float64, vocab_size=SMALL), k=4, dtype=torch.float64).double()


def ids(rows: int = 3) -> torch.LongTensor:
    return prompt(9, rows) % SMALL


def sample(model, input_ids, seed: int = SEED, new_tokens: int = NEW_TOKENS, **options) -> list[list[int]]:
    output = model.generate(
        input_ids,
        do_sample=True,
        max_new_tokens=new_tokens,
        generator=torch.Generator().manual_seed(seed),
        **{"mtp": True, **options},
    )
    return output[:, input_ids.shape[1] :].tolist()


def expected(model, input_ids, **options) -> list[list[int]]:
    base = model.get_base_model()
    return [
        sampled_text(base, input_ids[row : row + 1], SEED, row, NEW_TOKENS, **options) for row in range(len(input_ids))
    ]


# ---------------------------------------------------------------- one seed, one text


@pytest.mark.parametrize("name", PROCESSORS)
def test_texts_are_those_of_one_token_at_a_time(name, model):
    texts = expected(model, ids(), **PROCESSORS[name])
    assert len({tuple(text) for text in texts}) == 3
    for strategy in reversed(STRATEGIES):
        assert sample(model, ids(), mtp_strategy=strategy, **PROCESSORS[name]) == texts
    assert 0 < model.mtp_statistics.accepted < model.mtp_statistics.drafted


def test_the_text_does_not_depend_on_how_it_is_decoded(model):
    texts = expected(model, ids())
    for k in (1, 2, 3):
        assert sample(model, ids(), mtp_k=k, mtp_strategy="quadratic") == texts
    for _ in range(3):  # the schedule goes on learning
        assert sample(model, ids()) == texts
    assert sample(model, ids(), cache_implementation="static", mtp_strategy="quadratic") == texts
    assert sample(model, ids(), new_tokens=NEW_TOKENS // 2) == [text[: NEW_TOKENS // 2] for text in texts]
    assert sample(model, ids(1)) == texts[:1]


def test_the_text_does_not_depend_on_the_adapter(model):
    texts = expected(model, ids())
    assert sample(randomised(model, seed=7), ids(), mtp_strategy="quadratic") == texts
    randomised(model, seed=1)
    other = upgraded(tiny_base("llama", torch.float64, vocab_size=SMALL), k=2, sampler=False).double()
    assert sample(other, ids(), mtp_strategy="quadratic") == texts
    untrained = upgraded(tiny_base("llama", torch.float64, vocab_size=SMALL), k=3).double()
    untrained.add_adapter("fresh", GatedLoraConfig(k=3, r=2))
    untrained.set_adapter("fresh")
    assert sample(untrained.double(), ids(), mtp_strategy="linear") == texts


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padded_rows(strategy, model):
    starts = [0, 4, 7]
    mask = (torch.arange(9) >= torch.tensor(starts)[:, None]).long()
    texts = [
        sampled_text(model.get_base_model(), ids()[row : row + 1, start:], SEED, row, NEW_TOKENS)
        for row, start in enumerate(starts)
    ]
    assert sample(model, ids(), attention_mask=mask, pad_token_id=0, mtp_strategy=strategy) == texts


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_that_end(strategy, model):
    texts = expected(model, ids())
    ends = {"eos_token_id": 3, "pad_token_id": 0, "attention_mask": torch.ones_like(ids())}
    output = sample(model, ids(), mtp_strategy=strategy, **ends)
    assert any(3 in text for text in texts)
    for row, text in zip(output, texts, strict=True):
        end = text.index(3) + 1 if 3 in text else len(text)
        assert row == [*text[:end], *[0] * (len(row) - end)]


class Rotates(LogitsProcessor):
    """Keeps a state: bans another token in each call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores[:, self.calls % SMALL] = -torch.inf
        return scores


def test_rows_in_step(model):
    texts = {
        strategy: sample(model, ids(), mtp_strategy=strategy, logits_processor=LogitsProcessorList([Rotates()]))
        for strategy in STRATEGIES
    }
    assert texts["quadratic"] == texts["linear"] == texts["auto"]
    alone = sample(model, ids(1), mtp_strategy="linear", logits_processor=LogitsProcessorList([Rotates()]))
    assert alone == texts["auto"][:1]
    assert all(token != (place + 1) % SMALL for text in texts["auto"] for place, token in enumerate(text))


def test_the_seed_of_torch_or_of_a_generator(model):
    def of_global(seed: int):
        torch.manual_seed(seed)
        return model.generate(ids(), do_sample=True, max_new_tokens=12, mtp=True)

    assert torch.equal(of_global(0), of_global(0))
    assert not torch.equal(of_global(0), of_global(1))
    assert sample(model, ids()) == sample(model, ids())
    assert sample(model, ids()) != sample(model, ids(), seed=SEED + 1)
    torch.manual_seed(0)
    assert not torch.equal(*(model.generate(ids(), do_sample=True, max_new_tokens=12, mtp=True) for _ in range(2)))


@pytest.mark.parametrize("way", ["mtp=False", "disabled", "a model that decodes plainly"])
@pytest.mark.filterwarnings("ignore:generate.mtp=True. was called while the adapter is disabled")
def test_a_generator_seeds_plain_decoding(model, way, monkeypatch):
    if way == "a model that decodes plainly":
        monkeypatch.setattr(generate, "speculation_mode", lambda _: generate.SpeculationMode.NONE)

    def of(seed: int) -> list:
        with model.disable_adapter() if way == "disabled" else nullcontext():
            return sample(model, ids(), seed=seed, mtp=way != "mtp=False", mtp_strategy="auto")

    state = torch.get_rng_state()
    assert of(0) == of(0) != of(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_leaves_the_random_state_of_the_process_alone(model):
    state = torch.get_rng_state()
    sample(model, ids())
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_prompts_of_one_call_go_on_differently(model):
    same = ids(1).expand(4, -1)
    assert len({tuple(text) for text in sample(model, same)}) == 4
    assert sample(model, ids(1), num_return_sequences=4) == sample(model, same)


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("setting", [{"encoder_repetition_penalty": 9.0}, {"encoder_no_repeat_ngram_size": 1}])
def test_rows_of_one_prompt_have_its_settings(setting, prompts, model):
    there = torch.tensor([[1, 2, 1, 3], [4, 5, 6, 5]])[:prompts]  # of unlike tokens
    texts = expected(model, there.repeat_interleave(2, dim=0), **setting)
    assert texts != expected(model, there.repeat_interleave(2, dim=0))
    assert sample(model, there, num_return_sequences=2, **setting) == texts


def test_rows_of_one_prompt_are_constrained_by_its_number(model):
    texts = sample(
        model, ids(2), num_return_sequences=3, prefix_allowed_tokens_fn=lambda prompt, _: [[1, 2], [5, 6]][prompt]
    )
    assert [set(text) for text in texts] == [{1, 2}] * 3 + [{5, 6}] * 3


def test_low_temperature_is_greedy(model):
    greedy = model.generate(ids(), do_sample=False, max_new_tokens=NEW_TOKENS)[:, 9:].tolist()
    assert sample(model, ids(), temperature=1e-4) == greedy


class Spoiled(LogitsProcessor):
    """Spoils the scores of one row from its third new token on."""

    def __init__(self, value: float, whole: bool):
        self.value, self.whole = value, whole

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= ids().shape[1] + 2:
            scores[-1:, : None if self.whole else 1] = self.value
        return scores


@pytest.mark.parametrize(
    "value, whole", [(-torch.inf, True), (torch.nan, False), (torch.inf, False)], ids=["all -inf", "nan", "inf"]
)
@pytest.mark.parametrize("mtp", [True, False])
def test_scores_from_which_nothing_can_be_drawn(model, mtp, value, whole):
    with pytest.raises(RuntimeError, match="No token can be sampled" if mtp else "probability tensor contains"):
        sample(model, ids(), mtp=mtp, logits_processor=LogitsProcessorList([Spoiled(value, whole)]))


@pytest.mark.parametrize("mtp", [True, False])
def test_a_base_whose_logits_are_nan_is_not_sampled(mtp):
    model = upgraded(tiny_base("llama"))
    sample(model, ids())  # the trial of the model's speculation mode compares finite logits
    head = model.get_base_model().lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone().index_fill_(0, torch.tensor([3]), torch.nan))
    with pytest.raises(RuntimeError, match="No token can be sampled" if mtp else "probability tensor contains"):
        sample(model, ids(), mtp=mtp)


def test_noise_of_decided_positions_is_not_kept(model, monkeypatch):
    held, at = [], PositionNoise.at

    def counting(noise, position):
        drawn = at(noise, position)
        held.append(len(noise._drawn))
        return drawn

    monkeypatch.setattr(PositionNoise, "at", counting)
    sample(model, ids(), mtp_strategy="quadratic", new_tokens=60)
    assert max(held) <= 2 * (1 + 4)  # drafts of two passes


def test_a_draft_is_the_maximum_of_its_power_and_the_noise():
    tuner = upgraded(tiny_base("llama", torch.float64), k=1, sampler=False).base_model
    hidden_1KD = torch.randn(1, 1, tuner.model.config.hidden_size, dtype=torch.float64)
    two_best = tuner.unembedding()(hidden_1KD)[0, 0].topk(2)
    first, second = two_best.indices.tolist()
    gap = SHARPNESS * (two_best.values[0] - two_best.values[1])

    def drafted(noise: float) -> int:
        def noise_of(step, candidate_BC):
            return noise * (candidate_BC == second)

        return tuner.draft(torch.tensor([0]), hidden_1KD, noise_of, LogitsProcessorList()).token_BK.item()

    assert drafted(0.99 * gap) == first
    assert drafted(1.01 * gap) == second


# ---------------------------------------------------------------- the distribution

VOCAB, DRAWN = 3, 3


@pytest.fixture(scope="module")
def trained():
    """A model whose adapter has learned from texts of its base."""
    torch.manual_seed(0)
    model = upgraded(tiny_base("llama", vocab_size=VOCAB, initializer_range=0.15), k=2)
    text = model.generate(torch.zeros(32, 1, dtype=torch.long), do_sample=True, top_k=0, max_new_tokens=40)
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
    model.train()
    for _ in range(25):
        request = ObjectiveRequest(get_recipe("default"), anchors=12)
        model(input_ids=text, labels=text, mtp_objective=request).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def base_probabilities(model, input_ids, temperature: float) -> dict[tuple[int, ...], float]:
    """The probability of each continuation, by plain forward passes."""
    texts = torch.tensor(list(itertools.product(range(VOCAB), repeat=DRAWN)))
    logits = model(input_ids=torch.cat([input_ids.expand(len(texts), -1), texts], dim=1)).logits
    log_p = (logits[:, -DRAWN - 1 : -1].double() / temperature).log_softmax(dim=-1)
    p = log_p.gather(2, texts[:, :, None])[:, :, 0].sum(dim=1).exp()
    return dict(zip(map(tuple, texts.tolist()), p.tolist(), strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_twenty_thousand_draws(strategy, trained):
    """A chi-square test against the product of the base's own softmaxes, in batches whose rows accept differently."""
    input_ids, accepted = prompt(5) % VOCAB, 0
    wanted = base_probabilities(trained, input_ids, temperature=0.8)
    counts, generator = dict.fromkeys(wanted, 0), torch.Generator().manual_seed(0)
    for _ in range(10):
        output = trained.generate(
            input_ids,
            mtp=True,
            mtp_strategy=strategy,
            generator=generator,
            do_sample=True,
            temperature=0.8,
            top_k=0,
            num_return_sequences=2000,
            max_new_tokens=DRAWN,
        )
        accepted += trained.mtp_statistics.accepted
        for text in output[:, 5:].tolist():
            counts[tuple(text)] += 1
    assert accepted > 1000 or strategy == "auto"
    assert abs(sum(wanted.values()) - 1) < 1e-9
    assert p_value(torch.tensor(list(counts.values())), 20_000 * torch.tensor(list(wanted.values()))) > 1e-3
