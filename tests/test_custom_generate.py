"""`base.generate(custom_generate=adapter)` in scripts that do not know of hf_mtp."""

import copy
import json
import runpy
import shutil
from pathlib import Path
from threading import Thread

import pytest
import torch
from hub_sessions import run_session, saved_base
from hub_stand_in import TOKEN, HubStandIn
from oracle import RIGHT, Oracle
from peft import PeftModel
from tiny_models import generate, prompt, upgraded
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_mtp import attached

SHIM = {"custom_generate/generate.py", "custom_generate/requirements.txt"}


# ---------------------------------------------------------------- the Hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The stand-in with adapters that were shared with `custom_generate=True`."""
    home = tmp_path_factory.mktemp("hub")
    constant = AutoModelForCausalLM.from_pretrained(saved_base(home / "constant", tie_word_embeddings=False))
    with torch.no_grad():  # one direction drowns the others, so it generates token 7 for ever, and masks agree
        constant.model.embed_tokens.weight[:, 0] = 100.0
        constant.lm_head.weight[7, 0] = 10.0
    constant.save_pretrained(home / "constant")
    saved_base(home / "base")
    upgraded(load_base(home)).save_pretrained(home / "uploaded", custom_generate=True)
    with HubStandIn() as hub:
        hub.add_folder("me/base", home / "base")
        hub.add_folder("me/uploaded", home / "uploaded")
        hub.add_folder("me/constant", home / "constant")
        hub.commits = run_session("hub_sessions.py", "author_for_strangers", hub=hub, home=home / "author")
        yield hub


def stranger(hub, home: Path, adapter: str, base: str = "me/base", options: dict | None = None, **environment) -> dict:
    """What a script sees that does not import hf_mtp."""
    arguments = base, adapter, json.dumps(options or {})
    return run_session("custom_generate_session.py", *arguments, hub=hub, home=home, **environment)


def assert_the_same_text(seen: dict) -> None:
    assert not seen["imported before"]
    assert seen["upgraded"] == seen["plain"] == seen["plain afterwards"]


def test_a_stranger_generates_with_a_shared_adapter(hub, tmp_path):
    assert_the_same_text(stranger(hub, tmp_path, "me/adapter"))
    pinned = hub.repositories["me/adapter"].commits[1].oid
    weights = [request for request in hub.requests if "/me/adapter/resolve/" in request and "adapter_model" in request]
    assert weights and all(f"/{pinned}/" in request for request in weights)
    assert_the_same_text(stranger(hub, tmp_path, "me/adapter", HF_HUB_OFFLINE="1"))
    assert hub.unknown == []


def test_a_stranger_needs_fewer_passes(hub, tmp_path):
    seen = stranger(hub, tmp_path, "me/constant-mtp", "me/constant")
    assert_the_same_text(seen)
    assert seen["forward_passes"] <= 7  # one for the prompt, and then 4 tokens in each


def test_the_file_names_the_commit_of_the_weights(hub):
    _, with_weights, with_file, with_other_weights = hub.repositories["me/adapter"].commits
    assert SHIM & with_weights.files.keys() == set()
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= with_weights.files.keys()
    assert SHIM <= with_file.files.keys()
    text = with_file.files["custom_generate/generate.py"].decode()
    assert "ADAPTER = 'me/adapter'" in text
    assert f"REVISION = '{with_weights.oid}'" in text
    assert with_file.files["custom_generate/requirements.txt"].decode().split() == ["hf_mtp"]
    assert "custom_generate" in with_weights.files["README.md"].decode()
    assert with_other_weights.files["custom_generate/generate.py"].decode() == text
    assert hub.commits["first"] == with_file.oid, "who pins the commit that was returned gets the file, too"


def test_a_pull_request_has_both_commits(hub):
    _, with_weights, with_file = hub.repositories["me/proposed"].commits
    assert hub.repositories["me/proposed"].at("refs/pr/1") is with_file
    assert with_weights.oid in with_file.files["custom_generate/generate.py"].decode()
    assert "adapter_model.safetensors" not in hub.repositories["me/proposed"].at("main").files
    assert hub.commits["pull request"].endswith("/me/proposed/discussions/1")


def test_a_token_given_to_generate_opens_a_private_adapter(hub, tmp_path):
    seen = stranger(hub, tmp_path, "me/private", options={"token": TOKEN}, HF_TOKEN="")
    assert_the_same_text(seen)


def test_a_revision_is_where_the_file_comes_from(hub, tmp_path):
    assert_the_same_text(stranger(hub, tmp_path, "me/on-a-branch", options={"revision": "trial"}))
    assert not SHIM & hub.repositories["me/on-a-branch"].at("main").files.keys()


def test_a_folder_uploaded_by_another_tool_is_found(hub, tmp_path):
    commit = hub.repositories["me/uploaded"].commits[0].oid
    assert_the_same_text(stranger(hub, tmp_path, "me/uploaded", options={"revision": commit}))


def test_a_private_adapter_needs_a_token(hub, tmp_path):
    with pytest.raises(AssertionError, match="401|not a valid model identifier|RepositoryNotFound"):
        stranger(hub, tmp_path, "me/private", HF_TOKEN="")


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base in `base`, and adapters of it in `adapter` and `other`."""
    saved_base(tmp_path / "base")
    for seed, name in enumerate(("adapter", "other")):
        upgraded(load_base(tmp_path), k=3 + seed, seed=seed).save_pretrained(tmp_path / name, custom_generate=True)
    return tmp_path


def load_base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def with_adapter(base: PreTrainedModel, adapter: str | Path, **kwargs):
    """Generates as a script would."""
    options = {"mtp_strategy": "quadratic", "return_dict_in_generate": True, **kwargs}
    return generate(base, prompt(), custom_generate=str(adapter), trust_remote_code=True, **options)


@pytest.fixture
def loaded(monkeypatch):
    """The adapters that were loaded."""
    calls, load = [], PeftModel.from_pretrained

    def counted(base, adapter, **kwargs):
        calls.append(Path(adapter).name)
        return load(base, adapter, **kwargs)

    monkeypatch.setattr(attached.PeftModel, "from_pretrained", counted)
    return calls


def test_the_text_is_the_same_in_fewer_passes(folder, monkeypatch):
    base = load_base(folder)
    plain = generate(base, prompt())
    Oracle(monkeypatch, plain, RIGHT["always"])
    output = with_adapter(base, folder / "adapter")
    assert torch.equal(output.sequences, plain)
    assert output.mtp_statistics.forward_passes <= 7


def test_the_base_stays_as_it_is(folder):
    base = load_base(folder).train()
    base.lm_head.requires_grad_(False)

    def state() -> list:
        modules = [(name, type(module), module.training) for name, module in base.named_modules()]
        return [*modules, *((name, parameter.requires_grad) for name, parameter in base.named_parameters())]

    before, weights, logits = state(), copy.deepcopy(base.state_dict()), base(prompt()).logits
    with_adapter(base, folder / "adapter")
    assert state() == before
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in base.state_dict().items())
    assert torch.equal(base(prompt()).logits, logits)


def test_an_adapter_is_loaded_once(folder, loaded):
    base = load_base(folder)
    for name in ("adapter", "other", "adapter", "other"):
        output = with_adapter(base, folder / name)
        assert torch.equal(output.sequences, generate(base, prompt()))
        assert len(output.mtp_statistics.accepted_per_position) == {"adapter": 3, "other": 4}[name]
    assert loaded == ["adapter", "other"]


def test_threads_share_an_adapter(folder, loaded):
    base, texts = load_base(folder), []
    plain = generate(base, prompt())
    threads = [
        Thread(target=lambda: texts.append(with_adapter(base, folder / "adapter").sequences.tolist()))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [plain.tolist()] * 3
    assert loaded == ["adapter"]


def test_a_copy_of_the_base_loads_its_own(folder, loaded):
    base = load_base(folder)
    with_adapter(base, folder / "adapter")
    output = with_adapter(copy.deepcopy(base), folder / "adapter")
    assert torch.equal(output.sequences, generate(base, prompt()))
    assert loaded == ["adapter", "adapter"]


def test_an_adapter_follows_its_base_to_another_device(folder):
    base, adapters = load_base(folder), attached.AttachedAdapters()
    model = adapters.get(base, str(folder / "adapter"), None)
    base.to("meta")
    assert adapters.get(base, str(folder / "adapter"), None) is model
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_plain_decoding_can_be_asked_for(folder):
    output = with_adapter(load_base(folder), folder / "adapter", mtp=False)
    assert not hasattr(output, "mtp_statistics")


def test_another_base_is_refused(folder, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(saved_base(tmp_path / "wide", hidden_size=48, num_attention_heads=6))
    with pytest.raises(ValueError, match="hidden size 32"):
        with_adapter(other, folder / "adapter")


def test_a_folder_may_be_moved_and_names_no_place(folder, monkeypatch):
    moved = folder / "elsewhere" / "adapter"
    shutil.copytree(folder / "adapter", moved)
    shutil.rmtree(folder / "adapter")
    text = (moved / "custom_generate" / "generate.py").read_text()
    assert str(folder) not in text and folder.name not in text
    base = load_base(folder)
    monkeypatch.chdir(folder)
    for name in (str(moved), "elsewhere/adapter"):
        assert torch.equal(with_adapter(base, name).sequences, generate(base, prompt()))
    monkeypatch.chdir(folder / "elsewhere")
    assert torch.equal(with_adapter(base, "adapter").sequences, generate(base, prompt()))
    assert len(base.__dict__[attached._STORE]._models) == 1, "one folder, whatever it is called"


def test_folders_of_one_name_are_two(folder, loaded):
    upgraded(load_base(folder), k=5).save_pretrained(folder / "more" / "adapter", custom_generate=True)
    base = load_base(folder)
    for name, k in (("adapter", 3), ("more/adapter", 5), ("adapter", 3)):
        assert len(with_adapter(base, folder / name).mtp_statistics.accepted_per_position) == k
    assert loaded == ["adapter", "adapter"]


def test_a_generate_that_cannot_know_its_place_says_so(folder):
    base, file = load_base(folder), base_generate(folder / "adapter")
    with pytest.raises(ValueError, match="The adapter of this call cannot be found"):
        file(model=base, input_ids=prompt())


def base_generate(adapter: Path):
    """What transformers calls, called by somebody else."""
    return runpy.run_path(str(adapter / "custom_generate" / "generate.py"))["generate"]


def test_an_adapter_has_the_files_only_when_asked(folder):
    upgraded(load_base(folder)).save_pretrained(folder / "without")
    assert not (folder / "without" / "custom_generate").exists()
    assert "custom_generate" not in (folder / "without" / "README.md").read_text()
    card = (folder / "adapter" / "README.md").read_text()
    assert "- custom_generate\n" in card and 'custom_generate="adapter"' in card
