"""The `kernels` suite: every op on one GPU, all ways to compute it in turns, forward and with its backward pass."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import gpu, gpu_state
from benchmarks.gpu import Loop, Machine, Rates
from benchmarks.harness import Contender, Measured, Result, Sample, WrongOutput, interleave
from benchmarks.kernels.calls import Error, Task, Way, call_of, check, copied, peak_mb, truth_and_yardstick
from benchmarks.kernels.tasks import TASKS
from benchmarks.model_work import Datasheet, datasheet
from benchmarks.rows import Row, row

RATES = "rates"
WORKLOADS = {
    "attention": "local and global by length, 128 to 8192: ours, every FlashAttention, cuDNN, FlexAttention, sdpa",
    "cross-entropy": "time and peak memory of the loss of masked language modelling, beside F.cross_entropy and Liger",
    "maxsim": "128 queries and documents of 32 and 300 tokens, and one query against 1000, beside two libraries",
    "questions": "where the residual sum belongs, chunks that stay in the cache, full waves of tiles, gaps in a graph",
    "elementwise": "norms, GeGLU, rotary and its tables, projection, pooling: their share of a copy's rate; Liger",
}
"""In the order of what is decided by them. `rates`, the yardstick of all, is measured before them in every run."""

ON_CPU = ("attention", "elementwise")
"""Tried on a CPU by `--quick`."""

MINUTES = 8.5
"""After these nothing new is begun where no other limit is set, so that the suite fits into a call of ten minutes."""

ROUNDS = 9
FIGURES = ("gb_per_s", "tflop_per_s", "percent_of_copy", "percent_of_matmul", "percent_of_datasheet")


class Timed(NamedTuple):
    """A way that is right, ready to be timed."""

    way: Way
    loop: Loop
    error: Error


def run(
    *, quick: bool, only: Sequence[str], minutes: float | None = None, machine: Machine | None = None
) -> Iterator[Result]:
    """Measure the workloads named in `only` (all if empty); a `Result` for each table, as it is done.

    After `minutes`, by default `MINUTES`, nothing new is begun.

    A CPU takes `--quick` only, with a few tasks: it tries the path of the figures, which are no results.
    """
    machine = machine or gpu.this_machine()
    if not machine.is_gpu and not quick:
        raise SystemExit("the suite `kernels` needs a GPU, and there is none here (--quick tries it on the CPU)")
    workloads = only or (tuple(WORKLOADS) if machine.is_gpu else ON_CPU)
    if not machine.is_gpu and not set(workloads) <= set(ON_CPU):
        raise SystemExit(f"without a GPU there is only {' and '.join(ON_CPU)}")
    minutes = MINUTES if minutes is None else minutes
    until = time.monotonic() + 60 * minutes
    samples, state = gpu.rates(machine, quick=quick)
    yield Result(RATES, rates_rows(samples, machine, state), {})
    rates = gpu.median_rates(samples)
    for workload in workloads:
        for task in TASKS[workload](machine.device, quick):
            if time.monotonic() > until:
                late = f"was not reached within {minutes:g} minutes: ask for it with --only {workload}"
                yield Result(workload, [], {"the rest": late})
                break
            for backward in task.passes:
                yield measure(workload, task, backward, machine, rates, rounds=3 if quick else ROUNDS)


def measure(workload: str, task: Task, backward: bool, machine: Machine, rates: Rates, *, rounds: int) -> Result:
    """Check every way of a task, and time those that are right in turns."""
    what = f"{task.what}, {'forward + backward' if backward else 'forward'}"
    ready, refused, peaks = prepared(task, backward, machine)
    refused = {f"{what}: {name}": reason for name, reason in refused.items()}
    if not ready:
        return Result(workload, [], refused)
    contenders = [Contender(one.way.implementation, "", one.loop.run, lambda nothing: nothing) for one in ready]
    for one in contenders:
        gpu.settle(one.run, machine)
    calls = {one.way.implementation: one.loop.calls * one.way.repeats for one in ready}
    taken = interleave(contenders, dict.fromkeys(calls, 1), rounds, 0, machine.read)
    measured = []
    for contender, one in zip(contenders, ready, strict=True):
        made = calls[contender.implementation]
        samples = tuple(Sample(seconds / made, foreign) for seconds, foreign in taken[contender.implementation])
        measured.append(Measured(contender, one.error.found, made, samples))
    rows = [
        time_row(workload, what, task, backward, one, timed, measured, rates, machine)
        for one, timed in zip(measured, ready, strict=True)
    ]
    rows += [memory_row(workload, what, one, peaks) for one in ready if peaks]
    state = gpu_state.sensors(machine.device, contenders[0].run)
    return Result(workload, [completed(one, task.dtype, backward, machine, state) for one in rows], refused)


def prepared(
    task: Task, backward: bool, machine: Machine
) -> tuple[list[Timed], dict[str, str], dict[str, list[float]]]:
    """The ways that are right, why others are refused, and the peaks of memory in MB where they are asked for."""
    slots = [copied(task, backward) for _ in range(gpu.copies_beyond_cache(task.nbytes, machine.cache))]
    ready: list[Timed] = []
    refused: dict[str, str] = {}
    peaks: dict[str, list[float]] = {}
    known: tuple[Any, ...] = (None,)
    for way in task.ways:
        reference = way.reference or task.reference
        try:
            if known[0] is not reference:
                known = (None,)  # the memory of the last one is free first
                known = (reference, *truth_and_yardstick(reference, task, backward))
            error = check(way, task, backward, *known[1:])
            calls = [call_of(way, *slot, backward) for slot in slots]
            if task.memory and machine.is_gpu:
                peaks[way.implementation] = [peak_mb(calls[0]) for _ in range(3)]
            ready.append(Timed(way, gpu.loop(calls, machine, graph=way.graph), error))
        except (WrongOutput, gpu.TooSlow) as reason:
            refused[way.implementation] = str(reason)
        except Exception as error:
            # Whatever packages of others raise, and too little memory: a way that does not run costs no other its row.
            refused[way.implementation] = f"fails: {type(error).__name__}: {str(error)[:300]}"
    return ready, refused, peaks


def time_row(
    workload: str,
    what: str,
    task: Task,
    backward: bool,
    one: Measured,
    timed: Timed,
    all_measured: Sequence[Measured],
    rates: Rates,
    machine: Machine,
) -> Row:
    """Microseconds of a call, and how much of what this machine can do it reaches."""
    way, loop, error = timed
    work = way.work or task.work
    amounts = work.of(backward) if work else (None, None)
    bytes_rate, flops_rate = (None if amount is None else amount / one.median for amount in amounts)
    # The rate of bfloat16 is no yardstick for float32.
    of_matmul = flops_rate if task.dtype.itemsize == 2 else None
    sheet = datasheet(gpu_state.identity(machine.device)["gpu"])
    # Ways that do different amounts of work are no rivals.
    rivals = [other for other in all_measured if other is not one] if way.work is None else []
    return row(
        workload=workload,
        what=what,
        implementation=way.implementation,
        settings=", ".join(filter(None, (way.settings, loop.how))),
        unit="us",
        values=[1e6 * seconds for seconds in one.seconds],
        max_error=error.found,
        tolerance=figure(error.allowed),
        foreign_percent=one.foreign,
        clean=one.clean,
        calls=one.calls,
        times_better_than={other.contender.implementation: one.times_faster_than(other) for other in rivals},
    ) | {
        "gb_per_s": figure(bytes_rate, 1e-9),
        "tflop_per_s": figure(flops_rate, 1e-12),
        "percent_of_copy": figure(bytes_rate, 100 / rates.copy),
        "percent_of_matmul": figure(of_matmul, 100 / rates.matmul),
        "percent_of_datasheet": sheet and of_datasheet(sheet, task.dtype, bytes_rate, flops_rate),
    }


def of_datasheet(
    sheet: Datasheet, dtype: torch.dtype, bytes_rate: float | None, flops_rate: float | None
) -> float | None:
    """The share of what bounds the call, its bytes or its operations, by the datasheet."""
    peak = sheet.float32 if dtype is torch.float32 else sheet.bfloat16
    shares = [rate / most for rate, most in ((bytes_rate, sheet.bytes), (flops_rate, peak)) if rate is not None]
    return figure(max(shares), 100) if shares else None


def memory_row(workload: str, what: str, timed: Timed, peaks: dict[str, list[float]]) -> Row:
    """MB at the peak of a call, beyond what was there before."""
    mine = timed.way.implementation
    return row(
        workload=workload,
        what=f"{what}, peak memory",
        implementation=mine,
        settings=timed.way.settings,
        unit="MB",
        values=peaks[mine],
        max_error=timed.error.found,
        tolerance=figure(timed.error.allowed),
        times_better_than={name: max(theirs) / max(peaks[mine]) for name, theirs in peaks.items() if name != mine},
    )


def rates_rows(samples: dict[str, list[float]], machine: Machine, state: dict[str, float | None]) -> list[Row]:
    """What a share of the machine is a share of."""
    rows = [
        row(
            workload=RATES,
            what="What this machine reaches: a copy (bytes read and written), a product of square matrices",
            implementation=name,
            settings="",
            unit=unit,
            values=[value * scale for value in samples[name]],
            max_error=None,
            tolerance=None,
            calls=8,
        )
        for name, unit, scale in (("copy", "GB/s", 1e-9), ("matmul", "TFLOP/s", 1e-12))
    ]
    return [completed(one, torch.bfloat16, False, machine, state) for one in rows]


def completed(one: Row, dtype: torch.dtype, backward: bool, machine: Machine, state: dict[str, float | None]) -> Row:
    """A row with what this suite knows beyond `rows.row`: the GPU, its clocks at the time, the pass."""
    identity = gpu_state.identity(machine.device)
    known = {
        "suite": "kernels",
        "dtype": str(dtype).removeprefix("torch."),
        "pass": "forward + backward" if backward else "forward",
        "state": state,
        "versions": one["versions"] | identity["versions"],
    }
    if machine.is_gpu:
        known["foreign_percent"] = None  # what else the CPU does, a GPU does not feel
    return dict.fromkeys(FIGURES) | one | identity | known


def figure(value: float | None, scale: float = 1.0) -> float | None:
    return None if value is None else float(f"{value * scale:.4g}")
