"""What of the integration with vLLM needs no vLLM: its files, its arguments, its schedule, and the command.

The tests in `with_vllm` run vLLM itself.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_cli import run
from tiny_models import tiny_base, upgraded
from transformers import AutoModelForCausalLM

import hf_mtp
from hf_mtp.decoding.schedule.costs import PassCosts
from hf_mtp.export.vllm import export_vllm
from hf_mtp.serving.vllm.adapter import EMBEDDINGS, IDS, ExportedAdapter
from hf_mtp.serving.vllm.arguments import command_line, engine_arguments
from hf_mtp.serving.vllm.schedule import MaskSchedule
from hf_mtp.serving.vllm_server import VllmSettings, serve_with_vllm, vllm_command

K = 3


def exported(folder: Path, **config) -> str:
    """An adapter of a tiny base, exported."""
    tiny_base().save_pretrained(folder / "base")
    model = upgraded(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), K, **config)
    model.save_pretrained(folder / "adapter")
    export_vllm(str(folder / "adapter"), folder / "exported", str(folder / "base"))
    return str(folder / "exported")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return exported(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def copy(folder, tmp_path):
    """A function that copies the exported adapter with other settings of its `mtp.safetensors`."""

    def make(**settings) -> Path:
        for file in Path(folder).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        with safe_open(tmp_path / "mtp.safetensors", "pt") as file:
            tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        save_file(tensors, tmp_path / "mtp.safetensors", {**meta, **settings})
        return tmp_path

    return make


# ---------------------------------------------------------------- files


def test_the_exported_adapter_is_read(folder):
    adapter = ExportedAdapter.read(folder)
    assert (adapter.k, adapter.rank, adapter.hidden_size, adapter.vocab_size) == (K, 4, 32, 97)
    assert adapter.base == str(Path(folder).parent / "base")
    assert {"q_proj", "down_proj"} <= set(adapter.modules)
    masks, head = adapter.weights(torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(adapter.base)
    own = upgraded(model, K).base_model
    assert masks[EMBEDDINGS].shape == (K, 32)
    hidden = torch.randn(2, K, 32)
    previous = torch.randn(2, K, 32)
    assert torch.equal(head(previous, hidden), own.sampler_head()(previous, hidden))


def test_noise_tokens_and_no_sampler(tmp_path):
    adapter = ExportedAdapter.read(exported(tmp_path, masks="noise", sampler=False))
    masks, head = adapter.weights(torch.device("cpu"))
    assert head is None and masks[IDS].shape == (K,)


def test_what_is_not_an_exported_adapter(folder, copy, tmp_path):
    with pytest.raises(ValueError, match="no adapter_config.json. Make the folder with hf-mtp export"):
        ExportedAdapter.read(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="of type GATED_LORA, but vLLM reads LORA"):
        ExportedAdapter.read(str(Path(folder).parent / "adapter"))
    with pytest.raises(ValueError, match="format version '2'"):
        ExportedAdapter.read(str(copy(format_version="2")))
    with pytest.raises(ValueError, match="recurrent sampler head"):
        ExportedAdapter.read(str(copy(sampler_recurrent="True")))
    config = json.loads((copy() / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="DoRA"):
        ExportedAdapter.read(str(tmp_path))
    (copy() / "mtp.safetensors").unlink()
    with pytest.raises(ValueError, match="mtp.safetensors is missing or broken"):
        ExportedAdapter.read(str(tmp_path))


# ---------------------------------------------------------------- arguments


def test_arguments_of_the_engine(folder):
    arguments = engine_arguments(folder, k=2)
    assert arguments["speculative_config"]["num_speculative_tokens"] == 2
    # Not taken for "all": the engine refuses it when it starts.
    assert engine_arguments(folder, k=0)["speculative_config"]["num_speculative_tokens"] == 0
    assert arguments["max_lora_rank"] == 8 and arguments["max_loras"] == 2
    options = command_line(arguments)
    assert options[:2] == ["--model", str(Path(folder).parent / "base")]
    assert "--enable-lora" in options and "True" not in options
    assert json.loads(options[options.index("--additional-config") + 1])["hf_mtp"] == folder
    place = options.index("--lora-target-modules")
    assert options[place + 1 : place + 1 + len(arguments["lora_target_modules"])] == arguments["lora_target_modules"]
    with pytest.raises(ValueError, match="must be auto or linear in vLLM, but is 'quadratic'"):
        engine_arguments(folder, strategy="quadratic")


# ---------------------------------------------------------------- schedule

NEARLY_FREE = PassCosts([(1, 1.0), (400, 1.1)], [(1, 1.0), (400, 1.1)])
FREE_TO_TEN = PassCosts([(1, 1.0), (10, 1.0), (20, 11.0)], [(1, 1.0), (10, 1.0), (20, 11.0)])


def schedule(costs: PassCosts, accepted: int = 2, offered: int = 4) -> MaskSchedule:
    made = MaskSchedule(offered)
    made.costs = costs
    for _ in range(300):
        made.observe(offered, accepted)
    return made


def test_masks_that_cost_little_are_computed_for_all():
    requests, masks = schedule(NEARLY_FREE).plan(16)
    assert requests == 16 and masks >= 2


def test_masks_go_when_more_requests_run_and_come_back():
    made = schedule(FREE_TO_TEN)
    masks = [made.plan(requests)[1] for requests in (1, 2, 4, 8, 16)]
    assert masks[0] >= 2 and masks == sorted(masks, reverse=True) and masks[-2:] == [0, 0]
    assert made.plan(1) == (1, masks[0])


def test_masks_that_are_never_right_are_tried_now_and_then_by_one_request():
    made = schedule(PassCosts([(1, 1.0), (2, 1.2)], [(1, 1.0), (2, 1.2)]), accepted=0)
    plans = [made.plan(16) for _ in range(2 * MaskSchedule.REST)]
    assert plans.count((1, 4)) == 2 and plans.count((0, 0)) == len(plans) - 2


def test_the_price_of_a_token_is_that_of_many_passes():
    """Against a simulation of chains of drafts that are each right with probability 0.7."""
    made, masks = schedule(FREE_TO_TEN), 3
    made.acceptance.survival = [0.7, 0.49, 0.343, 0.2401]
    generator = torch.Generator().manual_seed(0)
    tokens = columns = drafts = 0
    for _ in range(20000):
        right = int((torch.rand(drafts, generator=generator) < 0.7).long().cumprod(0).sum())
        tokens, columns = tokens + 1 + right, columns + 1 + drafts + masks
        drafts = masks if right == drafts else 0
    made.costs = PassCosts([(1, 1.0), (2, 2.0)], [(1, 1.0), (2, 2.0)])  # a pass costs its columns
    assert made.price(1, masks) == pytest.approx(columns / tokens, rel=0.02)


# ---------------------------------------------------------------- the command, and imports

WITHOUT_PEFT = """
import sys
sys.modules["peft"] = sys.modules["trl"] = sys.modules["transformers"] = None
from hf_mtp.serving.vllm import adapter, arguments, schedule
print(arguments.engine_arguments(sys.argv[1])["max_lora_rank"])
"""


def test_vllm_s_process_needs_no_peft(folder):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PEFT, folder],
        capture_output=True,
        text=True,
        cwd=Path(hf_mtp.__file__).parents[1],
    )
    assert done.stdout.strip() == "8", done.stderr


def test_the_command_of_the_server(folder):
    settings = VllmSettings("me/mine", port=8123, max_rows=4, python="/envs/vllm/python", options=["--enforce-eager"])
    command = vllm_command(settings, folder)
    assert command[:3] == ["/envs/vllm/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert command[-1] == "--enforce-eager"
    for name, value in {"served-model-name": "me/mine", "port": "8123", "max-num-seqs": "4"}.items():
        assert command[command.index(f"--{name}") + 1] == value


def test_the_server_runs_what_it_exported(folder, tmp_path, monkeypatch):
    """A stand-in for the engine's Python writes down its command, its key, and what it finds in the folder."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n[ $1 = -c ] && exit 0\n"
        f'echo "$VLLM_API_KEY $*" > {tmp_path}/said\nfor word in "$@"; do case "$word" in *hf_mtp*adapter*) '
        f'ls "$(echo "$word" | sed \'s/.*"hf_mtp": "//; s/".*//\')" >> {tmp_path}/said;; esac; done\nexit 7\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv("HF_MTP_API_KEY", "secret")
    adapter = str(Path(folder).parent / "adapter")
    options = ["serve", adapter, "--engine", "vllm", "--vllm-python", str(python), "--", "--enforce-eager"]
    run(*options, code=7)
    said = (tmp_path / "said").read_text()
    assert said.startswith("secret -m vllm.entrypoints.openai.api_server") and "--enforce-eager" in said
    assert "mtp.safetensors" in said and "secret" not in said.removeprefix("secret")


def test_wrong_usage_of_the_server(folder):
    with pytest.raises(ImportError, match="has no vllm.*pip install --no-deps hf_mtp.*--vllm-python"):
        serve_with_vllm(VllmSettings(folder))
    assert "--engine vllm" in run("serve", folder, "--", "--enforce-eager", code=2).output
    for option, value in (("--max-new-tokens", "9"), ("--device", "cpu"), ("--log-level", "info")):
        said = run("serve", folder, "--engine", "vllm", option, value, code=2).output
        assert option in said and "would be ignored with --engine vllm" in " ".join(said.split())
