"""Adapters for other engines: what the files hold, that nothing is lost on the way, and what is refused.

The engines themselves are not run here. Readers in this file know nothing but the page docs/export.md.
"""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import sampled_text
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import run
from tiny_models import CACHE, VOCAB, generate, prompt, randomised, tiny_base, upgraded
from transformers import AutoModelForCausalLM

import hf_mtp
from hf_mtp.export.files import new_folder
from hf_mtp.export.uno import export_uno, import_uno
from hf_mtp.export.vllm import export_vllm
from hf_mtp.pretrained import load_model

K = 3
PARTS = ("weight", "bias")
NOISE = {"masks": "noise", "sampler": False}
# The adapter_config.json of IFM/K2-Horizon-7B-Uno has these fields; their values but for the base and the rank.
UNO_FIELDS = {
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 64.0,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "revision": None,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"],
    "task_type": "CAUSAL_LM",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny bases in float64, by architecture."""
    made = {}

    def folder(architecture: str = "llama", **overrides) -> str:
        key = architecture, *overrides.items()
        if key not in made:
            made[key] = str(tmp_path_factory.mktemp(architecture))
            tiny_base(architecture, torch.float64, **overrides).save_pretrained(made[key])
        return made[key]

    return folder


def load_base(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def saved(base: str, folder: Path, **config) -> PeftModel:
    """An adapter with random weights, of a base in a folder."""
    model = upgraded(load_base(base), K, dtype=torch.float64, **config)
    model.save_pretrained(folder)
    return model


def mask_states(model: PeftModel, ids: torch.LongTensor) -> torch.Tensor:
    """`(1, K, D)`: what the unembedding reads at the masks after a text."""
    masks = torch.arange(VOCAB, VOCAB + K)[None]
    with torch.no_grad(), model.base_model.capture_hidden_states() as captured:
        model(torch.cat([ids, masks], dim=1))
    return captured.states[:, -K:]


def drafts(model: PeftModel, ids: torch.LongTensor, pending: int) -> list[int]:
    with torch.no_grad():
        return model.base_model.draft(torch.tensor([pending]), mask_states(model, ids)).tokens[0]


class VllmReader:
    """Drafts from an exported folder, after the page: base on the text, base and LoRA on masks, then the sampler."""

    def __init__(self, folder: Path, base: str):
        self.base = load_base(base)
        with safe_open(folder / "mtp.safetensors", "pt") as file:
            self.metadata = file.metadata()
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.plain = PeftModel.from_pretrained(load_base(base), folder, autocast_adapter_dtype=False)

    @torch.no_grad()
    def drafts(self, ids: torch.LongTensor, pending: int) -> list[int]:
        embed, unembed = self.base.get_input_embeddings(), self.base.get_output_embeddings()
        tensors, k = self.tensors, int(self.metadata["k"])
        masks_kE = embed(tensors["mask_ids"]) if self.metadata["masks"] == "noise" else tensors["mask_embeddings"]
        assert masks_kE.shape[0] == k
        text = self.base(ids, use_cache=True)
        outputs = self.plain.get_base_model().model(
            inputs_embeds=masks_kE[None].double(), **{CACHE: getattr(text, CACHE)}
        )
        tokens = []
        for state_D in outputs.last_hidden_state[0]:
            shortlist = unembed(state_D).topk(32).indices
            if self.metadata["sampler"] == "True":
                x = torch.cat([embed(torch.tensor(pending)), state_D])
                for first in (0, 3):
                    keys = [f"sampler.blocks.{layer}.{part}" for layer in (first, first + 2) for part in PARTS]
                    weight, bias, gain, shift = (tensors[key].double() for key in keys)
                    x = F.layer_norm(F.silu(F.linear(x, weight, bias)), bias.shape, gain, shift, 1e-5)
                state_D = state_D + x if self.metadata["sampler_residual"] == "True" else x
            pending = shortlist[unembed(state_D)[shortlist].argmax()].item()
            tokens.append(pending)
        return tokens


def effects(model: PeftModel) -> dict[str, torch.Tensor]:
    """What a LoRA adds to the weight of each layer."""
    layers = {name: layer for name, layer in model.base_model.named_modules() if hasattr(layer, "get_delta_weight")}
    assert layers
    return {name.removeprefix("model."): layer.get_delta_weight("default") for name, layer in layers.items()}


def assert_same_effects(plain: PeftModel, gated: PeftModel) -> None:
    expected = {
        name: layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        for name, layer in gated.base_model.gated_layers().items()
    }
    found = effects(plain)
    assert found.keys() == expected.keys()
    for name, effect in expected.items():
        torch.testing.assert_close(found[name], effect)


# ---------------------------------------------------------------- vLLM


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3_text"])
@pytest.mark.parametrize("config", [{}, {"sampler_residual": False}, NOISE])
def test_a_reader_of_the_vllm_folder_makes_our_drafts(architecture, config, bases, tmp_path):
    base = bases(architecture)
    model = saved(base, tmp_path / "adapter", **config)
    assert export_vllm(str(tmp_path / "adapter"), tmp_path / "vllm") == tmp_path / "vllm"
    reader = VllmReader(tmp_path / "vllm", base)
    assert_same_effects(reader.plain, model)
    found = [reader.drafts(prompt(seed=seed), seed) for seed in range(4)]
    assert found == [drafts(model, prompt(seed=seed), seed) for seed in range(4)]
    assert len({token for row in found for token in row}) > 4


def test_names_shapes_and_metadata_of_the_vllm_folder(bases, tmp_path):
    saved(bases(), tmp_path / "adapter", save_dtype="bfloat16")
    export_vllm(str(tmp_path / "adapter"), tmp_path / "vllm")
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "mtp.safetensors"]
    assert sorted(path.name for path in (tmp_path / "vllm").iterdir()) == names
    reader = VllmReader(tmp_path / "vllm", bases())
    assert reader.metadata == {
        "format_version": "1",
        "k": "3",
        "masks": "learned",
        "sampler": "True",
        "sampler_residual": "True",
        "sampler_recurrent": "False",
        "base_hidden_size": "32",
        "base_vocab_size": str(VOCAB),
        "base_model_name_or_path": bases(),
    }
    assert {name: list(tensor.shape) for name, tensor in reader.tensors.items()} == {
        "mask_embeddings": [K, 32],
        "sampler.blocks.0.weight": [32, 64],
        "sampler.blocks.0.bias": [32],
        "sampler.blocks.2.weight": [32],
        "sampler.blocks.2.bias": [32],
        "sampler.blocks.3.weight": [32, 32],
        "sampler.blocks.3.bias": [32],
        "sampler.blocks.5.weight": [32],
        "sampler.blocks.5.bias": [32],
    }
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "vllm"))
    assert {tensor.dtype for tensor in (*theirs.values(), *reader.tensors.values())} == {torch.bfloat16}
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    assert len(theirs) == 2 * 2 * 7
    config = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["target_modules"] == sorted(UNO_FIELDS["target_modules"])
    assert "acts on all tokens" in (tmp_path / "vllm" / "README.md").read_text(encoding="utf-8")


def test_fewer_masks_and_other_adapter_names(bases, tmp_path):
    base = load_base(bases())
    model = randomised(get_peft_model(base, hf_mtp.GatedLoraConfig(k=K, r=4), adapter_name="mine")).eval()
    model.save_pretrained(tmp_path / "adapter")
    export_vllm(str(tmp_path / "adapter" / "mine"), tmp_path / "vllm", k=2)
    reader = VllmReader(tmp_path / "vllm", bases())
    assert reader.drafts(prompt(), 7) == drafts(model, prompt(), 7)[:2]


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "down_proj": 6}},
        {"alpha_pattern": {"layers.1.mlp": 3, "v_proj": 20}, "rank_pattern": {"v_proj": 3}, "use_rslora": True},
    ],
)
def test_ranks_and_scales_of_their_own(config, bases, tmp_path):
    model = saved(bases(), tmp_path / "adapter", **config, **NOISE)
    for name, export in (("vllm", export_vllm), ("uno", export_uno)):
        export(str(tmp_path / "adapter"), tmp_path / name)
        fields = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert not {"rank_pattern", "alpha_pattern"} & fields.keys()
        shapes = {name: t.shape for name, t in load_file(tmp_path / name / "adapter_model.safetensors").items()}
        assert {shape[0] for name, shape in shapes.items() if "lora_A" in name} == {fields["r"]}
        plain = PeftModel.from_pretrained(load_base(bases()), tmp_path / name, autocast_adapter_dtype=False)
        assert_same_effects(plain, model)


@pytest.mark.parametrize("modules", [["q_proj", "o_proj", "gate_proj", "up_proj"], ["v_proj"]])
def test_lora_on_some_layers_and_projections(modules, bases, tmp_path):
    model = saved(bases(), tmp_path / "adapter", target_modules=modules, layers_to_transform=[1], **NOISE)
    assert {name.split(".")[2] for name in model.base_model.gated_layers()} == {"1"}
    for name, export in (("vllm", export_vllm), ("uno", export_uno)):
        export(str(tmp_path / "adapter"), tmp_path / name)
        plain = PeftModel.from_pretrained(load_base(bases()), tmp_path / name, autocast_adapter_dtype=False)
        assert_same_effects(plain, model)
    import_uno(str(tmp_path / "uno"), tmp_path / "back", k=K)
    back = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float64)
    torch.testing.assert_close(mask_states(back, prompt()), mask_states(model, prompt()))


# ---------------------------------------------------------------- Uno


@pytest.mark.parametrize("some", [{"layers_to_transform": [1]}, {"exclude_modules": ["model.layers.0.mlp.up_proj"]}])
def test_layers_of_a_kind_that_have_none(some, bases, tmp_path):
    """Readers would otherwise expect weights in every layer of these kinds."""
    kinds = {"target_modules": ["q_proj", "up_proj"], **some}
    model = saved(bases(), tmp_path / "ours", **kinds, **NOISE)
    for target in ("vllm", "uno"):
        folder = {"vllm": export_vllm, "uno": export_uno}[target](str(tmp_path / "ours"), tmp_path / target)
        with warnings.catch_warnings(action="error", category=UserWarning):  # of missing weights
            plain = PeftModel.from_pretrained(load_base(bases()), folder, autocast_adapter_dtype=False)
        assert_same_effects(plain, model)
    import_uno(str(tmp_path / "uno"), tmp_path / "back", k=K)
    back = PeftModel.from_pretrained(load_base(bases()), tmp_path / "back", autocast_adapter_dtype=False)
    assert back.base_model.gated_layers().keys() == model.base_model.gated_layers().keys()


def uno_adapter(folder: Path, base: str | None, architecture: str = "llama", **fields) -> dict[str, torch.Tensor]:
    """An adapter of Uno's published layout for a tiny base: what PEFT's own LoRA saves, with their config."""
    config = LoraConfig(r=4, lora_alpha=64, target_modules=UNO_FIELDS["target_modules"])
    model = randomised(get_peft_model(tiny_base(architecture), config), seed=3)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    written = {**UNO_FIELDS, "base_model_name_or_path": base, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
def test_to_uno_and_back(architecture, bases, tmp_path):
    base = bases(architecture)
    model = saved(base, tmp_path / "ours", **NOISE)
    export_uno(str(tmp_path / "ours"), tmp_path / "uno")
    fields = json.loads((tmp_path / "uno" / "adapter_config.json").read_text())
    assert fields.keys() - UNO_FIELDS.keys() == {"use_dora", "use_rslora"}
    assert not fields["use_dora"] and not fields["use_rslora"]
    import_uno(str(tmp_path / "uno"), tmp_path / "back", k=K)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "back"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    back = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float64)
    torch.testing.assert_close(mask_states(back, prompt()), mask_states(model, prompt()))
    config = back.active_peft_config
    assert (config.masks, config.sampler, config.k, config.base_vocab_size) == ("noise", False, K, VOCAB)
    assert "noise tokens" in (tmp_path / "back" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("architecture", "where"),
    [("llama", ""), ("llama", "adapter"), ("qwen3", ""), ("mistral", ""), ("gemma3_text", "")],
)
def test_an_adapter_of_unos_decodes_exactly(architecture, where, bases, tmp_path):
    base, theirs = bases(architecture), tmp_path / "theirs"
    (theirs / where).mkdir(parents=True, exist_ok=True)
    weights = uno_adapter(theirs / where, base, architecture)
    import_uno(str(theirs), tmp_path / "ours", k=4)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64).eval()
    layer = model.base_model.gated_layers()["model.layers.1.mlp.down_proj"]
    down_proj = weights["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
    torch.testing.assert_close(layer.lora_B["default"].weight.detach(), down_proj, check_dtype=False)
    assert layer.scaling["default"] == 64 / 4
    expected = generate(load_base(base), prompt())
    assert torch.equal(generate(model, prompt()), expected)
    for strategy in ("quadratic", "linear", "auto"):
        assert torch.equal(generate(model, prompt(), mtp=True, mtp_strategy=strategy), expected)
    seeded = {"do_sample": True, "generator": torch.Generator().manual_seed(5), "mtp": True, "max_new_tokens": 16}
    sampled = model.generate(prompt(), **seeded)[0, prompt().shape[1] :].tolist()
    assert sampled == sampled_text(load_base(base), prompt(), 5, 0, 16)
    ungated = PeftModel.from_pretrained(load_base(base), theirs / where)  # as the cards of such adapters show
    assert not torch.equal(generate(ungated, prompt()), expected)


def test_unos_adapters_may_name_a_base_that_holds_code(bases, tmp_path):
    uno_adapter(tmp_path / "uno", "IFM/uno-qwen3-8b-base", revision="4ccfeed3fba497e40495fe6dc5c15c89f7f1e2cd")
    with pytest.raises(OSError, match="The config of the base IFM/uno-qwen3-8b-base cannot be read.*`--base`"):
        import_uno(str(tmp_path / "uno"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    import_uno(str(tmp_path / "uno"), tmp_path / "ours", base=bases())
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    assert (model.active_peft_config.k, model.active_peft_config.revision) == (8, None)


# ---------------------------------------------------------------- what is refused


CANNOT_HOLD = {
    "DoRA": (export_vllm, {"use_dora": True}, r"`use_dora=True`, which other engines do not support"),
    "a bias": (export_vllm, {"lora_bias": True}, r"`lora_bias=True`"),
    "a recurrent sampler": (export_vllm, {"sampler_recurrent": True}, r"a recurrent sampler head"),
    "mask embeddings and a sampler": (export_uno, {}, r"mask embeddings .*and a sampler head"),
    "mask embeddings": (export_uno, {"sampler": False}, r"has mask embeddings .*, but Uno's format"),
    "a sampler": (export_uno, {"masks": "noise"}, r"has a sampler head .*masks='noise', sampler=False"),
    "DoRA on noise": (export_uno, {"use_dora": True, **NOISE}, r"`use_dora=True`"),
}


@pytest.mark.parametrize("what", CANNOT_HOLD)
def test_what_the_target_cannot_hold(what, bases, tmp_path):
    export, config, message = CANNOT_HOLD[what]
    saved(bases(), tmp_path / "adapter", **config)
    with pytest.raises(ValueError, match=message):
        export(str(tmp_path / "adapter"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_target_parameters(bases, tmp_path):
    upgraded("mixtral", K, target_parameters=["mlp.experts.down_proj"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"has `target_parameters=.*Only plain LoRA on linear layers"):
        export_vllm(str(tmp_path / "adapter"), tmp_path / "out", base=bases("mixtral"))


def test_layers_that_uno_does_not_know(bases, tmp_path):
    saved(bases("gpt2"), tmp_path / "adapter", **NOISE)
    with pytest.raises(
        ValueError, match=r"LoRA on 8 layer\(s\) that Uno's format does not support, such as 'transformer"
    ):
        export_uno(str(tmp_path / "adapter"), tmp_path / "out")
    export_vllm(str(tmp_path / "adapter"), tmp_path / "out")  # whether vLLM takes such a LoRA is vLLM's business


def test_another_base(bases, tmp_path):
    saved(bases(), tmp_path / "adapter", **NOISE)
    uno_adapter(tmp_path / "uno", bases())
    wider, longer = bases(intermediate_size=64), bases(num_hidden_layers=3)
    small = bases(vocab_size=50)
    for export in (export_vllm, export_uno):
        with pytest.raises(ValueError, match="trained for a base of vocabulary size 97, but .* has 50"):
            export(str(tmp_path / "adapter"), tmp_path / "out", base=small)
        with pytest.raises(ValueError, match="adapter does not fit .*wrong shape for 6 tensor"):
            export(str(tmp_path / "adapter"), tmp_path / "out", base=wider)
    with pytest.raises(ValueError, match="uno does not fit .*lack 14 tensor"):
        import_uno(str(tmp_path / "uno"), tmp_path / "out", base=longer)
    with pytest.raises(ValueError, match="uno does not fit .*wrong shape for"):
        import_uno(str(tmp_path / "uno"), tmp_path / "out", base=wider)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("k", [0, 4])
def test_more_masks_than_there_are(k, bases, tmp_path):
    saved(bases(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"`k` must be between 1 and 3, the number of masks of .*but got {k}"):
        export_vllm(str(tmp_path / "adapter"), tmp_path / "out", k=k)
    uno_adapter(tmp_path / "uno", bases())
    with pytest.raises(ValueError, match="`k` must be an integer of at least 1"):
        import_uno(str(tmp_path / "uno"), tmp_path / "out", k=0)


def test_unknown_tensors_and_fields_of_unos_files(bases, tmp_path):
    weights, file = uno_adapter(tmp_path / "uno", bases()), tmp_path / "uno" / "adapter_model.safetensors"
    save_file({**weights, "base_model.model.model.embed_tokens.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match=r"have the unknown 1 tensor\(s\), such as .*embed_tokens"):
        import_uno(str(tmp_path / "uno"), tmp_path / "out")
    save_file({name: t for name, t in weights.items() if "layers.1.self_attn.k_proj.lora_B" not in name}, file)
    with pytest.raises(ValueError, match=r"lack 1 tensor\(s\), such as .*k_proj.lora_B"):
        import_uno(str(tmp_path / "uno"), tmp_path / "out")
    for field, message in {
        "lora_spectral": "fields that the installed PEFT does not know: lora_spectral",
        "modules_to_save": "`modules_to_save=.* would change what the base model computes",
    }.items():
        uno_adapter(tmp_path / "uno", bases(), **{field: ["lm_head"]})
        with pytest.raises(ValueError, match=message):
            import_uno(str(tmp_path / "uno"), tmp_path / "out")
    uno_adapter(tmp_path / "uno", bases(), a_later_field=None)
    import_uno(str(tmp_path / "uno"), tmp_path / "out")


def test_adapters_of_another_kind(bases, tmp_path):
    saved(bases(), tmp_path / "ours", **NOISE)
    uno_adapter(tmp_path / "uno", bases())
    with pytest.raises(ValueError, match="is already an adapter of hf_mtp"):
        import_uno(str(tmp_path / "ours"), tmp_path / "out")
    for export in (export_vllm, export_uno):
        with pytest.raises(ValueError, match=r"of type 'LORA', but only adapters of hf_mtp .*--from uno"):
            export(str(tmp_path / "uno"), tmp_path / "out")
        with pytest.raises(ValueError, match="is not an adapter: it has no adapter_config.json. Pass"):
            export(bases(), tmp_path / "out")
    uno_adapter(tmp_path / "uno", bases(), peft_type="IA3")
    with pytest.raises(ValueError, match="of type 'IA3', but Uno adapters have type 'LORA'"):
        import_uno(str(tmp_path / "uno"), tmp_path / "out")
    with pytest.raises(ValueError, match="has no adapter_config.json, neither at its root nor in `adapter/`"):
        import_uno(bases(), tmp_path / "out")
    with pytest.raises(OSError, match="is neither a folder nor the id of a repository"):
        import_uno(str(tmp_path / "nowhere"), tmp_path / "out")
    saved(bases(), tmp_path / "learned")
    export_vllm(str(tmp_path / "learned"), tmp_path / "vllm")
    with pytest.raises(ValueError, match="is no Uno adapter, but an export for vLLM: mtp.safetensors holds its masks"):
        import_uno(str(tmp_path / "vllm"), tmp_path / "out")


@pytest.mark.parametrize("content", ['{"peft_type": "LO', "[]"])
def test_a_broken_config_is_named(content, bases, tmp_path):
    saved(bases(), tmp_path / "ours", **NOISE)
    (tmp_path / "ours" / "adapter_config.json").write_text(content, encoding="utf-8")
    message = "adapter_config.json (is not valid JSON|must hold a JSON object).*again"
    for read in (export_vllm, export_uno, import_uno):
        with pytest.raises(ValueError, match=message):
            read(str(tmp_path / "ours"), tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path / "ours"))
    assert not (tmp_path / "out").exists()


def test_pickles_and_broken_files(bases, tmp_path):
    uno_adapter(tmp_path / "uno", bases())
    file = tmp_path / "uno" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a valid safetensors file"):
        import_uno(str(tmp_path / "uno"), tmp_path / "out")
    file.rename(file.with_name("adapter_model.bin"))
    with pytest.raises(ValueError, match="a pickle, which can run code"):
        import_uno(str(tmp_path / "uno"), tmp_path / "out")
    file.with_name("adapter_model.bin").unlink()
    saved(bases(), tmp_path / "ours")
    (tmp_path / "ours" / "adapter_model.safetensors").unlink()
    for read, name in ((import_uno, "uno"), (export_uno, "ours"), (export_vllm, "ours")):
        with pytest.raises(ValueError, match="has an adapter_config.json but no adapter_model.safetensors"):
            read(str(tmp_path / name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over_and_nothing_is_half_written(bases, tmp_path, monkeypatch):
    saved(bases(), tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter_config.json").read_bytes()
    for taken in ("adapter", "adapter/README.md"):
        with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
            export_vllm(str(tmp_path / "adapter"), tmp_path / taken)
    assert (tmp_path / "adapter" / "adapter_config.json").read_bytes() == before
    (tmp_path / "empty").mkdir()
    export_vllm(str(tmp_path / "adapter"), tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty")

    def fails(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_mtp.export.vllm.save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        export_vllm(str(tmp_path / "adapter"), tmp_path / "out" / "inside")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_new_folder_has_the_name_at_the_end_only(tmp_path):
    with new_folder(tmp_path / "a" / "b") as draft:
        (draft / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", "file"]


@pytest.mark.parametrize("kind", ["the current one", "a link", "a link to nothing"])
def test_an_empty_folder_stays_the_folder_that_it_is(tmp_path, monkeypatch, kind):
    (tmp_path / "real").mkdir()
    given = tmp_path / "link"
    given.symlink_to(tmp_path / ("nothing" if kind == "a link to nothing" else "real"))
    if kind == "the current one":
        monkeypatch.chdir(tmp_path / "real")
        given = "."
    with new_folder(given) as draft:
        for name in ("adapter_config.json", "file"):
            (draft / name).write_text("x")
    found = sorted(path.name for path in Path(given).iterdir())  # of the very folder that a shell is in
    assert found == ["adapter_config.json", "file"]
    with pytest.raises(FileExistsError), new_folder(given):
        pass


# ---------------------------------------------------------------- the command


def test_the_command(bases, tmp_path):
    saved(bases(), tmp_path / "ours", **NOISE)
    ours, uno, back, vllm = (str(tmp_path / name) for name in ("ours", "uno", "back", "vllm"))
    assert "--uno-lora-path" in run("export", ours, "--to", "uno", uno).output
    assert "hf-mtp generate" in run("export", uno, back, "--from", "uno", "--k", "5", "--base", bases()).output
    assert "for vLLM" in run("export", back, vllm, "--to", "vllm", "--k", "2").output
    with safe_open(Path(vllm, "mtp.safetensors"), "pt") as file:
        assert (file.metadata()["k"], file.metadata()["masks"]) == ("2", "noise")


def test_wrong_usage(bases, tmp_path):
    out = str(tmp_path / "out")
    assert "Pass either --to (vllm or uno) or --from (uno)" in run("export", bases(), out, code=2).output
    assert "either" in run("export", bases(), out, "--to", "uno", "--from", "uno", code=2).output
    assert "tensorrt" in run("export", bases(), out, "--to", "tensorrt", code=2).output
    assert "Uno's format does not contain" in run("export", bases(), out, "--to", "uno", "--k", "2", code=2).output
    saved(bases(), tmp_path / "learned")
    assert "Error: " in run("export", str(tmp_path / "learned"), out, "--to", "uno", code=1).output
