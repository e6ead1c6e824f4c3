"""The threads that call a model: on a CPU one a core, each with its own micro-batch and one intra-op thread.

Small operations do not scale over threads, micro-batches do. A sketch of this had 1.16 to 1.28 times the speed of one
caller with all threads, and gave the same numbers.

The number of intra-op threads is OpenMP's of each thread, and PyTorch's for threads that start later. Callers set their
own, and leave PyTorch's as it was. OpenMP's threads do not survive a fork: the next parallel operation of the thread
that forked waits for them without end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_thread = threading.local()
"""`process`: the id of the process in which this thread first encoded on several threads, or made a Session. Only it
knows of a fork."""

T = TypeVar("T")
R = TypeVar("R")


def callers(device: torch.device) -> int:
    """How many threads call a model on this device at a time."""
    # Autocast is a setting of one thread: the others would compute in another dtype.
    return 1 if device.type != "cpu" or torch.is_autocast_enabled("cpu") else torch.get_num_threads()


def map_callers(function: Callable[[T], R], items: Sequence[T], count: int) -> Iterator[R]:
    """`function(item)` of each item, in order, by `count` threads in inference mode."""

    def call(item: T) -> R:
        with torch.inference_mode():
            return function(item)

    if count == 1 or len(items) <= 1:
        yield from map(call, items)
        return
    with ThreadPoolExecutor(count, initializer=_one_intra_op_thread, initargs=(torch.get_num_threads(),)) as pool:
        yield from pool.map(call, items)


def check_process() -> None:
    """Raise RuntimeError where this thread has encoded before its process was forked: its next work would hang."""
    if torch.get_num_threads() == 1:
        return
    process = os.getpid()
    if getattr(_thread, "process", process) != process:
        raise RuntimeError(
            "this process was forked after a model had encoded, or a Session was made, in it on several threads, which "
            "a fork does not copy: start processes with the method 'spawn', or call torch.set_num_threads(1) first in "
            "each forked process"
        )
    _thread.process = process


def _one_intra_op_thread(usual: int) -> None:
    """One intra-op thread for this thread; those that start later get the usual number, as before."""
    torch.get_num_threads()  # a thread takes the number that any thread set last, when it first needs one
    torch.set_num_threads(1)
    restore = threading.Thread(target=torch.set_num_threads, args=(usual,))
    restore.start()
    restore.join()
