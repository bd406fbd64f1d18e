"""Trainings of tiny models, and what is the same at the end of two of them."""

import torch
from datasets import Dataset
from peft import PeftModel
from tiny_models import adapter_parameters, prompt, upgraded
from tiny_text import tiny_tokenizer, words
from transformers import TrainerCallback

from hf_mtp import MTPConfig, MTPTrainer
from hf_mtp.evaluation.decoded import decode_rows
from hf_mtp.objective.request import ObjectiveRequest

K = 3
ROWS = 16
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "anchors_per_sequence": 3}


def texts(rows: int = ROWS) -> Dataset:
    return Dataset.from_dict({"text": [words(12 + row % 5, row) for row in range(rows)]})


def tokens(rows: int = ROWS) -> Dataset:
    return Dataset.from_dict({"input_ids": [prompt(14, seed=row)[0].tolist() for row in range(rows)]})


def trainer(folder, train_dataset=None, model=None, **options) -> MTPTrainer:
    """A trainer of a tiny model. Options are those of the config, or of the trainer where it has one of that name."""
    names = {"eval_dataset", "callbacks", "peft_config", "processing_class"} & options.keys()
    of_trainer = {name: options.pop(name) for name in names}
    config = MTPConfig(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "max_length": 32,
            "base_weight": 1.0,
            "auxiliary_weight": 0.5,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "save_strategy": "no",
            "training_curves": False,
            **options,
        },
    )
    return MTPTrainer(
        model=upgraded("llama", K) if model is None else model,
        args=config,
        train_dataset=texts() if train_dataset is None else train_dataset,
        **{"processing_class": tiny_tokenizer(), **of_trainer},
    )


def logged(trained: MTPTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


def assert_same_end(resumed: MTPTrainer, whole: MTPTrainer, steps: int) -> None:
    """The last `steps` losses and the adapters are the same, to the bit."""
    assert len(set(logged(whole))) == len(logged(whole)) == whole.args.max_steps
    assert logged(resumed)[-steps:] == logged(whole)[-steps:]
    for name, parameter in adapter_parameters(whole.model).items():
        assert torch.equal(adapter_parameters(resumed.model)[name], parameter)


def taught(model: PeftModel, new_tokens: int) -> PeftModel:
    """An adapter that has learnt a little of the model's own answers, so that some drafts are right."""
    prompts = [tiny_tokenizer()(words(9, start))["input_ids"] for start in range(4)]
    texts = torch.tensor([prompt + decode_rows(model, [prompt], new_tokens).rows[0] for prompt in prompts])
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        model(input_ids=texts, mtp_objective=ObjectiveRequest()).loss.backward()
        optimizer.step()
    return model


class RaisesAt(TrainerCallback):
    """Runs `action` when a step ends."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()
