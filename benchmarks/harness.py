"""How to measure: in turns, freshly warmed up, on a quiet machine, and only if the answer is right."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.rows import Row

# Percent of one core that everything but this process may use while a sample is taken.
FOREIGN_LIMIT = 6.0


@dataclass(frozen=True)
class Contender:
    """One implementation of a workload with one choice of settings.

    Attributes:
        implementation: the name in its row. Of contenders that share it, the fastest is taken.
        settings: what was chosen, in words.
        run: one timed call; everything prepared beforehand is outside the time.
        result: brings what `run` returned into the order and shape of the expected tensor, untimed.
    """

    implementation: str
    settings: str
    run: Callable[[], Any]
    result: Callable[[Any], Tensor]


class Reading(NamedTuple):
    """What the clocks said about one piece of work."""

    seconds: float
    foreign: float  # percent of one core used by everything else meanwhile


class Sample(NamedTuple):
    """The median call of one window of calls."""

    seconds: float
    foreign: float

    @property
    def clean(self) -> bool:
        return self.foreign <= FOREIGN_LIMIT


class Result(NamedTuple):
    """The rows of one workload, and why an implementation has none."""

    workload: str
    rows: list[Row]
    refused: dict[str, str]


class WrongOutput(ValueError):
    """The contender does not compute what the reference computes, so its speed means nothing."""


class Failed(RuntimeError):
    """A contender has no answer, and this is why."""


@dataclass(frozen=True)
class Measured:
    """A contender with the samples that were kept, one per round."""

    contender: Contender
    max_error: float
    calls: int
    samples: tuple[Sample, ...]

    @property
    def seconds(self) -> tuple[float, ...]:
        return tuple(sample.seconds for sample in self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def foreign(self) -> float:
        """The worst of the kept samples."""
        return max(sample.foreign for sample in self.samples)

    @property
    def clean(self) -> bool:
        return all(sample.clean for sample in self.samples)

    def times_faster_than(self, other: Measured) -> float:
        """Median over rounds of `other`'s time over this one's: only samples of one round are compared."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True))


def read_clocks(work: Callable[[], Any]) -> Reading:
    """Do `work`, and say how long it took and how busy the rest of the machine was.

    The rest of the machine is all CPU time that was not idle (the first line of /proc/stat on Linux, so time
    that a hypervisor stole counts) minus this process's own.
    """
    idle, own, start = _idle_seconds(), time.process_time(), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    own, idle = time.process_time() - own, _idle_seconds() - idle
    foreign = seconds * (os.cpu_count() or 1) - idle - own
    # The kernel counts idle time in ticks of 10 ms, so a short sample can read a little below zero.
    return Reading(seconds, max(0.0, 100 * foreign / seconds))


def _idle_seconds() -> float:
    times = import_module("psutil").cpu_times()  # comes with the extra `bench`
    return times.idle + getattr(times, "iowait", 0.0)


def check(contender: Contender, expected: Tensor, tolerance: float) -> float:
    """Run `contender` once; its largest absolute difference from `expected`, or `WrongOutput`."""
    got = contender.result(contender.run())
    if got.shape != expected.shape:
        raise WrongOutput(f"returned shape {tuple(got.shape)}, the reference has {tuple(expected.shape)}")
    error = (got.double() - expected.double()).abs().max().item()
    if not error <= tolerance:  # NaN is refused too
        raise WrongOutput(f"differs from the reference by {error:.2g}, allowed are {tolerance:.2g}")
    return error


def measure(
    contenders: Sequence[Contender],
    expected: Tensor,
    tolerance: float,
    *,
    rounds: int,
    window: float,
    retries: int = 3,
    read: Callable[[Callable[[], Any]], Reading] = read_clocks,
) -> tuple[list[Measured], dict[str, str]]:
    """Check every contender, take the best settings of each implementation, and time those in turns.

    Args:
        expected: what all of them must return, up to `tolerance` in absolute value.
        rounds: samples per implementation.
        window: least seconds of one sample; fast contenders are called many times in it.
        retries: samples that may be repeated per implementation because the machine was busy.
        read: does some work and reads the clocks (a test hands in its own).

    Returns:
        The measurements in the order of the contenders, and for every refused implementation the reason.
    """
    errors: dict[Contender, float] = {}
    refused: dict[str, str] = {}
    for contender in contenders:
        try:
            errors[contender] = check(contender, expected, tolerance)
        except WrongOutput as reason:
            refused[contender.implementation] = str(reason)
    best: dict[str, tuple[float, Contender]] = {}
    rivals = Counter(contender.implementation for contender in errors)
    for contender in errors:
        name = contender.implementation
        quickest = typical(contender.run, window / 2 if rivals[name] > 1 else None, read)
        if name not in best or quickest < best[name][0]:
            best[name] = quickest, contender
    calls = {name: max(1, math.ceil(window / quickest)) for name, (quickest, _) in best.items()}
    taken = interleave([chosen for _, chosen in best.values()], calls, rounds, retries, read)
    measured = [Measured(chosen, errors[chosen], calls[name], tuple(taken[name])) for name, (_, chosen) in best.items()]
    return measured, {name: reason for name, reason in refused.items() if name not in best}


def typical(run: Callable[[], Any], window: float | None, read: Callable[[Callable[[], Any]], Reading]) -> float:
    """The median call of about `window` seconds, of two calls at least; of a single one without a window."""
    seconds = [read(run).seconds]
    more = 0 if window is None else min(100, max(1, int(window / max(seconds[0], 1e-9))))
    return statistics.median_low([*seconds, *(read(run).seconds for _ in range(more))])


def interleave(
    contenders: Sequence[Contender],
    calls: dict[str, int],
    rounds: int,
    retries: int,
    read: Callable[[Callable[[], Any]], Reading],
) -> dict[str, list[Sample]]:
    """Samples per implementation, taken in turns: A B C, B C A, C A B, ...

    A drift of the machine (clock rate, temperature, neighbours) then falls on all alike.
    """
    asks = {one.implementation: partial(take, one.run, calls[one.implementation], read) for one in contenders}
    return in_turns(asks, rounds, retries=retries)[0]


def in_turns(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    until: float = math.inf,
    retries: int = 3,
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Answers of each contender, taken A B C, B C A, C A B, and why some have none.

    A `Sample` from a busy machine is repeated while its contender has retries left, and the quietest is kept. Who
    `Failed` leaves; the others go on. After `until` (of time.monotonic) no third round is begun.
    """
    taken: dict[str, list[Any]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    left = dict.fromkeys(contenders, retries)
    for turn in range(rounds):
        if turn >= 2 and time.monotonic() > until:
            break
        names = list(taken)
        start = turn % max(1, len(names))
        for name in [*names[start:], *names[:start]]:
            try:
                one = contenders[name]()
                while isinstance(one, Sample) and not one.clean and left[name] > 0:
                    left[name] -= 1
                    one = min(one, contenders[name](), key=lambda attempt: attempt.foreign)
                taken[name].append(one)
            except Failed as reason:
                failed[name] = str(reason)
                del taken[name]
    return taken, failed


def take(run: Callable[[], Any], calls: int, read: Callable[[Callable[[], Any]], Reading]) -> Sample:
    """The median of `calls` calls, after an untimed one that outlasts spinning threads."""
    run()
    if calls == 1:
        return Sample(*read(run))
    seconds = []

    def window() -> None:
        for _ in range(calls):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)

    foreign = read(window).foreign
    return Sample(statistics.median(seconds), foreign)
