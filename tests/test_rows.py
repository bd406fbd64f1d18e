"""Datasets as they come: rows with little or nothing in them, and datasets that are refused before they are read."""

import math
import re

import pytest
from datasets import Dataset
from tiny_models import upgraded
from tiny_text import CHAT_TEMPLATE, tiny_tokenizer, words
from tiny_training import ROWS, K, logged, texts, tokens, trainer

from hf_mtp import MTPConfig, MTPTrainer

SHORT = ["", words(1), words(2)]
CHAT = [{"role": "user", "content": words(4)}, {"role": "assistant", "content": words(9)}]


# ---------------------------------------------------------------- little in a row


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_short_and_long_rows_just_work(packing, stream, tmp_path):
    rows = Dataset.from_dict({"text": [*SHORT, words(300), words(9), *SHORT, words(12)]})
    rows = rows.to_iterable_dataset() if stream else rows
    made = trainer(tmp_path, rows, packing=packing, per_device_train_batch_size=1, max_steps=9)
    made.train()
    assert all(math.isfinite(loss) for loss in logged(made))
    assert max(logged(made, "mask_tokens")) <= 32 * K
    assert all(parameter.isfinite().all() for parameter in made.model.parameters())


@pytest.mark.parametrize("bad", [[], [7], [7, 8]], ids=["empty", "one token", "two tokens"])
def test_rows_with_nothing_to_learn_change_nothing(bad, tmp_path):
    long = list(range(6, 18))
    alone, among = (
        trainer(
            tmp_path / str(len(rows)),
            Dataset.from_dict({"input_ids": rows}),
            anchors_per_sequence=None,
            max_steps=1,
            per_device_train_batch_size=len(rows),
        )
        for rows in ([long], [bad, long, bad])
    )
    for made in (alone, among):
        made.train()
    assert logged(among, "mask_tokens") == logged(alone, "mask_tokens")
    assert logged(among) == pytest.approx(logged(alone), rel=1e-4)


def test_a_batch_with_nothing_to_learn_changes_nothing(tmp_path):
    rows = Dataset.from_dict({"input_ids": [list(range(6, 18)), [7], [8]]})
    options = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "weight_decay": 0.0}
    made = trainer(tmp_path, rows, max_steps=3, **options)
    made.train()
    assert logged(made, "mask_tokens")[1:] == [0, 0]
    assert logged(made)[1:] == logged(made, "grad_norm")[1:] == [0, 0]


def test_k_larger_than_every_completion(tmp_path):
    rows = Dataset.from_dict({"prompt": [words(5)] * ROWS, "completion": [" " + words(3, row) for row in range(ROWS)]})
    made = trainer(tmp_path, rows, upgraded("llama", 20), max_steps=2)
    made.train()
    # 3 words and the end: behind the prompt there are masks for the three after the first word, and so on.
    assert logged(made, "mask_tokens") == [4 * (3 + 2 + 1)] * 2
    assert all(math.isfinite(loss) and loss > 0 for loss in logged(made))


def test_completions_too_short_for_any_mask(tmp_path):
    rows = tokens(4).map(lambda row: {"labels": [-100] * (len(row["input_ids"]) - 1) + row["input_ids"][-1:]})
    with pytest.raises(ValueError, match="No sequence of `train_dataset` has two tokens in a row inside the loss"):
        trainer(tmp_path, rows)


# ---------------------------------------------------------------- formats

MIXED = {
    "text first": ({"text": [words(9), None], "messages": [None, CHAT]}, "'text', but row 1 .* It has 'messages'"),
    "chat first": ({"text": [None, words(9)], "messages": [CHAT, None]}, "'messages', but row 1 .* It has 'text'"),
    "prompts": (
        {"text": [words(9), None], "prompt": [None, words(4)], "completion": [None, " " + words(5)]},
        "'prompt', but row 0 has none. It has 'text'",
    ),
}


@pytest.mark.parametrize("mixed", MIXED)
@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_mixed_formats_are_refused(mixed, which, tmp_path):
    rows, message = MIXED[mixed]
    with pytest.raises(ValueError, match=f"`{which}` is read by its column {message}.*must have one format"):
        trainer(tmp_path, **{which: Dataset.from_dict(rows)})


def test_rows_without_text_are_refused(tmp_path):
    rows = Dataset.from_dict({"text": [words(9), words(9), None]})
    with pytest.raises(ValueError, match=r"column 'text', but row 2 has none\. Drop such rows: `dataset\.filter"):
        trainer(tmp_path, rows)
    trainer(tmp_path, rows.filter(lambda row: row["text"] is not None))


def test_prompts_of_which_some_have_no_completion_are_refused(tmp_path):
    rows = Dataset.from_dict({"prompt": [words(3)] * 3, "completion": [" " + words(5), None, None]})
    with pytest.raises(
        ValueError, match=r"column 'completion', but row 1 has none\. Drop such rows: `dataset\.filter"
    ):
        trainer(tmp_path, rows)


PADDED = {
    "behind the text": [[1, 1, 1, 1, 0, 0], [5, 6, 7, 8, 2, 2]],
    "before it": [[0, 0, 1, 1, 1, 1], [-100, -100, 7, 8, 9, 10]],
}


@pytest.mark.parametrize("place", PADDED)
def test_rows_that_were_padded_are_refused(place, tmp_path):
    """TRL drops the attention mask: the base would read the padding, and masks learn it."""
    mask, labels = PADDED[place]
    ids = [2 if label == -100 else label for label in labels]
    rows = {"input_ids": [[5, 6, 7, 8], ids], "attention_mask": [[1] * 4, mask], "labels": [[5, 6, 7, 8], labels]}
    with pytest.raises(ValueError, match=r"Row 1 of `eval_dataset\['a'\]` has padding.* Tokenize without `padding`"):
        trainer(tmp_path, eval_dataset={"a": Dataset.from_dict(rows)})
    del rows["labels"]
    with pytest.raises(ValueError, match="Row 1 of `train_dataset` has padding"):
        trainer(tmp_path, Dataset.from_dict(rows))


def test_padding_outside_the_loss_changes_nothing(tmp_path):
    ids, padding = tokens(8)["input_ids"], [2] * 5
    rows = {
        "input_ids": [row + padding for row in ids],
        "labels": [row + [-100] * 5 for row in ids],
        "attention_mask": [[1] * len(row) + [0] * 5 for row in ids],
    }
    padded, plain = trainer(tmp_path, Dataset.from_dict(rows)), trainer(tmp_path, tokens(8))
    padded.train()
    plain.train()
    assert logged(padded) == pytest.approx(logged(plain))


def test_a_column_that_is_not_needed_may_have_gaps(tmp_path):
    trainer(tmp_path, Dataset.from_dict({"text": [words(9)] * 2, "messages": [None, CHAT]}), max_steps=1).train()


def test_a_dataset_with_nothing_to_learn_from_is_refused(tmp_path):
    rows = Dataset.from_dict({"body": [words(9)] * 4})
    with pytest.raises(ValueError, match="`train_dataset` has the columns 'body', and none to learn from.*'text'"):
        trainer(tmp_path, rows)
    trainer(tmp_path, rows, dataset_text_field="body")


@pytest.mark.parametrize(
    "others, advice",
    [({}, "`regenerate_responses"), ({"text": [words(9)] * 4}, "'text', drop the prompts")],
    ids=["alone", "beside texts"],
)
def test_prompts_without_completions_are_refused(others, advice, tmp_path):
    """TRL's error is a KeyError. UltraChat has such prompts beside its conversations."""
    rows = Dataset.from_dict({"prompt": [words(9)] * 4, **others})
    with pytest.raises(ValueError, match=f"`train_dataset` has the column 'prompt' and no 'completion'.*{advice}"):
        trainer(tmp_path, rows)


# ---------------------------------------------------------------- templates


WITHOUT_MARKS = re.sub("{% (end)?generation %}", "", CHAT_TEMPLATE)


@pytest.mark.parametrize("template", [None, WITHOUT_MARKS])
def test_a_chat_template_that_marks_no_answers_is_refused(template, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    args = MTPConfig(str(tmp_path), assistant_only_loss=True, use_cpu=True, bf16=False, report_to="none")
    with pytest.raises((ValueError, RuntimeError), match=r"chat.template.*generation|generation.*chat template"):
        MTPTrainer(upgraded("llama", K), args, Dataset.from_dict({"messages": [CHAT] * 4}), processing_class=tokenizer)


# ---------------------------------------------------------------- packing


def test_packing_for_a_model_that_reads_sequences_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`packing=True` .* BloomForCausalLM reads one sequence .*`packing=False`"):
        trainer(tmp_path, model=upgraded("bloom", K), packing=True)
    trainer(tmp_path, model=upgraded("bloom", K))


def test_attention_that_takes_no_masks_is_refused_before_training(tmp_path):
    model = upgraded("llama", K)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'.*sdpa"):
        trainer(tmp_path, texts(), model, packing=True)
