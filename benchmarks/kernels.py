"""The `kernels` suite: every op on one GPU, each way to compute it in turns, forward and with its backward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import modernbert_kernels as ops
from benchmarks import gpu
from benchmarks.cpu import Result
from benchmarks.gpu import Loop, Machine, Rates
from benchmarks.harness import Contender, Measured, Sample, WrongOutput, interleave
from benchmarks.kernel_tasks import TASKS, Task, Way
from benchmarks.rows import Row, row

OURS = "triton"
RATES = "rates"
WORKLOADS = tuple(TASKS)
"""In the order of what is decided by them; `rates`, the yardstick of all, comes before."""

MINUTES = 8.5
"""After these no other task is begun, so that the whole suite fits into a call of ten minutes."""

ROUNDS = 9


def run(*, quick: bool, only: Sequence[str], machine: Machine | None = None) -> Iterator[Result]:
    """Measure the workloads named in `only` (all if empty); a `Result` for each table of them, as it is done.

    A CPU runs nothing but `--quick`: the elementwise ops and one attention, to try the path that figures take.
    """
    machine = machine or gpu.this_machine()
    if not machine.is_gpu and not quick:
        raise SystemExit("the suite `kernels` needs a GPU, and there is none here; --quick tries it on the CPU")
    until = time.monotonic() + 60 * MINUTES
    samples = gpu.rates(machine, quick=quick)
    rates = gpu.median_rates(samples)
    yield Result(RATES, rates_rows(samples, machine), {})
    for workload in only or WORKLOADS:
        for task in TASKS[workload](machine.device, quick):
            if time.monotonic() > until:
                late = f"was not reached within {MINUTES:g} minutes: ask for it with --only {workload}"
                yield Result(workload, [], {"the rest": late})
                break
            for backward in task.passes:
                yield measure(workload, task, backward, machine, rates, rounds=3 if quick else ROUNDS)


def measure(
    workload: str, task: Task, backward: bool, machine: Machine, rates: Rates, *, rounds: int = ROUNDS
) -> Result:
    """Check every way of the task, and time those that are right in turns."""
    what = f"{task.what}, {'forward + backward' if backward else 'forward'}"
    slots = slots_of(task, machine, backward)
    loops: dict[str, tuple[Way, Loop, tuple[float, float]]] = {}
    refused: dict[str, str] = {}
    peaks: dict[str, list[float]] = {}
    known: dict[Callable[..., Any], list[list[Tensor]]] = {}
    for way in task.ways:
        try:
            reference = way.reference or task.reference
            if reference not in known:
                known = {reference: truth_and_yardstick(reference, task, backward)}
            error = check(way, task, backward, *known[reference])
            calls = [call_of(way, slot, backward) for slot in slots]
            loops[way.implementation] = way, gpu.loop(calls, machine, graph=way.graph), error
            if task.memory and machine.is_gpu:
                peaks[way.implementation] = [peak_mb(calls[0]) for _ in range(3)]
        except (WrongOutput, gpu.TooSlow) as reason:
            refused[f"{what}: {way.implementation}"] = str(reason)
        except Exception as error:  # Whatever a peer raises: one that does not run costs no other its row.
            refused[f"{what}: {way.implementation}"] = f"fails: {type(error).__name__}: {str(error)[:300]}"
    del known
    if not loops:
        return Result(workload, [], refused)
    for _, loop, _ in loops.values():
        gpu.settle(loop.run, machine.read)
    runs = [Contender(name, "", loop.run, lambda nothing: nothing) for name, (_, loop, _) in loops.items()]
    taken = interleave(runs, dict.fromkeys(loops, 1), rounds, 0, machine.read)
    state = gpu.identity(machine.device) | {"state": gpu.sensors(machine.device, runs[0].run)}
    measured = []
    for one in runs:
        way, loop, error = loops[one.implementation]
        kept = [Sample(taken_.seconds / (loop.calls * way.repeats), taken_.foreign) for taken_ in taken[one.implementation]]
        measured.append(Measured(replace(one, settings=way.settings), error[0], loop.calls, tuple(kept)))
    rows = [
        time_row(workload, what, task, backward, one, *loops[one.contender.implementation], measured, rates)
        for one in measured
    ]
    rows += [memory_row(workload, what, *loops[name], values, peaks) for name, values in peaks.items()]
    return Result(workload, [completed(one, task.dtype, backward, state) for one in rows], refused)


@dataclass(frozen=True)
class Slot:
    """Arguments of the task in memory of their own."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def slots_of(task: Task, machine: Machine, backward: bool) -> list[Slot]:
    nbytes = sum(x.nbytes for x in task.args if isinstance(x, Tensor))
    count = gpu.copies_beyond_cache(nbytes, machine.cache)
    return [Slot(*copied(task.args, task.kwargs, None, backward)) for _ in range(count)]


def copied(
    args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype | None, backward: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """New tensors of the same numbers; those of `args` in this dtype, and with gradients if `backward`."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(dtype or x.dtype, copy=True).requires_grad_(backward) if x.is_floating_point() else x.clone()

    return tuple(tree_map_only(Tensor, leaf, list(args))), tree_map_only(Tensor, lambda x: x.clone(), kwargs)


def call_of(way: Way, slot: Slot, backward: bool) -> Callable[[], list[Tensor]]:
    """One timed call: outputs, and gradients of all real arguments. What the way prepares is not timed."""
    args = tuple(way.prepare(slot.args))
    # Detached after the preparation, so that it is in no backward pass.
    args = tuple(x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args)
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    cotangents: list[Tensor] = []

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            found = way.call(*args, **slot.kwargs)
        outputs = list(found) if isinstance(found, tuple) else [found]
        if not backward:
            return outputs
        wanted = [output for output in outputs if output.requires_grad]
        if not cotangents:
            cotangents.extend(cotangent(at, output) for at, output in enumerate(wanted))
        gradients = torch.autograd.grad(wanted, leaves, cotangents, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]
        # Without their history: it would hold on to the stream of this call.
        return [*(output.detach() for output in outputs), *gradients]

    return call


def cotangent(at: int, output: Tensor) -> Tensor:
    """Random numbers that every dtype sees alike, the same for every way."""
    generator = torch.Generator(output.device).manual_seed(at)
    drawn = torch.randn(output.shape, generator=generator, device=output.device)
    return drawn.bfloat16().to(output.dtype)


def truth_and_yardstick(reference: Callable[..., Any], task: Task, backward: bool) -> list[list[Tensor]]:
    """The reference in float32 (in float64 for float32 arguments), and in the dtype of the arguments."""
    higher = torch.float64 if task.dtype is torch.float32 else torch.float32
    return [
        call_of(Way("reference", reference), Slot(*copied(task.args, task.kwargs, dtype, backward)), backward)()
        for dtype in (higher, None)
    ]


def check(way: Way, task: Task, backward: bool, truth: Sequence[Tensor], plain: Sequence[Tensor]) -> tuple[float, float]:
    """The worst error of a way and what is allowed there, both as a share of the truth.

    As in the tests: twice the error that the reference makes in the same dtype, plus one rounding step, as root mean
    squares.
    """
    got = call_of(way, Slot(*copied(task.args, task.kwargs, None, backward)), backward)()
    outputs = len(truth) - (sum(isinstance(x, Tensor) and x.is_floating_point() for x in task.args) if backward else 0)
    got = [*got[:outputs], *way.restore(got[outputs:])]
    step, worst = torch.finfo(task.dtype).eps, (0.0, step_of(task.dtype))
    for mine, exact, yardstick in zip(got, truth, plain, strict=True):
        if mine.shape != exact.shape:
            raise WrongOutput(f"returns shape {tuple(mine.shape)}, the reference has {tuple(exact.shape)}")
        size = max(rms(exact), 1e-30)
        error = rms(mine.double() - exact.double()) / size
        allowed = 2 * rms(yardstick.double() - exact.double()) / size + step
        if not error <= allowed:  # NaN is refused too
            raise WrongOutput(f"differs from the reference by {error:.2g} of it, allowed are {allowed:.2g}")
        worst = max(worst, (error, allowed), key=lambda pair: pair[0] / pair[1])
    return worst


def step_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def peak_mb(call: Callable[[], Any]) -> float:
    """Memory that a call takes at its peak beyond what was there before, in MB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def time_row(
    workload: str,
    what: str,
    task: Task,
    backward: bool,
    one: Measured,
    way: Way,
    loop: Loop,
    error: tuple[float, float],
    others: Sequence[Measured],
    rates: Rates,
) -> Row:
    """Microseconds of a call, and what it reaches of what this machine can."""
    work = way.work or task.work
    nbytes, flops = work.of(backward) if work else (None, None)
    per_second = [None if amount is None else amount / one.median for amount in (nbytes, flops)]
    half = task.dtype.itemsize == 2
    shares = [
        None if reached is None else round(100 * reached / most, 1)
        for reached, most in zip(per_second, rates, strict=True)
    ]
    comparable = [other for other in others if other is not one] if way.work is None else []
    return row(
        workload=workload,
        what=what,
        implementation=way.implementation,
        settings=", ".join(filter(None, (way.settings, loop.how))),
        unit="us",
        values=[1e6 * seconds for seconds in one.seconds],
        max_error=error[0],
        tolerance=float(f"{error[1]:.2g}"),
        foreign_percent=one.foreign,
        clean=one.clean,
        calls=loop.calls,
        times_better_than={other.contender.implementation: one.times_faster_than(other) for other in comparable},
    ) | {
        "gb_per_s": figure(per_second[0], 1e9),
        "tflop_per_s": figure(per_second[1], 1e12),
        "percent_of_copy": shares[0],
        "percent_of_matmul": shares[1] if half else None,
    }


def memory_row(
    workload: str,
    what: str,
    way: Way,
    loop: Loop,
    error: tuple[float, float],
    values: Sequence[float],
    all_peaks: dict[str, list[float]],
) -> Row:
    return row(
        workload=workload,
        what=f"{what}, peak memory",
        implementation=way.implementation,
        settings=way.settings,
        unit="MB",
        values=values,
        max_error=error[0],
        tolerance=float(f"{error[1]:.2g}"),
        times_better_than={name: max(theirs) / max(values) for name, theirs in all_peaks.items() if theirs is not values},
    )


def rates_rows(samples: dict[str, list[float]], machine: Machine) -> list[Row]:
    state = gpu.identity(machine.device) | {"state": gpu.sensors(machine.device, lambda: None)}
    return [
        completed(
            row(
                workload=RATES,
                what="What this machine reaches: a copy (bytes read and written), a product of square matrices",
                implementation=name,
                settings="",
                unit=unit,
                values=[value / scale for value in samples[name]],
                max_error=None,
                tolerance=None,
                calls=8,
            ),
            torch.bfloat16,
            False,
            state,
        )
        for name, unit, scale in (("copy", "GB/s", 1e9), ("matmul", "TFLOP/s", 1e12))
    ]


FIGURES = ("gb_per_s", "tflop_per_s", "percent_of_copy", "percent_of_matmul")


def completed(one: Row, dtype: torch.dtype, backward: bool, state: dict[str, Any]) -> Row:
    """A row with all that this suite knows beyond `rows.row`."""
    versions = {"versions": one["versions"] | state["versions"]}
    known = {"suite": "kernels", "dtype": str(dtype).removeprefix("torch."), "backward": backward}
    return dict.fromkeys(FIGURES) | one | state | versions | known


def figure(value: float | None, unit: float) -> float | None:
    return None if value is None else float(f"{value / unit:.4g}")
