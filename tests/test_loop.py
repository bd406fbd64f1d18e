"""The decode loop: rows are admitted and retired between passes, and threads may decode with one model."""

import sys
import threading
from dataclasses import dataclass

import pytest
import torch
from test_batch import SMALL
from tiny_models import generate, prompt, tiny_base, upgraded
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria

from hf_mtp.cache.rollback import RollbackCache
from hf_mtp.decoding.batch import Batch
from hf_mtp.decoding.drafters.masks import MaskDrafter
from hf_mtp.decoding.drafters.ngrams import NgramDrafter
from hf_mtp.decoding.loop import DecodingLoop
from hf_mtp.decoding.noise import PositionNoise, draw_seed
from hf_mtp.decoding.schedule.adaptive import AdaptiveSchedule
from hf_mtp.decoding.schedule.fixed import FixedSchedule
from hf_mtp.decoding.sequence import Sequence
from hf_mtp.decoding.verifier import Verifier
from hf_mtp.passes.decoding_pass import DecodingPass

K, END = 3, 2
KINDS = ("greedy", "sampled", "with an end")
STRATEGIES = ("quadratic", "linear", "auto")


@pytest.fixture(scope="module")
def model():
    base = tiny_base("llama", torch.float64, vocab_size=SMALL, seed=3)
    return upgraded(base, k=K, dtype=torch.float64).double()


@dataclass(frozen=True)
class Request:
    """A prompt, and what `generate` makes of it alone."""

    ids: torch.LongTensor
    new_tokens: int
    seed: int | None = None
    end: int | None = None

    def arguments(self) -> dict:
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        options = {"eos_token_id": self.end, "pad_token_id": 0, "attention_mask": torch.ones_like(self.ids)}
        return {
            "input_ids": self.ids,
            "max_new_tokens": self.new_tokens,
            "do_sample": self.seed is not None,
            "generator": generator,
            **options,
        }

    def alone(self, model) -> list[int]:
        arguments = self.arguments() | {"mtp": True, "mtp_strategy": "linear"}
        if self.seed is None:
            arguments = {name: value for name, value in arguments.items() if "mtp" not in name and name != "generator"}
        return model.generate(**arguments)[0].tolist()

    def batch(self) -> Batch:
        noise = None
        if self.seed is not None:
            seed = draw_seed(torch.Generator().manual_seed(self.seed))
            noise = PositionNoise(seed, 0, SMALL, torch.device("cpu"))
        sequence = Sequence(self.ids[0], 0, 0, self.new_tokens, GenerationConfig(), LogitsProcessorList(), noise)
        return Batch([sequence], RollbackCache(torch.zeros(1, dtype=torch.long)), self.ids)


def requests(kind: str) -> list[Request]:
    return [
        Request(
            prompt(length, seed=number) % SMALL,
            new_tokens=22 + 3 * number,
            seed=10 + number if kind == "sampled" else None,
            end=END if kind == "with an end" else None,
        )
        for number, length in enumerate((9, 4, 13, 1))
    ]


def loop_of(model, strategy: str, end: int | None = None) -> DecodingLoop:
    criteria = StoppingCriteriaList([MaxLengthCriteria(100)] + ([] if end is None else [EosTokenCriteria(end)]))
    schedule = AdaptiveSchedule(K) if strategy == "auto" else FixedSchedule(K, linear=strategy == "linear")
    verifier = Verifier(LogitsProcessorList(), criteria, rows=1)
    drafters = [MaskDrafter(model.base_model, schedule.mask_acceptance, verifier.processors)]
    if strategy == "auto":
        drafters.append(NgramDrafter(schedule.ngram_rates))
    return DecodingLoop(DecodingPass(model.base_model), schedule, drafters, verifier, K)


@torch.no_grad()
def served(model, strategy: str, waiting: list[Request], every: int) -> tuple[list[list[int]], list[int]]:
    """Decodes all, of which one more comes every so many passes: their texts, and rows of each pass."""
    loop, batch, done, rows, waiting = loop_of(model, strategy, waiting[0].end), None, [], [], list(waiting)
    sequences = []
    while waiting or not batch.is_done:
        if waiting and len(rows) % every == 0 or batch is None:
            new = waiting.pop(0).batch()
            sequences += new.sequences
            loop.step(new)
            if batch is None:
                batch = new
            else:
                batch.admit(new)
        done += batch.retire()
        rows.append(len(batch.sequences))
        if not batch.is_done:
            loop.step(batch)
    assert loop.statistics.tokens == sum(sequence.new_tokens for sequence in sequences)
    assert all(sequence in sequences for sequence in done)
    return [sequence.text for sequence in sequences], rows


@pytest.fixture(scope="module")
def texts(model):
    return {kind: [request.alone(model) for request in requests(kind)] for kind in KINDS}


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_admitted_at_any_pass_are_what_they_are_alone(strategy, kind, every, model, texts):
    found, rows = served(model, strategy, requests(kind), every)
    assert found == texts[kind]
    if every <= 2 and kind != "with an end":
        assert max(rows) > 2
    if kind == "with an end":
        assert any(text[-1] == END for text in found)


def test_rows_of_several_windows_are_admitted():
    model = upgraded(tiny_base("gemma3_text", vocab_size=SMALL), k=K)
    expected = [request.alone(model) for request in requests("greedy")]
    assert served(model, "quadratic", requests("greedy"), 2)[0] == expected


def test_retiring_keeps_the_last_row(model):
    batch = requests("greedy")[0].batch()
    batch.sequences[0].finish()
    assert batch.retire() == []
    assert len(batch.sequences) == 1


@torch.no_grad()
def test_retired_rows_are_returned(model):
    loop = loop_of(model, "quadratic")
    batch, other = (request.batch() for request in requests("greedy")[:2])
    loop.step(batch)
    loop.step(other)
    batch.admit(other)
    first = batch.sequences[0]
    first.finish()
    assert batch.retire() == [first]
    assert len(batch.sequences) == len(batch.cache.rows.lengths) == 1
    assert len(batch.unread_BT) == len(batch.origins) == 1


@torch.no_grad()
def test_admitted_rows_bring_their_drafts(model):
    loop = loop_of(model, "quadratic")
    batch, other = (request.batch() for request in requests("greedy")[1:3])
    for _ in range(2):
        loop.step(batch)
    loop.step(other)
    before = [part.drafts.token_BK.tolist()[0] for part in (batch, other)]
    pending = [part.sequences[0].text[-1] for part in (batch, other)]
    batch.admit(other)
    assert batch.drafts.token_BK.tolist() == before and before[0] != before[1]
    assert batch.unread_BT.tolist() == [[token, *drafts] for token, drafts in zip(pending, before, strict=True)]
    assert [[origin.drafter for origin in row] for row in batch.origins] == [[0] * len(row) for row in before]
    assert batch.cache.rows.lengths == [sequence.ids_1S.shape[1] - 1 for sequence in batch.sequences]


@torch.no_grad()
def test_costs_are_those_of_unequal_rows(model, monkeypatch):
    loop = loop_of(model, "auto")
    batch, other = (request.batch() for request in requests("greedy")[:2])
    loop.step(batch)
    loop.step(other)
    batch.admit(other)
    before, drafts, seen = list(batch.cache.rows.lengths), batch.drafts, []
    forward = DecodingPass.__call__

    def watched(self, regular_BT, layout, cache, **options):
        seen.append((layout, cache.rows.lengths))
        return forward(self, regular_BT, layout, cache, **options)

    monkeypatch.setattr(DecodingPass, "__call__", watched)
    loop.measure_costs(batch, lambda seconds: seconds)
    assert batch.cache.rows.lengths == before == batch.cache.rows.length_B.tolist() and batch.drafts is drafts
    for layout, lengths in seen:
        columns = layout.position_BT.shape[1] + layout.masks
        assert [length - was for length, was in zip(lengths, before, strict=True)] == [0, int(columns > 1)]


# ---------------------------------------------------------------- threads


@pytest.fixture
def switches():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("first_use", [False, True], ids=["known", "first_use"])
def test_eight_threads_decode_with_one_model(first_use, switches):
    model = upgraded(tiny_base("llama", torch.float64, vocab_size=SMALL, seed=3), k=K, dtype=torch.float64).double()
    expected = [request.alone(model) for kind in KINDS[:2] for request in requests(kind)]
    if first_use:  # then the threads find out the speculation mode
        fresh = upgraded(tiny_base("llama", torch.float64, vocab_size=SMALL, seed=3), k=K, dtype=torch.float64)
        model = fresh.double()
    errors, wrong = [], []
    start = threading.Barrier(8)

    def call(number: int) -> None:
        try:
            start.wait()
            for turn in range(3):
                which = (number + 3 * turn) % 8
                strategy = ("auto", "auto", "quadratic", "linear")[(number + turn) % 4]
                request = requests(KINDS[which // 4])[which % 4]
                output = model.generate(**request.arguments(), mtp=True, mtp_strategy=strategy)
                if output[0].tolist() != expected[which]:
                    wrong.append((number, turn, strategy))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (errors, wrong) == ([], [])


def test_other_threads_notice_nothing_of_a_first_call():
    """While one thread finds out the speculation mode, others make tensors and draw numbers as ever."""
    model = upgraded(tiny_base("qwen2", vocab_size=SMALL + 2), k=K)  # sizes that no other test has
    torch.manual_seed(0)
    dtypes, draws, stop = set(), [], threading.Event()

    def other() -> None:
        while not stop.is_set():
            dtypes.add(torch.zeros(1).dtype)
            draws.append(torch.rand(()).item())

    thread = threading.Thread(target=other)
    thread.start()
    generate(model, prompt() % SMALL, 4, mtp=True)
    stop.set()
    thread.join()
    assert dtypes == {torch.float32}
    torch.manual_seed(0)
    assert draws == [torch.rand(()).item() for _ in draws]
    assert len(draws) > 10
