"""Bases whose weights are somewhere else: on named devices, offloaded, or spread over processes."""

import os
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, generate, prompt, randomised, tiny_base, upgraded
from transformers import AutoModelForCausalLM

from hf_mtp import GatedLoraConfig
from hf_mtp.evaluation.support import Rehearsal
from hf_mtp.objective.request import ObjectiveRequest

STRATEGIES = ("quadratic", "linear", "auto")


def assert_exact(base) -> None:
    expected = generate(base, prompt())
    model = randomised(get_peft_model(base, GatedLoraConfig(k=3, r=4))).eval()
    model.base_model.draft = Rehearsal([expected])
    for strategy in STRATEGIES:
        assert torch.equal(generate(model, prompt(), mtp=True, mtp_strategy=strategy), expected)
    assert torch.isfinite(model(input_ids=prompt(), mtp_objective=ObjectiveRequest()).loss)


def test_device_map(tmp_path):
    tiny_base("llama").save_pretrained(tmp_path)
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"], "cpu")
    places["model.rotary_emb"] = "cpu"
    assert_exact(AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, dtype=torch.float32).eval())


def test_embeddings_that_are_offloaded(tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "base")
    places = dict.fromkeys(["model.layers", "model.norm", "model.rotary_emb"], "cpu")
    places |= {"model.embed_tokens": "disk", "lm_head": "disk"}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=tmp_path / "weights", dtype=torch.float32
    ).eval()
    assert base.get_input_embeddings().weight.device.type == "meta"
    assert_exact(base)


def with_a_layer_on_disk(folder):
    tiny_base("llama").save_pretrained(folder / "base")
    places = dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    return AutoModelForCausalLM.from_pretrained(
        folder / "base",
        device_map={**places, "model.layers.1": "disk"},
        offload_folder=folder / "weights",
        dtype=torch.float32,
    ).eval()


def test_an_upgrade_of_layers_that_are_offloaded(tmp_path):
    """PEFT's own LoRA is then on the meta device, where it holds nothing."""
    assert_exact(with_a_layer_on_disk(tmp_path))
    config = {"k": 3, "r": 4, "lora_alpha": 8}
    model = randomised(get_peft_model(with_a_layer_on_disk(tmp_path), GatedLoraConfig(**config))).eval()
    there, masked = upgraded(**config), torch.cat([prompt(), torch.arange(VOCAB, VOCAB + 3)[None]], dim=1)
    torch.testing.assert_close(model(masked).logits, there(masked).logits)


def test_dora_over_layers_that_are_offloaded_is_refused(tmp_path):
    """DoRA computes with the base's own weights. PEFT fails there with a message about meta tensors."""
    with pytest.raises(ValueError, match="DoRA.*`model.layers.1.self_attn.q_proj` are offloaded.*use_dora=False"):
        get_peft_model(with_a_layer_on_disk(tmp_path), GatedLoraConfig(k=3, r=4, use_dora=True))
    model = upgraded("llama", use_dora=True)
    expected = generate(model, prompt(), mtp=True)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="those of a layer are offloaded"):
        generate(model, prompt(), mtp=True)
    assert torch.equal(generate(model, prompt()), expected)


def above_another(base):
    users = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=4))
    return randomised(get_peft_model(users, GatedLoraConfig(k=3, r=4), adapter_name="mtp")).eval()


@pytest.mark.parametrize("make", [upgraded, above_another], ids=["plain", "above another adapter"])
@pytest.mark.parametrize("way", ["cpu", "disk", "dispatched"])
def test_offloading_after_the_upgrade(make, way, tmp_path):
    model = make(tiny_base("llama"))
    expected, masks = generate(model, prompt()), torch.arange(VOCAB, VOCAB + 3)[None]
    drafts = model(torch.cat([prompt(), masks], dim=1)).logits
    generate(model, prompt(), mtp=True, mtp_strategy="quadratic")
    steps = model.mtp_statistics.steps
    if way == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif way == "disk":
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    else:
        parts = {f"base_model.{name}": "cpu" for name, _ in model.base_model.named_children()}
        parts.pop("base_model.model")
        places = {**parts, "base_model.model.model": "disk", "base_model.model.lm_head": "cpu"}
        dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    torch.testing.assert_close(model(torch.cat([prompt(), masks], dim=1)).logits, drafts)
    assert torch.equal(generate(model, prompt(), mtp=True, mtp_strategy="quadratic"), expected)
    assert model.mtp_statistics.steps == steps


def decode_in_parallel(rank: int, folder: str) -> None:
    """One of two processes, with half of each matrix."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", USE_LIBUV="0")
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", tp_plan="auto", dtype=torch.float32).eval()
    expected = generate(base, prompt())
    model = get_peft_model(base, GatedLoraConfig(k=3, r=4)).eval()
    model.base_model.draft = Rehearsal([expected])
    result = {
        "is whole": torch.equal(expected, generate(tiny_base("llama"), prompt())),
        "is spread": type(base.model.layers[0].self_attn.q_proj.base_layer.weight).__name__ == "DTensor",
    }
    for strategy in (*STRATEGIES, "auto"):  # which measures passes, each process by its own clock
        result[strategy] = torch.equal(generate(model, prompt(), mtp=True, mtp_strategy=strategy), expected)
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="tensor parallelism was another before"
)
def test_tensor_parallelism(tmp_path: Path):
    tiny_base("llama").save_pretrained(tmp_path / "base")
    torch.multiprocessing.spawn(decode_in_parallel, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert all(result.values()), result
