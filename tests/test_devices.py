"""Prompts on the CPU for a model on a GPU. Fake tensors have a device without there being one."""

import pytest
import torch
from tiny_models import prompt, upgraded
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_mtp.decoding import generate
from hf_mtp.decoding.devices import to_device
from hf_mtp.decoding.statistics import MTPGenerateOutput

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def fake():
    with FakeTensorMode():
        yield


def tensors(device: torch.device, *names: str) -> dict:
    return {name: torch.ones(1, 5, dtype=torch.long, device=device) for name in names}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", ["inputs", "input_ids", "inputs_embeds"])
def test_a_prompt_on_the_cpu_goes_to_the_gpu_and_the_text_comes_back(name):
    kwargs = {**tensors(CPU, name, "attention_mask", "position_ids"), "max_new_tokens": 5, "streamer": None}
    moved, returned = to_device(kwargs, GPU)
    assert {key for key, value in moved.items() if getattr(value, "device", None) == GPU} == {
        name,
        "attention_mask",
        "position_ids",
    }
    assert moved["max_new_tokens"] == 5 and kwargs[name].device == CPU
    assert returned(moved[name]).device == CPU


@pytest.mark.usefixtures("fake")
def test_scores_and_logits_come_back_as_in_plain_decoding():
    moved, returned = to_device(tensors(CPU, "input_ids"), GPU)
    states = (torch.zeros(1, 2, device=GPU),)
    output = returned(MTPGenerateOutput(moved["input_ids"], scores=states, logits=states, hidden_states=states))
    assert {output.sequences.device, output.scores[0].device, output.logits[0].device} == {CPU}
    assert output["sequences"].device == CPU and output.hidden_states[0].device == GPU
    assert returned(MTPGenerateOutput(moved["input_ids"])).scores is None


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("prompt_device, device", [(CPU, CPU), (GPU, GPU), (GPU, CPU)])
def test_all_else_is_left_where_it_is(prompt_device, device):
    kwargs = {**tensors(prompt_device, "input_ids"), **tensors(CPU, "attention_mask")}
    moved, returned = to_device(kwargs, device)
    assert moved is kwargs and returned(kwargs["input_ids"]) is kwargs["input_ids"]


def test_a_call_without_a_prompt_is_left_alone():
    assert to_device({"max_new_tokens": 3}, GPU)[0] == {"max_new_tokens": 3}


def test_generate_moves_prompts_and_results(monkeypatch):
    devices, ids = [], prompt(6, 2)

    def spy(kwargs, device):
        devices.append(device)
        return {**kwargs, "inputs": kwargs["inputs"].flip(0)}, lambda output: output.flip(0)

    model = upgraded("llama")
    plain = model.generate(ids, do_sample=False, max_new_tokens=6)
    monkeypatch.setattr(generate, "to_device", spy)
    assert torch.equal(model.generate(ids, mtp=True, do_sample=False, max_new_tokens=6), plain)
    assert devices == [CPU]
