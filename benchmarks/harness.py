"""How to measure: a process for each implementation, in turns, on a quiet machine, and only if the answer is right."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import clock, worker
from benchmarks.clock import Reading, Refused, Sample
from benchmarks.inputs import save_seeded
from benchmarks.rows import Row, rounded, row
from benchmarks.work import shares
from benchmarks.worker import BEFORE, ENGINES, OURS, SESSION, Job, Peer, Setup, Worker
from modernbert import EncoderConfig

FOREIGN_LIMIT = 6.0
"""Percent of one core that everything else may use during a sample."""

ABSOLUTE = RELATIVE = 1e-4
"""The largest difference from the reference in float32 on a CPU; as a share of it where sums have another order (on a
GPU, and backward). One product in TF32 errs by more."""

LOADING, COMPILING = 240.0, 3.0
"""Seconds in which a model must be loaded; minutes that a run must have for implementations that compile."""


class Result(NamedTuple):
    """The rows of one workload, and why an implementation has none."""

    workload: str
    rows: list[Row]
    refused: dict[str, str]


def in_turns(
    asks: Mapping[str, Callable[[], Any]], rounds: int, *, until: float = math.inf, retries: int = 3
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Answers of each implementation, taken A B C, B C A, C A B, and why some have none.

    A drift of the machine (clock rate, temperature, neighbours) then affects all alike. A `Sample` from a busy machine
    is repeated while its implementation has retries left, and the quietest is kept. An implementation that is `Refused`
    leaves; the others go on. After `until` (of time.monotonic) no third round is begun.
    """
    taken: dict[str, list[Any]] = {name: [] for name in asks}
    refused: dict[str, str] = {}
    left = dict.fromkeys(asks, retries)
    for turn in range(rounds):
        if turn >= 2 and time.monotonic() > until:
            break
        names = list(taken)
        start = turn % max(1, len(names))
        for name in [*names[start:], *names[:start]]:
            try:
                one = asks[name]()
                while isinstance(one, Sample) and one.foreign > FOREIGN_LIMIT and left[name] > 0:
                    left[name] -= 1
                    one = min(one, asks[name](), key=lambda attempt: attempt.foreign)
                taken[name].append(one)
            except Refused as reason:
                refused[name] = str(reason)
                del taken[name]
    return taken, refused


class Difference(NamedTuple):
    """From the reference, and what is allowed; None if everything is."""

    found: float
    allowed: float | None


def difference(
    got: Tensor,
    exact: Tensor,
    plain: Tensor | None,
    *,
    absolute: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Difference:
    """Judge an answer, or raise `Refused`.

    Args:
        exact: the reference in a higher precision.
        plain: the reference in the dtype that is measured; None for float32 on the same device. Twice its root mean
            square error and a rounding step of `dtype` are allowed.
        absolute: without `plain`, the largest absolute difference counts.
    """
    if got.shape != exact.shape:
        raise Refused(f"returned shape {tuple(got.shape)}, the reference has {tuple(exact.shape)}")
    found, allowed = rms(got, exact), RELATIVE
    if plain is not None:
        allowed = 2 * rms(plain, exact) + torch.finfo(dtype).eps
    elif absolute:
        found, allowed = (got.double() - exact.double()).abs().max().item(), ABSOLUTE
    if not found <= allowed:  # NaN is refused too
        raise Refused(f"differs from the reference by {found:.2g}, allowed are {allowed:.2g}")
    return Difference(found, allowed)


def rms(got: Tensor, exact: Tensor) -> float:
    """Root mean square error as a share of the reference; something of size zero is compared absolutely."""
    return (got.double() - exact.double()).norm().item() / (exact.double().norm().item() or 1.0)


@dataclass
class Measured:
    """An implementation that is right, and what was measured of it, one cost a round (seconds or bytes).

    Attributes:
        foreign: percent of a core that others used, the worst of the samples; None where it does not matter.
        exact: whether it was compared with a tolerance.
        sensors: of a GPU under this load.
    """

    name: str
    settings: str
    error: Difference
    calls: int = 1
    costs: list[float] = field(default_factory=list)
    foreign: float | None = None
    clean: bool = True
    exact: bool = True
    sensors: Row = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.costs)

    def times_better_than(self, other: Measured) -> float:
        """Median over rounds: only samples of one round are compared."""
        return statistics.median(theirs / mine for mine, theirs in zip(self.costs, other.costs, strict=True))

    def quiet(self, samples: Sequence[Sample | Reading]) -> Measured:
        """With what others used during these samples of a CPU."""
        self.foreign = max(one.foreign for one in samples)
        self.clean = self.foreign <= FOREIGN_LIMIT
        return self

    def row(self, others: Sequence[Measured], value: Callable[[float], float], **more: Any) -> Row:
        """With factors over these others. An exact one is not worse for being slower than another."""
        rivals = {other.name: other for other in others if other is not self and other.exact >= self.exact}
        known = {"implementation": self.name, "settings": self.settings, "calls_per_sample": self.calls}
        known |= {"foreign_percent": rounded(self.foreign, digits=2), "clean": self.clean, "sensors": self.sensors}
        known["times_better_than"] = {name: rounded(self.times_better_than(other)) for name, other in rivals.items()}
        errors = {"max_error": self.error.found, "tolerance": self.error.allowed}
        return row([value(cost) for cost in self.costs], **errors, **known | more)


@dataclass(frozen=True)
class Table:
    """Rows that are compared with each other.

    Attributes:
        workload, what: its name in `--only`; the table in words.
        model: a preset; the folder of its checkpoint.
        figure, unit: what the number is (throughput, p50, ...).
        value: from the cost of a call to a number in the unit; None is real tokens per second.
        model_pass: a cost is the seconds of a pass through the model, which has a roofline.
        rounds: samples. measure: how; by default `speed`.
    """

    workload: str
    what: str
    model: str
    dtype: str
    job: Job
    peers: Mapping[str, Peer]
    reference: Peer
    figure: str = "throughput"
    unit: str = "tokens/s"
    value: Callable[[float], float] | None = None
    model_pass: bool = True
    rounds: int = 5
    measure: Callable[[Workers, Table], Result] | None = None

    def in_unit(self, cost: float) -> float:
        return sum(self.job.lengths) / cost if self.value is None else self.value(cost)


MS: dict[str, Any] = {"figure": "time", "unit": "ms", "value": lambda seconds: 1e3 * seconds}


@dataclass
class Run:
    """One run of a suite: nothing is begun after `until`.

    Attributes:
        scratch: a folder for checkpoints and stores.
        against: another checkout of this project. Only ours and its plain modules take part then.
        texts, pairs: files of JSON lines for training, see `inputs`.
        packages: a folder of packages that only those peers import that are not in this environment.
    """

    suite: str
    scratch: Path
    quick: bool = False
    device: str = "cpu"
    minutes: float = math.inf
    until: float = math.inf
    against: Path | None = None
    texts: Path | None = None
    pairs: Path | None = None
    packages: Path | None = None

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> str:
        """What a suite measures if it says nothing else."""
        return "bfloat16" if self.is_gpu else "float32"

    def left(self) -> float:
        return self.until - time.monotonic()

    def rest(self, workload: str) -> Result:
        reason = f"was not reached within {self.minutes:g} minutes: ask for it with --only {workload}"
        return Result(workload, [], {"the rest": reason})

    def setup(self, model: str, dtype: str) -> Setup:
        """With the checkpoint, which is written when it is first asked for."""
        folder = self.scratch / model
        if not folder.exists():
            save_seeded(EncoderConfig.preset(model), folder)
        return Setup(str(folder), dtype, self.device, torch.get_num_threads(), self.quick)

    def located(self, peer: Peer) -> Peer:
        """A peer whose package is not in this environment, but in the folder of packages, imports it from there."""
        package, folder = peer.package, self.packages
        if package and folder and not find_spec(package) and (folder / package).exists():
            return peer._replace(package=None, paths=(str(folder),))
        return peer

    def peers(self, table: Table) -> dict[str, Peer]:
        """Those of a table that are made for this machine; with another checkout only ours."""
        found = dict(table.peers)
        if self.against:
            before = found[OURS]._replace(paths=(str(self.against), str(self.against / "kernels")))
            found = {name: found[name] for name in (*ENGINES, SESSION, OURS) if name in found} | {BEFORE: before}
        found = {name: self.located(peer) for name, peer in found.items()}
        setup = self.setup(table.model, table.dtype)
        return {name: peer for name, peer in found.items() if peer.applies(setup)}


def measure(here: Run, tables: Iterable[Table]) -> Iterator[Result]:
    """The results of these tables. Neighbours of one model, dtype and choice of peers share their processes."""
    if here.against:
        tables = (table for table in tables if OURS in table.peers)
    for _, group in groupby(tables, lambda one: (one.model, one.dtype, dict(one.peers), one.reference)):
        first = next(group)
        with closing(Workers(here, first)) as workers:
            for table in chain([first], group):
                if here.left() <= 0:
                    yield here.rest(table.workload)
                    return
                yield (table.measure or speed)(workers, table)


class Workers:
    """The processes of one model."""

    def __init__(self, here: Run, table: Table) -> None:
        self.here, self.reference = here, here.located(table.reference)
        self.setup = here.setup(table.model, table.dtype)
        self.peers: dict[str, Peer] = {}
        self.left_out: dict[str, str] = {}
        self.running: dict[str, Worker] = {}
        short = here.quick or here.minutes < COMPILING
        for name, peer in here.peers(table).items():
            if peer.package and not find_spec(peer.package):
                self.left_out[name] = f"{peer.package} is not installed"
            elif peer.slow and short:
                self.left_out[name] = "is left out: it compiles for minutes"
            else:
                self.peers[name] = peer

    def close(self) -> None:
        for one in self.running.values():
            one.close()

    def start(self) -> dict[str, str]:
        """Let all load the model at the same time; why some take no part."""
        for name in self.peers:
            self.worker(name)
        return self.left_out

    def worker(self, name: str) -> Worker:
        """The process of an implementation; a new one if the last has died."""
        return self._running(name, self.setup, self.peers[name])

    def _running(self, name: str, setup: Setup, peer: Peer) -> Worker:
        if name not in self.running or not self.running[name].is_alive:
            self.running[name] = Worker(setup, peer, self.here.scratch)
        return self.running[name]

    def expected(self, job: Job) -> tuple[Tensor, Tensor | None]:
        """The reference in float32, and in the dtype that is measured if that is another."""
        found = []
        try:
            for dtype in dict.fromkeys(["float32", self.setup.dtype]):
                judge = self._running(f"reference in {dtype}", replace(self.setup, dtype=dtype), self.reference)
                found.append(judge.ask(worker.answer, timeout=LOADING, job=job))
        except Refused as reason:
            raise Refused(f"cannot be judged: the reference {reason}") from reason
        return found[0], found[1] if len(found) > 1 else None

    def judged(self, name: str, got: Tensor, exact: Tensor, plain: Tensor | None, job: Job) -> Difference:
        """How wrong an answer is, or `Refused`."""
        absolute = not self.here.is_gpu and not job.backward and plain is None
        if not self.peers[name].exact and got.shape == exact.shape:
            return Difference((got - exact).abs().max().item() if absolute else rms(got, exact), None)
        return difference(got, exact, plain, absolute=absolute)

    def prepared(self, job: Job) -> tuple[dict[str, Measured], dict[str, str]]:
        """Prepare a job everywhere: the implementations that are right, and why the others are not among them."""
        refused = dict(self.start())
        try:
            exact, plain = self.expected(job)
        except Refused as reason:
            return {}, refused | {"every implementation": str(reason)}
        ready: dict[str, Measured] = {}
        window = (0.05 if self.here.quick else 0.25) * (1 if self.here.is_gpu else 2)
        seconds = min(5.0 if self.here.quick else 60.0, max(1.0, self.here.left() / 4))
        for name, peer in self.peers.items():
            try:
                timeout = LOADING + max(30.0, min(self.here.left(), 600.0))
                told = self.worker(name).ask(worker.prepare, timeout=timeout, job=job, window=window, seconds=seconds)
                error = self.judged(name, told["answer"], exact, plain, job)
                ready[name] = Measured(name, told["settings"], error, told["calls"], exact=peer.exact)
            except Refused as reason:
                refused[name] = str(reason)
        return ready, refused

    def turns(
        self, names: Iterable[str], request: Callable[..., Any], rounds: int, **arguments: Any
    ) -> tuple[dict[str, list[Any]], dict[str, str]]:
        """Answers to a request, in turns."""

        def ask(name: str) -> Any:
            return self.running[name].ask(request, timeout=max(60.0, min(self.here.left(), 900.0)), **arguments)

        return in_turns({name: partial(ask, name) for name in names}, rounds, until=self.here.until)

    def result(self, table: Table, done: Sequence[Measured], refused: Mapping[str, str]) -> Result:
        """A row for each, with factors over the others, and the reasons of those without one."""
        lengths = table.job.lengths
        known: Row = {"device": self.here.device, "suite": self.here.suite}
        known |= {"workload": table.workload, "what": table.what, "unit": table.unit}
        known |= {"dtype": self.setup.dtype, "model": table.model, "figure": table.figure}
        known["pass"] = "forward + backward" if table.job.backward else "forward"
        known["lengths"] = {"sequences": len(lengths), "tokens": sum(lengths), "longest": max(lengths, default=0)}
        rows, dtype, device = [], self.setup.torch_dtype, torch.device(self.here.device)
        rates = clock.rates(device, dtype, quick=self.here.quick) if table.model_pass and done else None
        for one in done:
            of_pass = shares(EncoderConfig.preset(table.model), table.job, one.median, rates, dtype) if rates else {}
            rows.append(one.row(done, table.in_unit, **known | of_pass))
        return Result(table.workload, rows, {f"{table.what}: {name}": reason for name, reason in refused.items()})


def speed(workers: Workers, table: Table, *, count: int | None = None) -> Result:
    """Rows of the implementations that are right, by the seconds of a call, and why the others have none.

    With `count` each of so many calls is waited for, and there are rows of p50 and of p99.
    """
    ready, refused = workers.prepared(table.job)
    taken, failed = workers.turns(ready, worker.sample, 2 if workers.here.quick else table.rounds, count=count)
    told, _ = workers.turns(taken if workers.here.is_gpu else (), worker.sensors, 1)
    rows: list[Row] = []
    for figure, at in ({"p50": statistics.median, "p99": p99} if count else {table.figure: statistics.median}).items():
        done = []
        for name, samples in taken.items():
            one = replace(ready[name], calls=count or ready[name].calls, costs=[at(one.seconds) for one in samples])
            one.sensors = told[name][0] if name in told else {}
            done.append(one if workers.here.is_gpu else one.quiet(samples))
        of_pass = table.model_pass and figure != "p99"
        rows += workers.result(replace(table, figure=figure, model_pass=of_pass), done, {}).rows
    return workers.result(table, [], refused | failed)._replace(rows=rows)


def p99(seconds: Sequence[float]) -> float:
    return sorted(seconds)[int(0.99 * (len(seconds) - 1))]


def peak_memory(workers: Workers, table: Table) -> Result:
    """Bytes at the peak of a call beyond the loaded model and its inputs, a fresh process for each sample."""
    here, taken, refused = workers.here, {}, {}
    if not here.is_gpu and not worker.CLEAR.exists():
        return workers.result(table, [], {"every implementation": "only Linux resets the peak memory of a process"})
    warm = Job((16, 8), (0,), batch=2, backward=table.job.backward, options=table.job.options.get("warm", {}))
    with closing(Workers(here, table)) as judges:  # whose memory the others need
        try:
            exact, plain = judges.expected(table.job)
        except Refused as reason:
            return workers.result(table, [], {"every implementation": str(reason)})
    for _ in range(1 if here.quick else min(3, table.rounds)):
        with closing(Workers(here, table)) as fresh:
            refused |= fresh.start()
            told, failed = fresh.turns(fresh.peers, worker.peak, 1, job=table.job, warm=warm)
            refused |= failed
            for name, (found,) in told.items():
                try:
                    error = fresh.judged(name, found["answer"], exact, plain, table.job)
                    one = taken.setdefault(name, Measured(name, found["settings"], error))
                    one.costs.append(max(1, found["bytes"]))
                except Refused as reason:
                    refused[name] = str(reason)
    return workers.result(table, [one for name, one in taken.items() if name not in refused], refused)


PEAK: dict[str, Any] = {"figure": "peak memory", "unit": "MB", "value": lambda nbytes: nbytes / 1e6}
PEAK |= {"measure": peak_memory, "model_pass": False}


class Suite(NamedTuple):
    """A suite.

    Attributes:
        what: is measured. workloads: what `--only` takes, with a line each. against: the other implementations.
        measure: takes a `Run` and the names of workloads; yields results as they are done.
        on: the machine that it is for. needs_gpu: only --quick runs without one.
        weight: its part of the time of `all`; 0 leaves it out there.
    """

    what: str
    workloads: Mapping[str, str]
    against: str
    measure: Callable[[Run, Sequence[str]], Iterator[Result]]
    on: str = "made for a GPU; on a CPU it measures a small model"
    needs_gpu: bool = False
    weight: int = 0


def of_tables(make: Callable[[Run, Sequence[str]], Iterable[Table]]) -> Callable[..., Iterator[Result]]:
    """The `measure` of a suite that is nothing but tables."""
    return lambda here, names: measure(here, make(here, names))


def of_workloads(
    workloads: Mapping[str, tuple[Callable[[Run, str], Iterable[Table]], str]],
) -> Callable[..., Iterator[Result]]:
    """The `measure` of a suite each of whose workloads makes tables of its own. A line describes each."""
    return of_tables(lambda here, names: (table for name in names for table in workloads[name][0](here, name)))
