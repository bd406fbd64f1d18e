"""Adapters go to the Hub and to folders, and come back the same: weights, card, refusals."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hub_sessions import run_session, saved_base
from hub_stand_in import HubStandIn
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import adapter_parameters, generate, prompt, randomised, tiny_base, upgraded
from tiny_text import tiny_tokenizer
from tiny_training import trainer
from transformers import AutoModelForCausalLM

from hf_mtp import GatedLoraConfig
from hf_mtp.adapter.base_identity import tokenizer_fingerprint
from hf_mtp.adapter.card import EVALUATION_BEGIN, EVALUATION_END, MARK, render_model_card, write_model_card
from hf_mtp.adapter.custom_generate import custom_generate_files

SECTION = f"{EVALUATION_BEGIN}\n## Evaluation\n\n| maths | 2.00 |\n{EVALUATION_END}\n"
BY_HAND = "---\nlibrary_name: peft\n---\n\n# My own words\n"
CARD_OF_THE_BASE = "---\nlicense: other\nlicense_name: tiny-license\nlicense_link: LICENSE\n---\n# A base\n"
ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


# ---------------------------------------------------------------- the Hub


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The stand-in after an author has shared adapters, and what the author and a reader saw."""
    home = tmp_path_factory.mktemp("hub")
    pickled = home / "pickled"
    upgraded(saved_base_model(home)).save_pretrained(pickled)
    (home / "base" / "README.md").write_text(CARD_OF_THE_BASE)
    with HubStandIn() as hub:
        hub.add_folder("me/base", home / "base")
        hub.add_folder("me/other-base", saved_base(home / "other", hidden_size=48, num_attention_heads=6))
        hub.add("me/by-hand", {"README.md": BY_HAND.encode()})
        hub.add(
            "me/pickled",
            {"adapter_config.json": (pickled / "adapter_config.json").read_bytes(), "adapter_model.bin": b"pickle"},
        )
        author = run_session("hub_sessions.py", "author", hub=hub, home=home / "author")
        yield hub, author, run_session("hub_sessions.py", "reader", hub=hub, home=home / "reader")


def saved_base_model(home: Path):
    """The base of the shared adapters, loaded from its folder."""
    return AutoModelForCausalLM.from_pretrained(saved_base(home / "base"))


def latest(hub: HubStandIn, name: str, branch: str = "main"):
    return hub.repositories[name].at(branch)


def test_an_adapter_comes_back_from_the_hub_the_same(shared):
    _, author, reader = shared
    assert {name: reader[name] for name in author} == author
    assert author["upgraded"] == author["plain"]


def test_an_adapter_is_three_files_in_one_commit(shared):
    hub, *_ = shared
    repository = hub.repositories["me/my-model-mtp"]
    assert set(latest(hub, "me/my-model-mtp").files) == ADAPTER_FILES | {".gitattributes"}
    assert len(repository.commits) == 2, "the Hub's own first commit, and one of ours"


def test_the_shared_card_says_what_the_adapter_is(shared):
    hub, *_ = shared
    text = latest(hub, "me/my-model-mtp").files["README.md"].decode()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == "me/base"
    assert metadata["library_name"] == "peft"
    assert metadata["pipeline_tag"] == "text-generation"
    assert {"hf_mtp", "multi-token-prediction", "tiny"} <= set(metadata["tags"])
    assert [metadata[key] for key in ("license", "license_name")] == ["other", "tiny-license"]
    assert metadata["datasets"] == ["openai/gsm8k"], "names without an owner are no data set of the Hub"
    for line in (
        "# my-model-mtp",
        'AutoPeftModelForCausalLM.from_pretrained("me/my-model-mtp")',
        'AutoTokenizer.from_pretrained("me/base")',
        "| mask tokens (k) | 3 |",
        "| LoRA rank | 4 |",
        "| training recipe | default |",
        "| training data | openai/gsm8k, notes |",
        "| maths | 3.46 |",
    ):
        assert line in text


def test_a_card_written_by_hand_stays_on_the_hub(shared):
    hub, *_ = shared
    files = latest(hub, "me/by-hand").files
    assert files["README.md"].decode() == BY_HAND
    assert "adapter_model.safetensors" in files


def test_a_revision_gets_the_adapter_and_main_does_not(shared):
    hub, author, reader = shared
    assert "adapter_model.safetensors" not in latest(hub, "me/on-a-branch").files
    assert latest(hub, "me/on-a-branch", "trial").message == "A trial"
    assert reader["branch"] == author


def test_an_n_gram_table_comes_with_its_adapter(shared):
    hub, _, reader = shared
    assert "ngrams.safetensors" in latest(hub, "me/with-ngrams", "trial").files
    assert reader["n-grams"] == [[8, 9]] * 2  # online, and from the cache


def test_a_repository_with_a_pickle_only_is_refused(shared):
    assert "adapter_model.safetensors only" in shared[2]["me/pickled on me/base"]


def test_a_shared_adapter_refuses_another_base(shared):
    assert "hidden size 32" in shared[2]["me/my-model-mtp on me/other-base"]


def test_the_stand_in_has_an_answer_to_all_that_was_asked(shared):
    hub, *_ = shared
    assert hub.unknown == []
    assert any(request.startswith("PUT /storage/") for request in hub.requests), "weights go through Git LFS"


def test_a_pickle_is_not_even_downloaded(shared):
    hub, *_ = shared
    assert "HEAD /me/pickled/resolve/main/adapter_model.bin" in hub.requests
    assert "GET /me/pickled/resolve/main/adapter_model.bin" not in hub.requests


def test_adapters_of_other_types_are_shared_as_before(monkeypatch):
    calls = []
    monkeypatch.setattr("transformers.utils.PushToHubMixin.push_to_hub", lambda *args, **kw: calls.append((args, kw)))
    model = get_peft_model(tiny_base(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.push_to_hub("me/plain-lora", private=True)
    assert calls == [((model, "me/plain-lora"), {"private": True})]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The stand-in after trainings with each `hub_strategy`, and what was seen there."""
    home = tmp_path_factory.mktemp("pushed")
    with HubStandIn() as hub:
        hub.add_folder("me/base", saved_base(home / "base"))
        yield hub, run_session("hub_sessions.py", "trainer_pushes", hub=hub, home=home / "author")
        assert hub.unknown == []


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_a_trainer_pushes_the_adapter_with_its_card(strategy, pushed):
    hub, document = pushed
    assert document[f"{strategy} read"] == document[strategy]
    assert document[strategy]["upgraded"] == document[strategy]["plain"]
    repository = hub.repositories[f"me/{strategy.replace('_', '-')}"]
    files = repository.at("main").files
    assert ADAPTER_FILES <= files.keys()
    assert MARK in files["README.md"].decode() and f"me/{strategy.replace('_', '-')}" in files["README.md"].decode()
    during = [
        commit.message for commit in repository.commits if commit.message.startswith("Training in progress, step")
    ]
    most = {"end": 0, "every_save": 2}.get(strategy, 4)
    # Uploads run beside training. A late one finds the weights of the next save, which then has nothing to commit.
    assert most - (most > 0) <= len(during) <= most
    steps = {path.split("/")[0] for path in files if "/" in path and "checkpoint" in path}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4"}}
    assert steps == expected.get(strategy, set())
    assert not any("unfinished" in path for path in files)


def test_what_is_pushed_while_training_loads(pushed):
    hub, _ = pushed
    # Uploads run beside training, so both may be of the last step.
    for commit in hub.repositories["me/every-save"].commits[1:]:
        assert ADAPTER_FILES - {"README.md"} <= commit.files.keys()


def test_a_training_resumes_from_the_hub(pushed):
    _, document = pushed
    assert document["damage"] is None
    assert document["resumed"] == [1, 2, 3, 4, 5, 6]


def test_a_trainer_pushes_custom_generate_and_names_no_place(pushed, tmp_path):
    hub, document = pushed
    files = hub.repositories["me/end"].at("main").files
    assert "custom_generate/generate.py" in files
    card = files["README.md"].decode()
    assert 'custom_generate="me/end"' in card and "- custom_generate\n" in card and "me/words" in card
    for path in ("custom_generate/generate.py", "README.md", "adapter_config.json"):
        assert document["home"] not in files[path].decode()
    seen = run_session("custom_generate_session.py", "me/base", "me/end", "{}", hub=hub, home=tmp_path)
    assert seen["upgraded"] == seen["plain"]


@pytest.fixture(scope="module")
def locked_out(tmp_path_factory):
    """What somebody is told who may not read `me/gated` and `me/private`, and asks for `me/missing`."""
    home = tmp_path_factory.mktemp("locked")
    upgraded(saved_base_model(home)).save_pretrained(home / "adapter", custom_generate=True)
    with HubStandIn() as hub:
        hub.add_folder("me/base", home / "base")
        hub.add_folder("me/gated", home / "adapter").gated = True
        hub.add_folder("me/private", home / "adapter").private = True
        for name in ("gated", "private", "missing"):
            hub.add(f"me/names-{name}", custom_generate_files(f"me/{name}"))
        yield run_session("hub_sessions.py", "locked_out", hub=hub, home=home / "stranger", HF_TOKEN="hf_stranger")
        assert hub.unknown == []


OURS = ("load_model", "attach", "custom_generate of another", "generate", "push")


@pytest.mark.parametrize("way", OURS)
def test_an_adapter_that_may_not_be_read_says_why(way, locked_out):
    gated, _ = locked_out[f"{way} me/gated"]
    assert "me/gated is a gated repository" in gated and "https://huggingface.co/me/gated" in gated
    for name in ("private", "missing"):
        said, _ = locked_out[f"{way} me/{name}"]
        assert f"me/{name} is neither a folder nor a repository on the Hub that you have access to" in said
        assert "hf auth login" in said


@pytest.mark.parametrize("name", ["gated", "private", "missing"])
def test_the_command_ends_with_one_paragraph(name, locked_out):
    for verb in ("generate", "push"):
        said, code = locked_out[f"{verb} me/{name}"]
        assert code == "1" and said.startswith("Error: ") and len(said.strip().splitlines()) == 1


def test_what_the_hosts_say_themselves(locked_out):
    """Before any code of ours is asked. The troubleshooting page quotes it."""
    for way in ("auto", "peft"):
        said, cause = locked_out[f"{way} me/gated"]
        assert said == "Can't find 'adapter_config.json' at 'me/gated'" and "GatedRepoError" in cause
    assert "me/gated is a gated repository" in locked_out["custom_generate me/gated"][0]
    assert "me/private is not a local folder or a valid repository" in locked_out["custom_generate me/private"][0]


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    """An adapter saved in `adapter`, whose base is in `base`."""
    base = saved_base_model(tmp_path)
    model = upgraded(base)
    model.peft_config["default"].tokenizer_fingerprint = tokenizer_fingerprint(tiny_tokenizer())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def load(folder: Path, way: str) -> PeftModel:
    if way == "auto":
        return AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    return PeftModel.from_pretrained(saved_base_model(folder), folder / "adapter")


@pytest.mark.parametrize("way", ["auto", "base given"])
def test_an_adapter_comes_back_from_a_folder_the_same(folder, way):
    expected = upgraded(saved_base_model(folder))
    model = load(folder, way)
    assert {path.name for path in (folder / "adapter").iterdir()} == ADAPTER_FILES
    assert not model.training
    found = adapter_parameters(model)
    for name, parameter in adapter_parameters(expected).items():
        assert torch.equal(found[name], parameter), name
    assert torch.equal(generate(model, prompt(), mtp=True), generate(expected, prompt(), mtp=True))


def test_a_saved_config_knows_itself(folder):
    config = PeftConfig.from_pretrained(folder / "adapter")
    assert isinstance(config, GatedLoraConfig)
    assert (config.k, config.r, config.base_hidden_size, config.base_vocab_size) == (3, 4, 32, 97)


def test_a_folder_with_a_pickle_only_is_refused(folder):
    (folder / "adapter" / "adapter_model.safetensors").rename(folder / "adapter" / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.safetensors only"):
        load(folder, "auto")


def test_a_base_of_another_size_is_refused(folder):
    saved_base(folder / "base", hidden_size=48, num_attention_heads=6)
    with pytest.raises(ValueError, match="hidden size 32, but base has 48"):
        load(folder, "auto")


def test_a_base_with_more_rows_and_the_same_tokens_is_taken(folder):
    saved_base(folder / "base", vocab_size=101)
    assert load(folder, "auto").base_model.vocab_size == 101


def test_a_base_with_another_tokenizer_is_refused(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder / "base")
    with pytest.raises(ValueError, match="fingerprint"):
        load(folder, "auto")


@pytest.mark.parametrize("damage", ["truncated", "a tensor less"])
def test_a_damaged_file_is_refused(folder, damage):
    file = folder / "adapter" / "adapter_model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        save_file(dict(list(load_file(file).items())[1:]), file)
    with pytest.raises((ValueError, SafetensorError)):
        load(folder, "auto")


# ---------------------------------------------------------------- cards


def card_of(folder: Path) -> str:
    return (folder / "adapter" / "README.md").read_text()


def save_again(folder: Path, readme: str | None = None) -> str:
    """The card after `readme` was put into the adapter's folder and the adapter saved there again."""
    if readme is not None:
        (folder / "adapter" / "README.md").write_text(readme)
    randomised(load(folder, "base given"), seed=5).save_pretrained(folder / "adapter")
    return card_of(folder)


def test_the_card_of_a_folder_keeps_local_paths_out_of_its_metadata(folder):
    metadata = yaml.safe_load(card_of(folder).split("---")[1])
    assert metadata["library_name"] == "peft"
    assert "base_model" not in metadata, "the Hub takes names of repositories only"


def test_a_card_of_ours_is_written_anew(folder):
    old = card_of(folder)
    assert MARK in old
    assert save_again(folder, old.replace("| LoRA rank | 4 |", "| LoRA rank | 5 |")) == old


def test_the_template_of_peft_is_replaced(folder):
    (folder / "adapter" / "README.md").unlink()
    load(folder, "base given").create_or_update_model_card(folder / "adapter")
    assert "[More Information Needed]" in card_of(folder)
    assert MARK in save_again(folder)


@pytest.mark.parametrize("change", ["by hand", "our card, mark deleted", "a half-filled template"])
def test_a_card_written_by_hand_is_kept(folder, change):
    if change == "our card, mark deleted":
        readme = card_of(folder).replace(MARK, "") + "\n## My own words\n"
    elif change == "a half-filled template":
        (folder / "adapter" / "README.md").unlink()
        load(folder, "base given").create_or_update_model_card(folder / "adapter")
        readme = card_of(folder).replace("[More Information Needed]", "My own words", 1)
    else:
        readme = BY_HAND
    assert "My own words" in readme
    after = save_again(folder, readme)
    assert "My own words" in after
    assert MARK not in after


@pytest.mark.parametrize("name", [None, "my base model", "C:\\models\\base", "a/b/c"])
def test_the_metadata_of_a_card_names_repositories_only(name):
    config = GatedLoraConfig(k=2, r=2, base_model_name_or_path=name)
    text = str(render_model_card(config, "me/adapter"))
    metadata = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in metadata
    assert not any("base_model" in tag for tag in metadata["tags"])
    assert "https://huggingface.co/my" not in text and "https://huggingface.co/the" not in text


def test_a_card_without_measurements_says_so(folder):
    assert "Not measured." in card_of(folder)


def test_a_card_has_a_table_of_what_was_measured(folder):
    config = GatedLoraConfig.from_pretrained(folder / "adapter")
    config.tokens_per_step = {"maths": 3.0, "code": 2.352}
    write_model_card(config, folder / "adapter", repo="me/named")
    card = card_of(folder)
    assert "| domain | tokens per step |\n|---|---|\n| maths | 3.00 |\n| code | 2.35 |" in card
    assert 'from_pretrained("me/named")' in card


def add_section(folder: Path) -> None:
    (folder / "adapter" / "README.md").write_text(f"{card_of(folder)}\n{SECTION}")


def test_results_of_evaluate_stay_while_the_weights_are_the_same(folder):
    add_section(folder)
    before = card_of(folder)
    load(folder, "base given").save_pretrained(folder / "adapter")
    assert card_of(folder) == before
    assert "## Evaluation" not in save_again(folder)


def test_a_license_stays_in_a_card_of_ours(folder):
    readme = card_of(folder).replace("library_name: peft", "library_name: peft\nlicense: apache-2.0")
    assert yaml.safe_load(save_again(folder, readme).split("---")[1])["license"] == "apache-2.0"


# ---------------------------------------------------------------- adapters with a name


class FolderApi:
    """The few calls of `push_to_hub`, on a folder."""

    folder: Path

    def __init__(self, **_):
        pass

    def create_repo(self, repo_id: str, **_):
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, *_, **__) -> bool:
        return False

    def create_commit(self, repo_id: str, operations, **_) -> None:
        for operation in operations:
            path = self.folder / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(Path(operation.path_or_fileobj).read_bytes())


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(FolderApi, "folder", tmp_path / "hub", raising=False)
    monkeypatch.setattr("hf_mtp.adapter.hub.HfApi", FolderApi)
    return tmp_path / "hub"


def loaded_as_the_card_says(folder: Path, card: Path):
    """The model that the example of a card makes, with a folder in the place of the repository."""
    example = card.read_text(encoding="utf-8").split("```python")[1].split("```")[0]
    names = {}
    exec(example.partition("tokenizer =")[0].replace("me/named", str(folder)), names)
    return names["model"]


def test_a_pushed_adapter_with_a_name_loads_as_its_card_says(hub_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(saved_base(tmp_path / "base"))
    model = get_peft_model(base, GatedLoraConfig(k=2, r=2), adapter_name="mtp")
    model.push_to_hub("me/named")
    assert {path.name for path in hub_folder.rglob("*")} == ADAPTER_FILES
    assert loaded_as_the_card_says(hub_folder, hub_folder / "README.md").peft_config["default"].k == 2


def test_a_card_by_hand_of_an_adapter_with_a_name_is_pushed(hub_folder, tmp_path):
    model = get_peft_model(tiny_base("llama"), GatedLoraConfig(k=2, r=2), adapter_name="mtp")
    model.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "mtp" / "README.md").write_text(BY_HAND)
    model.push_to_hub("me/named", card_from=tmp_path / "out" / "mtp")
    card = (hub_folder / "README.md").read_text()
    assert "# My own words" in card and MARK not in card
    assert {path.name for path in hub_folder.rglob("*")} == ADAPTER_FILES


class ApiWithCard:
    """A repository that holds a card."""

    card: Path

    def __init__(self, **_):
        pass

    def file_exists(self, *_, **__) -> bool:
        if not self.card.is_file():
            raise ConnectionError("no network")
        return True

    def hf_hub_download(self, *_, **__) -> str:
        return str(self.card)


@pytest.mark.parametrize("on_hub", ["by hand", "ours", "not reached"])
def test_a_trainer_keeps_a_card_that_was_written_on_the_hub(on_hub, tmp_path, monkeypatch):
    trained = trainer(tmp_path / "out")
    trained.create_model_card()
    ours = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(ApiWithCard, "card", tmp_path / "README.md", raising=False)
    monkeypatch.setattr("hf_mtp.adapter.hub.HfApi", ApiWithCard)
    trained.hub_model_id = "me/out"
    if on_hub != "not reached":
        (tmp_path / "README.md").write_text(BY_HAND if on_hub == "by hand" else ours)
    trained.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (card == BY_HAND) is (on_hub == "by hand")
    assert (MARK in card and 'from_pretrained("me/out")' in card) is (on_hub != "by hand")


def test_an_adapter_is_not_pushed_beside_a_model(hub_folder, monkeypatch):
    monkeypatch.setattr(FolderApi, "file_exists", lambda self, repo_id, file, **_: file == "config.json")
    with pytest.raises(ValueError, match="The repository me/base holds a model"):
        upgraded("llama").push_to_hub("me/base")
    assert not hub_folder.exists()


def test_pushed_adapters_each_load_as_their_card_says(hub_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(saved_base(tmp_path / "base"))
    model = get_peft_model(base, GatedLoraConfig(k=2, r=2))
    model.add_adapter("wide", GatedLoraConfig(k=4, r=2))
    model.push_to_hub("me/named")
    for k, card in ((2, hub_folder / "README.md"), (4, hub_folder / "wide" / "README.md")):
        assert f"| mask tokens (k) | {k} |" in card.read_text(encoding="utf-8")
        assert loaded_as_the_card_says(hub_folder, card).active_peft_config.k == k


def test_a_pushed_card_has_the_results_of_the_folder_while_the_weights_are_the_same(folder, hub_folder):
    add_section(folder)
    model = load(folder, "base given")
    model.push_to_hub("me/named", card_from=folder / "adapter")
    card = (hub_folder / "README.md").read_text()
    assert SECTION in card and 'from_pretrained("me/named")' in card
    randomised(model, seed=5).push_to_hub("me/named", card_from=folder / "adapter")
    assert "## Evaluation" not in (hub_folder / "README.md").read_text()


def test_a_card_written_by_hand_is_pushed(folder, hub_folder):
    (folder / "adapter" / "README.md").write_text(BY_HAND)
    load(folder, "base given").push_to_hub("me/named", card_from=folder / "adapter")
    card = (hub_folder / "README.md").read_text()
    assert "# My own words" in card and MARK not in card
