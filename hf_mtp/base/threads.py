"""Computing in a thread that ends. Knows threads, and nothing of models."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_own_thread(call: Callable[[], T]) -> T:
    """Runs a call in a thread that ends with it.

    On a CPU, OpenMP gives each thread that computes helpers of its own, which stay as long as the thread. Once there
    are more of them than cores, GNU's OpenMP lets all helpers sleep between two operations instead of spinning, and
    waking them takes long. So where one thread of a process decodes, no other one may keep helpers.

    Args:
        call (`Callable`): A function without arguments.

    Returns:
        What the call returns.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()
