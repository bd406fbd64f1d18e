"""A base whose own `generate` decodes with an adapter, in the hands of code that knows nothing of it.

TRL's online trainers, pipelines and `transformers serve` get a base and call its `generate`.
"""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hub_sessions import saved_base
from oracle import RIGHT, Oracle, sampled_text
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tiny_models import generate, prompt, randomised, upgraded
from tiny_text import words
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import hf_mtp
from hf_mtp import attached
from hf_mtp.decoding import call

SEED, NEW = 5, 8
# What a folder of a base needs, so that whoever loads it decodes with an adapter.
GENERATE = """from hf_mtp.attached import generate_with_adapter


def generate(*args, model, **kwargs):
    return generate_with_adapter(model, {adapter!r}, None, *args, **kwargs)
"""


@pytest.fixture
def folder(tmp_path):
    """A base with its tokenizer in `base`, and an adapter of it in `adapter`."""
    saved_base(tmp_path / "base")
    upgraded(load_base(tmp_path)).save_pretrained(tmp_path / "adapter")
    return tmp_path


def load_base(folder: Path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder / "base", **kwargs)


@pytest.fixture
def base(folder):
    """The base, with the adapter attached."""
    model = load_base(folder)
    attached.attach(model, str(folder / "adapter"))
    return model


def passes(base) -> int | None:
    """Forward passes of the latest call that used several tokens per pass."""
    (model,) = base.__dict__[attached._STORE]._models.values()
    return model.mtp_statistics and model.mtp_statistics.forward_passes


# ---------------------------------------------------------------- one base


def test_generate_of_the_base_uses_the_adapter(folder, base, monkeypatch):
    plain = generate(load_base(folder), prompt())
    Oracle(monkeypatch, plain, RIGHT["always"])
    assert torch.equal(generate(base, prompt(), mtp_strategy="quadratic"), plain)
    assert passes(base) <= 7
    positional = base.generate(prompt(), GenerationConfig(max_new_tokens=20, do_sample=False))
    assert torch.equal(positional, plain)


@pytest.mark.parametrize("where", ["argument", "generation_config", "the base's own"])
def test_plain_decoding_can_be_asked_for(folder, base, where):
    config = GenerationConfig(max_new_tokens=20, do_sample=False)
    target = {"generation_config": config, "the base's own": base.generation_config}.get(where)
    if target is not None:
        target.mtp = False
    output = base.generate(prompt(), config, **({"mtp": False} if where == "argument" else {}))
    assert torch.equal(output, generate(load_base(folder), prompt()))
    assert passes(base) is None


def test_detaching_gives_the_base_back(folder, base):
    del base.generate
    assert torch.equal(generate(base, prompt()), generate(load_base(folder), prompt()))
    assert passes(base) is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_generates_by_itself(base, copied):
    other = copied(base)
    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(other.model.embed_tokens.weight.flip(0))
    plain = generate(other, prompt(), mtp=False)
    assert not torch.equal(plain, generate(base, prompt(), mtp=False))
    assert torch.equal(generate(other, prompt()), plain)
    assert passes(other) is not None and passes(base) is None


def test_a_pipeline_uses_the_adapter(folder, base):
    tokenizer, options = AutoTokenizer.from_pretrained(folder / "base"), {"max_new_tokens": 12, "do_sample": False}
    expected = pipeline("text-generation", load_base(folder), tokenizer=tokenizer)(words(6), **options)
    assert pipeline("text-generation", base, tokenizer=tokenizer)(words(6), **options) == expected
    assert passes(base) is not None


def test_attaching_again_loads_what_was_trained_since(folder, base):
    expected, hooks = base.generate(prompt(), max_new_tokens=NEW), len(base.get_input_embeddings()._forward_hooks)
    trained = upgraded(load_base(folder), k=5)
    trained.save_pretrained(folder / "adapter")
    attached.attach(base, str(folder / "adapter"))
    (model,) = base.__dict__[attached._STORE]._models.values()
    assert model.active_mtp_config.k == 5
    assert len(base.get_input_embeddings()._forward_hooks) == hooks  # those of the first are gone
    assert torch.equal(base.generate(prompt(), max_new_tokens=NEW), expected)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        attached.attach(base, str(folder / "adapter"))
    assert torch.equal(base.generate(prompt(), max_new_tokens=NEW), expected) and passes(base)


def test_an_adapter_on_the_base_of_an_upgraded_model(folder):
    model = upgraded(load_base(folder), k=2)
    expected = generate(load_base(folder), prompt())
    attached.attach(model.get_base_model(), str(folder / "adapter"))
    assert torch.equal(generate(model, prompt(), mtp=True), expected)
    assert torch.equal(generate(model.get_base_model(), prompt()), expected)
    assert model.mtp_statistics and passes(model.get_base_model())


def test_another_base_is_refused_at_once(folder, tmp_path):
    wide = AutoModelForCausalLM.from_pretrained(saved_base(tmp_path / "wide", hidden_size=48, num_attention_heads=6))
    with pytest.raises(ValueError, match="hidden size 32"):
        attached.attach(wide, str(folder / "adapter"))
    assert "generate" not in wide.__dict__


def test_a_lora_may_come_before_or_after(folder):
    config, texts = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=4), []
    for first in (True, False):
        base = load_base(folder)
        if first:
            attached.attach(base, str(folder / "adapter"))
        model = randomised(get_peft_model(base, config))
        with pytest.raises(TypeError, match="takes a model of transformers, but got PeftModelForCausalLM"):
            attached.attach(model, str(folder / "adapter"))
        if not first:
            attached.attach(base, str(folder / "adapter"))
        texts.append(generate(model, prompt(), mtp=True))
        assert passes(base) is not None
        assert torch.equal(texts[-1], generate(model, prompt(), mtp=False))
    assert torch.equal(*texts) and not torch.equal(texts[0], generate(load_base(folder), prompt()))


# ---------------------------------------------------------------- TRL's online trainers


class Judge:
    """A reward that compares rollouts with sampling one token at a time from the policy as it is then."""

    __name__ = "judge"

    def __init__(self, tokenizer):
        self.tokenizer, self.trainer, self.seen = tokenizer, None, []

    def __call__(self, prompts, completion_ids, **kwargs):
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        for row, (text, ids) in enumerate(zip(prompts, completion_ids, strict=True)):
            ids_1S = torch.tensor([self.tokenizer(text).input_ids])
            expected = sampled_text(policy, ids_1S, SEED, row, NEW, top_k=0)
            assert ids == expected[: len(ids)] and len(ids) in (NEW, expected.index(1) + 1 if 1 in expected else NEW)
        self.seen.append(completion_ids)
        return [float(len(set(ids))) for ids in completion_ids]


def online_trainer(kind: str, folder: Path, base, policy: str, **options):
    """A trainer whose rollouts are compared with plain ones."""
    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[kind]
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    judge = Judge(tokenizer)
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": NEW,
        "max_steps": 3,
        "learning_rate": 0.05,
        "generation_kwargs": {"mtp": True, "mtp_strategy": "quadratic"},
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **options,
    }
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4) if policy == "LoRA" else None
    dataset = Dataset.from_dict({"prompt": [words(5), words(7)] * 4})
    judge.trainer = trainer(
        model=base,
        args=config(**settings),
        train_dataset=dataset,
        reward_funcs=judge,
        processing_class=tokenizer,
        peft_config=lora,
    )
    return judge.trainer, judge


@pytest.fixture
def one_seed(monkeypatch):
    """Every call samples with the same noise, so that texts differ only where the policy does."""
    draw = call.draw_seed
    monkeypatch.setattr(call, "draw_seed", lambda generator: draw(torch.Generator().manual_seed(SEED)))


@pytest.mark.parametrize("policy", ["LoRA", "all weights"])
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_rollouts_are_those_of_the_policy_in_training(kind, policy, folder, base, one_seed):
    trainer, judge = online_trainer(kind, folder, base, policy)
    trainer.train()
    assert len(judge.seen) == 3
    assert judge.seen[0] != judge.seen[-1], "the policy has changed, and so has its text"
    assert passes(base) is not None
    trainer.save_model(str(folder / "policy"))
    files = {path.name for path in (folder / "policy").iterdir()}
    loader = AutoPeftModelForCausalLM if policy == "LoRA" else AutoModelForCausalLM
    assert ("adapter_model.safetensors" if policy == "LoRA" else "model.safetensors") in files
    saved = loader.from_pretrained(folder / "policy")
    assert torch.allclose(saved(prompt()).logits, trainer.model(prompt()).logits, atol=1e-5)
    assert not torch.allclose(saved(prompt()).logits, load_base(folder)(prompt()).logits, atol=1e-2)


def test_mixed_precision_keeps_quadratic_decoding(folder, base):
    trainer, _ = online_trainer("grpo", folder, base, "all weights", max_steps=1, bf16=True)  # TRL's default
    trainer.reward_funcs = [lambda completion_ids, **kwargs: [float(len(ids)) for ids in completion_ids]]
    trainer.train()
    assert base.forward.__name__ == "forward" and hasattr(base, "_original_forward"), "accelerate has wrapped it"
    assert passes(base) is not None


def test_plain_rollouts_can_be_asked_for(folder, base):
    trainer, _ = online_trainer("grpo", folder, base, "LoRA", max_steps=1, generation_kwargs={"mtp": False})
    trainer.reward_funcs = [lambda completion_ids, **kwargs: [float(len(ids)) for ids in completion_ids]]
    trainer.train()
    assert passes(base) is None


def test_an_upgraded_model_warns_that_it_does_not_save_its_base(folder, caplog):
    lora = get_peft_model(load_base(folder), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    both = get_peft_model(lora, hf_mtp.GatedLoraConfig(k=3, r=4), adapter_name="mtp")
    both.save_pretrained(folder / "quiet")
    assert "trainable weights" not in caplog.text
    for name, parameter in both.named_parameters():
        parameter.requires_grad_(".default." in name)
    both.save_pretrained(folder / "warned")
    assert "4 trainable weights of the base, or of its own adapters, are not saved" in caplog.text


# ---------------------------------------------------------------- folders of bases


@pytest.fixture
def served(folder):
    """The folder of the base, whose `generate` is one with the adapter."""
    (folder / "base" / "custom_generate").mkdir()
    (folder / "base" / "custom_generate" / "generate.py").write_text(GENERATE.format(adapter=str(folder / "adapter")))
    return folder


def test_whoever_loads_the_folder_decodes_with_the_adapter(served):
    plain = generate(load_base(served), prompt())
    base = load_base(served, trust_remote_code=True)
    assert torch.equal(base.generate(prompt(), max_new_tokens=20, do_sample=False), plain)
    assert passes(base) is not None
    assert torch.equal(generate(base, prompt(), mtp=False), plain)


@pytest.fixture
def server(served):
    """`transformers serve` for that folder, and where it answers."""
    pytest.importorskip("fastapi")
    import socket

    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = GenerationConfig.from_pretrained(served / "base")
    config.mtp, config.mtp_strategy = True, "quadratic"
    config.save_pretrained(served / "base")
    server = Serve(
        force_model=str(served / "base"),
        host="127.0.0.1",
        port=port,
        device="cpu",
        trust_remote_code=True,
        non_blocking=True,
    )
    yield server, f"http://127.0.0.1:{port}/v1", str(served / "base")
    server.kill_server()


def test_transformers_serve_uses_the_adapter(server, served):
    openai = pytest.importorskip("openai")
    running, url, name = server
    client = openai.OpenAI(base_url=url, api_key="none")
    messages = [{"role": "user", "content": words(6)}]

    def ask(stream: bool = False, **settings) -> str:
        body = {"generation_config": json.dumps({"do_sample": False, "max_new_tokens": 16, **settings})}
        reply = client.chat.completions.create(model=name, messages=messages, stream=stream, extra_body=body)
        if not stream:
            return reply.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in reply if chunk.choices)

    (timed,) = running._model_manager.loaded_models.values()
    plain = ask(mtp=False)
    assert passes(timed.model) is None
    assert plain and ask() == plain
    assert passes(timed.model) < 17
    assert ask(stream=True) == plain
    defaults = client.chat.completions.create(model=name, messages=messages, max_tokens=16, temperature=0)
    assert defaults.choices[0].message.content == plain
