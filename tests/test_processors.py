"""Processors and criteria get what they get in plain decoding: the same calls, with the same arguments."""

import pytest
import torch
from test_batch import padded
from tiny_models import prompt, tiny_base, upgraded
from tiny_text import tiny_tokenizer
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
)
from transformers.generation import EosTokenCriteria

from hf_mtp.decoding.processors import Order, end_tokens_of, most_new_tokens, order_of, processors_of_row

STRATEGIES = ("quadratic", "linear", "auto")
SMALL, END = 8, 6  # a model of so few ids that drafts are often right, and an id that ends rows at different places


class Custom(LogitsProcessor):
    """A processor with a state: now and then bans what a row had before. Keeps all that it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.tolist(), scores.clone()))
        if len(self.calls) % 3 == 0:
            scores = scores.scatter(1, self.calls[-2][1].argmax(dim=-1, keepdim=True), -torch.inf)
        return scores


class PerRow(StoppingCriteria):
    """Stops each row at its second token 3, which it counts over calls. Keeps all that it was called with."""

    def __init__(self, rows: int, of: int = 2):
        self.calls, self.seen, self.of = [], [0] * rows, of

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append((input_ids.tolist(), scores and torch.stack(scores)))
        self.seen = [seen + (last == 3) for seen, last in zip(self.seen, input_ids[:, -1].tolist(), strict=True)]
        return torch.tensor([seen >= self.of for seen in self.seen])


class Harness(StoppingCriteria):
    """Says yes or no for the whole batch, once each row has had a token, as lm-evaluation-harness does."""

    def __init__(self, rows: int):
        self.done = [False] * rows

    def __call__(self, input_ids, scores, **kwargs):
        self.done = [done or last == 3 for done, last in zip(self.done, input_ids[:, -1].tolist(), strict=True)]
        return all(self.done)


@pytest.fixture(scope="module")
def model():
    base = tiny_base("llama", torch.float64, vocab_size=SMALL, seed=2)
    return upgraded(base, k=3, dtype=torch.float64).double()


def assert_same_calls(fast: list, plain: list) -> None:
    assert [ids for ids, _ in fast] == [ids for ids, _ in plain]
    for (_, one), (_, other) in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------- the calls


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("end", [None, END], ids=["no_end", "end"])
@pytest.mark.parametrize("rows", [1, 4])
def test_calls_are_those_of_plain_decoding(rows, end, strategy, model):
    inputs = padded((9, 5, 8, 7)[:rows], SMALL) | {"eos_token_id": end, "max_new_tokens": 25, "do_sample": False}
    outputs, processors, criteria = [], [], []
    for how in ({}, {"mtp": True, "mtp_strategy": strategy}):
        processors.append(Custom())
        criteria.append(PerRow(rows))
        lists = LogitsProcessorList([processors[-1]]), StoppingCriteriaList([criteria[-1]])
        outputs.append(model.generate(**inputs, logits_processor=lists[0], stopping_criteria=lists[1], **how))
    assert torch.equal(*outputs)
    assert_same_calls(processors[1].calls, processors[0].calls)
    assert_same_calls(criteria[1].calls, criteria[0].calls)
    assert criteria[1].seen == criteria[0].seen
    assert strategy == "auto" or 0 < model.mtp_statistics.accepted < model.mtp_statistics.drafted


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_criteria_get_scores_where_these_are_asked_for(strategy, model):
    inputs = padded((9, 5, 8), SMALL) | {"max_new_tokens": 9, "do_sample": False}
    wanted = {"return_dict_in_generate": True, "output_scores": True, "repetition_penalty": 1.3}
    plain, fast = PerRow(3), PerRow(3)
    model.generate(**inputs, **wanted, stopping_criteria=StoppingCriteriaList([plain]))
    how = {"mtp": True, "mtp_strategy": strategy}
    model.generate(**inputs, **wanted, stopping_criteria=StoppingCriteriaList([fast]), **how)
    assert_same_calls(fast.calls, plain.calls)
    assert plain.calls[-1][1].shape == (9, 3, SMALL)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("end", [None, END])
def test_criteria_that_look_at_all_rows(end, strategy, model):
    inputs = padded((9, 5, 8), SMALL) | {"max_new_tokens": 25, "do_sample": False, "eos_token_id": end}
    plain, fast = (
        model.generate(**inputs, stopping_criteria=StoppingCriteriaList([Harness(3)]), **how)
        for how in ({}, {"mtp": True, "mtp_strategy": strategy})
    )
    assert torch.equal(fast, plain)
    assert plain.shape[1] < 9 + 25


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("end", [None, END])
def test_rows_that_stop_apart(end, strategy, model):
    """Without an end token, rows that stopped go on until all have."""
    inputs = padded((9, 5, 8), SMALL) | {"max_new_tokens": 25, "do_sample": False, "eos_token_id": end}
    plain, fast = (
        model.generate(**inputs, stopping_criteria=StoppingCriteriaList([PerRow(3, of=2)]), **how)
        for how in ({}, {"mtp": True, "mtp_strategy": strategy})
    )
    assert torch.equal(fast, plain)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("end", [None, 40])
def test_stop_strings(end, rows, strategy):
    model, tokenizer = upgraded("llama", k=3), tiny_tokenizer(97)
    inputs = {"input_ids": prompt(rows=rows), "max_new_tokens": 20, "do_sample": False, "eos_token_id": end}
    inputs |= {"attention_mask": torch.ones(rows, 11, dtype=torch.long), "pad_token_id": 0}
    plain = model.generate(**inputs)
    strings = {"stop_strings": [f"w{plain[row, 11 + 3 * row + 4].item()}" for row in range(rows)]}
    plain = model.generate(**inputs, **strings, tokenizer=tokenizer)
    assert plain.shape[1] < 11 + 20 or end is None
    assert torch.equal(
        model.generate(**inputs, **strings, tokenizer=tokenizer, mtp=True, mtp_strategy=strategy), plain
    )


def test_stop_strings_of_the_users_own_criterion_take_precedence():
    model, tokenizer = upgraded("llama", k=3), tiny_tokenizer(97)
    plain = model.generate(prompt(), max_new_tokens=20, do_sample=False)
    never = StopStringCriteria(tokenizer, f"w{next(token for token in range(10, 97) if token not in plain)}")
    asked = {"stop_strings": f"w{plain[0, 14].item()}", "tokenizer": tokenizer, "stopping_criteria": [never]}
    for mtp in (False, True):
        assert torch.equal(model.generate(prompt(), max_new_tokens=20, do_sample=False, **asked, mtp=mtp), plain)


@pytest.mark.parametrize("end", [None, END])
def test_rows_of_chains_cannot_be_in_step(end):
    """Rows of these models are decoded one after the other, and what looks at a whole batch would see one row."""
    model = upgraded(tiny_base("bloom", vocab_size=SMALL), k=3)
    inputs = padded((9, 5), SMALL) | {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end}
    for asked in (
        {"logits_processor": LogitsProcessorList([Custom()])},
        {"stopping_criteria": StoppingCriteriaList([Harness(2)])},
        {"guidance_scale": 1.5},
    ):
        with pytest.raises(NotImplementedError, match="may look at a whole batch. Pass one sequence at a time"):
            model.generate(**inputs, **asked, mtp=True)
        alone = {"input_ids": inputs["input_ids"][:1], "max_new_tokens": 12, "do_sample": False}
        if "stopping_criteria" not in asked:
            assert torch.equal(model.generate(**alone, **asked, mtp=True), model.generate(**alone, **asked))
    known = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
    assert torch.equal(model.generate(**inputs, **known, mtp=True), model.generate(**inputs, **known))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_limit_of_the_users_takes_precedence(strategy, model):
    inputs = padded((9, 5), SMALL) | {"max_new_tokens": 30, "do_sample": False, "mtp": True, "mtp_strategy": strategy}
    for limit, columns in ((14, 14), (9, 10), (60, 60)):
        criteria = StoppingCriteriaList([MaxLengthCriteria(limit)])
        plain = model.generate(**{**inputs, "mtp": False}, stopping_criteria=criteria)
        output = model.generate(**inputs, stopping_criteria=criteria)
        assert torch.equal(output, plain)
        assert output.shape[1] == columns


def test_statistics_count_no_padding(model):
    inputs = padded((9, 5, 8, 7), SMALL) | {"eos_token_id": END, "max_new_tokens": 25, "do_sample": False}
    output = model.generate(**inputs, logits_processor=LogitsProcessorList([Custom()]), mtp=True)
    lengths = [row.index(END) + 1 if END in row else len(row) for row in output[:, 9:].tolist()]
    assert len(set(lengths)) > 1
    assert model.mtp_statistics.tokens == sum(model.mtp_statistics.steps) == sum(lengths)
    assert model.mtp_statistics.accepted <= model.mtp_statistics.drafted


def test_guidance_keeps_a_state_and_is_exact():
    model = upgraded("llama", k=3, dtype=torch.float64).double()
    arguments = {"input_ids": prompt(), "guidance_scale": 1.5, "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(**arguments, mtp=True), model.generate(**arguments))


def test_a_watermark_keeps_a_state_and_is_exact(model):
    def watermark():
        return LogitsProcessorList([SynthIDTextWatermarkLogitsProcessor(2, [1, 2], 64, 0, 4, torch.device("cpu"))])

    inputs = padded((9, 9, 9), SMALL) | {"do_sample": False, "max_new_tokens": 15}
    plain = model.generate(**inputs, logits_processor=watermark())
    assert torch.equal(model.generate(**inputs, logits_processor=watermark(), mtp=True), plain)


# ---------------------------------------------------------------- the order


@pytest.mark.parametrize(
    ("processors", "criteria", "one", "several"),
    [
        ([], [], "TOGETHER", "TOGETHER"),
        ([TemperatureLogitsWarper(0.5), MinPLogitsWarper(0.1)], [MaxLengthCriteria(9)], "TOGETHER", "TOGETHER"),
        ([], [EosTokenCriteria(4), MaxTimeCriteria(9.0)], "TOGETHER", "TOGETHER"),
        ([RepetitionPenaltyLogitsProcessor(2.0)], [], "BY_ROW", "BY_ROW"),
        ([NoRepeatNGramLogitsProcessor(2)], [EosTokenCriteria(4)], "BY_ROW", "BY_ROW"),
        ([Custom()], [], "BY_ROW", "IN_STEP"),
        ([], [PerRow(1), EosTokenCriteria(4)], "BY_ROW", "IN_STEP"),
        ([], [StopStringCriteria(tiny_tokenizer(97), ["w9"]), EosTokenCriteria(4)], "BY_ROW", "BY_ROW"),
        ([], [StopStringCriteria(tiny_tokenizer(97), ["w9"])], "BY_ROW", "IN_STEP"),
        (
            [SynthIDTextWatermarkLogitsProcessor(2, [1, 2], 64, 0, 4, torch.device("cpu"))],
            [EosTokenCriteria(4)],
            "BY_ROW",
            "IN_STEP",
        ),
    ],
)
def test_the_fastest_order_that_is_exact(processors, criteria, one, several):
    lists = LogitsProcessorList(processors), StoppingCriteriaList(criteria)
    assert order_of(*lists, rows=1) is Order[one]
    assert order_of(*lists, rows=3) is Order[several]


def test_subclasses_of_what_is_known_are_not_known():
    class Mine(TemperatureLogitsWarper):
        def __call__(self, input_ids, scores):
            return scores / len(input_ids)

    assert order_of(LogitsProcessorList([Mine(2.0)]), StoppingCriteriaList(), rows=2) is Order.IN_STEP


def test_limits_and_end_tokens():
    criteria = StoppingCriteriaList([MaxLengthCriteria(30), EosTokenCriteria([3, 4]), MaxLengthCriteria(12)])
    assert most_new_tokens(criteria, prompt=9) == 3
    assert most_new_tokens(criteria, prompt=12) == 1
    assert end_tokens_of(criteria) == {3, 4}
    assert end_tokens_of(StoppingCriteriaList([MaxLengthCriteria(3)])) == set()


def test_processors_of_a_row():
    seen = []
    constrained = PrefixConstrainedLogitsProcessor(lambda row, ids: seen.append(row) or [row], 1)
    processors = LogitsProcessorList([constrained])
    processors_of_row(processors, 2, 4)(torch.tensor([[1, 2]]), torch.zeros(1, 5))
    assert seen == [2]
    assert processors_of_row(processors, 0, 1) is processors
