"""Training: every form of dataset, every measure logged, and nothing lost when something goes wrong."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import adapter_parameters, generate, prompt, tiny_base, upgraded
from tiny_text import tiny_tokenizer, words
from tiny_training import ROWS, SAVING, K, RaisesAt, assert_same_end, logged, texts, tokens, trainer
from transformers.utils.logging import get_logger

from hf_mtp import GatedLoraConfig, MTPConfig, MTPTrainer
from hf_mtp.adapter.base_identity import tokenizer_fingerprint
from hf_mtp.layout.blocks import segments, training_layout

MEASURES = {
    "loss_base",
    "loss_sampler",
    "loss_lcm",
    "loss_auxiliary",
    "tokens_per_pass",
    "mask_tokens",
    *(f"accuracy_{step}" for step in range(1, K + 1)),
}


# ---------------------------------------------------------------- datasets


def chats(rows: int = ROWS) -> list[list[dict]]:
    return [
        [{"role": "user", "content": words(4, row)}, {"role": "assistant", "content": words(9, row + 1)}]
        for row in range(rows)
    ]


DATASETS = {
    "text": lambda: texts(),
    "messages": lambda: Dataset.from_dict({"messages": chats()}),
    "prompt_completion": lambda: Dataset.from_dict(
        {"prompt": [words(4, row) for row in range(ROWS)], "completion": [" " + words(9, row) for row in range(ROWS)]}
    ),
    "conversational_prompt_completion": lambda: Dataset.from_dict(
        {"prompt": [chat[:1] for chat in chats()], "completion": [chat[1:] for chat in chats()]}
    ),
    "tokens": tokens,
    "tokens_and_labels": lambda: tokens().map(lambda row: {"labels": [-100] * 4 + row["input_ids"][4:]}),
    "stream": lambda: texts().to_iterable_dataset(),
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("form", DATASETS)
def test_dataset_forms(form, packing, tmp_path):
    trained = trainer(tmp_path, DATASETS[form](), packing=packing, max_steps=2)
    trained.train()
    assert all(math.isfinite(loss) and loss > 0 for loss in logged(trained))
    assert min(logged(trained, "mask_tokens")) > 0


def test_batches_of_equal_length(tmp_path):
    rows = Dataset.from_dict({"text": [words(4 + row % 16, row) for row in range(96)]})
    by_length, by_chance = (
        [batch["input_ids"].eq(tiny_tokenizer().pad_token_id).sum().item() for batch in made.get_train_dataloader()]
        for made in (trainer(tmp_path, rows, train_sampling_strategy=name) for name in ("group_by_length", "random"))
    )
    assert sum(by_length) < sum(by_chance)


def supervised_tokens(folder, dataset, **options) -> set[tuple[int, int]]:
    """(row, column) of all tokens that some mask predicts in the first batch."""
    batch = next(iter(trainer(folder, dataset, **options).get_train_dataloader()))
    positions = torch.arange(batch["labels"].shape[1]).expand_as(batch["labels"])
    layout = training_layout(batch["labels"], positions, segments(batch["attention_mask"], positions), K)
    lines = layout.target_columns(batch["labels"]).tolist()
    return {(row, column) for row, line in enumerate(lines) for column in line if column >= 0}


def test_prompts_are_outside_the_loss(tmp_path):
    rows = Dataset.from_dict({"prompt": [words(5)] * 4, "completion": [" " + words(6)] * 4})
    seen = supervised_tokens(tmp_path, rows)
    # 5 of prompt, 6 of completion, 1 end: masks hang on columns 4.. and predict from two columns on.
    assert seen == {(row, column) for row in range(4) for column in range(6, 12)}


def test_assistant_only_loss(tmp_path):
    rows = Dataset.from_dict({"messages": [chats(1)[0]] * 4})
    seen = supervised_tokens(tmp_path, rows, assistant_only_loss=True)
    # `<user>`, 4 words, `<assistant>`; then 9 words and `<eos>` inside the loss.
    assert seen == {(row, column) for row in range(4) for column in range(7, 16)}


# ---------------------------------------------------------------- measures


def test_every_measure_is_logged_in_training_and_evaluation(tmp_path):
    trained = trainer(tmp_path, eval_dataset=texts(6), eval_strategy="steps", eval_steps=2)
    trained.train()
    train, evaluation = trained.state.log_history[0], trained.state.log_history[2]
    assert MEASURES <= train.keys()
    assert {f"eval_{name}" for name in MEASURES} | {"eval_loss"} <= evaluation.keys()
    for entry, prefix in ((train, ""), (evaluation, "eval_")):
        assert 1 <= entry[prefix + "tokens_per_pass"] <= K + 1
        assert all(0 <= entry[f"{prefix}accuracy_{step}"] <= 1 for step in range(1, K + 1))
        terms = {"base": 1.0, "sampler": 1.0, "lcm": 1.0, "auxiliary": 0.5}
        weighted = sum(weight * entry[f"{prefix}loss_{name}"] for name, weight in terms.items())
        assert entry[prefix + "loss"] == pytest.approx(weighted, rel=1e-3)


def test_a_loss_of_no_weight_is_not_computed(tmp_path):
    trained = trainer(tmp_path, base_weight=0.0, auxiliary_weight=0.0)
    trained.train()
    entry = trained.state.log_history[0]
    assert not {"loss_base", "loss_auxiliary"} & entry.keys()
    assert {"loss_sampler", "loss_lcm", "accuracy_1"} <= entry.keys()


def test_evaluation_draws_the_same_masks_every_time(tmp_path):
    made = trainer(tmp_path, eval_dataset=texts(6), anchors_per_sequence=2)
    first, second = made.evaluate(), made.evaluate()
    assert {name: first[name] for name in ("eval_loss", "eval_tokens_per_pass")} == {
        name: second[name] for name in ("eval_loss", "eval_tokens_per_pass")
    }


def test_training_draws_new_masks_every_time(tmp_path):
    made = trainer(tmp_path, anchors_per_sequence=2)
    batch = next(iter(made.get_train_dataloader()))
    losses = {made.compute_loss(made.model.train(), batch).item() for _ in range(3)}
    assert len(losses) == 3


def test_mask_tokens_are_bounded_by_the_anchors(tmp_path):
    trained = trainer(tmp_path, anchors_per_sequence=2, max_steps=1)
    trained.train()
    assert logged(trained, "mask_tokens")[0] <= 4 * 2 * K


def test_training_learns_and_the_output_stays(tmp_path):
    model = upgraded("llama", K)
    before = generate(model, prompt())
    trained = trainer(tmp_path, tokens(2), model, max_steps=40, lr_scheduler_type="constant")
    trained.train()
    losses, accuracies = logged(trained), logged(trained, "accuracy_1")
    assert losses[-1] < 0.5 * losses[0]
    assert accuracies[-1] > accuracies[0] + 0.3
    model.eval()
    assert torch.equal(generate(model, prompt()), before)
    assert torch.equal(generate(model, prompt(), mtp=True), before)


def test_only_the_adapter_is_trained(tmp_path):
    model = upgraded("llama", K)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer(tmp_path, model=model).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(adapter_parameters(model))


def losses_of_training(folder, *args, **options) -> list[float]:
    trained = trainer(folder, *args, **options)
    trained.train()
    return logged(trained)


@pytest.mark.parametrize(("recipe", "targets"), [("paper", "data"), ("default", "soft")])
def test_recipes_set_the_targets(recipe, targets, tmp_path):
    assert trainer(tmp_path, recipe=recipe).recipe.targets == targets
    assert trainer(tmp_path, recipe=recipe, lcm_weight=0.25).recipe.lcm == 0.25


def test_upgrading_by_the_trainer(tmp_path):
    trained = trainer(tmp_path, model=tiny_base("llama"), peft_config=GatedLoraConfig(k=K, r=4), max_steps=1)
    trained.train()
    assert trained.model.base_model.active_mtp_config.k == K


def test_deadline_ends_training(tmp_path):
    trained = trainer(tmp_path, max_minutes=1e-6, max_steps=50)
    trained.train()
    assert trained.state.global_step == 1
    assert len(logged(trained)) == 1


def test_deadline_drives_the_learning_rate(tmp_path, monkeypatch):
    # Ten seconds pass with each look at the clock; a training of five minutes sees its learning rate fall to nothing.
    clock = iter(range(0, 100_000, 10))
    monkeypatch.setattr("hf_mtp.training.callbacks.deadline.time.monotonic", lambda: next(clock))
    trained = trainer(tmp_path, max_minutes=5, max_steps=50, lr_scheduler_type="linear")
    trained.train()
    rates = logged(trained, "learning_rate")
    assert trained.state.global_step < 50
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.8e-2 > 0.2e-2 > rates[-1]


# ---------------------------------------------------------------- saving and resuming


def test_checkpoints_hold_the_adapter_and_not_the_base(tmp_path):
    trained = trainer(tmp_path, save_strategy="steps", save_steps=2)
    trained.train()
    trained.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
        assert not list(folder.glob("model*.safetensors")) + list(folder.glob("pytorch_model*"))
    loaded = PeftModel.from_pretrained(tiny_base("llama"), tmp_path)
    for name, parameter in adapter_parameters(trained.model).items():
        assert torch.equal(loaded.get_parameter(name), parameter)


def test_adapter_records_how_it_was_trained(tmp_path):
    trained = trainer(tmp_path, recipe="paper", max_steps=1)
    trained.train()
    trained.save_model()
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["recipe"] == "paper"
    assert config["tokenizer_fingerprint"] == tokenizer_fingerprint(tiny_tokenizer())
    assert "| training recipe | paper |" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, MTPTrainer]:
    """A whole training, with checkpoints: its folder and its trainer."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    whole = trainer(folder, **SAVING)
    whole.train()
    return folder, whole


def test_resumed_training_ends_as_uninterrupted_training(uninterrupted, tmp_path):
    folder, whole = uninterrupted
    resumed = trainer(tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert_same_end(resumed, whole, steps=2)


def test_resumed_training_with_dropout_and_accumulation(tmp_path):
    options, config = {**SAVING, "gradient_accumulation_steps": 2}, {"lora_dropout": 0.1, "save_dtype": "bfloat16"}
    whole = trainer(tmp_path / "whole", model=upgraded("llama", K, **config), **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", model=upgraded("llama", K, **config), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same_end(resumed, whole, steps=2)


def test_interrupt_saves_a_checkpoint_to_resume_from(uninterrupted, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    interrupt = RaisesAt(3, lambda: signal.raise_signal(signal.SIGINT))
    trainer(tmp_path, callbacks=[interrupt], **{**SAVING, "save_steps": 100}).train()
    assert signal.getsignal(signal.SIGINT) is handler
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert checkpoint.name in ("checkpoint-3", "checkpoint-4")  # of this step or, asked too late for it, of the next
    resumed = trainer(tmp_path, **{**SAVING, "save_steps": 100})
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, uninterrupted[1], steps=2)


@pytest.fixture
def interruptible():
    """Python's own handler of Ctrl-C, which a process started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_second_interrupt_stops_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[RaisesAt(1, twice)]).train()
    assert signal.getsignal(signal.SIGINT) is handler


def test_training_that_fails_gives_the_interrupt_back(tmp_path):
    def fail():
        raise RuntimeError("out of memory")

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path, callbacks=[RaisesAt(1, fail)]).train()
    assert signal.getsignal(signal.SIGINT) is handler


def full_disk(monkeypatch, when: str):
    """Lets saving fail after what `when` names was written."""

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if when == "adapter":
        monkeypatch.setattr(PeftModel, "save_pretrained", refuse)
    elif when == "optimizer":
        monkeypatch.setattr(torch, "save", refuse)
    else:
        monkeypatch.setattr("transformers.TrainerState.save_to_json", refuse)


@pytest.mark.parametrize("when", ["adapter", "optimizer", "state"])
def test_full_disk_leaves_the_checkpoint_before(when, uninterrupted, tmp_path, monkeypatch):
    options = {**SAVING, "save_total_limit": 1}
    with pytest.raises(OSError, match="No space left"):
        trainer(tmp_path, callbacks=[RaisesAt(3, lambda: full_disk(monkeypatch, when))], **options).train()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, uninterrupted[1], steps=4)


# ---------------------------------------------------------------- what cannot be trained


def test_empty_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        trainer(tmp_path, Dataset.from_dict({"text": []}))
    with pytest.raises(ValueError, match=r"`eval_dataset\['none'\]` is empty"):
        trainer(tmp_path, eval_dataset={"some": texts(4), "none": Dataset.from_dict({"text": []})})


def test_dataset_of_prompts_alone_is_refused(tmp_path):
    rows = tokens().map(lambda row: {"labels": [-100] * len(row["input_ids"])})
    with pytest.raises(
        ValueError, match="No sequence of `train_dataset` has two tokens in a row inside the loss.*Are they all prompt"
    ):
        trainer(tmp_path, rows)


def test_texts_too_short_for_a_mask_are_refused(tmp_path):
    with pytest.raises(ValueError, match="No sequence of `train_dataset` has two tokens in a row"):
        trainer(tmp_path, Dataset.from_dict({"input_ids": [[7, 8], [9, 10]]}))


def test_an_evaluation_without_a_target_is_refused(tmp_path):
    short = Dataset.from_dict({"input_ids": [[7, 8], [9, 10]]})
    with pytest.raises(ValueError, match="No sequence of `eval_dataset` has two tokens in a row"):
        trainer(tmp_path, eval_dataset=short)
    with pytest.raises(ValueError, match=r"No sequence of `eval_dataset\['short'\]` has two tokens in a row"):
        trainer(tmp_path, eval_dataset={"long": texts(4), "short": short})


@pytest.mark.parametrize("strange", [97, 99, -1])  # the first two are ids of masks
def test_ids_outside_the_vocabulary_are_refused(strange, tmp_path):
    made = trainer(tmp_path, Dataset.from_dict({"input_ids": [[7, 8, 9, 10, strange, 11]] * 4}))
    with pytest.raises(ValueError, match=f"The batch has token ids from .*{strange}.* vocabulary has ids 0 to 96"):
        made.train()


def test_some_prompts_alone_among_others_are_no_problem(tmp_path):
    rows = tokens().map(
        lambda row, i: {"labels": row["input_ids"] if i == 0 else [-100] * len(row["input_ids"])}, with_indices=True
    )
    trained = trainer(tmp_path, rows, per_device_train_batch_size=1, num_train_epochs=1, max_steps=ROWS)
    trained.train()
    assert all(math.isfinite(loss) for loss in logged(trained))


@pytest.mark.parametrize("max_length", [1, K + 1])
def test_max_length_without_room_for_a_block_is_refused(max_length, tmp_path):
    with pytest.raises(ValueError, match=rf"`max_length={max_length}` is too short.*at least k \+ 2 = 5"):
        trainer(tmp_path, max_length=max_length)


def test_model_that_was_not_upgraded_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got LlamaForCausalLM. Upgrade it first"):
        trainer(tmp_path, model=tiny_base("llama"))


def test_own_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`compute_loss_func` would replace"):
        MTPTrainer(upgraded("llama", K), train_dataset=texts(), compute_loss_func=lambda: 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"muon_learning_rate": -1.0}, "`muon_learning_rate` must not be negative, but got -1.0"),
        ({"recipe": "soup"}, "Unknown recipe 'soup'. Known: 'default', 'paper'"),
        ({"targets": "dreams"}, "'model', 'soft', 'data', but got 'dreams'"),
        ({"lcm_weight": -1.0}, "`lcm_weight` must not be negative, but got -1.0"),
        ({"max_minutes": 0}, "`max_minutes` must be positive, or None for no limit, but got 0"),
        ({"max_minutes": float("nan")}, "`max_minutes` must be positive, or None for no limit, but got nan"),
        ({"max_minutes": "5"}, "`max_minutes` must be positive, or None for no limit, but got '5'"),
        ({"anchors_per_sequence": 0}, "at least 1, or None for all, but got 0"),
        ({"anchors_per_sequence": 1.5}, "`anchors_per_sequence` must be an integer of at least 1.* but got 1.5"),
        ({"eval_anchors_per_sequence": "8"}, "`eval_anchors_per_sequence` must be an integer .*, but got '8'"),
        ({"masks_per_part": 2.5}, "`masks_per_part` must be an integer of at least 1, but got 2.5"),
        ({"masks_per_part": True}, "`masks_per_part` must be an integer of at least 1, but got True"),
        ({"position_decay": float("nan")}, "`position_decay` must be a finite number, but got nan"),
        ({"base_weight": float("inf")}, "`base_weight` must be a finite number, but got inf"),
        ({"sampler_weight": "1"}, "`sampler_weight` must be a finite number, but got '1'"),
        ({"muon_learning_rate": None}, "`muon_learning_rate` must be a finite number, but got None"),
        ({"sampler_weight": 0.0, "lcm_weight": 0}, "`auxiliary_weight` are all 0, so there is no loss to learn from"),
        (
            {"recipe": "paper", "base_weight": 0.0, "sampler_weight": 0.0, "lcm_weight": 0.0},
            "`auxiliary_weight` are all 0, so there is no loss to learn from",
        ),
    ],
)
def test_bad_options_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MTPConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_refused_training_writes_nothing(tmp_path):
    with pytest.raises(ValueError):
        trainer(tmp_path / "out", Dataset.from_dict({"text": []}))
    assert not Path(tmp_path, "out").exists() or not list(Path(tmp_path, "out").iterdir())


def test_stream_of_prompts_alone_trains_nothing_and_says_so(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(get_logger("transformers"), "propagate", True)
    rows = tokens().map(lambda row: {"labels": [-100] * len(row["input_ids"])})
    trained = trainer(tmp_path, rows.to_iterable_dataset(), max_steps=1)
    trained.train()
    assert trained.state.global_step == 0
    assert "not to be a single sample" in caplog.text


# ---------------------------------------------------------------- the optimizer


def test_muon_trains_the_matrices_of_the_lora_and_adamw_the_rest(tmp_path):
    trained = trainer(tmp_path)
    adamw, muon = trained.create_optimizer().optimizers
    names = {id(parameter): name for name, parameter in adapter_parameters(trained.model).items()}
    by_muon, by_adamw = (
        {names[id(parameter)] for group in part.param_groups for parameter in group["params"]}
        for part in (muon, adamw)
    )
    assert by_muon | by_adamw == set(names.values())
    assert not by_muon & by_adamw
    assert all(".lora_A." in name or ".lora_B." in name for name in by_muon)
    assert any("lora_mask_embeddings" in name for name in by_adamw)
    assert any("lora_sampler_heads" in name for name in by_adamw)


def test_the_schedule_reaches_both_optimizers(tmp_path):
    trained = trainer(
        tmp_path, lr_scheduler_type="linear", warmup_steps=0, learning_rate=1e-3, muon_learning_rate=1e-2
    )
    assert [one.param_groups[0]["lr"] for one in trained.create_optimizer().optimizers] == [1e-3, 1e-2]
    trained.train()
    assert trained.state.log_history[0]["learning_rate"] == 1e-3  # as asked for, not Muon's
    rates = [group["lr"] for one in trained.optimizer.optimizer.optimizers for group in one.param_groups]
    assert rates == [0.0] * len(rates)


@pytest.mark.parametrize("muon", [True, False])
def test_weight_decay_leaves_biases_and_gains_alone(muon, tmp_path):
    made = trainer(tmp_path, muon=muon, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in adapter_parameters(made.model).items()}
    decay = {
        names[id(p)]: group["weight_decay"] for group in made.create_optimizer().param_groups for p in group["params"]
    }
    gains = {name for name, module in made.model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    spared = {name for name in decay if name.endswith(".bias") or name.rpartition(".")[0] in gains}
    assert len(spared) == 6
    assert decay == {name: 0.0 if name in spared else 0.1 for name in names.values()}


def test_muon_with_weight_decay_resumes_to_the_same_losses(tmp_path):
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=2, weight_decay=0.1)
    whole.train()
    resumed = trainer(tmp_path / "resumed", weight_decay=0.1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed) == pytest.approx(logged(whole), rel=1e-6)


@pytest.mark.parametrize("options", [{"muon": False}, {"optim": "adafactor"}])
def test_another_optimizer(options, tmp_path):
    assert not hasattr(trainer(tmp_path, **options).create_optimizer(), "optimizers")


@pytest.mark.parametrize(("there", "message"), [(False, "trained without Muon"), (True, "trained with Muon")])
def test_a_checkpoint_of_another_optimizer_is_refused(there, message, tmp_path):
    trainer(tmp_path, muon=there, save_strategy="steps", save_steps=2, max_steps=2).train()
    with pytest.raises(ValueError, match=rf"checkpoint-2 was {message}.* Resume with `muon={there}`"):
        trainer(tmp_path, muon=not there).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_muon_resumes_to_the_same_losses(tmp_path):
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed) == pytest.approx(logged(whole), rel=1e-6)


# ---------------------------------------------------------------- compiled


def test_compiled_training_has_the_same_losses(tmp_path):
    """The forward passes are traced, whatever the lengths of the batches; what is made of them is not."""
    torch.compiler.reset()
    plain = trainer(tmp_path / "plain", max_steps=2)
    plain.train()
    options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    compiled = trainer(tmp_path / "compiled", anchors_per_sequence=None, **options)
    compiled.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert logged(compiled) == pytest.approx(logged(plain), abs=1e-4)
