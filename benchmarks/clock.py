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
}
"""What nvidia-smi is asked, and its name in a row."""

THROTTLED = "clocks_event_reasons.active", "clocks_throttle_reasons.active"
"""Its reasons for lower clocks, by the name that drivers have for them since 535, and before."""

REASONS = {4: "power cap", 8: "hardware slowdown", 32: "heat", 64: "heat, by hardware", 128: "power brake"}
"""Bits of these reasons; others mean that the GPU is idle, or that clocks were set."""

COPIES, COPIED = 64, 1 << 30
"""The most copies of the arguments of a call, and their most bytes if there are more than two."""


class Refused(RuntimeError):
    """An implementation gets no row; the message is the reason."""


class Reading(NamedTuple):
    """Seconds of a piece of work, and the CPU that everything else used meanwhile in percent of one core."""

    seconds: float
    foreign: float


class Sample(NamedTuple):
    """The seconds of some calls on the host, and the CPU that everything else used meanwhile."""

    seconds: Sequence[float]
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
    """Seconds until a GPU that was idle has done `work`, as the host sees it. Other programs do not slow a GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return Reading(time.perf_counter() - start, 0.0)


def read_gpu(work: Call) -> Reading:
    """Seconds that an idle GPU takes for `work`, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return Reading(start.elapsed_time(end) / 1000, 0.0)


def sensors(work: Call) -> dict[str, Any]:
    """Clocks, power, heat and reasons for lower clocks while a GPU does this work; nothing without nvidia-smi."""
    if not torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return {}
    # Not its number, which CUDA counts in another order.
    gpu = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    for reasons in THROTTLED:
        query = f"--query-gpu={','.join([*SENSORS, reasons])}"
        answer = output_during(work, ["nvidia-smi", "-i", gpu, query, "--format=csv,noheader,nounits"])
        if found := sensors_of(answer):
            return found
    return {}


def output_during(work: Call, command: Sequence[str], seconds: float = 30.0) -> str:
    """What a command prints while a GPU works. One that hangs is ended: figures are not lost for want of a clock."""
    until = time.monotonic() + seconds
    work()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while process.poll() is None and time.monotonic() < until:
        work()
        torch.cuda.synchronize()
    process.kill()
    return process.communicate()[0]


def sensors_of(answer: str) -> dict[str, Any]:
    """A line of nvidia-smi; numbers, and reasons in words. What a GPU does not tell is left out."""
    found = dict(zip([*SENSORS.values(), "throttled"], answer.strip().split(", "), strict=False))
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
    """Many calls as one piece of work: `run` makes `calls` of them; `how`, in words; `idle` seconds do not count."""

    run: Call
    calls: int
    how: str
    idle: float = 0.0

    def seconds(self, reading: Reading) -> float:
        """Of a call."""
        return (reading.seconds - self.idle) / self.calls


def loop(calls: Sequence[Call], machine: Machine, flush: Call | None = None) -> Loop:
    """A loop that lasts `machine.window`, as replays of a CUDA graph where one can be captured.

    `calls` are the same call, each on memory of its own, so that none finds its data in a cache. Where they have too
    little memory for that, `flush` fills the cache after the last of them; its time does not count.
    """
    calls[0]()  # compiles, loads and allocates
    if (seconds := machine.read(calls[0]).seconds) > SLOWEST:
        raise Refused(f"takes {seconds:.2g} s a call, and what takes more than {SLOWEST:g} s is not timed")
    turn = calls if flush is None else [*calls, flush]
    repeat(1, *turn)
    idle = machine.read(partial(repeat, 8, flush)).seconds / 8 if flush else 0.0
    seconds, how = min(machine.read(call).seconds for call in calls), "single calls"
    turns = repeats_for(machine.window, seconds * len(calls))
    if machine.is_gpu and never_waits(calls[0]):
        few = min(turns, max(1, 32 // len(calls)))  # more than 32 calls only take longer to capture
        try:
            captured, held = capture(turn, few), few * len(calls)
            replays = repeats_for(machine.window, machine.read(captured.replay).seconds)
            run, how = partial(repeat, replays, captured.replay), f"replays of a graph of {held} calls"
            return Loop(run, replays * held, how, replays * few * idle)
        except RuntimeError as error:
            how = f"single calls, as a graph fails: {str(error).partition(chr(10))[0][:80]}"
    return Loop(partial(repeat, turns, *turn), turns * len(calls), how, turns * idle)


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


def copies_beyond_cache(nbytes: int, moved: int, cache: int) -> tuple[int, int]:
    """How many copies of `nbytes` are used in turn by calls that move so many bytes, and bytes to write after the last.

    Between two uses of a copy three times what the cache holds must be touched. Of the bytes that the other copies
    move half are counted, because one that is read and written is moved twice. If there would be too many copies, the
    bytes that are written are enough.
    """
    wanted = 1 + max(1, math.ceil(6 * cache / max(moved, 1)))
    count = min(wanted, COPIES, max(2, COPIED // max(nbytes, 1)))
    return count, 3 * cache if count < wanted else 0


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
