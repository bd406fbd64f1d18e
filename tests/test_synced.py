"""Processes that decode side by side, as sharded weights require: all run the same number of forward passes."""

import os
from pathlib import Path

import pytest
import torch
from tiny_models import generate, prompt, upgraded

NEW_TOKENS = (4, 24)  # of each process: the first is done long before the second


def decode_in_step(rank: int, strategy: str, folder: str) -> None:
    """One of the processes. Its model needs the other one for every forward pass, like one with sharded weights."""
    os.environ.update(MASTER_ADDR="127.0.0.1", USE_LIBUV="0")
    store = torch.distributed.FileStore(f"{folder}/store", len(NEW_TOKENS))
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=len(NEW_TOKENS))
    torch.set_num_threads(1)
    model, passes = upgraded(), 0

    def meet(*_):
        nonlocal passes
        passes += 1
        torch.distributed.all_reduce(torch.ones(1))

    plain = generate(model, prompt(seed=rank), NEW_TOKENS[rank])
    model.get_base_model().get_decoder().register_forward_pre_hook(meet)
    fast = generate(model, prompt(seed=rank), NEW_TOKENS[rank], mtp=True, mtp_strategy=strategy, synced_gpus=True)
    torch.save({"passes": passes, "identical": torch.equal(plain, fast)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.parametrize("strategy", ["auto", "quadratic"])
def test_processes_run_the_same_number_of_passes(strategy, tmp_path: Path):
    torch.multiprocessing.spawn(decode_in_step, (strategy, str(tmp_path)), nprocs=len(NEW_TOKENS))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(NEW_TOKENS))]
    assert [result["identical"] for result in results] == [True, True]
    assert results[0]["passes"] == results[1]["passes"] > 4
