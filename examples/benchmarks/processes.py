"""Runs a function in a process of its own, whose memory can be measured."""

import multiprocessing
from collections.abc import Callable

MIB = 2**20


def in_a_process(function: Callable[[], dict]) -> dict:
    """Calls a function in a process that is forked from this one, and returns what the function returns.

    Call `torch.set_num_threads(1)` first: threads that have started do not survive a fork.
    """
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function)
