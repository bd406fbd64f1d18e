"""The n-gram table: it counts right, saves and loads with its adapter, drafts in `auto`, and changes no output."""

import copy
import json
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from test_cli import run
from tiny_models import generate, prompt, tiny_base, upgraded
from tiny_text import tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_mtp import count_ngrams
from hf_mtp.adapter.ngram_table import BITS, CANDIDATES, NGRAMS_NAME, NO_CANDIDATE, NgramTable
from hf_mtp.data.ngram_counts import SAME, count_tokens

K = 3
TEXTS = [[1, 2, 3, 4], [1, 2, 3, 5], [7, 2, 3, 4], [9, 9]]


def table_of(*texts: list[int]) -> NgramTable:
    return count_tokens([text for text in texts for _ in range(2)])


# ---------------------------------------------------------------- counting


Entry = list[tuple[int, float]]  # candidates with their probabilities


def counted_by_hand(texts: list[list[int]]) -> dict[tuple[int, ...], Entry]:
    """What a table must have, by the definition."""
    found = {}
    for length in (1, 2, 3):
        after = defaultdict(Counter)
        for text in texts:
            for place in range(length, len(text)):
                after[tuple(text[place - length : place])][text[place]] += 1
        for context, counts in after.items():
            likeliest = sorted(counts, key=lambda token, counts=counts: (-counts[token], token))[:CANDIDATES]
            entry = [(token, counts[token] / (counts.total() + 1)) for token in likeliest if counts[token] >= 2]
            if entry:
                found[context] = entry
    return {context: entry for context, entry in found.items() if not is_same(entry, found.get(context[1:], []))}


def is_same(one: Entry, other: Entry) -> bool:
    differences = [abs(a[1] - b[1]) for a, b in zip(one, other, strict=False)]
    return [token for token, _ in one] == [token for token, _ in other] and max(differences) < SAME


def as_dict(table: NgramTable) -> dict[tuple[int, ...], Entry]:
    def tokens(key: int) -> tuple[int, ...]:
        parts = [(key >> BITS * place) % (1 << BITS) - 1 for place in (2, 1, 0)]
        return tuple(part for part in parts if part >= 0)

    entries = zip(table.contexts.tolist(), table.tokens.tolist(), table.probabilities.tolist(), strict=True)
    return {
        tokens(key): [pair for pair in zip(*entry, strict=True) if pair[0] != NO_CANDIDATE] for key, *entry in entries
    }


def first_after(table: NgramTable, context: list[int], count: int) -> list[int]:
    """The likeliest continuation."""
    return [candidates[0][0] for candidates in table.after(context, count)]


def test_counts_are_those_of_the_definition():
    texts = [(prompt(80, rows=1, seed=seed)[0] % 5).tolist() for seed in range(6)]
    found, expected = as_dict(count_tokens(texts)), counted_by_hand(texts)
    assert found.keys() == expected.keys() and len({len(context) for context in found}) == 3
    assert {len(entry) for entry in expected.values()} == {1, 2, 3}
    for context, entry in expected.items():
        assert [token for token, _ in found[context]] == [token for token, _ in entry], context
        assert [p for _, p in found[context]] == pytest.approx([p for _, p in entry], abs=1e-3), context


def test_texts_do_not_run_into_each_other():
    assert (4,) not in as_dict(count_tokens([[1, 2, 3, 4]] * 4))


def test_the_largest_ids_fit():
    most = (1 << BITS) - 2
    table = table_of([most, most - 1, 0])
    assert first_after(table, [most], 2) == [most - 1, 0]
    assert as_dict(table)[(most,)] == [(most - 1, pytest.approx(2 / 3, abs=1e-3))]


def test_of_too_many_the_most_frequent_are_kept():
    texts = [[1, 2]] * 5 + [[3, 4]] * 3 + [[5, 6]] * 2
    assert list(as_dict(count_tokens(texts, size=2))) == [(1,), (3,)]


@pytest.mark.parametrize(
    ("texts", "words"),
    [([], "No n-gram occurs twice"), ([[1, 2], [3, 4]], "No n-gram"), ([[1 << 20, 1]], "between 0 and 1048574")],
)
def test_texts_that_give_no_table(texts, words):
    with pytest.raises(ValueError, match=words):
        count_tokens(texts)


def test_continuations():
    table = table_of([1, 2, 3, 4, 5], [8, 3, 9])
    assert first_after(table, [0, 1], 8) == [2, 3, 4, 5]
    assert first_after(table, [8, 3], 8) == [9]
    assert first_after(table, [1], 2) == [2, 3]
    assert list(table.after([6], 8)) == [] == list(table.after([], 8))


# ---------------------------------------------------------------- datasets


CHAT = [{"role": "user", "content": "w30 w31"}]
SAYS = {"role": "assistant", "content": "w20 w21 w22"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "w30 w31", "completion": "w20 w21 w22"},
        {"prompt": CHAT, "completion": [SAYS]},
        {"messages": [*CHAT, SAYS]},
        {"conversations": [*CHAT, SAYS]},
        {"text": "w20 w21 w22"},
    ],
    ids=["text prompt", "conversation", "messages", "conversations", "text"],
)
def test_forms_of_datasets(row):
    table = count_ngrams([row] * 2, tiny_tokenizer())
    assert first_after(table, [20], 3) == [21, 22, tiny_tokenizer().eos_token_id]
    assert not list(table.after([30], 1))  # the prompt does not count


def test_an_empty_response_is_a_response():
    rows = [{"prompt": "w30", "completion": ""}, *[{"prompt": "w30", "completion": "w20 w21"}] * 2]
    assert first_after(count_ngrams(rows, tiny_tokenizer()), [20], 1) == [21]


def test_prompts_alone_are_refused():
    with pytest.raises(ValueError, match="Let the model answer first: `hf-mtp regenerate`"):
        count_ngrams([{"prompt": CHAT}], tiny_tokenizer())


# ---------------------------------------------------------------- decoding


def upgraded_with(table: NgramTable | None, kind: str = "llama"):
    model = upgraded(kind, K).double()
    model.peft_config["default"].ngrams = table
    return model


def right_table(kind: str = "llama", new_tokens: int = 24) -> NgramTable:
    """A table of what the base writes after the prompt."""
    return table_of(
        tiny_base(kind).double().generate(prompt(), max_new_tokens=new_tokens, do_sample=False)[0].tolist()
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_right_tables_save_passes_and_wrong_ones_change_nothing(kind):
    plain = generate(tiny_base(kind).double(), prompt(), 24)
    passes = {}
    for name, table in {"none": None, "right": right_table(kind), "wrong": table_of([5, 6, 7], [6, 5, 3])}.items():
        model = upgraded_with(table, kind)
        assert torch.equal(generate(model, prompt(), 24, mtp=True, mtp_strategy="auto"), plain), name
        passes[name] = model.mtp_statistics.forward_passes
        if name == "right":
            assert model.mtp_statistics.looked_up > 0
    assert passes["right"] < passes["none"]


def test_candidates_beside_the_first_are_accepted():
    text = generate(tiny_base("llama").double(), prompt(), 24)[0].tolist()
    pairs = [[[token, 3]] * 3 + [[token, after]] * 2 for token, after in pairwise(text)]  # 3 is wrong, but likelier
    model = upgraded_with(count_tokens([pair for both in pairs for pair in both]))
    assert generate(model, prompt(), 24, mtp=True, mtp_strategy="auto")[0].tolist() == text
    assert model.mtp_statistics.looked_up > 0


def test_samples_are_those_without_a_table():
    samples = []
    for table in (None, right_table()):
        torch.manual_seed(3)
        model = upgraded_with(table)
        samples.append(
            model.generate(input_ids=prompt(), max_new_tokens=24, mtp=True, do_sample=True, temperature=0.7)
        )
    assert torch.equal(*samples)


def test_a_batch_looks_up_by_rows():
    rows = prompt(9, rows=3, seed=5)
    plain = generate(tiny_base("llama").double(), rows, 16)
    model = upgraded_with(table_of(*plain.tolist()))
    assert torch.equal(generate(model, rows, 16, mtp=True, mtp_strategy="auto"), plain)
    assert model.mtp_statistics.looked_up > 0


def test_a_table_of_another_tokenizer_is_refused_before_decoding():
    with pytest.raises(ValueError, match="token ids up to 501, .* another tokenizer"):
        generate(upgraded_with(table_of([500, 501])), prompt(), 12, mtp=True)


def test_strategies_of_the_paper_do_not_use_it():
    model = upgraded_with(right_table())
    generate(model, prompt(), 12, mtp=True, mtp_strategy="quadratic")
    assert model.mtp_statistics.looked_up == 0


# ---------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path):
    """The folder of an adapter with a table."""
    tiny_base("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = upgraded(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), K)
    model.peft_config["default"].ngrams = table_of(*TEXTS)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def entries(model) -> dict:
    return as_dict(model.peft_config["default"].ngrams)


def test_it_is_saved_and_loaded_with_its_adapter(saved):
    expected = as_dict(table_of(*TEXTS))
    base = AutoModelForCausalLM.from_pretrained(saved.parent / "base")
    assert entries(PeftModel.from_pretrained(base, saved)) == expected
    model = AutoPeftModelForCausalLM.from_pretrained(saved)
    assert entries(model) == expected == entries(copy.deepcopy(model))
    model.load_adapter(saved, "again")
    assert as_dict(model.peft_config["again"].ngrams) == expected
    assert f"| n-gram table | {len(expected)} contexts |" in (saved / "README.md").read_text()
    assert "ngrams" not in json.loads((saved / "adapter_config.json").read_text())


def test_a_table_of_another_adapter_does_not_stay(saved):
    other = upgraded("llama", K, seed=2)
    other.save_pretrained(saved)
    assert not (saved / NGRAMS_NAME).exists()


def test_a_table_stays_with_its_weights(saved):
    model = AutoPeftModelForCausalLM.from_pretrained(saved)
    model.peft_config["default"].ngrams = None
    model.save_pretrained(saved)
    assert (saved / NGRAMS_NAME).exists()


@pytest.mark.parametrize("content", [b"", b"cut", "weights"], ids=["empty", "cut", "other tensors"])
def test_broken_files_are_named(saved, content):
    if content == "weights":
        content = (saved / "adapter_model.safetensors").read_bytes()
    (saved / NGRAMS_NAME).write_bytes(content)
    with pytest.raises(ValueError, match="ngrams.safetensors is not an n-gram table .* or delete it"):
        AutoPeftModelForCausalLM.from_pretrained(saved)


def test_arrays_that_are_no_table():
    good = table_of(*TEXTS)
    arrays = {name: getattr(good, name) for name in ("contexts", "tokens", "probabilities")}
    for change in ({"contexts": good.contexts[::-1]}, {"tokens": -good.tokens - 1}, {"tokens": good.tokens[1:]}):
        with pytest.raises(ValueError, match="n-gram table"):
            NgramTable(**(arrays | change))
    with pytest.raises(ValueError, match="float16"):
        NgramTable(**(arrays | {"probabilities": good.probabilities.astype(np.float32)}))


def test_a_table_of_another_tokenizer_is_refused(saved):
    table_of([100_000, 100_001]).save(saved)
    with pytest.raises(ValueError, match="token ids up to 100001, but the base's vocabulary has .* another tokenizer"):
        AutoPeftModelForCausalLM.from_pretrained(saved)


def test_command(saved, tmp_path):
    (saved / NGRAMS_NAME).write_bytes(b"broken")  # to be replaced
    rows = [{"prompt": "w30", "completion": "w20 w21"}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("ngrams", str(saved), str(tmp_path / "rows.jsonl"))
    assert "n-grams. To see what they bring: hf-mtp evaluate" in result.stdout
    assert as_dict(NgramTable.load(saved / NGRAMS_NAME)) == as_dict(count_ngrams(rows, tiny_tokenizer()))


def test_command_keeps_the_old_table_after_an_error(saved, tmp_path):
    before = (saved / NGRAMS_NAME).read_bytes()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "w30"}) + "\n")
    for folder in (saved, tmp_path):
        run("ngrams", str(folder), str(tmp_path / "rows.jsonl"), code=1)
    assert (saved / NGRAMS_NAME).read_bytes() == before
