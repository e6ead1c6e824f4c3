"""A process that holds one implementation of one model, and answers the commands of `COMMANDS` over a pipe.

It runs one case at a time. What goes wrong in it, also on the device, costs its own rows only.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_state
from benchmarks.harness import Reading, read_clocks
from benchmarks.models.case import Build, Case, Order, Way
from benchmarks.models.rates import rates
from benchmarks.process_memory import peak_beyond

SLOW = 2.0
"""Seconds of a call on a CPU from which on it needs no other before it."""


@dataclass
class Desk:
    """What a process has before it.

    Attributes:
        way: the case being measured, with the settings that were fastest.
        calls: of a sample. seconds: of a call.
        read: the clock.
    """

    order: Order
    device: torch.device
    build: Build
    way: Way | None = None
    calls: int = 1
    seconds: float = 0.0
    read: Callable[[Callable[[], Any]], Reading] = field(default=read_clocks)

    @property
    def ready(self) -> Way:
        if self.way is None:
            raise RuntimeError("no case is prepared")
        return self.way


def serve(connection: Connection, order: Order, log: str) -> None:
    """Answer until the other side closes the pipe. Every answer is (True, value) or (False, reason)."""
    redirect(log)
    desk = None
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        try:
            desk = desk or opened(order, Path(log).parent)
            answer = True, COMMANDS[command](desk, **arguments)
        except Exception as error:
            # Whatever packages of others raise, and too little memory: it becomes the reason of a missing row.
            answer = False, f"fails: {type(error).__name__}: {str(error)[:300]}"
            forget(desk)
        connection.send(answer)


def redirect(log: str) -> None:
    """Progress bars and warnings go to a file, whose end is shown where the process dies."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))


def opened(order: Order, scratch: Path) -> Desk:
    """The model, loaded."""
    # What another process or an earlier run compiled is not found again.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=scratch)
    torch.set_num_threads(order.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(order.place.device)
    module, _, function = order.builder.partition(":")
    build = getattr(import_module(module), function)(order.place, **order.options)
    return Desk(order, device, build, read=read_wall if order.place.is_gpu else read_clocks)


def read_wall(work: Callable[[], Any]) -> Reading:
    """Seconds until a GPU that was idle has done `work`, as the host sees it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return Reading(time.perf_counter() - start, 0.0)


def hello(desk: Desk) -> dict[str, Any]:
    """The GPU and what drives it."""
    return gpu_state.identity(desk.device)


def prepare(desk: Desk, case: Case, file: str, window: float, seconds: float) -> dict[str, Any]:
    """Try the ways of a case, keep the fastest and write its answer to `file`.

    Args:
        window: least seconds of a sample.
        seconds: after these no further way is tried.

    Returns:
        Its settings, the calls of a sample, and what went wrong with other settings.
    """
    forget(desk)
    until = time.monotonic() + seconds
    best, quickest, failed, tried = None, float("inf"), "", 0
    for way in desk.build(case):
        try:
            took = desk.read(way.warm or way.run).seconds
            if took < SLOW or way.warm or desk.order.place.is_gpu:
                took = desk.read(way.run).seconds
            if took < 1.0:
                took = min(took, desk.read(way.run).seconds)
        except torch.OutOfMemoryError as error:
            failed, took = f"too little memory for {way.settings}: {str(error)[:100]}", float("inf")
            release()
        tried += 1
        if took < quickest:
            best, quickest = way, took
        # A protocol's batch size is the first that fits, whatever is faster.
        if best and (case.batch is not None or time.monotonic() > until):
            break
    if best is None:
        raise RuntimeError(failed or "there is no way to run this case")
    torch.save(best.answer(), file)
    desk.way, desk.seconds = best, quickest
    desk.calls = max(1, -(-int(1e6 * window) // max(1, int(1e6 * quickest))))
    release()
    return {"settings": best.settings, "calls": desk.calls, "seconds": quickest, "tried": tried}


def sample(desk: Desk) -> tuple[float, float]:
    """Seconds of a call, and the CPU that others used meanwhile in percent of a core. A GPU makes its calls without
    waiting in between; of a CPU's calls it is the median.
    """
    way, calls = desk.ready, desk.calls
    if desk.seconds < SLOW or desk.order.place.is_gpu:
        (way.warm or way.run)()
    each: list[float] = []

    def window() -> None:
        for _ in range(calls):
            start = time.perf_counter()
            way.run()
            each.append(time.perf_counter() - start)

    seconds, foreign = desk.read(window)
    release(few=True)
    return (seconds / calls if desk.order.place.is_gpu else statistics.median(each)), foreign


def latencies(desk: Desk, count: int) -> dict[str, Any]:
    """Seconds of `count` calls, each waited for: as the host sees them, and between two events on a GPU."""
    way = desk.ready
    for _ in range(3):
        way.run()
    host: list[float] = []
    device: list[float] = []

    def calls() -> None:
        for _ in range(count):
            if desk.order.place.is_gpu:
                host.append(read_wall(way.run).seconds)
            else:
                start = time.perf_counter()
                way.run()
                host.append(time.perf_counter() - start)

    foreign = 0.0
    if desk.order.place.is_gpu:
        calls()
    else:
        foreign = desk.read(calls).foreign
    for _ in range(count if desk.order.place.is_gpu else 0):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        way.run()
        end.record()
        end.synchronize()
        device.append(start.elapsed_time(end) / 1000)
    return {"host": host, "device": device, "foreign": foreign}


def peak(desk: Desk, case: Case, warm: Case) -> dict[str, Any]:
    """Bytes that a call takes at its peak beyond the loaded model and its inputs; its settings.

    Thread pools, workspaces and lazy imports come with `warm`. On a CPU only the first call of a process counts: an
    allocator keeps what it once had.
    """
    forget(desk)
    warming = next(iter(desk.build(warm)))
    warming.run()
    warming.clear()
    del warming
    release()
    way = next(iter(desk.build(case)))
    if desk.order.place.is_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way.run()
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated() - before
    else:
        found, _ = peak_beyond(way.run)
    desk.way = way
    return {"bytes": found, "settings": way.settings}


def answer(desk: Desk, file: str, case: Case | None = None) -> None:
    """Write the answer of the prepared case, or of one that is only asked for its answer."""
    way = desk.ready if case is None else next(iter(desk.build(case)))
    torch.save(way.answer(), file)


def fits(desk: Desk, case: Case) -> bool:
    """Whether there is memory for the case in one batch."""
    forget(desk)
    try:
        next(iter(desk.build(case))).run()
        if desk.order.place.is_gpu:
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return False
    finally:
        release()
    return True


def rest(desk: Desk) -> None:
    """Let go of the case and of what the allocator keeps."""
    forget(desk)


def sensors(desk: Desk) -> dict[str, float | None]:
    """Clocks, power and temperature while the prepared case runs."""
    return gpu_state.sensors(desk.device, desk.ready.warm or desk.ready.run)


def measure_rates(desk: Desk) -> dict[str, list[float]]:
    """What this machine reaches in the dtype of the order."""
    return rates(desk.device, desk.order.place.torch_dtype, quick=desk.order.place.quick)


def forget(desk: Desk | None) -> None:
    """Let go of the last case."""
    if desk is not None:
        desk.way = None
    release()


def release(*, few: bool = False) -> None:
    """Give back what the allocator of a GPU keeps, because others need it; with `few` only if it is much."""
    if not torch.cuda.is_initialized():
        gc.collect()
        return
    if few and torch.cuda.memory_reserved() < torch.cuda.mem_get_info()[1] / 40:
        return
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


COMMANDS: dict[str, Callable[..., Any]] = {
    one.__name__: one for one in (hello, prepare, sample, latencies, peak, answer, fits, rest, sensors, measure_rates)
}
