"""What goes wrong while training: killed processes, numbers that are not finite, dead workers, wrong checkpoints."""

import json
import math
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny_models import adapter_parameters, prompt, tiny_base, upgraded
from tiny_training import ROWS, SAVING, K, RaisesAt, assert_same_end, logged, texts, trainer
from transformers import Trainer
from transformers.utils.logging import get_logger

from hf_mtp import MTPConfig
from hf_mtp.training.recovery.checkpoint import UNFINISHED, contents, damage_of, newest_complete_checkpoint
from hf_mtp.training.recovery.compatibility import (
    describe,
    describe_objective,
    describe_steps,
    refuse_different_processes,
    step_size_warning,
)

# ---------------------------------------------------------------- killed

KILLS = 10
KILLED_RUN = {**SAVING, "save_steps": 1, "save_total_limit": 1, "max_steps": 12}


def copy_of_this_process(action, *args) -> int:
    """Starts one that calls `action` and ends; gives its id."""
    child = os.fork()
    if not child:
        try:
            action(*args)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os._exit(1)
        os._exit(0)
    return child


def exit_code(child: int) -> int:
    """Waits for a process: 0 if all went well, -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(seconds: float, child: int) -> int:
    """Kills a process after that time, if it has not ended by then; gives its exit code."""
    killer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    killer.start()
    code = exit_code(child)
    killer.cancel()
    killer.join()  # no thread is there when the next copy is made
    return code


def kill_in_a_save(moment: int) -> None:
    """Kills this process at the `moment`-th time that Python opens, renames or deletes what belongs to a save."""
    moments = iter(range(moment, -1, -1))

    def count(event, args):
        about_saves = any(UNFINISHED in arg for arg in args if isinstance(arg, str))
        if about_saves and next(moments, None) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="trains in copies of this process")
def test_killed_at_any_moment_it_goes_on_from_a_whole_checkpoint(tmp_path):
    """The copies start with all imported and the trainer made, so that each takes the time of its steps only."""
    whole = trainer(tmp_path / "whole", **KILLED_RUN)
    start = time.monotonic()
    whole.train()
    seconds = time.monotonic() - start
    folder = tmp_path / "killed"
    made = trainer(folder, **KILLED_RUN)

    def go_on() -> None:
        made.train(resume_from_checkpoint=newest_complete_checkpoint(folder) is not None)

    def go_on_and_die(moment: int) -> None:
        kill_in_a_save(moment)
        go_on()

    draw, codes, unfinished = random.Random(0), [], 0
    for kill in range(KILLS):
        if kill % 2:  # by the clock, or else in the second save from here
            child = copy_of_this_process(go_on_and_die, 70)
            codes.append(killed_after(draw.uniform(0, seconds / 4), child))
        else:
            codes.append(exit_code(copy_of_this_process(go_on_and_die, draw.randint(1, 70))))
        unfinished += Path(folder, UNFINISHED).is_dir()
        assert all(damage_of(checkpoint) is None for checkpoint in folder.glob("checkpoint-*"))
    assert set(codes) == {-signal.SIGKILL}
    assert unfinished > 2
    go_on()
    assert_same_end(made, whole, steps=made.args.max_steps)
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [f"checkpoint-{made.args.max_steps}"]


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def logs(caplog, monkeypatch):
    """What is logged by transformers and by this package."""
    for name in ("transformers", "hf_mtp"):
        monkeypatch.setattr(get_logger(name), "propagate", True)
    return caplog


def test_resuming_passes_over_a_checkpoint_that_is_not_whole(tmp_path, logs):
    whole = trainer(tmp_path, **SAVING)
    whole.train()
    Path(tmp_path, "checkpoint-6", "optimizer.pt").unlink()
    weights = Path(tmp_path, "checkpoint-4", "adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    resumed = trainer(tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-6 is skipped because it is incomplete: it lacks optimizer.pt" in logs.text
    assert "checkpoint-4 is skipped" in logs.text
    assert "bytes of adapter_model.safetensors" in logs.text
    assert_same_end(resumed, whole, steps=4)
    assert damage_of(tmp_path / "checkpoint-6") is None


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match="No complete checkpoint to resume from in .*Omit `resume_from_checkpoint`"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("weights_only", [False, True])
def test_resuming_without_an_optimizer_says_so(weights_only, tmp_path, logs):
    trainer(tmp_path, **{**SAVING, "max_steps": 2, "save_only_model": weights_only}).train()
    trainer(tmp_path, **{**SAVING, "max_steps": 3}).train(resume_from_checkpoint=True)
    assert ("checkpoint-2 has weights, but no state of the optimizer" in logs.text) == weights_only


def test_the_best_checkpoint_and_the_newest_stay(tmp_path):
    """The learning rate is so high that the first checkpoint is the best one."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 2, "learning_rate": 3.0}
    options |= {"muon": False, "load_best_model_at_end": True}
    made = trainer(tmp_path, eval_dataset=texts(4), **{**SAVING, **options})
    made.train()
    best = tmp_path / f"checkpoint-{made.state.best_global_step}"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted({best.name, "checkpoint-6"})
    assert best.name != "checkpoint-6"
    assert Path(made.state.best_model_checkpoint) == best
    saved = json.loads(Path(tmp_path, "checkpoint-6", "trainer_state.json").read_text(encoding="utf-8"))
    assert Path(saved["best_model_checkpoint"]) == best
    saved = json.loads(Path(best, "trainer_state.json").read_text(encoding="utf-8"))
    assert Path(saved["best_model_checkpoint"]) == best


def test_a_checkpoint_is_pushed_under_its_own_name(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((folder, damage_of(Path(folder))))
    )
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    trainer(tmp_path, push_to_hub=True, hub_model_id="me/tiny", hub_strategy="checkpoint", **SAVING).train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), None) for step in (2, 4, 6)]


# ---------------------------------------------------------------- resuming another training


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Folder of a training of two steps and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    trainer(folder, **{**SAVING, "max_steps": 2}).train()
    return folder


def contents_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: upgraded("llama", K + 2), "`k` is 3 in the checkpoint and 5 in the model"),
        (lambda: upgraded("llama", K, r=8), "`r` is 4 in the checkpoint and 8 in the model"),
        (
            lambda: upgraded("llama", K, target_modules=["q_proj"]),
            "the layers with a LoRA differ: 14 in the checkpoint and 2 in the model",
        ),
        (lambda: upgraded("llama", K, sampler=False), "`sampler` is True in the checkpoint and False in the model"),
        (lambda: upgraded("llama", K, sampler_recurrent=True), "`sampler_recurrent` is False in the checkpoint"),
        (lambda: upgraded("llama", K, use_dora=True), "`use_dora` is False in the checkpoint and True in the model"),
        (lambda: upgraded(tiny_base("llama", seed=1), K), "the weights of the base differ"),
        (lambda: upgraded(tiny_base("llama", vocab_size=101), K), "`base_vocab_size` is 97 in .* and 101 in"),
        (
            lambda: upgraded(tiny_base("llama", hidden_size=48, num_attention_heads=6), K),
            "`base_hidden_size` is 32 in",
        ),
    ],
    ids=["k", "rank", "layers", "sampler", "recurrent", "dora", "base", "vocabulary", "width"],
)
def test_a_checkpoint_of_another_adapter_is_refused(model, message, trained, tmp_path):
    before = contents_of(trained)
    made = trainer(trained, model=model(), **SAVING)
    weights = {name: parameter.clone() for name, parameter in adapter_parameters(made.model).items()}
    with pytest.raises(ValueError, match=f"checkpoint-2 cannot be resumed by this training: .*{message}"):
        made.train(resume_from_checkpoint=True)
    assert contents_of(trained) == before
    assert all(torch.equal(parameter, weights[name]) for name, parameter in adapter_parameters(made.model).items())


def test_the_base_in_another_precision_is_the_same_base(trained, tmp_path):
    made = trainer(tmp_path, model=upgraded(tiny_base("llama", dtype=torch.bfloat16), K), max_steps=3)
    made.train(resume_from_checkpoint=str(trained / "checkpoint-2"))
    assert made.state.global_step == 3


def test_steps_of_another_length_go_on_and_say_what_changes(trained, tmp_path, logs):
    made = trainer(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    made.train(resume_from_checkpoint=str(trained / "checkpoint-2"))
    assert made.state.global_step == 3
    assert "Steps had 4 sequences and have 8 from here on" in logs.text


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ((1, 8), (2, 8), "written by 1 process.*resumed by 2"),
        ((2, 8), (1, 4), "with 1 process.* a step has 8"),
        ((2, 8), (2, 8), None),
    ],
)
def test_another_number_of_processes(there, here, message):
    change = step_size_warning(describe_steps(*there), describe_steps(*here))
    assert re.search(message, change) if message else change is None


def test_processes_that_train_different_adapters_are_refused():
    one, other = (
        describe(upgraded("llama", k).base_model)
        | describe_objective(MTPConfig("out", use_cpu=True, bf16=False, **options).resolved_recipe(), 128)
        for k, options in ((3, {}), (2, {"lcm_weight": 0.5}))
    )
    refuse_different_processes([one, one])
    with pytest.raises(
        ValueError, match=r"Processes 0 and 2 .*`k` is 3 in process 0 and 2 in process 2; `lcm \(recipe\)` is"
    ):
        refuse_different_processes([one, one, other])


# ---------------------------------------------------------------- numbers that are not finite

BAD = 96  # a token whose embedding is not finite


def poisoned() -> torch.nn.Module:
    """An upgraded model that makes NaN of a row with the token `BAD`."""
    model = upgraded("llama", K)
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = torch.inf
    return model


def with_bad_row(row: int) -> Dataset:
    """Rows of tokens, one of them with `BAD`; not to be shuffled."""
    rows = [[5 + (3 * column + 7 * number) % 90 for column in range(14)] for number in range(ROWS)]
    rows[row][3] = BAD
    return Dataset.from_dict({"input_ids": rows})


# A row of step 3, of four rows each or of two batches of two.
NONFINITE_RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "sequential"}
IN_STEP_3 = 10
SHAPES = pytest.mark.parametrize("shape", [(4, 1), (2, 2)], ids=["whole", "accumulated"])


def shaped(shape: tuple[int, int]) -> dict:
    return {"per_device_train_batch_size": shape[0], "gradient_accumulation_steps": shape[1]}


@SHAPES
def test_a_loss_that_is_not_finite_ends_training_and_names_its_batch(shape, tmp_path):
    made = trainer(tmp_path, with_bad_row(IN_STEP_3), poisoned(), **NONFINITE_RUN, **shaped(shape))
    with pytest.raises(FloatingPointError) as caught:
        made.train()
    message = str(caught.value)
    assert message.startswith("The loss of step 3 is not finite (loss_base=nan, ")
    assert "The adapter's weights are finite. The batch, in process 0:" in message
    assert "w96" in message
    assert message.count("  row ") == shape[0]
    assert "nonfinite='skip'" in message
    assert newest_complete_checkpoint(tmp_path).name == "checkpoint-2"
    assert all(parameter.isfinite().all() for parameter in adapter_parameters(made.model).values())


@SHAPES
def test_a_loss_that_is_not_finite_leaves_its_step_out(shape, tmp_path, logs):
    states = {}

    def keep(made, step):
        states[step] = {name: parameter.clone() for name, parameter in adapter_parameters(made.model).items()}

    made = trainer(
        tmp_path,
        with_bad_row(IN_STEP_3),
        poisoned(),
        nonfinite="skip",
        weight_decay=0.1,
        **NONFINITE_RUN,
        **shaped(shape),
    )
    for step in range(1, 5):
        made.add_callback(RaisesAt(step, lambda step=step: keep(made, step)))
    made.train()
    same = [
        all(torch.equal(states[a][name], states[b][name]) for name in states[a]) for a, b in ((1, 2), (2, 3), (3, 4))
    ]
    assert same == [False, True, False]
    assert logged(made, "skipped_steps") == [0, 0, 1, 1]
    assert all(torch.isfinite(torch.tensor(logged(made, name))).all() for name in ("loss", "loss_lcm", "grad_norm"))
    for state in made.optimizer.state.values():
        assert all(value.isfinite().all() for value in state.values() if isinstance(value, torch.Tensor))
        assert state["step"] == 3
    assert "The loss of step 3 is not finite" in logs.text
    assert "The step is skipped" in logs.text


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_gradients_that_are_not_finite(policy, tmp_path, logs):
    model = upgraded("llama", K)
    made = trainer(tmp_path, model=model, nonfinite=policy, **NONFINITE_RUN)
    name, parameter = next(iter(adapter_parameters(model).items()))
    parameter.register_hook(lambda gradient: gradient * (torch.inf if made.state.global_step == 2 else 1))
    if policy == "skip":
        made.train()
        assert logged(made, "skipped_steps")[-1] == 1
        assert parameter.isfinite().all()
    else:
        with pytest.raises(FloatingPointError, match="The gradients of step 3 are not finite, though its losses"):
            made.train()
        assert newest_complete_checkpoint(tmp_path).name == "checkpoint-2"


def test_a_loss_that_overflows_with_finite_gradients(tmp_path):
    made = trainer(tmp_path, nonfinite="skip", muon=False, **NONFINITE_RUN)
    made.model.register_forward_hook(
        lambda model, args, objective: replace(
            objective, loss=objective.loss + (torch.inf if made.state.global_step == 2 else 0)
        )
    )
    made.train()
    assert logged(made, "skipped_steps") == [0, 0, 1, 1]
    assert {int(state["step"]) for state in made.optimizer.state.values()} == {3}


def test_an_evaluation_that_is_not_finite_is_reported_as_it_is(tmp_path):
    made = trainer(tmp_path, model=poisoned(), eval_dataset=with_bad_row(0))
    assert math.isnan(made.evaluate()["eval_loss_base"])


def test_an_unknown_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`nonfinite` must be one of 'raise', 'skip', but got 'ignore'"):
        trainer(tmp_path, nonfinite="ignore")


# ---------------------------------------------------------------- workers


def reads_or_dies(batch: dict) -> dict:
    """What is read of a dataset; the worker that reads its row 14 kills itself."""
    if 14 in batch["row"] and torch.utils.data.get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    ids = [prompt(14, seed=row)[0].tolist() for row in batch["row"]]
    return {"input_ids": ids, "labels": ids}


def test_a_worker_that_dies_ends_training_with_what_to_do(tmp_path):
    options = {"dataloader_num_workers": 1, "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    rows = Dataset.from_dict({"row": range(ROWS)}).with_transform(reads_or_dies)
    made = trainer(tmp_path, rows, remove_unused_columns=False, **NONFINITE_RUN, **options)
    with pytest.raises(
        RuntimeError, match=r"(killed by signal|exited unexpectedly).*`dataloader_num_workers=1`.*resume with"
    ) as caught:
        made.train()
    newest = newest_complete_checkpoint(tmp_path)
    assert newest is not None
    assert str(newest) in str(caught.value)


# ---------------------------------------------------------------- two processes


def in_two_processes(action) -> list[int]:
    """Calls `action(rank)` in two copies of this process that can talk to each other; gives their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        action(rank)

    return [exit_code(child) for child in [copy_of_this_process(run, rank) for rank in range(2)]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="trains in copies of this process")
def test_two_processes_leave_out_the_same_step_and_write_one_checkpoint(tmp_path, logs):
    """The bad row is of the second process. In the end both try to go on with another adapter each, and one alone."""

    def train(rank: int) -> None:
        options = {**NONFINITE_RUN, "per_device_train_batch_size": 2, "save_total_limit": 1, "nonfinite": "skip"}
        made = trainer(tmp_path, with_bad_row(IN_STEP_3), poisoned(), **options)
        made.train()
        assert logged(made, "skipped_steps") == [0, 0, 1, 1]
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"checkpoint-4"}
        weights = {name: parameter.detach() for name, parameter in adapter_parameters(made.model).items()}
        save_file(weights, tmp_path / f"{rank}.safetensors")
        with pytest.raises(ValueError, match="Processes 0 and 1 .*`k` is 2 in process 0 and 3 in process 1"):
            trainer(tmp_path, model=upgraded("llama", 2 + rank)).train(resume_from_checkpoint=True)

    assert in_two_processes(train) == [0, 0]
    one, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(one[name], other[name]) and one[name].isfinite().all() for name in one)
    assert {"rng_state_0.pth", "rng_state_1.pth"} < {path.name for path in Path(tmp_path, "checkpoint-4").iterdir()}
    assert contents(tmp_path / "checkpoint-4")["steps"] == {"processes": 2, "sequences_per_step": 4}
    assert damage_of(tmp_path / "checkpoint-4") is None
    alone = trainer(tmp_path, with_bad_row(0), poisoned(), **{**NONFINITE_RUN, "max_steps": 5, "nonfinite": "skip"})
    alone.train(resume_from_checkpoint=True)
    assert "The checkpoint was written by 2 process(es) and is resumed by 1" in logs.text
    assert alone.state.global_step == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="trains in copies of this process")
def test_two_processes_evaluate_every_row_once(tmp_path):
    """Nine rows in batches of two for each process: the last batches are filled up with three of the first rows."""
    names = ("loss", "loss_sampler", "accuracy_1", "tokens_per_pass", "tokens_per_block")

    def evaluate(rank: int) -> None:
        rows = texts(9).map(lambda row: {"text": " ".join(row["text"].split()[: 5 + len(row["text"]) % 9])})
        found = trainer(tmp_path, per_device_eval_batch_size=2).evaluate(rows)
        (tmp_path / f"{rank}.json").write_text(json.dumps({name: found[f"eval_{name}"] for name in names}))

    assert in_two_processes(evaluate) == [0, 0]
    evaluate(2)
    one, other, alone = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3))
    assert one == pytest.approx(alone) and other == pytest.approx(alone)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="trains in copies of this process")
def test_two_processes_follow_one_clock(tmp_path, monkeypatch):
    """The second process has a faster clock, by which the learning rate would fall faster, and training end first."""

    def train(rank: int) -> None:
        clock = iter(range(0, 100_000, 10 + 5 * rank))
        monkeypatch.setattr("hf_mtp.training.callbacks.deadline.time.monotonic", lambda: next(clock))
        made = trainer(tmp_path, max_minutes=2, max_steps=50, ddp_timeout=30, lr_scheduler_type="linear")
        made.train()
        (tmp_path / f"{rank}.json").write_text(json.dumps(logged(made, "learning_rate")))

    assert in_two_processes(train) == [0, 0]
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert len(set(one)) == len(one) == 12  # 120 seconds, 10 for each step


@pytest.mark.skipif(not hasattr(os, "fork"), reason="trains in copies of this process")
@pytest.mark.parametrize("interrupted", [0, 1])
def test_two_processes_end_together_where_one_is_interrupted(interrupted, tmp_path):
    def train(rank: int) -> None:
        callbacks = [RaisesAt(3, lambda: os.kill(os.getpid(), signal.SIGINT))] if rank == interrupted else []
        made = trainer(tmp_path, callbacks=callbacks, ddp_timeout=30, **KILLED_RUN)
        made.train()
        assert made.state.global_step == 3

    assert in_two_processes(train) == [0, 0]
    assert contents(tmp_path / "checkpoint-3")["steps"]["processes"] == 2
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
