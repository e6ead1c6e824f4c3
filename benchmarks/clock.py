"""Clocks: wall time with the CPU that others used meanwhile, time on a GPU, and what a machine is and reaches."""

from __future__ import annotations

import math
import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

from modernbert_kernels import linear

Call = Callable[[], Any]

WINDOW, SLOWEST = 0.05, 2.0
"""Least seconds of a sample on a GPU: long enough for its clocks to settle under the load. Most seconds of a call."""

SENSORS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "watts",
    "temperature.gpu": "celsius",
    "clocks_throttle_reasons.active": "throttled",
}
"""What nvidia-smi is asked, and its name in a row."""

REASONS = {4: "power cap", 8: "hardware slowdown", 32: "heat", 64: "heat, by hardware", 128: "power brake"}
"""Bits of its reasons for lower clocks; others mean that the GPU is idle, or that clocks were set."""


class Refused(RuntimeError):
    """An implementation gets no row; the message is the reason."""


class Reading(NamedTuple):
    """Seconds of a piece of work, and the CPU that everything else used meanwhile in percent of one core."""

    seconds: float
    foreign: float


def read_clocks(work: Call) -> Reading:
    """Wall time of `work`, and all CPU time that was not idle (also what a hypervisor stole) but this process's own."""
    idle, own, start = _idle_seconds(), time.process_time(), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    own, idle = time.process_time() - own, _idle_seconds() - idle
    foreign = seconds * (os.cpu_count() or 1) - idle - own
    # The kernel counts idle time in ticks of 10 ms, so a short sample can read a little below zero.
    return Reading(seconds, max(0.0, 100 * foreign / seconds))


def _idle_seconds() -> float:
    times = import_module("psutil").cpu_times()  # of the extra `bench`
    return times.idle + getattr(times, "iowait", 0.0)


def read_wall(work: Call) -> Reading:
    """Seconds until a GPU that was idle has done `work`, as the host sees it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return Reading(time.perf_counter() - start, 0.0)


def read_gpu(work: Call) -> Reading:
    """Seconds that an idle GPU takes for `work`, between two events. Other programs of the CPU do not slow a GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return Reading(start.elapsed_time(end) / 1000, 0.0)


def sensors(work: Call = lambda: None) -> dict[str, Any]:
    """Clocks, power, heat and reasons for lower clocks while a GPU does this work; nothing without nvidia-smi."""
    if not torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return {}
    repeat(8, work)  # so that it is still busy when it is asked
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[torch.cuda.current_device()]
    command = ["nvidia-smi", "-i", index, f"--query-gpu={','.join(SENSORS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout
    except subprocess.TimeoutExpired:
        answer = ""  # figures are not lost for want of a clock
    torch.cuda.synchronize()
    return sensors_of(answer)


def sensors_of(answer: str) -> dict[str, Any]:
    """A line of nvidia-smi; numbers, and reasons in words. What a GPU does not tell is left out."""
    found = dict(zip(SENSORS.values(), answer.strip().split(", "), strict=False))
    reasons = found.pop("throttled", "")
    bits = int(reasons, 16) if re.fullmatch(r"0x[\da-fA-F]+", reasons) else 0
    numbers = {name: float(text) for name, text in found.items() if re.fullmatch(r"[\d.]+", text)}
    return numbers | {"throttled": [words for bit, words in REASONS.items() if bits & bit]} if numbers else {}


def record(call: Call, machine: Machine, name: str) -> None:
    """One call, after others that compile and allocate, as the range that ncu and nsys record."""
    repeat(3, call)
    if machine.is_gpu:
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile(), torch.cuda.nvtx.range(name):
            call()
            torch.cuda.synchronize()


def peak_bytes(run: Call) -> int:
    """Memory of the GPU at the peak of a call beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Machine(NamedTuple):
    """Where kernels run: the clock, and the least seconds of a sample."""

    device: torch.device
    read: Callable[[Call], Reading]
    window: float

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def cache(self) -> int:
        """Bytes of the last cache of a GPU."""
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.is_gpu else 0


def this_machine() -> Machine:
    """The GPU, or the CPU if there is none. The process then works on another stream than the default one, which cannot
    be captured; a capture breaks if a backward pass meets what was made on another stream.
    """
    if torch.cuda.is_available():
        torch.cuda.set_stream(torch.cuda.Stream())
        return Machine(torch.device("cuda", torch.cuda.current_device()), read_gpu, WINDOW)
    return Machine(torch.device("cpu"), read_clocks, 0.0)


class Loop(NamedTuple):
    """Many calls as one piece of work: `run` makes `calls` of them; `how`, in words."""

    run: Call
    calls: int
    how: str


def loop(calls: Sequence[Call], machine: Machine) -> Loop:
    """A loop that lasts `machine.window`, as replays of a CUDA graph where one can be captured.

    `calls` are the same call, each on memory of its own, so that none finds its data in a cache.
    """
    calls[0]()  # compiles, loads and allocates
    if (seconds := machine.read(calls[0]).seconds) > SLOWEST:
        raise Refused(f"takes {seconds:.2g} s a call, and what takes more than {SLOWEST:g} s is not timed")
    repeat(1, *calls)
    seconds = min(machine.read(call).seconds for call in calls)
    turns = repeats_for(machine.window, seconds * len(calls))
    if not (machine.is_gpu and never_waits(calls[0])):
        return Loop(partial(repeat, turns, *calls), turns * len(calls), "single calls")
    turns = min(turns, max(1, 32 // len(calls)))  # more than 32 calls only take longer to capture
    captured, held = capture(calls, turns), turns * len(calls)
    replays = repeats_for(machine.window, machine.read(captured.replay).seconds)
    return Loop(partial(repeat, replays, captured.replay), replays * held, f"replays of a graph of {held} calls")


def repeat(times: int, *calls: Call) -> None:
    """All calls in order, again and again; what they return is dropped at once."""
    for _ in range(times):
        for call in calls:
            call()


def repeats_for(window: float, seconds: float) -> int:
    return max(1, math.ceil(window / max(seconds, 1e-9)))


def never_waits(call: Call) -> bool:
    """Whether the CPU does not wait for the GPU in it: a graph can hold only such calls."""
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


def capture(calls: Sequence[Call], turns: int) -> torch.cuda.CUDAGraph:
    """All calls, `turns` times over. Results keep their memory until their next turn, and so do not stay in a cache."""
    graph, results, stream = torch.cuda.CUDAGraph(), {}, torch.cuda.current_stream()
    # The outer context restores the stream if a capture fails.
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        for index, call in [*enumerate(calls)] * turns:
            results[index] = call()
    return graph


def copies_beyond_cache(nbytes: int, cache: int) -> int:
    """How many copies of `nbytes`, used in turn, evict each other from a cache: three times what it holds."""
    return min(32, max(2, math.ceil(3 * cache / max(nbytes, 1))))


class Rates(NamedTuple):
    """What this machine reached in this run: bytes copied (read and written) and operations, per second."""

    copy: float
    matmul: float


@cache
def rates(device: torch.device, dtype: torch.dtype, *, quick: bool) -> Rates:
    """A copy and a product of square matrices, of random data: zeros are multiplied faster."""
    is_gpu = device.type == "cuda"
    read = read_gpu if is_gpu else read_clocks
    rows, width = ((1 << 16, 8192) if is_gpu else (1 << 12, 1024)) if not quick else (1 << 9, 256)
    x = torch.randn(rows, 4096, device=device, dtype=dtype)
    a, b = torch.randn(2, width, width, device=device, dtype=dtype)
    y, weight = torch.empty_like(x), torch.nn.Parameter(b, requires_grad=False)

    def rate(call: Call, amount: int) -> float:
        several = partial(repeat, 4, call)  # the start of the first then counts for little
        several()
        return 4 * amount / statistics.median(read(several).seconds for _ in range(7))

    # On some processors oneDNN, which our layers use, multiplies twice as fast as what `@` calls.
    products: list[Call] = [lambda: a @ b] if is_gpu else [lambda: a @ b, lambda: linear(a, weight)]
    return Rates(rate(lambda: y.copy_(x), 2 * x.nbytes), max(rate(one, 2 * width**3) for one in products))
