"""What users of transformers and TRL set on a trainer: followed, or refused where it is set."""

import dataclasses
import math
import signal

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import adapter_parameters, generate, prompt, tiny_base, upgraded
from tiny_text import tiny_tokenizer, words
from tiny_training import K, logged, texts, trainer
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.utils.logging import get_logger
from trl import DPOConfig, SFTConfig

from hf_mtp import GatedLoraConfig, MTPConfig, MTPTrainer
from hf_mtp.training.callbacks.interrupt import SaveOnInterrupt
from hf_mtp.training.data_checks import refuse_settings

QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}


def options(folder, **more) -> dict:
    return {"output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 4, **QUIET, **more}


@pytest.fixture
def warnings(monkeypatch, caplog):
    monkeypatch.setattr(get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(get_logger("hf_mtp"), "propagate", True)
    return caplog


def test_training_does_not_write_to_the_place_of_a_model(tmp_path):
    tiny_base("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a model \(config.json\). .* Choose another place"):
        trainer(tmp_path)
    trainer(tmp_path, model=get_peft_model(tiny_base("llama"), GatedLoraConfig(k=K, r=2), adapter_name="mtp"))
    args = MTPConfig(**options(tmp_path / "out", push_to_hub=True, hub_model_id="me/base"))
    tuner = upgraded("llama", K).base_model
    tuner.model.name_or_path = "me/base"
    with pytest.raises(ValueError, match="The repository me/base holds a model"):
        refuse_settings(args, tuner)


# ---------------------------------------------------------------- arguments of other classes


@pytest.mark.parametrize("kind", [TrainingArguments, SFTConfig])
def test_arguments_of_transformers_and_trl_are_followed(kind, tmp_path):
    args = kind(**options(tmp_path, learning_rate=3e-3, gradient_accumulation_steps=2, seed=7, hub_token="secret"))
    trained = MTPTrainer(upgraded("llama", K), args, texts(), processing_class=tiny_tokenizer())
    trained.train()
    assert isinstance(trained.args, MTPConfig)
    assert trained.args.hub_token == "secret"
    assert (trained.args.learning_rate, trained.args.seed, trained.args.gradient_accumulation_steps) == (3e-3, 7, 2)
    assert trained.args.recipe == "default"


def test_tokens_named_in_arguments_are_followed(tmp_path):
    args = SFTConfig(**options(tmp_path, eos_token="<user>"))
    assert MTPConfig.from_arguments(args).eos_token == "<user>"


def test_a_default_made_for_whole_models_is_followed_and_said(tmp_path, warnings):
    assert MTPConfig.from_arguments(SFTConfig(**options(tmp_path))).learning_rate == 2e-5
    assert "`learning_rate=2e-05` is the default of SFTConfig. That of MTPConfig" in warnings.text
    warnings.clear()
    MTPConfig.from_arguments(SFTConfig(**options(tmp_path, learning_rate=1e-3, gradient_checkpointing=False)))
    assert "default" not in warnings.text


def test_fields_of_a_users_own_class_are_kept(tmp_path):
    class Own(SFTConfig):
        pass

    Own.__annotations__, Own.flavour = {"flavour": str}, "sweet"
    args = dataclasses.dataclass(Own)(**options(tmp_path, flavour="sour"))
    assert MTPConfig.from_arguments(args).flavour == "sour"


@pytest.mark.parametrize("kind", [DPOConfig, Seq2SeqTrainingArguments])
def test_arguments_of_other_trainers_are_refused(kind, tmp_path):
    with pytest.raises(TypeError, match=rf"{kind.__name__} has arguments of another trainer, such as '.*Pass an MTPC"):
        MTPTrainer(upgraded("llama", K), kind(**options(tmp_path)), texts())


def test_arguments_that_are_none_are_refused():
    with pytest.raises(TypeError, match="`args` must be an MTPConfig, but got dict"):
        MTPTrainer(upgraded("llama", K), {"output_dir": "out"}, texts())


# ---------------------------------------------------------------- what is about regular tokens


@pytest.mark.parametrize(
    "setting",
    [
        {"label_smoothing_factor": 0.1},
        {"loss_type": "dft"},
        {"neftune_noise_alpha": 5.0},
        {"router_aux_loss_coef": 0.01},
    ],
)
def test_settings_of_regular_tokens_are_refused(setting, tmp_path):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"`{name}={value!r}` changes how a model learns from regular tokens"):
        MTPConfig(**options(tmp_path, **setting))
    with pytest.raises(ValueError, match=f"`{name}="):
        MTPTrainer(upgraded("llama", K), SFTConfig(**options(tmp_path, **setting)), texts())


@pytest.mark.parametrize("metric", ["eval_mean_token_accuracy", "mean_token_accuracy", "entropy"])
def test_a_best_model_by_a_measure_of_the_base_is_refused(metric, tmp_path):
    with pytest.raises(ValueError, match=f"`metric_for_best_model='{metric}'` is a measure of the base"):
        MTPConfig(**options(tmp_path, metric_for_best_model=metric))


@pytest.mark.parametrize(
    ("metric", "greater"), [("loss_base", False), ("eval_loss_lcm", False), ("loss", False), ("tokens_per_pass", True)]
)
def test_the_best_is_the_lowest_loss_or_the_most_tokens(metric, greater, tmp_path):
    assert MTPConfig(**options(tmp_path, metric_for_best_model=metric)).greater_is_better is greater


def test_the_best_model_by_a_loss_of_ours_is_loaded(tmp_path):
    trained = trainer(
        tmp_path,
        eval_dataset=texts(4),
        metric_for_best_model="loss_sampler",
        load_best_model_at_end=True,
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
    )
    trained.train()
    found = {entry["step"]: entry["eval_loss_sampler"] for entry in trained.state.log_history if "eval_loss" in entry}
    assert trained.state.best_metric == min(found.values())
    assert trained.state.best_global_step == min(found, key=found.get)


@pytest.mark.parametrize("name, others", [("default", ["mtp"]), ("mtp", []), ("mtp", ["default"])], ids=str)
def test_the_best_model_of_an_adapter_of_any_name_is_loaded(name, others, tmp_path):
    """PEFT saves adapters of other names than `default` in folders of their own."""
    model = get_peft_model(tiny_base(), GatedLoraConfig(k=K, r=4), adapter_name=name)
    for other in others:
        model.add_adapter(other, GatedLoraConfig(k=K + 1, r=4))
    trained = trainer(
        tmp_path,
        model=model,
        eval_dataset=texts(4),
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the best checkpoint is not the last
        load_best_model_at_end=True,
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
    )
    trained.train()
    best = tmp_path / "checkpoint-1"
    assert trained.state.best_model_checkpoint == str(best)
    loaded = PeftModel.from_pretrained(tiny_base(), best / ("" if name == "default" else name), adapter_name=name)
    for weight, parameter in adapter_parameters(loaded).items():
        assert torch.equal(trained.model.get_parameter(weight), parameter)


@pytest.mark.parametrize("switched_on", [False, True])
def test_the_bases_router_is_left_alone(switched_on, tmp_path):
    base = tiny_base("mixtral", output_router_logits=switched_on, router_aux_loss_coef=0.02)
    model = upgraded(base, K)
    trainer(tmp_path, model=model, max_steps=1).train()
    assert (base.config.output_router_logits, base.config.router_aux_loss_coef) == (switched_on, 0.02)
    model.eval()
    assert torch.equal(generate(model, prompt(rows=2), mtp=True), generate(model, prompt(rows=2)))


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_losses_does_not_follow_the_clock(name, tmp_path):
    follows_losses = {"lr_scheduler_type": name, "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match=f"follow the clock, but `lr_scheduler_type='{name}'` follows the losses"):
        MTPConfig(**options(tmp_path, max_minutes=5, **follows_losses))


@pytest.mark.parametrize(
    ("counts_steps", "message"),
    [
        (
            {"warmup_steps": 100},
            "`warmup_steps=100` counts steps. Pass a share of the time, such as `warmup_steps=0.05`",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 100}},
            "'num_decay_steps' in `lr_scheduler_kwargs` counts steps",
        ),
    ],
)
def test_a_schedule_that_counts_steps_does_not_follow_the_clock(counts_steps, message, tmp_path):
    """A step of the schedule is a ten-thousandth of the time, whatever a step of the training takes."""
    MTPConfig(**options(tmp_path, **counts_steps))
    with pytest.raises(ValueError, match=message):
        MTPConfig(**options(tmp_path, max_minutes=5, **counts_steps))
    MTPConfig(**options(tmp_path, max_minutes=5, warmup_steps=0.1))


def test_sequences_that_are_split_over_processes_are_refused(tmp_path):
    args = MTPConfig(**options(tmp_path))
    with pytest.raises(ValueError, match="`cp_size=2` splits sequences over processes"):
        refuse_settings(args, upgraded("llama", K).base_model, ParallelismConfig(cp_size=2))
    refuse_settings(args, upgraded("llama", K).base_model, ParallelismConfig(dp_replicate_size=2))


# ---------------------------------------------------------------- metrics of the user's own


def test_compute_metrics_sees_the_bases_logits(tmp_path):
    model, seen = upgraded("llama", K), []
    trained = trainer(tmp_path, model=model, per_device_eval_batch_size=4)
    rows = trained.train_dataset.select(range(8))
    trained.compute_metrics = lambda found: seen.append(found) or {"own": 0.5}
    metrics = trained.evaluate(rows)
    assert metrics["eval_own"] == 0.5 and 1 <= metrics["eval_tokens_per_pass"] <= K + 1
    (found,) = seen
    labels = torch.tensor(rows[0]["labels"])
    logits = model.get_base_model()(torch.tensor([rows[0]["input_ids"]])).logits[0]
    assert found.label_ids[0, : len(labels)].tolist() == labels.tolist()
    torch.testing.assert_close(torch.tensor(found.predictions[0, : len(labels)]), logits)


def test_metrics_of_preprocessed_logits_choose_the_best_model(tmp_path):
    made = MTPTrainer(
        upgraded("llama", K),
        MTPConfig(
            **options(tmp_path, max_steps=2, metric_for_best_model="own", load_best_model_at_end=True)
            | {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        ),
        texts(),
        eval_dataset=texts(4),
        processing_class=tiny_tokenizer(),
        compute_metrics=lambda found: {"own": float(found.predictions.shape[-1])},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    made.train()
    assert made.state.best_metric == made.state.log_history[1]["eval_own"]


def test_predict_returns_logits(tmp_path):
    made = trainer(tmp_path)
    output = made.predict(made.train_dataset.select(range(2)))
    assert output.predictions.shape[0] == 2 and output.predictions.shape[2] == 97
    assert {"test_loss", "test_tokens_per_pass"} <= output.metrics.keys()


def test_an_evaluation_is_not_of_what_was_predicted_before(tmp_path):
    made = trainer(tmp_path)
    rows, others = made.train_dataset.select(range(2)), made.train_dataset.select(range(2, 12))
    alone = made.evaluate(rows)
    made.predict(others)
    again = made.evaluate(rows)
    names = [name for name in alone if "accuracy" in name or "tokens_per" in name or "loss" in name]
    assert {name: again[name] for name in names} == {name: alone[name] for name in names}
    assert len(names) > K


@pytest.mark.parametrize("options", [{}, {"eval_anchors_per_sequence": 20}])
def test_an_evaluation_does_not_depend_on_its_batches(options, tmp_path):
    rows = texts(9).map(lambda row: {"text": " ".join(row["text"].split()[: 5 + len(row["text"]) % 9])})
    measured = [trainer(tmp_path, per_device_eval_batch_size=size, **options).evaluate(rows) for size in (1, 4, 8, 9)]
    names = [name for name in measured[0] if "loss" in name or "accuracy" in name or "tokens_per" in name]
    assert len(names) >= K + 7
    for other in measured[1:]:
        assert {name: other[name] for name in names} == pytest.approx({name: measured[0][name] for name in names})


@pytest.mark.parametrize("streamed", [False, True])
def test_an_evaluation_without_a_target_is_never_the_best(streamed, tmp_path, warnings):
    nothing = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 4, "labels": [[-100, -100, -100, 8]] * 4})
    made = trainer(tmp_path, eval_dataset=texts(4))
    assert math.isnan(made.evaluate(nothing.to_iterable_dataset() if streamed else nothing)["eval_loss"])
    assert "nothing for a mask to predict, and the loss of this evaluation is NaN" in warnings.text
    assert made.evaluate()["eval_loss"] > 0


def test_several_evaluation_datasets_have_measures_of_their_own(tmp_path):
    made = trainer(tmp_path)
    rows = {"a": made.train_dataset.select(range(2)), "b": made.train_dataset.select(range(2, 9))}
    together = made.evaluate(rows)
    for name in rows:
        alone = made.evaluate(rows[name], metric_key_prefix="eval")
        for measure in ("tokens_per_pass", "loss_sampler", "accuracy_1", "loss"):
            assert together[f"eval_{name}_{measure}"] == pytest.approx(alone[f"eval_{measure}"])


# ---------------------------------------------------------------- models


def test_an_adapter_loaded_for_inference_is_refused(tmp_path):
    upgraded("llama", K).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base("llama"), tmp_path)
    with pytest.raises(ValueError, match="adapter is not trainable.*is_trainable=True"):
        trainer(tmp_path / "out", model=loaded)
    loaded = PeftModel.from_pretrained(tiny_base("llama"), tmp_path, is_trainable=True)
    before = {name: parameter.clone() for name, parameter in adapter_parameters(loaded).items()}
    trainer(tmp_path / "out", model=loaded, max_steps=2).train()
    assert not all(torch.equal(before[name], parameter) for name, parameter in adapter_parameters(loaded).items())


def test_a_base_that_is_trainable_is_refused(tmp_path):
    model = upgraded("llama", K)
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match="trains only the adapter, but 1 other parameters are.*embed_tokens"):
        trainer(tmp_path, model=model)


def test_another_kind_of_adapter_is_refused_before_it_is_made(tmp_path):
    base = tiny_base("llama")
    with pytest.raises(ValueError, match=r"`peft_config=GatedLoraConfig\(...\)`, but got LoraConfig"):
        trainer(tmp_path, model=base, peft_config=LoraConfig(r=4))
    assert not any("lora" in name for name, _ in base.named_parameters())


def test_two_upgrades_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has an adapter already, and `peft_config` would make another. Leave out"):
        trainer(tmp_path, model=upgraded("llama", K), peft_config=GatedLoraConfig(k=K))
    own = get_peft_model(tiny_base("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="another. Upgrade it with .*adapter_name='mtp'.*. Leave out `peft_config`"):
        trainer(tmp_path, model=own, peft_config=GatedLoraConfig(k=K))


def test_a_chat_template_that_brings_tokens(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    template = tmp_path / "template.jinja"
    template.write_text(tokenizer.chat_template)
    config = {"model": tiny_base("llama"), "peft_config": GatedLoraConfig(k=K, r=4), "max_steps": 1}
    with pytest.raises(ValueError, match="is a tokenizer: TRL adds its tokens to the base and would train their emb"):
        trainer(tmp_path, chat_template_path=str(tmp_path / "tokenizer"), **config)
    trainer(tmp_path, chat_template_path=str(template), **config).train()


@pytest.mark.parametrize(
    ("architecture", "half"),
    [(name, torch.float16) for name in ("llama", "mixtral", "gemma2")]  # whose layers are none that torch refuses
    + [(name, torch.bfloat16) for name in ("llama", "bloom", "gpt2")],
)
def test_a_half_precision_base_trains_under_the_default_autocast(architecture, half, tmp_path):
    trained = trainer(tmp_path, model=upgraded(tiny_base(architecture, half), K), max_steps=1, bf16=True)
    trained.train()
    assert logged(trained)[0] > 0


@pytest.mark.parametrize("made_by", ["user", "trainer"])
def test_an_adapter_of_a_quantized_base_keeps_its_precision(made_by, tmp_path):
    """TRL casts it to bfloat16, in which the gains of the sampler head are too coarse to learn."""
    base = tiny_base("llama", torch.bfloat16)
    base.is_loaded_in_8bit = True  # all that TRL asks
    upgrade = (
        {"model": upgraded(base, K)} if made_by == "user" else {"model": base, "peft_config": GatedLoraConfig(k=K)}
    )
    before = {name: weight.detach().clone() for name, weight in adapter_parameters(upgrade["model"]).items()}
    made = trainer(tmp_path, bf16=True, **upgrade)
    for name, weight in adapter_parameters(made.model).items():
        assert weight.dtype == torch.float32
        assert made_by == "trainer" or torch.equal(weight, before[name])
    made.train()
    gains = [weight for name, weight in adapter_parameters(made.model).items() if name.endswith("blocks.2.weight")]
    assert len(gains) == 1 and not torch.equal(gains[0], gains[0].bfloat16().float())


def test_an_evaluation_in_half_precision_leaves_the_adapter_as_it_was(tmp_path):
    made = trainer(tmp_path, bf16_full_eval=True, eval_dataset=texts(4))
    before = {name: weight.detach().clone() for name, weight in adapter_parameters(made.model).items()}
    made.evaluate()
    assert next(made.model.get_base_model().parameters()).dtype == torch.bfloat16
    for name, weight in adapter_parameters(made.model).items():
        assert weight.dtype == torch.float32 and torch.equal(weight, before[name])
    made.train()


def test_a_half_precision_adapter_stays_one(tmp_path):
    base = tiny_base("llama", torch.bfloat16)
    base.is_loaded_in_8bit = True
    model = get_peft_model(base, GatedLoraConfig(k=K, r=4), autocast_adapter_dtype=False)
    made = trainer(tmp_path, model=model, bf16=True)
    assert {weight.dtype for weight in adapter_parameters(made.model).values()} == {torch.bfloat16}


# ---------------------------------------------------------------- datasets and collators


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_collator_of_the_users_own(padding_side, streamed, tmp_path):
    """It reads a column that nobody else knows, and gives the losses of rows that TRL prepared."""
    texts_of = [words(9 + row % 3, row) + " <eos>" for row in range(4)]
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = padding_side

    def collate(rows: list[dict]) -> dict:
        batch = tokenizer([row["question"] for row in rows], return_tensors="pt", padding=True)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    rows = Dataset.from_dict({"question": texts_of})
    own = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}, "logging_steps": 1}
    by_collator = MTPTrainer(
        upgraded("llama", K),
        MTPConfig(**options(tmp_path, training_curves=False, **own)),
        rows.to_iterable_dataset() if streamed else rows,
        processing_class=tokenizer,
        data_collator=collate,
    )
    prepared = Dataset.from_dict({"input_ids": tiny_tokenizer()(texts_of)["input_ids"]})
    by_trl = trainer(tmp_path, prepared, base_weight=None, auxiliary_weight=None, max_steps=1)
    by_collator.train()
    by_trl.train()
    assert logged(by_collator)[0] == pytest.approx(logged(by_trl)[0], rel=1e-4)


def test_a_disabled_adapter_is_refused(tmp_path):
    model = upgraded("llama", K)
    with model.disable_adapter(), pytest.raises(ValueError, match="The adapter is disabled.*Train outside of"):
        trainer(tmp_path, model=model)
    trainer(tmp_path, model=model, max_steps=1).train()


def test_a_frozen_lora_leaves_the_rest_to_train(tmp_path):
    model = upgraded("llama", K)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_sampler_heads" in name or "lora_mask_embeddings" in name)
    before = {name: p.clone() for name, p in adapter_parameters(model).items()}
    trainer(tmp_path, model=model, max_steps=2).train()
    changed = {name for name, p in adapter_parameters(model).items() if not torch.equal(p, before[name])}
    assert changed and all("lora_A" not in name and "lora_B" not in name for name in changed)


def test_packed_evaluation_is_that_of_single_texts(tmp_path):
    with pytest.raises(ValueError, match="`eval_packing=True` without `packing=True` mixes"):
        trainer(tmp_path, eval_dataset=texts(8), eval_packing=True)
    model, losses = upgraded("llama", K), []
    for options in ({}, {"packing": True}, {"padding_free": True, "max_length": None, "eval_packing": False}):
        losses.append(trainer(tmp_path, model=model, eval_dataset=texts(8), **options).evaluate()["eval_loss"])
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)


def test_a_bad_row_in_one_of_several_evaluation_datasets_is_named(tmp_path):
    rows = {"good": texts(4), "bad": Dataset.from_dict({"text": ["w7 w8 w9 w10", None]})}
    with pytest.raises(ValueError, match=r"`eval_dataset\['bad'\]` is read by its column 'text', but row 1 has none"):
        trainer(tmp_path, eval_dataset=rows)


def test_num_tokens_counts_no_padding(tmp_path):
    rows = Dataset.from_dict({"input_ids": [list(range(5, 20)), list(range(5, 12))]})
    trained = trainer(tmp_path, rows, per_device_train_batch_size=2, max_steps=1)
    trained.train()
    assert logged(trained, "num_tokens") == [15 + 7]


# ---------------------------------------------------------------- schedules, batches, interrupts


def test_a_schedule_of_the_users_own_is_left_alone(tmp_path):
    made = trainer(tmp_path, max_minutes=5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    made.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    assert made.create_scheduler(4, optimizer) is made.lr_scheduler
    assert made.lr_scheduler.lr_lambdas[0](1) == 0.5


def test_a_batch_that_is_too_large_is_halved_and_the_interrupt_given_back(tmp_path, monkeypatch):
    handler, sizes = signal.getsignal(signal.SIGINT), []
    made = trainer(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8, max_steps=2)
    compute = made.compute_loss

    def out_of_memory(model, inputs, **kwargs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 4:
            raise RuntimeError("CUDA out of memory.")
        return compute(model, inputs, **kwargs)

    monkeypatch.setattr(made, "compute_loss", out_of_memory)
    made.train()
    assert sizes[0] == 8 and sizes[-1] <= 4 and made.state.global_step == 2
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_training_that_begins_twice_gives_back_the_first_handler():
    handler, interrupt = signal.getsignal(signal.SIGINT), SaveOnInterrupt()
    for _ in range(2):
        interrupt.on_train_begin(None, None, None)
    interrupt.restore_handler()
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_card_has_what_it_is_told(tmp_path):
    made = trainer(tmp_path, max_steps=1)
    made.train()
    made.create_model_card("my-model", dataset_name="me/data", tags="mine")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "- mine" in text and "- me/data" in text and 'from_pretrained("my-model")' in text


def test_loss_with_outputs_has_the_bases_logits(tmp_path):
    made = trainer(tmp_path)
    batch = next(iter(made.get_train_dataloader()))
    loss, outputs = made.compute_loss(made.model, batch, return_outputs=True)
    assert loss.ndim == 0 and outputs.logits.shape == (*batch["input_ids"].shape, 97)
    with torch.no_grad():
        torch.testing.assert_close(outputs.logits, made.model.get_base_model()(**batch).logits)
