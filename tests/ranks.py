"""Training runs of several processes on one CPU, with the environment that `accelerate launch` gives them.

Processes are forked from one that has imported everything, which takes longer than what they do.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
from accelerate import DistributedType, PartialState
from accelerate.commands import launch
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

import hf_mtp

hf_mtp.MTPTrainer  # noqa: B018  imports what training needs

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "accelerate"
WORLD = 2
PATIENCE = 120  # seconds


def environment(config: str, port: int) -> dict[str, str]:
    """What `accelerate launch --config_file examples/accelerate/{config}.yaml` sets, but for the precision."""
    arguments = ["--config_file", CONFIGS / f"{config}.yaml", "--num_processes", WORLD, "--main_process_port", port]
    arguments = [str(argument) for argument in (*arguments, "--mixed_precision", "no", "train.py")]
    args, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments))
    if not args.use_deepspeed:
        return prepare_multi_gpu_env(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(args)[1]


def start_accelerate(config: str) -> None:
    """Makes accelerate's state anew, one per trainer. By itself it spreads weights over accelerators only."""
    AcceleratorState._reset_state(reset_partial_state=True)
    state = PartialState(cpu=True)
    if config.startswith("zero"):
        import deepspeed

        deepspeed.comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        state.distributed_type = DistributedType.DEEPSPEED
    elif config.startswith("fsdp"):
        state.distributed_type = DistributedType.MULTI_GPU


def run(work: Callable[[int, str, Path], None], config: str, folder: Path) -> None:
    """Runs `work(rank, config, folder)` in every process.

    Raises:
        RuntimeError: One of them failed, with its traceback, or did not end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks"])
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # of the process to fork from
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_process, args=(rank, port, work, config, folder)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    end = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in processes):
        if time.monotonic() > end or any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
                process.join()
        time.sleep(0.05)
    if any(process.exitcode for process in processes):
        errors = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.error"))
        raise RuntimeError(f"{config}: {errors or f'not done after {PATIENCE} seconds'}")


def _process(rank: int, port: int, work: Callable, config: str, folder: Path) -> None:
    log = Path(folder, f"{rank}.log").open("w", encoding="utf-8")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "USE_LIBUV": 0, "DS_ACCELERATOR": "cpu"}
        os.environ.update(environment(config, port), **{name: str(value) for name, value in own.items()})
        torch.set_num_threads(1)
        start_accelerate(config)
        work(rank, config, folder)
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        os._exit(1)
