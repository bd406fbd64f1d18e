"""Quantized bases: MTP gives what the quantized base gives by itself, and training reaches the adapter only."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny_models import adapter_parameters, generate, prompt, randomised, tiny_base, upgraded
from tiny_text import tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    HqqConfig,
    QuantoConfig,
    TorchAoConfig,
)

from hf_mtp import GatedLoraConfig, MTPConfig, MTPTrainer
from hf_mtp.base.inspection import unpack_for_gradients
from hf_mtp.evaluation.support import Rehearsal
from hf_mtp.objective.request import ObjectiveRequest
from hf_mtp.passes.speculation_mode import SpeculationMode, speculation_mode


def torchao_config():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


CONFIGS = {
    "bitsandbytes 8-bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes 8-bit without outliers": (
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    ),
    "bitsandbytes 4-bit": (
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    ),
    "torchao": ("torchao", torchao_config),
    "hqq": ("hqq", lambda: HqqConfig(nbits=8, group_size=32)),
    "quanto": ("optimum.quanto", lambda: QuantoConfig(weights="int8")),
    "fp8": ("torch", lambda: FineGrainedFP8Config()),
}


def quantized(name: str, folder):
    package, config = CONFIGS[name]
    pytest.importorskip(package, reason=f"{package} is not installed")
    if name == "fp8" and not torch.cuda.is_available():
        pytest.skip("transformers computes with FP8 weights on a GPU only")
    tiny_base("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(), dtype=torch.float32).eval()
    except NotImplementedError as error:
        pytest.skip(f"transformers: {error}")


@pytest.mark.parametrize("name", CONFIGS)
def test_output_is_that_of_the_quantized_base(name, tmp_path):
    base = quantized(name, tmp_path)
    expected = generate(base, prompt())
    model = randomised(get_peft_model(base, GatedLoraConfig(k=3, r=4))).eval()
    model.base_model.draft = Rehearsal([expected])
    # LLM.int8() takes apart the columns in which any token of a pass has an outlier: tokens are computed together.
    reads = speculation_mode(model.base_model.model)
    assert (reads is SpeculationMode.TREE) == (name != "bitsandbytes 8-bit")
    for strategy in ("quadratic", "linear", "auto") if reads is SpeculationMode.TREE else ("auto",):
        assert torch.equal(generate(model, prompt(), mtp=True, mtp_strategy=strategy), expected)
    assert any("lora_A" in parameter for parameter in adapter_parameters(model))


@pytest.mark.parametrize("name", CONFIGS)
def test_training_on_a_quantized_base(name, tmp_path):
    model = get_peft_model(quantized(name, tmp_path), GatedLoraConfig(k=3, r=4)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=3e-3), []
    for _ in range(10):
        objective = model(input_ids=prompt(rows=2), mtp_objective=ObjectiveRequest())
        optimizer.zero_grad()
        objective.loss.backward()
        optimizer.step()
        losses.append(objective.loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert set(map(id, parameters)) == set(map(id, adapter_parameters(model).values()))


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_qlora(optim, tmp_path):
    """Trained on a 4-bit base, saved, and loaded on a base that is quantized anew."""
    model = get_peft_model(quantized("bitsandbytes 4-bit", tmp_path / "base"), GatedLoraConfig(k=3, r=4))
    trainer = MTPTrainer(
        model=model,
        args=MTPConfig(
            output_dir=str(tmp_path / "adapter"),
            optim=optim,
            max_steps=12,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"input_ids": prompt(14, rows=4).tolist()}),
        processing_class=tiny_tokenizer(),
    )
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {torch.float32}
    try:
        trainer.train()
    except NotImplementedError as error:
        pytest.skip(f"bitsandbytes: {error}")
    assert getattr(trainer.optimizer.optimizer, "is_paged", False) == optim.startswith("paged")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.95 * losses[0]
    trainer.save_model()

    base = quantized("bitsandbytes 4-bit", tmp_path / "base")
    unpack_for_gradients(base)  # packed for a CPU and unpacked, as loading an adapter does, weights are others
    expected = generate(base, prompt())
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(loaded.get_parameter(name).to(parameter.dtype), parameter)
    for strategy in ("quadratic", "linear", "auto"):
        assert torch.equal(generate(loaded, prompt(), mtp=True, mtp_strategy=strategy), expected)


def test_evaluation_does_not_stop_the_gradient(tmp_path):
    """Weights that bitsandbytes packed for a CPU pass no gradient on."""
    base = quantized("bitsandbytes 4-bit", tmp_path)
    model, gradients = upgraded(base), []
    for _ in range(2):
        unpack_for_gradients(model)
        model.train()(input_ids=prompt(), mtp_objective=ObjectiveRequest()).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in adapter_parameters(model).values()])
        model.zero_grad()
        generate(model.eval(), prompt())
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    weight = model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    whole = torch.nn.Linear(weight.in_features, weight.out_features, bias=False)
    features = torch.randn(3, weight.in_features, requires_grad=True)
    with torch.no_grad():
        whole.weight.copy_(weight(torch.eye(weight.in_features)).mT)
    expected, found = (torch.autograd.grad(layer(features).sum(), features)[0] for layer in (whole, weight))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layer", ["gptq.GPTQLoraLinear", "torchao.TorchaoLoraLinear"])
def test_layers_of_peft_that_ask_the_gate(layer):
    """GPTQ needs a GPU to run; that PEFT's layer for it asks a variant is what gating needs."""
    assert asks_the_gate(layer)


@pytest.mark.parametrize("layer", ["awq.AwqLoraLinear", "aqlm.AqlmLoraLinear"])
def test_layers_of_peft_that_do_not_are_refused(layer):
    """AWQ needs a GPU to run; its layer is of the kind that `test_gate.py` sees refused."""
    assert not asks_the_gate(layer)


def asks_the_gate(layer: str) -> bool:
    module, _, name = layer.partition(".")
    layer_class = getattr(pytest.importorskip(f"peft.tuners.lora.{module}"), name)
    return "lora_variant" in layer_class.forward.__code__.co_names
