"""Sampling with `mtp=True` draws from the base's own distribution, whatever the drafts."""

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from tiny_models import prompt, tiny_base, upgraded
from transformers import LogitsProcessorList

from hf_mtp.decoding import call, generation
from hf_mtp.decoding.drafters.masks import Draw
from hf_mtp.decoding.schedule.adaptive import Pacer
from hf_mtp.decoding.verification import accepted_drafts, next_token
from hf_mtp.objective.recipe import get_recipe

VOCAB, NEW_TOKENS = 3, 3


# ---------------------------------------------------------------- every course that chance can take


@dataclass
class Script:
    """One course of chance: choices made so far, replayed, and then the first possible ones."""

    choices: list[tuple[int, int]]  # choice, alternatives
    at: int = 0
    probability: float = 1.0

    def choose(self, probabilities: list[float]) -> int:
        possible = [index for index, probability in enumerate(probabilities) if probability > 0]
        if self.at == len(self.choices):
            self.choices.append((0, len(possible)))
        choice = possible[self.choices[self.at][0]]
        self.at += 1
        self.probability *= probabilities[choice]
        return choice

    def next_course(self) -> bool:
        """Moves on to the next course; False after the last."""
        while self.choices and self.choices[-1][0] + 1 == self.choices[-1][1]:
            self.choices.pop()
        if self.choices:
            choice, alternatives = self.choices.pop()
            self.choices.append((choice + 1, alternatives))
        self.at, self.probability = 0, 1.0
        return bool(self.choices)


@dataclass(frozen=True)
class EveryCourse(Draw):
    """Stands in for [`Draw`]: takes its choices from a script."""

    script: Script = field(default=None)

    def one_of(self, probability_XC):
        rows = (probability_XC / probability_XC.sum(dim=-1, keepdim=True)).tolist()
        return torch.tensor([[self.script.choose(row)] for row in rows])

    def happens(self, probability_X):
        rows = probability_X.clamp(max=1).tolist()
        return torch.tensor([self.script.choose([1 - p, p]) == 1 for p in rows], dtype=torch.bool)


def base_probabilities(model, input_ids, processors) -> dict[tuple[int, ...], float]:
    """The probability of each continuation, by plain forward passes."""
    result = {}
    for continuation in itertools.product(range(VOCAB), repeat=NEW_TOKENS):
        probability, sequence = 1.0, input_ids
        for token in continuation:
            logits = model(input_ids=sequence).logits[:, -1].float()
            probability *= processors(sequence, logits).softmax(dim=-1)[0, token].item()
            sequence = torch.cat([sequence, torch.tensor([[token]])], dim=1)
        result[continuation] = probability
    return result


class TwoSlots(Pacer):
    """Automatic decoding with a fixed budget, so that the same chance takes the same course."""

    def __init__(self):
        super().__init__(k=2)
        self.resting, self.budget = 0, 2
        self.lookups.compare = lambda found, tokens: None

    def observe(self, done):
        pass


class EveryMatch(TwoSlots):
    """The same, with drafts from the text itself wherever there are any."""

    def lookups_to_take(self, found, from_masks):
        return [len(match.tokens) for match in found]


@pytest.mark.parametrize("strategy", ["quadratic", "linear", "auto", "lookup"])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "top_p": 0.9}, {"repetition_penalty": 1.7, "temperature": 1.3}],
    ids=["plain", "warpers", "processor_that_reads_the_prefix"],
)
@torch.no_grad()
def test_probability_of_every_continuation(options, strategy, monkeypatch):
    model = upgraded(tiny_base("llama", torch.float64, vocab_size=VOCAB, initializer_range=0.1), k=2).double()
    input_ids = prompt(5) % VOCAB
    script = Script([])
    monkeypatch.setattr(generation, "Pacer", lambda k: EveryMatch() if strategy == "lookup" else TwoSlots())
    monkeypatch.setattr(call, "Draw", lambda warpers, generator: EveryCourse(warpers, generator, script))
    found: dict[tuple[int, ...], float] = {}
    arguments = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, **options}
    courses = accepted = looked_up = 0
    while True:
        output = model.generate(input_ids, mtp=True, mtp_strategy=strategy.replace("lookup", "auto"), **arguments)
        continuation = tuple(output[0, 5:].tolist())
        found[continuation] = found.get(continuation, 0.0) + script.probability
        courses += 1
        accepted += model.mtp_statistics.accepted
        looked_up += model.mtp_statistics.looked_up
        if not script.next_course():
            break
    processors = model.get_base_model()._get_logits_processor(
        model.get_base_model()._prepare_generation_config(None, **arguments)[0], input_ids_seq_length=5
    )
    expected = base_probabilities(model, input_ids, processors)
    assert courses > 8
    assert accepted > 0
    assert (looked_up > 0) == (strategy == "lookup")
    assert math.isclose(sum(found.values()), 1.0, abs_tol=1e-6)
    for continuation, probability in expected.items():
        assert abs(found.get(continuation, 0.0) - probability) < 1e-6


def test_a_draft_or_what_replaces_it_is_drawn_as_the_base_would():
    """p against q in closed form: acceptance and surplus add up to p."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(1, 7, generator=generator, dtype=torch.float64).softmax(dim=-1) for _ in range(2))
    result = torch.zeros(7, dtype=torch.float64)
    for token in range(7):
        script = Script([])
        while True:
            draw = EveryCourse(LogitsProcessorList(), None, script)
            drafted = p.log(), draw, torch.tensor([token]), torch.arange(7)[None], q
            accepted = accepted_drafts(drafted[0], drafted[2], draw, *drafted[3:])
            result[token if accepted else next_token(*drafted)] += q[0, token] * script.probability
            if not script.next_course():
                break
    torch.testing.assert_close(result, p[0])


# ---------------------------------------------------------------- statistics


@pytest.fixture(scope="module")
def trained():
    """An upgraded model that was trained on text of its base, and its share of accepted drafts before and after."""
    torch.manual_seed(0)
    model = upgraded(tiny_base("llama", vocab_size=VOCAB, initializer_range=0.15), k=2)
    before = acceptance(model)
    text = model.generate(torch.zeros(32, 1, dtype=torch.long), do_sample=True, top_k=0, max_new_tokens=40)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(60):
        model(input_ids=text, labels=text, mtp_recipe=get_recipe("default"), mtp_anchors=16).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), before, acceptance(model)


def acceptance(model) -> float:
    """Accepted drafts over those offered, greedily."""
    counts = [0, 0]
    for seed in range(8):
        model.generate(prompt(5, seed=seed) % VOCAB, mtp=True, mtp_strategy="linear", max_new_tokens=20)
        counts = [counts[0] + model.mtp_statistics.accepted, counts[1] + model.mtp_statistics.drafted]
    return counts[0] / counts[1]


@pytest.mark.parametrize("strategy", ["quadratic", "linear", "auto"])
def test_twenty_thousand_draws(strategy, trained):
    """A chi-square test against the base's own probabilities, in batches whose rows accept differently."""
    model, before, after = trained
    assert after > before + 0.1
    input_ids = prompt(5) % VOCAB
    with torch.no_grad():
        expected = base_probabilities(model, input_ids, lambda prefix, logits: logits / 0.8)
    counts, accepted = dict.fromkeys(expected, 0), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        output = model.generate(
            input_ids,
            mtp=True,
            mtp_strategy=strategy,
            generator=generator,
            do_sample=True,
            temperature=0.8,
            top_k=0,
            num_return_sequences=2000,
            max_new_tokens=NEW_TOKENS,
        )
        accepted += model.mtp_statistics.accepted
        for continuation in output[:, 5:].tolist():
            counts[tuple(continuation)] += 1
    assert accepted > 1000 or strategy == "auto"
    whole = sum(expected.values())  # 1, up to the rounding of float32
    wanted = torch.tensor([20_000 * p / whole for p in expected.values()], dtype=torch.float64)
    seen = torch.tensor(list(counts.values()), dtype=torch.float64)
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(freedom, statistic / 2) > 1e-3  # the chi-square test's p-value


def test_seed_and_generator_make_draws_repeatable():
    model = upgraded("llama", k=3)
    arguments = {"mtp": True, "mtp_strategy": "quadratic", "do_sample": True, "max_new_tokens": 12}
    outputs = []
    for seed in (0, 0, 1):
        outputs.append(model.generate(prompt(), generator=torch.Generator().manual_seed(seed), **arguments))
        torch.manual_seed(seed)
        outputs.append(model.generate(prompt(), **arguments))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[4])


def test_low_temperature_is_greedy():
    model = upgraded("llama", k=3)
    greedy = model.generate(prompt(), do_sample=False, max_new_tokens=15)
    cold = model.generate(prompt(), mtp=True, do_sample=True, temperature=1e-4, max_new_tokens=15)
    assert torch.equal(cold, greedy)
