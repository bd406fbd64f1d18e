"""Batches: every row is what it would be alone, however differently rows go on."""

import pytest
import torch
from tiny_models import CACHE, CONFIGS, WITHOUT_BRANCHES, generate, prompt, tiny_base, upgraded

STRATEGIES = ("quadratic", "linear", "auto")
PAD = 0
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
SMALL = 5  # so few ids that random drafts are often right, and rows of a batch accept differently


def padded(lengths=(9, 5, 1, 7), vocab=SMALL) -> dict[str, torch.Tensor]:
    """Rows of several lengths, padded on the left."""
    longest = max(lengths)
    input_ids = prompt(longest, rows=len(lengths)) % vocab
    mask = torch.arange(longest) >= torch.tensor([longest - length for length in lengths])[:, None]
    return {"input_ids": input_ids.where(mask, PAD), "attention_mask": mask.long(), "pad_token_id": PAD}


def alone(inputs: dict, row: int) -> torch.LongTensor:
    return inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].argmax() :]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name not in WITHOUT_BRANCHES])
def test_rows_are_what_they_are_alone(architecture, strategy):
    model = upgraded(tiny_base(architecture, vocab_size=SMALL), k=3)
    inputs = padded()
    output = model.generate(**inputs, do_sample=False, max_new_tokens=20, mtp=True, mtp_strategy=strategy)
    for row in range(4):
        input_ids = alone(inputs, row)
        expected = generate(model, input_ids, 20, attention_mask=torch.ones_like(input_ids))[0, -20:]
        assert output[row, -20:].tolist() == expected.tolist()
    if architecture == "llama" and strategy != "auto":
        assert 0 < model.mtp_statistics.accepted < model.mtp_statistics.drafted


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_rows_end_each_by_itself(cache, strategy):
    model = upgraded(tiny_base("llama", vocab_size=SMALL, seed=3), k=3)
    inputs, arguments = padded((9, 5, 8, 7)), {"eos_token_id": [4], "max_new_tokens": 25, "do_sample": False}
    expected = model.generate(**inputs, **arguments)
    output = model.generate(**inputs, **arguments, mtp=True, mtp_strategy=strategy, cache_implementation=cache)
    assert torch.equal(output, expected)
    ends = {row.tolist().index(4) if 4 in row else None for row in output[:, 9:]}
    assert len(ends) > 1
    assert model.mtp_statistics.tokens == sum(
        row.tolist().index(4) + 1 if 4 in row else len(row) for row in output[:, 9:]
    )


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 2.0},
        {"encoder_repetition_penalty": 2.0},
        {"no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 2},
        {"min_new_tokens": 6, "eos_token_id": 2},
        {"prefix_allowed_tokens_fn": lambda row, ids: [row, (row + len(ids)) % SMALL]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_see_the_prefix_of_their_row(options):
    model = upgraded(tiny_base("llama", vocab_size=SMALL), k=3)
    lengths = (9, 6, 3, 8) if "repetition_penalty" in options else (9, 9, 9, 9)  # others count padding as text
    inputs = padded(lengths) | {"do_sample": False, "max_new_tokens": 15}
    for strategy in STRATEGIES:
        output = model.generate(**inputs, **options, mtp=True, mtp_strategy=strategy)
        assert torch.equal(output, model.generate(**inputs, **options))


def test_num_return_sequences():
    model = upgraded(tiny_base("llama", vocab_size=SMALL), k=3)
    output = model.generate(prompt(6) % SMALL, mtp=True, do_sample=True, num_return_sequences=6, max_new_tokens=10)
    assert output.shape == (6, 16)
    assert len({tuple(row) for row in output.tolist()}) > 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_returned_dict(strategy):
    model = upgraded(tiny_base("llama", vocab_size=SMALL), k=3)
    inputs = padded() | {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True}
    wanted = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "output_attentions": True}
    model.get_base_model().set_attn_implementation("eager")
    plain = model.generate(**inputs, **wanted)
    fast = model.generate(**inputs, **wanted, mtp=True, mtp_strategy=strategy)
    assert torch.equal(fast.sequences, plain.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(fast[name], plain[name], **CLOSE)
    for name in ("hidden_states", "attentions"):
        assert len(fast[name]) == len(plain[name]) == 12
        for fast_token, plain_token in zip(fast[name][1:], plain[name][1:], strict=True):
            for fast_layer, plain_layer in zip(fast_token, plain_token, strict=True):
                torch.testing.assert_close(fast_layer, plain_layer, **CLOSE)
    for fast_layer, plain_layer in zip(fast[CACHE].layers, plain[CACHE].layers, strict=True):
        for row, start in enumerate(inputs["attention_mask"].argmax(dim=1).tolist()):
            torch.testing.assert_close(fast_layer.keys[row, :, start:], plain_layer.keys[row, :, start:], **CLOSE)


def test_rows_that_end_cost_no_more_columns():
    model = upgraded(tiny_base("llama", vocab_size=SMALL, seed=3), k=3)
    model.generate(prompt() % SMALL, max_new_tokens=1, mtp=True)  # asks the model, once, whether it takes branches
    rows = []
    model.get_base_model().get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    model.generate(**padded((9, 5, 8, 7)), eos_token_id=4, max_new_tokens=25, do_sample=False, mtp=True)
    assert rows[0] == 4
    assert rows[-1] < 4
    assert rows == sorted(rows, reverse=True)


# ---------------------------------------------------------------- what cannot be


def test_a_row_of_padding_is_refused():
    model, inputs = upgraded("llama"), padded()
    inputs["attention_mask"][2] = 0
    with pytest.raises(ValueError, match="Row 2 of the batch contains only padding"):
        model.generate(**inputs, mtp=True, max_new_tokens=3)
