"""Ways to train that must come to the same: in float64, after two steps of plain gradient descent."""

import pytest
import torch
from datasets import Dataset
from tiny_models import adapter_parameters, prompt, upgraded
from tiny_text import words
from tiny_training import K, logged, texts, trainer

from hf_mtp.objective.recipe import Recipe
from hf_mtp.objective.request import ObjectiveRequest

COMMON = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_steps": 2,
    "anchors_per_sequence": None,
    "position_decay": 0.7,
    "train_sampling_strategy": "sequential",
}


def ragged(rows: int = 16) -> Dataset:
    """Texts of 3 to 24 tokens."""
    return Dataset.from_dict({"text": [words(3 + 7 * row % 22, row) for row in range(rows)]})


def trained(folder, dataset=None, architecture="llama", **options) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and the adapter after training."""
    model = upgraded(architecture, K, dtype=torch.float64).double()
    made = trainer(folder, ragged() if dataset is None else dataset, model, **{**COMMON, **options})
    made.train()
    return logged(made), adapter_parameters(made.model)


def assert_same(one, other, **tolerance) -> None:
    tolerance = tolerance or {"rtol": 1e-6, "atol": 1e-9}
    assert one[0] == pytest.approx(other[0], rel=1e-4)  # losses are logged with few digits
    for name, parameter in one[1].items():
        torch.testing.assert_close(parameter, other[1][name], **tolerance)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain"), per_device_train_batch_size=8)


def test_the_start_is_not_the_end(plain):
    start = adapter_parameters(upgraded("llama", K, dtype=torch.float64).double())
    moved = [(parameter - start[name]).abs().max() for name, parameter in plain[1].items()]
    assert min(moved) > 1e-6


@pytest.mark.parametrize(("batch", "accumulated"), [(1, 8), (2, 4)])
def test_accumulated_batches_are_one_large_batch(plain, batch, accumulated, tmp_path):
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    assert_same(trained(tmp_path, **options), plain)


@pytest.mark.parametrize("masks_per_part", [1, 2 * 8 * K, 5 * 8 * K])
def test_masks_in_parts(plain, masks_per_part, tmp_path):
    assert_same(trained(tmp_path, per_device_train_batch_size=8, masks_per_part=masks_per_part), plain)


def test_gradient_checkpointing(plain, tmp_path):
    assert_same(trained(tmp_path, per_device_train_batch_size=8, gradient_checkpointing=True), plain)


def test_more_anchors_than_tokens(plain, tmp_path):
    assert_same(trained(tmp_path, per_device_train_batch_size=8, anchors_per_sequence=100), plain)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_packing(architecture, tmp_path):
    options = {"max_steps": 1, "max_length": 300, "architecture": architecture}
    apart = trained(tmp_path / "apart", ragged(8), per_device_train_batch_size=8, **options)
    packed = trained(tmp_path / "packed", ragged(8), per_device_train_batch_size=1, packing=True, **options)
    assert_same(packed, apart)


def test_accumulation_where_blocks_are_read_as_sequences(tmp_path):
    options = {"architecture": "bloom", "max_steps": 1}
    whole = trained(tmp_path / "whole", ragged(4), per_device_train_batch_size=4, **options)
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert_same(trained(tmp_path / "parts", ragged(4), **options), whole)


def test_bfloat16_is_the_same_within_rounding(tmp_path):
    options = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    losses = [logged_losses(tmp_path / str(bf16), bf16=bf16, **options) for bf16 in (False, True)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def logged_losses(folder, **options) -> list[float]:
    made = trainer(folder, texts(), **options)
    made.train()
    return logged(made)


@pytest.mark.parametrize("position_decay", [1.0, 0.6])
def test_sampled_anchors_are_all_anchors_on_average(position_decay):
    """The mean over every block that can be drawn, gradients included."""
    model, recipe = upgraded("llama", K, dtype=torch.float64).double(), Recipe(position_decay=position_decay)
    text, parameters = prompt(9), list(adapter_parameters(model).values())
    drawn = {}
    for seed in range(80):
        generator = torch.Generator().manual_seed(seed)
        loss = model(input_ids=text, mtp_objective=ObjectiveRequest(recipe, 1, generator)).loss
        if round(loss.item(), 9) not in drawn:
            drawn[round(loss.item(), 9)] = loss, torch.autograd.grad(loss, parameters)
    assert len(drawn) == 7  # tokens with two more behind them
    whole = model(input_ids=text, mtp_objective=ObjectiveRequest(recipe)).loss
    torch.testing.assert_close(sum(loss for loss, _ in drawn.values()) / 7, whole, rtol=1e-6, atol=0)
    for index, gradient in enumerate(torch.autograd.grad(whole, parameters)):
        mean = sum(gradients[index] for _, gradients in drawn.values()) / 7
        torch.testing.assert_close(mean, gradient, rtol=1e-5, atol=1e-6)  # norms compute in float32
