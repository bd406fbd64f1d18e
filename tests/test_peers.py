"""`examples/benchmarks/peers.py`: peers decode exactly like plain decoding, and draft what they learned."""

import json
import sys
from importlib import import_module as script
from pathlib import Path

import pytest
import torch
from oracle import RIGHT
from peft import get_peft_model
from scripts import importable
from tiny_models import VOCAB, prompt, tiny_base, upgraded
from transformers import AutoModelForCausalLM

from hf_mtp import GatedLoraConfig

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [ROOT / "examples" / "benchmarks", ROOT / "examples" / "smollm2", ROOT / "docs"]
DRAFTERS = ("medusa", "eagle", "two passes")
NEW, K = 20, 3


@pytest.fixture(autouse=True)
def _importable():
    with importable(*FOLDERS):
        yield


def peer(name: str, count: int = K, dtype: torch.dtype = torch.float64) -> tuple:
    """A model and an untrained drafter for it, whose weights are random and far from zero."""
    if name == "two passes":
        model = upgraded("llama", k=K, dtype=dtype)
        model.to(dtype)
        return model, script("two_pass").TwoPassDrafter(model, count)
    base = tiny_base("llama", dtype=dtype)
    torch.manual_seed(1)
    if name == "medusa":
        head = script("medusa_heads").MedusaHeads(base, K)
    else:
        head = script("eagle_head").EagleHead(base)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 0.3)
    drafter = script("medusa_heads").MedusaDrafter if name == "medusa" else script("eagle_head").EagleDrafter
    return base, drafter(head.to(dtype), base, count)


class Steered:
    """Lets a peer make its drafts, and then makes them right or wrong as a test decides.

    Args:
        drafter: The peer.
        text_1S: The prompt and what plain decoding makes of it.
        right: Whether the draft for the token at this index of the text is right.
    """

    def __init__(self, drafter, text_1S: torch.LongTensor, right):
        self.drafter, self.text, self.right = drafter, text_1S[0].tolist(), right
        self.proposed = 0

    def begin(self):
        self.drafter.begin()

    def propose(self, ids_1S, state_1ND, cache, room):
        assert ids_1S[0].tolist() == self.text[: ids_1S.shape[1]]
        drafts = self.drafter.propose(ids_1S, state_1ND, cache, room)
        assert len(drafts) <= room
        self.proposed += len(drafts)
        places = range(ids_1S.shape[1], ids_1S.shape[1] + len(drafts))
        return [self.text[place] if self.right(place) else (self.text[place] + 1) % VOCAB for place in places]


def decode(model, drafter, ids_1T: torch.LongTensor, **options) -> torch.LongTensor:
    generate = script("speculation").speculative_generate
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(input_ids=ids_1T, custom_generate=generate, drafter=drafter, **options)


@pytest.mark.parametrize("right", RIGHT)
@pytest.mark.parametrize("name", DRAFTERS)
def test_right_and_wrong_drafts_give_the_text_of_plain_decoding(name, right):
    model, drafter = peer(name)
    plain = model.generate(input_ids=prompt(), max_new_tokens=NEW, do_sample=False)
    steered = Steered(drafter, plain, RIGHT[right])
    assert decode(model, steered, prompt()).tolist() == plain.tolist()
    assert steered.proposed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, K])
@pytest.mark.parametrize("name", DRAFTERS)
def test_own_drafts_give_the_text_of_plain_decoding(name, count, dtype):
    model, drafter = peer(name, count, dtype)
    for seed in (2, 3):
        ids = prompt(seed=seed)
        plain = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)
        assert decode(model, drafter, ids).tolist() == plain.tolist()


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_text_ends_where_it_does_in_plain_decoding(name):
    model, drafter = peer(name)
    whole = model.generate(input_ids=prompt(), max_new_tokens=NEW, do_sample=False)
    end = whole[0, -6].item()
    plain = model.generate(input_ids=prompt(), max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=0)
    steered = Steered(drafter, whole, RIGHT["always"])
    assert decode(model, steered, prompt(), eos_token_id=end, pad_token_id=0).tolist() == plain.tolist()
    assert plain.shape[1] < whole.shape[1]


# ---------------------------------------------------------------- drafts are what a pass over the whole text gives


class Compared:
    """Lets a peer make its drafts, and compares them with a slow reference."""

    def __init__(self, drafter, reference):
        self.drafter, self.reference, self.seen = drafter, reference, 0

    def begin(self):
        self.drafter.begin()

    def propose(self, ids_1S, state_1ND, cache, room):
        columns = cache.get_seq_length()
        drafts = self.drafter.propose(ids_1S, state_1ND, cache, room)
        assert cache.get_seq_length() == columns == ids_1S.shape[1] - 1
        assert drafts == self.reference(ids_1S)[: len(drafts)]
        self.seen += len(drafts)
        return drafts


def base_states(model, ids_1S: torch.LongTensor) -> torch.Tensor:
    return model(input_ids=ids_1S, output_hidden_states=True).hidden_states[-1]


@torch.no_grad()
def medusa_reference(model, drafter, ids_1S):
    state_1D = base_states(model, ids_1S[:, :-1])[:, -1]
    return [model.lm_head(drafter.heads(state_1D, head)).argmax().item() for head in range(K)]


@torch.no_grad()
def eagle_reference(model, drafter, ids_1S):
    """Without a cache: the head reads the whole text again for each draft."""
    state_1ND, drafts = base_states(model, ids_1S[:, :-1]), []
    for _ in range(K):
        foreseen_1D = drafter.head(model.get_input_embeddings()(ids_1S[:, 1:]), state_1ND)[:, -1]
        drafts.append(model.lm_head(foreseen_1D).argmax().item())
        ids_1S = torch.cat([ids_1S, torch.tensor([[drafts[-1]]])], dim=1)
        state_1ND = torch.cat([state_1ND, foreseen_1D[:, None]], dim=1)
    return drafts


@torch.no_grad()
def two_pass_reference(model, drafter, ids_1S):
    masks_1K = torch.arange(VOCAB, VOCAB + K)[None]
    with model.base_model.capture_hidden_states() as captured:
        model(input_ids=torch.cat([ids_1S, masks_1K], dim=1))
    first_1 = model.get_base_model().lm_head(captured.states[:, -K - 1]).argmax(dim=-1)
    return [first_1.item(), *model.base_model.draft(first_1, captured.states[:, -K:]).tokens[0]]


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafts_are_those_of_a_pass_over_the_whole_text(name):
    model, drafter = peer(name)
    reference = {"medusa": medusa_reference, "eagle": eagle_reference, "two passes": two_pass_reference}[name]
    compared = Compared(drafter, lambda ids_1S: reference(model, drafter, ids_1S))
    decode(model, compared, prompt())
    assert compared.seen > NEW


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["medusa", "eagle"])
def test_a_peer_that_learned_a_text_drafts_it(name):
    """So what is learned is what is drafted, and not the token before or after it."""
    base = tiny_base("llama").requires_grad_(False)
    ids = base.generate(input_ids=prompt(), max_new_tokens=NEW, do_sample=False)
    torch.manual_seed(0)
    head = script("peer_training").PEERS[name](base)
    is_answer = torch.arange(ids.shape[1])[None] >= prompt().shape[1]
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        head.learn(base, ids, base_states(base, ids), is_answer)
        optimizer.step()
    drafter = script("medusa_heads").MedusaDrafter if name == "medusa" else script("eagle_head").EagleDrafter
    passes = []
    hook = base.model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert decode(base, drafter(head.eval(), base, K), prompt()).tolist() == ids.tolist()
    hook.remove()
    assert len(passes) < 0.6 * NEW, len(passes)


# ---------------------------------------------------------------- the script


QUICKSTART = ROOT / "examples" / "quickstart" / "base"
BEST = {"prompt lookup": "5 tokens, n-grams up to 3", "early exit": "layer 10, 2 tokens", "small draft": "3 tokens"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script on the quickstart's base, and returns its report and its folder."""
    sets = {
        "gsm8k_test": [{"question": f"{number} + 2?"} for number in range(42)],
        "mbpp": [{"task_id": number, "text": f"Sort list {number}."} for number in range(1, 43)],
        "chat_test": [{"prompt": f"Hello {number}!"} for number in range(42)],
        "answers": [
            {
                "prompt": [{"role": "user", "content": f"Count to {number}."}],
                "completion": [{"role": "assistant", "content": "One, two, three, four, five, six."}],
            }
            for number in range(8)
        ],
    }
    for name, rows in sets.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "best.json").write_text(json.dumps({"best": BEST}))
    base = AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype=torch.float32)
    get_peft_model(base, GatedLoraConfig(k=8, r=2)).save_pretrained(tmp_path / "shipped")

    same_tokenizer = property(lambda models: {"assistant_model": models.small_draft})
    monkeypatch.setattr(script("methods").Models, "small_draft_options", same_tokenizer)

    def run(*arguments: str) -> dict:
        files = [tmp_path / "answers.jsonl", tmp_path, tmp_path / "report.json"]
        options = {"base": QUICKSTART, "adapter": tmp_path / "shipped", "trained": tmp_path / "trained"}
        options |= {"best": tmp_path / "best.json", "dtype": "float32", "prompts": 1, "new-tokens": 6, "threads": 1}
        flags = [part for name, value in options.items() for part in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["peers.py", *map(str, [*files, *flags, *arguments])])
        monkeypatch.setattr(script("paired"), "WARM_UP_TOKENS", 2)
        monkeypatch.setattr(script("peers"), "SETTING_TOKENS", 4)
        monkeypatch.setattr(script("peers"), "peak_memory", script("peer_memory").measured_here)
        script("peers").main()
        return json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))

    run.folder = tmp_path
    return run


def test_the_script_trains_measures_and_measures_again(run, monkeypatch):
    report = run("--minutes", "0.002")
    memory = json.loads((run.folder / "trained" / "memory.json").read_text(encoding="utf-8"))
    for name, record in report["trained"].items():
        assert record["parameters"] > 0
        assert name == "shipped" or record["steps"] > 0
    for methods in report["domains"].values():
        assert {*memory} == {*methods}
        for name, row in methods.items():
            assert row["identical"] == row["prompts"] == 1, name
        assert methods["plain"]["tokens_per_pass"] == 1.0
    assert all(answer != "runs" for answer in report["refused"].values())
    monkeypatch.setattr(script("peers"), "train_missing", None)  # would raise if it were called
    assert run("--measure-only")["best"] == report["best"]
    assert_table(report, memory, run.folder, monkeypatch)


def assert_table(report: dict, memory: dict, folder: Path, monkeypatch) -> None:
    """The page's table has every method."""
    monkeypatch.setattr(script("tables"), "RESULTS", folder)
    (folder / "peers_trained.json").write_text(json.dumps(report | {"memory_mib": memory}))
    lines = script("peer_tables").trained_peers().splitlines()[2:-2]
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in report["best"]]


def test_nothing_is_measured_without_what_was_trained(run):
    with pytest.raises(SystemExit, match="lacks ours, medusa, eagle"):
        run("--measure-only")
