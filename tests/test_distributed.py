"""Training on several processes, with the configs in `examples/accelerate`: as good as one process, to rounding."""

import multiprocessing
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import ranks
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import generate, prompt, tiny_base, upgraded
from tiny_text import tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_mtp import MTPConfig, MTPTrainer
from hf_mtp.base.distributed import is_sharded
from hf_mtp.objective import losses
from hf_mtp.objective.request import ObjectiveRequest
from hf_mtp.passes.speculation_mode import SpeculationMode, speculation_mode

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed"),
    pytest.mark.skipif(
        "forkserver" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork processes"
    ),
]
K = 3
SHARDED = {"fsdp2", "zero3"}
TIED = {"zero3"}  # where the unembedding is the embedding, too
MUON = {"ddp"}  # where optimizers see whole matrices


def rows_of_all_lengths() -> list[list[int]]:
    """So that processes differ in how many masks they have."""
    return [row[: 5 + 5 * index % 9] for index, row in enumerate(prompt(13, rows=16, seed=3).tolist())]


def make_trainer(
    folder: Path, name: str, processes: int, tied: bool, checkpointing: bool = False, muon: bool = True
) -> MTPTrainer:
    """A trainer of the tiny model in `folder`, whose process has its part of batches of four rows."""
    base = AutoModelForCausalLM.from_pretrained(folder / f"base-{tied}")
    return MTPTrainer(
        model=PeftModel.from_pretrained(base, folder / f"start-{tied}", is_trainable=True),
        args=MTPConfig(
            output_dir=str(folder / name),
            max_steps=4,
            per_device_train_batch_size=4 // processes,
            per_device_eval_batch_size=4 // processes,
            learning_rate=1e-2,
            muon=muon,
            logging_steps=1,
            max_length=32,
            base_weight=1.0,
            auxiliary_weight=0.5,
            anchors_per_sequence=None,
            masks_per_part=8 * K,
            save_strategy="steps",
            save_steps=2,
            report_to="none",
            bf16=False,
            use_cpu=processes == 1,
            gradient_checkpointing=checkpointing,
            accelerator_config={"use_configured_state": processes > 1},
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows_of_all_lengths()}),
        eval_dataset=Dataset.from_dict({"input_ids": prompt(13, rows=4, seed=4).tolist()}),
        processing_class=tiny_tokenizer(),
    )


def made(config: str, folder: Path, name: str) -> MTPTrainer:
    """The trainer of one of several processes."""
    ranks.start_accelerate(config)
    trainer = make_trainer(folder, name, ranks.WORLD, config in TIED, checkpointing=config == "fsdp2")
    if config == "zero3":  # else weights as small as these are not spread at all, or stay once they are gathered
        settings = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        names = ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")
        settings |= {f"stage3_{name}": 0 for name in names}
    return trainer


def losses_of(trainer: MTPTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def measures_of(trainer: MTPTrainer) -> dict[str, float]:
    """Of an evaluation of all rows, whichever process has them, and of the training before."""
    measures = trainer.evaluate()
    return {name: measures[f"eval_{name}"] for name in ("loss", "tokens_per_pass", "accuracy_1", "num_tokens")}


def train_save_resume(rank: int, config: str, folder: Path) -> None:
    """What each process does."""
    whole = made(config, folder, "whole")
    seen_within = []
    whole.model.base_model.model.get_input_embeddings().register_forward_hook(
        lambda *_: seen_within.append(is_sharded(whole.model.base_model))
    )
    whole.train()
    whole.save_model()
    result = {
        "losses": losses_of(whole),
        "measures": measures_of(whole),
        "sharded": {is_sharded(whole.model), *seen_within},
        "muon": whole.uses_muon,
        "reads branches": speculation_mode(whole.model.base_model.model) is SpeculationMode.TREE,
    }
    whole.model.eval()
    options = {"synced_gpus": config in SHARDED}
    plain = generate(whole.model, prompt(), **options)
    fast = generate(whole.model, prompt(), mtp=True, mtp_strategy="quadratic", **options)
    result["identical"] = torch.equal(plain, fast)

    resumed = made(config, folder, "resumed")
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    resumed.save_model()

    # Nothing to learn in one process, many chunks of masks in the other: they must not wait for each other for ever.
    losses.ROWS_PER_CHUNK = 8
    ids = prompt(16, rows=2)
    batch = {"input_ids": ids, "labels": ids if rank else torch.full_like(ids, -100)}
    resumed.model_wrapped.train()
    loss = resumed.compute_loss(resumed.model_wrapped, batch)
    resumed.accelerator.backward(loss)
    result["uneven"] = loss.item()
    torch.save(result, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder with bases and untrained adapters, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("start")
    for tied in (False, True):
        tiny_base("llama", tie_word_embeddings=tied).save_pretrained(folder / f"base-{tied}")
        upgraded(AutoModelForCausalLM.from_pretrained(folder / f"base-{tied}"), K).save_pretrained(
            folder / f"start-{tied}"
        )
    for config in ("ddp", "zero2", "zero3"):
        name = alone_as(config)
        alone = make_trainer(folder, name, 1, config in TIED, muon=config in MUON)
        alone.train()
        alone.save_model()
        torch.save({"losses": losses_of(alone), "measures": measures_of(alone)}, folder / f"{name}.pt")
    return folder


def alone_as(config: str) -> str:
    """The name of what one process makes with the model and the optimizer of several."""
    return f"alone-{config in TIED}-{config in MUON}"


@pytest.mark.parametrize("config", ["ddp", "fsdp2", "zero2", "zero3"])
def test_processes_make_what_one_process_makes(config, start, tmp_path, monkeypatch):
    if config.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    if config == "fsdp2" and not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("this torch has no FSDP2")
    for path in start.glob("*-*"):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    ranks.run(train_save_resume, config, tmp_path)

    alone = torch.load(start / f"{alone_as(config)}.pt")
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks.WORLD)]
    for rank, result in enumerate(results):
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert result["measures"] == pytest.approx(alone["measures"], rel=1e-4)
        assert result["sharded"] == {config in SHARDED} and result["muon"] == (config in MUON)
        assert result["reads branches"] and result["identical"]
        assert (result["uneven"] > 0) == (rank == 1)
    expected = load_file(start / alone_as(config) / "adapter_model.safetensors")
    untrained = load_file(start / f"start-{config in TIED}" / "adapter_model.safetensors")
    for name in ("whole", "resumed", "whole/checkpoint-4"):
        found = load_file(tmp_path / name / "adapter_model.safetensors")
        assert found.keys() == expected.keys() == set(untrained)
        for key, tensor in expected.items():
            assert not torch.equal(tensor, untrained[key])
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4)


# Which threads of torch.distributed a process still has when the script has ended, by their names.
THREADS_LEFT = """
import os, runpy, sys
from pathlib import Path
runpy.run_path({script!r}, run_name="__main__")
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
Path(f"threads_{{os.environ['RANK']}}").write_text("".join(name for name in names if "gloo" in name))
"""


def test_command(tmp_path):
    """The command that the examples name, on CPUs.

    No thread that holds tensors is left: one that frees them while Python ends aborts the process.
    """
    script, config = tmp_path / "train.py", ranks.CONFIGS / "ddp.yaml"
    script.write_text(THREADS_LEFT.format(script=str(ranks.CONFIGS / "train.py")))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--mixed_precision", "no"]
    command += ["--main_process_port", "0", script, "--k", "3", "--rank", "4", "--output", tmp_path, "--set"]
    command += ["use_cpu=True", "bf16=False", "max_steps=1", "max_length=64", "anchors_per_sequence=4"]
    command += ["per_device_train_batch_size=1", "report_to='none'"]
    environment = {**os.environ, "PYTHONPATH": str(ranks.CONFIGS.parents[1]), "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
    process = subprocess.run(
        list(map(str, command)), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180
    )
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert len(list((tmp_path / "checkpoint-1").glob("rng_state_*"))) == ranks.WORLD
    assert [path.read_text() for path in tmp_path.glob("threads_*")] == [""] * ranks.WORLD


def test_one_process_holds_all(monkeypatch):
    model = upgraded("llama", K)
    assert not is_sharded(model) and not is_sharded(model.base_model)
    model.get_base_model().lm_head.weight.ds_id = 0  # as DeepSpeed marks what it spread
    assert not is_sharded(model)  # over no other process
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert is_sharded(model)


def test_models_without_branches_need_whole_weights(monkeypatch):
    model = upgraded("bloom", K).train()
    assert model(input_ids=prompt(), mtp_objective=ObjectiveRequest()).rows > 0
    monkeypatch.setattr("hf_mtp.passes.training_checks.is_sharded", lambda model: True)
    with pytest.raises(NotImplementedError, match="Use DDP or DeepSpeed ZeRO-2"):
        model(input_ids=prompt(), mtp_objective=ObjectiveRequest())
