"""Responses from the model itself: every form of dataset, the same file however often it was interrupted."""

import datetime
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState, debug_launcher
from datasets import Dataset, DatasetDict, load_dataset
from peft import LoraConfig, get_peft_model
from tiny_models import generate, tiny_base, upgraded
from tiny_text import CHAT_TEMPLATE, tiny_tokenizer, words
from transformers import AutoModelForCausalLM

from hf_mtp import GatedLoraModel, MTPConfig, MTPTrainer, regenerate_responses
from hf_mtp.cli import regenerate
from hf_mtp.data import answers, responses, survey
from hf_mtp.data.prompts import decode_response, encode_prompt, question_of
from hf_mtp.data.rows import load_rows
from hf_mtp.data.shard import Shard
from hf_mtp.pretrained import load_model, load_tokenizer

K, ROWS, NEW_TOKENS = 3, 7, 6


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def turns(row: int) -> list[dict]:
    return [{"role": "user", "content": words(2 + row, row)}, {"role": "assistant", "content": words(5, row + 1)}]


def chats(rows: int = ROWS) -> Dataset:
    return Dataset.from_dict({"messages": [turns(row) for row in range(rows)], "id": [*range(rows)]})


DATASETS = {
    "messages": chats,
    "conversations": lambda: Dataset.from_dict(
        {
            "conversations": [
                [{"from": turn["role"], "value": turn["content"]} for turn in turns(r)] for r in range(ROWS)
            ]
        }
    ),
    "prompt_completion": lambda: Dataset.from_dict(
        {"prompt": [words(2 + row, row) for row in range(ROWS)], "completion": [" w9"] * ROWS}
    ),
    "prompt_only": lambda: Dataset.from_dict({"prompt": [words(2 + row, row) for row in range(ROWS)]}),
    "conversational_prompt_completion": lambda: Dataset.from_dict(
        {"prompt": [turns(row)[:1] for row in range(ROWS)], "completion": [turns(row)[1:] for row in range(ROWS)]}
    ),
    "text": lambda: Dataset.from_dict({"text": [words(4 + row, row) for row in range(ROWS)]}),
}


def own_words(dataset: Dataset, folder: Path, model=None, **options) -> Dataset:
    if "text" in dataset.column_names:
        options = {"prompt_tokens": 5, **options}
    return regenerate_responses(
        upgraded("llama", K) if model is None else model,
        tiny_tokenizer(),
        dataset,
        folder,
        **{"batch_size": 3, "max_new_tokens": NEW_TOKENS, **options},
    )


def answered_alone(asked: str | list[dict]) -> str:
    """What the base says to one prompt by itself, without the end."""
    tokenizer, model = tiny_tokenizer(), tiny_base()
    ids = encode_prompt(asked, tokenizer)
    new = generate(model, torch.tensor([ids]), NEW_TOKENS, eos_token_id=tokenizer.eos_token_id)[0, len(ids) :].tolist()
    return decode_response(ids, [token for token in new if token != tokenizer.eos_token_id], tokenizer)


@pytest.mark.parametrize("form", DATASETS)
def test_every_row_has_the_response_of_the_base_alone(form, tmp_path):
    result = own_words(DATASETS[form](), tmp_path / "out")
    assert len(result) == ROWS
    for row, before, after in zip(range(ROWS), DATASETS[form](), result, strict=True):
        if form == "text":
            kept = " ".join(before["text"].split()[:5])
            assert after["text"] == kept + answered_alone(kept)
        elif form.startswith("prompt"):
            assert after["completion"] == answered_alone(before["prompt"])
        else:
            asked = turns(row)[:1]
            conversation = after["messages"] if "messages" in after else after["prompt"] + after["completion"]
            assert conversation == [*asked, {"role": "assistant", "content": answered_alone(asked)}]


def test_columns_of_other_forms_are_dropped():
    """TRL would take the old response from one of them. UltraChat has prompts and conversations."""
    row = {"prompt": words(3), "messages": turns(0), "text": words(9), "id": 7}
    question = question_of(row, tiny_tokenizer())
    assert question.with_response("w9") == {"prompt": words(3), "completion": "w9", "id": 7}
    del row["prompt"]
    question = question_of(row, tiny_tokenizer())
    expected = [*turns(0)[:1], {"role": "assistant", "content": "w9"}]
    assert question.with_response("w9") == {"messages": expected, "id": 7}


def test_tools_are_a_list_or_its_json(tmp_path):
    """As in TRL's datasets, where JSON keeps tools of different arguments in one column."""
    tools = [{"type": "function", "function": {"name": "w7", "parameters": {"type": "object", "properties": {}}}}]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}" + CHAT_TEMPLATE
    asked, without = turns(0)[:1], encode_prompt(turns(0)[:1], tokenizer)
    for given in (tools, json.dumps(tools)):
        assert encode_prompt(asked, tokenizer, {"tools": given}) == [7, *without]
    for given in (None, [], "", "[]", "null"):
        assert encode_prompt(asked, tokenizer, {"tools": given}) == without
    rows = [{"messages": turns(row), "tools": json.dumps(tools)} for row in range(ROWS)]
    assert own_words(Dataset.from_list(rows), tmp_path / "out")["tools"][:] == [json.dumps(tools)] * ROWS


@pytest.mark.parametrize("form", ["messages", "prompt_completion", "text"])
def test_the_result_goes_straight_into_the_trainer(form, tmp_path):
    result = own_words(DATASETS[form](), tmp_path / "out")
    config = MTPConfig(
        output_dir=str(tmp_path / "adapter"),
        max_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        training_curves=False,
    )
    model = upgraded("llama", K)
    trained = MTPTrainer(model=model, args=config, train_dataset=result, processing_class=tiny_tokenizer()).train()
    assert trained.training_loss > 0


def test_other_columns_stay_and_the_reason_to_end_is_added(tmp_path):
    result = own_words(chats(), tmp_path / "out")
    assert result["id"] == [*range(ROWS)]
    lengths = [len(turns[-1]["content"].split()) for turns in result["messages"]]
    assert [*result["finish_reason"]] == ["length" if length == NEW_TOKENS else "stop" for length in lengths]


def test_the_end_token_and_what_follows_it_are_left_out(tmp_path):
    (first,) = own_words(chats(1), tmp_path / "a")
    said = first["messages"][-1]["content"].split()
    end = tiny_tokenizer().convert_tokens_to_ids(said[3])
    (row, *_) = own_words(chats(2), tmp_path / "b", eos_token_id=end)
    assert row["messages"][-1]["content"].split() == said[: said.index(said[3])]
    assert row["finish_reason"] == "stop"


def test_multi_token_prediction_says_the_same(tmp_path):
    model = upgraded("llama", K)
    plain = own_words(chats(), tmp_path / "plain", model)
    assert own_words(chats(), tmp_path / "mtp", model, mtp=True).to_list() == plain.to_list()
    assert model.base_model.mtp_statistics.drafted > 0


def test_sampling_draws_from_the_seed_and_leaves_chance_outside_alone(tmp_path):
    model, state = upgraded("llama", K), torch.random.get_rng_state()
    first = own_words(chats(), tmp_path / "a", model, do_sample=True, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    assert own_words(chats(), tmp_path / "b", do_sample=True, seed=1).to_list() == first.to_list()
    assert own_words(chats(), tmp_path / "c", do_sample=True, seed=2).to_list() != first.to_list()


def test_the_longest_prompts_come_first_and_rows_keep_their_order(tmp_path, monkeypatch):
    widths, whole = [], answers.left_padded

    def spy(prompts, pad):
        widths.append([len(prompt) for prompt in prompts])
        return whole(prompts, pad)

    monkeypatch.setattr(answers, "left_padded", spy)
    result = own_words(chats(), tmp_path / "out")
    lengths = [length for batch in widths for length in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [turns[:1] for turns in result["messages"]] == [turns[:1] for turns in chats()["messages"]]


def test_a_model_in_training_mode_answers_without_dropout_and_goes_on_training(tmp_path):
    model = tiny_base(attention_dropout=0.5).train()
    assert own_words(chats(), tmp_path / "a", model).to_list() == own_words(chats(), tmp_path / "b").to_list()
    assert model.training


# ---------------------------------------------------------------- interruptions


class Killed(BaseException):
    pass


@pytest.mark.parametrize("do_sample", [False, True])
def test_an_interrupted_run_ends_with_the_same_file(do_sample, tmp_path, monkeypatch):
    whole = own_words(chats(), tmp_path / "whole", do_sample=do_sample)
    answer, calls = responses.answer_batch, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return answer(*args)

    monkeypatch.setattr(responses, "answer_batch", dies)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        own_words(chats(), out, do_sample=do_sample)
    assert not [*out.glob("*.jsonl")]  # nothing that looks like a dataset
    part = out / ".train-00000-of-00001.part"
    assert part.read_bytes().count(b"\n") == 6
    part.write_bytes(part.read_bytes()[:-9])  # the second batch was being written
    own_words(chats(), out, do_sample=do_sample)
    assert len(calls) == 3 + 2  # the second and third batch only
    name = "train-00000-of-00001.jsonl"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [path.name for path in out.iterdir() if not path.name.endswith("arguments.json")] == [name]
    assert own_words(chats(), out, do_sample=do_sample).to_list() == whole.to_list()
    assert len(calls) == 5  # a whole one is not begun again


def test_load_dataset_reads_the_folder(tmp_path):
    result = own_words(chats(), tmp_path / "out")
    assert load_dataset(str(tmp_path / "out"), split="train").to_list() == result.to_list()


# ---------------------------------------------------------------- the command


def save_model(folder: Path) -> Path:
    tiny_base().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run_command(*arguments: str) -> None:
    PartialState._reset_state()  # a forked process has its parent's
    sys.argv = ["hf-mtp-regenerate", *arguments]
    with pytest.raises(SystemExit) as ended:
        regenerate.main()
    assert ended.value.code == 0


def test_the_command_in_two_processes_says_what_one_says(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    model = save_model(tmp_path / "model")
    chats(9).to_json(tmp_path / "chats.jsonl")
    arguments = ["--model", str(model), "--dataset", str(tmp_path / "chats.jsonl"), "--batch-size", "2"]
    arguments += ["--max-new-tokens", str(NEW_TOKENS), "--output"]
    debug_launcher(run_command, (*arguments, str(tmp_path / "two")))
    run_command(*arguments, str(tmp_path / "one"))
    names = [f"train-0000{index}-of-00002.jsonl" for index in range(2)]
    assert sorted(path.name for path in (tmp_path / "two").glob("*.jsonl")) == names
    one, two = (load_dataset(str(tmp_path / name), split="train").to_list() for name in ("one", "two"))
    assert two == one and len(two) == 9


def test_two_processes_draw_differently(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    Dataset.from_dict({"prompt": [words(5)] * 2}).to_json(tmp_path / "same.jsonl")
    arguments = ["--model", str(save_model(tmp_path / "model")), "--dataset", str(tmp_path / "same.jsonl")]
    arguments += ["--do-sample", "--max-new-tokens", str(NEW_TOKENS), "--output", str(tmp_path / "out")]
    debug_launcher(run_command, arguments)
    first, second = load_dataset(str(tmp_path / "out"), split="train")["completion"]
    assert first != second


# ---------------------------------------------------------------- what cannot be answered


def test_rows_without_room_or_prompt_are_left_out(tmp_path, monkeypatch):
    asked = [words(4), "", words(125), words(3)]
    warnings = []
    monkeypatch.setattr(survey.logger, "warning", warnings.append)
    result = own_words(Dataset.from_dict({"prompt": asked}), tmp_path / "out")
    assert [*result["prompt"]] == [asked[0], asked[3]]
    assert "2 of 4 rows are skipped: 1 have an empty prompt, and in 1 the prompt" in warnings[0]
    with pytest.raises(ValueError, match="None of the 1 rows can be answered"):
        own_words(Dataset.from_dict({"prompt": asked[2:3]}), tmp_path / "none")


def test_other_arguments_are_refused(tmp_path):
    out = tmp_path / "out"
    own_words(chats(), out)
    with pytest.raises(ValueError, match="made with other arguments: max_new_tokens 6, not 7. Use the same"):
        own_words(chats(), out, max_new_tokens=7)
    with pytest.raises(ValueError, match="made with other arguments: rows"):
        own_words(chats(ROWS - 1), out)
    with pytest.raises(ValueError, match="made with other arguments: repetition_penalty None, not 1.5"):
        own_words(chats(), out, repetition_penalty=1.5)
    (out / ".train-00000-of-00001.arguments.json").unlink()
    with pytest.raises(ValueError, match="was not written by"):
        own_words(chats(), out)


def test_arguments_that_are_left_out_are_refused(tmp_path):
    own_words(chats(), tmp_path, repetition_penalty=1.5)
    with pytest.raises(ValueError, match="made with other arguments: repetition_penalty 1.5, not None"):
        own_words(chats(), tmp_path)


def test_responses_of_another_model_from_the_same_place_are_not_returned(tmp_path):
    """A base that was trained further, or another adapter of the user's own on it. A gated one changes no response."""
    options = {"batch_size": 3, "max_new_tokens": NEW_TOKENS}
    own_words(chats(), tmp_path)
    regenerate_responses(upgraded(tiny_base()), tiny_tokenizer(), chats(), tmp_path, **options)
    base = tiny_base()
    torch.nn.init.normal_(base.model.layers[1].mlp.up_proj.weight)
    tuned = get_peft_model(tiny_base(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for model in (base, tuned, upgraded(tuned)):
        with pytest.raises(ValueError, match="made with other arguments: weights"):
            regenerate_responses(model, tiny_tokenizer(), chats(), tmp_path, **options)


def test_another_chat_template_is_refused(tmp_path, monkeypatch):
    own_words(chats(), tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "w5 " + CHAT_TEMPLATE
    with pytest.raises(ValueError, match="made with other arguments: chat_template"):
        regenerate_responses(tiny_base(), tokenizer, chats(), tmp_path, batch_size=3, max_new_tokens=NEW_TOKENS)


def test_another_number_of_processes_is_refused(tmp_path):
    Shard(tmp_path, 1, count=2).claim({})
    with pytest.raises(ValueError, match="begun by 2 process.*now there are 1"):
        own_words(chats(), tmp_path)


def test_strange_files_are_refused(tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="holds mine.jsonl"):
        own_words(chats(), tmp_path)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Dataset.from_dict({"question": ["w9"]}), {}, "needs a column with prompts, .*but it has 'question'"),
        (Dataset.from_dict({"messages": []}), {}, "has 0 row"),
        (chats().to_iterable_dataset(), {}, "got IterableDataset: `Dataset.from_generator`"),
        (DatasetDict(train=chats()), {}, r"got DatasetDict: choose a split, \['train'\]"),
        (chats(), {"prompt_tokens": 4}, "column 'messages', and `prompt_tokens` is 4"),
        (Dataset.from_dict({"text": ["w9"]}), {"prompt_tokens": None}, "column 'text', and `prompt_tokens` is None"),
        (Dataset.from_dict({"text": ["w9"]}), {"prompt_tokens": 0}, "at least 1, but got 0"),
        (chats(), {"batch_size": 0}, "`batch_size` must be at least 1, but got 0"),
        (chats(), {"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, but got 0"),
        (chats(), {"num_return_sequences": 2}, "'num_return_sequences' cannot be passed on"),
        (chats(), {"model": tiny_base(), "mtp": True}, "needs an upgraded model, but got LlamaForCausalLM"),
        (
            chats().add_column("when", [datetime.date(2026, 1, 1)] * ROWS),
            {},
            r"Column 'when' cannot be written as JSON",
        ),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(dataset, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        own_words(dataset, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_conversations_need_a_chat_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="'messages' holds conversations, but the tokenizer has no chat template"):
        regenerate_responses(tiny_base(), tokenizer, chats(), tmp_path / "out")


def test_the_command_refuses_temperature_without_sampling(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", "regenerate --model m --dataset d --output o --temperature 0.7".split())
    with pytest.raises(SystemExit) as ended:
        regenerate.main()
    assert ended.value.code == 2
    assert "--temperature, --top-p and --top-k need --do-sample" in " ".join(capsys.readouterr().err.split())


def test_the_command_reads_saved_datasets_and_adapters(tmp_path):
    chats().save_to_disk(tmp_path / "rows")
    DatasetDict(test=chats()).save_to_disk(tmp_path / "splits")
    for name in ("rows", "splits"):
        assert load_rows(str(tmp_path / name), None, "test").to_list() == chats().to_list()
    base = save_model(tmp_path / "base")
    upgraded(AutoModelForCausalLM.from_pretrained(base), K).save_pretrained(tmp_path / "adapter")
    model = load_model(str(tmp_path / "adapter"))
    tokenizer = load_tokenizer(str(tmp_path / "adapter"), model)
    assert isinstance(model.base_model, GatedLoraModel) and tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
