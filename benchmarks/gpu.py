"""Time on a GPU: replays of a graph between two events, on memory that no cache holds.

A CPU takes the same way with a wall clock, so that what surrounds the clock is exercised everywhere.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_state import sensors
from benchmarks.harness import Reading, read_clocks

Clock = Callable[[Callable[[], Any]], Reading]

WINDOW = 0.004
"""Least seconds of a sample on a GPU: what passes before a first graph starts is then well below 1 % of it."""

SLOWEST = 0.25
"""Seconds of a call above which it is not timed: a specification that loops over pairs would take the whole run."""


class TooSlow(RuntimeError):
    """One call takes longer than all samples of it should."""


class Rates(NamedTuple):
    """What this machine reached in this run: bytes copied (read and written) and bfloat16 operations, per second."""

    copy: float
    matmul: float


@dataclass(frozen=True)
class Machine:
    """Where calls run and which clock times them.

    Attributes:
        window: least seconds of a sample.
        patience: runs at most until a time is stable.
    """

    device: torch.device
    read: Clock
    window: float
    patience: int

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def cache(self) -> int:
        """Bytes of the last cache; on a CPU, whose figures are no results, none."""
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.is_gpu else 0


def this_machine() -> Machine:
    """The current GPU, or the CPU where there is none.

    From here on the process works on one stream, which is not the default one: that cannot be captured, and a capture
    breaks when a backward pass meets anything that was made on another.
    """
    if torch.cuda.is_available():
        torch.cuda.set_stream(torch.cuda.Stream())
        return Machine(torch.device("cuda", torch.cuda.current_device()), read_gpu, WINDOW, 20)
    return Machine(torch.device("cpu"), read_clocks, 0.0, 3)


def read_gpu(work: Callable[[], Any]) -> Reading:
    """Do `work` on an idle GPU, and say how long the GPU took for it. Other programs of the CPU do not slow a GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return Reading(start.elapsed_time(end) / 1000, 0.0)


@dataclass(frozen=True)
class Loop:
    """Many calls as one piece of work.

    Attributes:
        calls: that `run` makes.
        how: they are made, in words.
    """

    run: Callable[[], Any]
    calls: int
    how: str


def loop(calls: Sequence[Callable[[], Any]], machine: Machine, *, graph: bool = True) -> Loop:
    """A loop that lasts `machine.window`, as replays of a CUDA graph where that can be.

    Args:
        calls: the same call on different memory each, so that no call finds its data in a cache.
        graph: False leaves launch gaps in, for all contenders alike.

    Raises:
        TooSlow: a call takes more than `SLOWEST`.
    """
    calls[0]()  # compiles, loads and allocates
    seconds = machine.read(calls[0]).seconds
    if seconds > SLOWEST:
        raise TooSlow(f"takes {seconds:.2g} s a call, and what takes more than {SLOWEST:g} s is not timed")
    for call in calls:
        call()
    seconds = min(machine.read(call).seconds for call in calls)
    if not (graph and machine.is_gpu and never_waits(calls[0])):
        turns = rounds_for(machine.window, seconds * len(calls))
        return Loop(partial(repeat, turns, *calls), turns * len(calls), "single calls")
    # 32 calls at most: more only take longer to capture.
    turns = min(rounds_for(machine.window, seconds * len(calls)), max(1, 32 // len(calls)))
    captured = capture(calls, turns)
    replays = rounds_for(machine.window, machine.read(captured.replay).seconds)
    held = turns * len(calls)
    return Loop(partial(repeat, replays, captured.replay), replays * held, f"replays of a graph of {held} calls")


def repeat(times: int, *calls: Callable[[], Any]) -> None:
    """All calls in turn, again and again; what they return is let go at once."""
    for _ in range(times):
        for call in calls:
            call()


def rounds_for(window: float, seconds: float) -> int:
    """How often something that takes `seconds` fits into the window, rounded up."""
    return max(1, math.ceil(window / max(seconds, 1e-9)))


def never_waits(call: Callable[[], Any]) -> bool:
    """Whether the CPU does not wait for the GPU in it. A graph can hold such calls only, and a failed capture is worse
    than none: it leaves the allocator in the middle of one.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def capture(calls: Sequence[Callable[[], Any]], turns: int) -> torch.cuda.CUDAGraph:
    """All calls, `turns` times over. The results of each call keep their memory until its next turn, so that results
    do not stay in a cache either.
    """
    graph, results, stream = torch.cuda.CUDAGraph(), {}, torch.cuda.current_stream()
    # The outer context puts the stream back where a capture fails.
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        for _ in range(turns):
            for at, call in enumerate(calls):
                results[at] = call()
    return graph


def settle(run: Callable[[], Any], machine: Machine, *, spread: float = 0.02) -> int:
    """Run until three runs in a row took the same time, within `spread`, or patience ends; how many it took."""
    last: list[float] = []
    for done in range(1, machine.patience + 1):
        last = [*last[-2:], machine.read(run).seconds]
        if len(last) == 3 and max(last) <= (1 + spread) * min(last):
            return done
    return machine.patience


def copies_beyond_cache(nbytes: int, cache: int) -> int:
    """How many copies of `nbytes`, used in turn, evict each other from a cache: three times as much as it holds."""
    return min(32, max(2, math.ceil(3 * cache / max(nbytes, 1))))


def rates(machine: Machine, *, quick: bool) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Samples of both `Rates`, of random data (zeros are multiplied faster), and the sensors during the products."""
    rows, width, samples = ((1 << 13, 2048, 3) if quick else (1 << 16, 8192, 9)) if machine.is_gpu else (256, 256, 2)
    x = torch.randn(rows, 8192, device=machine.device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    a, b = torch.randn(2, width, width, device=machine.device, dtype=torch.bfloat16)
    work = {"copy": (lambda: y.copy_(x), 2 * x.nbytes), "matmul": (lambda: a @ b, 2 * width**3)}
    found = {}
    for name, (call, amount) in work.items():
        several = partial(repeat, 8, call)  # beside them the start of the first is nothing
        settle(several, machine)
        found[name] = [8 * amount / machine.read(several).seconds for _ in range(samples)]
    return found, sensors(machine.device, work["matmul"][0])


def median_rates(found: dict[str, list[float]]) -> Rates:
    return Rates(*(statistics.median(found[name]) for name in Rates._fields))
