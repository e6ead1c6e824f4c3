"""How to measure: a process for each implementation, in turns, on a quiet machine, and only if the answer is right.

A suite makes `Table`s, one for each group of rows that are compared with each other, and `measure` turns them into
results: it starts the workers of a model, prepares a job in each, refuses wrong answers, takes samples in turns
A B C, B C A, C A B, and writes rows with the factors within each round.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import worker
from benchmarks.clock import SENSORS, Rates
from benchmarks.inputs import save_seeded
from benchmarks.rows import Row, rounded, row
from benchmarks.work import shares
from benchmarks.worker import Failed, Job, Peer, Setup, Worker
from modernbert.config import EncoderConfig

FOREIGN_LIMIT = 6.0
"""Percent of one core that everything else may use during a sample."""

ABSOLUTE = 1e-4
"""The largest difference anywhere from the reference, in float32 on a CPU."""

RELATIVE = 1e-4
"""Where sums have another order (on a GPU, and backward), as a share of the reference. One product in TF32 errs by more."""

LOADING = 240.0
"""Seconds in which a model must be loaded."""

COMPILING = 3.0
"""Minutes that a run must have for implementations that compile."""


class Sample(NamedTuple):
    """The median call of one window of calls, and the CPU that others used meanwhile in percent of a core."""

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
    """The implementation does not compute what the reference computes, so its speed means nothing."""


def in_turns(
    asks: Mapping[str, Callable[[], Any]], rounds: int, *, until: float = math.inf, retries: int = 3
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Answers of each implementation, taken A B C, B C A, C A B, and why some have none.

    A drift of the machine (clock rate, temperature, neighbours) then affects all alike. A `Sample` from a busy machine
    is repeated while its implementation has retries left, and the quietest is kept. An implementation that `Failed`
    leaves; the others go on. After `until` (of time.monotonic) no third round is begun.
    """
    taken: dict[str, list[Any]] = {name: [] for name in asks}
    failed: dict[str, str] = {}
    left = dict.fromkeys(asks, retries)
    for turn in range(rounds):
        if turn >= 2 and time.monotonic() > until:
            break
        names = list(taken)
        start = turn % max(1, len(names))
        for name in [*names[start:], *names[:start]]:
            try:
                one = asks[name]()
                while isinstance(one, Sample) and not one.clean and left[name] > 0:
                    left[name] -= 1
                    one = min(one, asks[name](), key=lambda attempt: attempt.foreign)
                taken[name].append(one)
            except Failed as reason:
                failed[name] = str(reason)
                del taken[name]
    return taken, failed


class Difference(NamedTuple):
    """From the reference, and what is allowed; None if everything is."""

    found: float
    allowed: float | None


def difference(got: Tensor, exact: Tensor, plain: Tensor | None, *, absolute: bool) -> Difference:
    """Judge an answer.

    Args:
        exact: the reference in float32.
        plain: the reference in the dtype that is measured; None for float32. Twice its root mean square error and a
            rounding step of bfloat16 are allowed.
        absolute: for float32, the largest absolute difference counts, up to `ABSOLUTE`.

    Raises:
        WrongOutput: it is not within what is allowed.
    """
    if got.shape != exact.shape:
        raise WrongOutput(f"returned shape {tuple(got.shape)}, the reference has {tuple(exact.shape)}")
    if plain is not None:
        one = Difference(rms(got, exact), 2 * rms(plain, exact) + torch.finfo(torch.bfloat16).eps)
    elif absolute:
        one = Difference((got.double() - exact.double()).abs().max().item(), ABSOLUTE)
    else:
        one = Difference(rms(got, exact), RELATIVE)
    assert one.allowed is not None
    if not one.found <= one.allowed:  # NaN is refused too
        raise WrongOutput(f"differs from the reference by {one.found:.2g}, allowed are {one.allowed:.2g}")
    return one


def rms(got: Tensor, exact: Tensor) -> float:
    """Root mean square error as a share of the reference."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@dataclass
class Measured:
    """An implementation that is right, and what was measured of it, one cost a round.

    Attributes:
        calls: in a sample.
        costs: seconds, bytes or errors: less is better.
        foreign: percent of a core that others used, the worst of the samples; None where it does not matter.
        state: clocks, power and temperature of a GPU.
        exact: whether it was compared with the tolerance.
        more: further fields of its row.
    """

    name: str
    settings: str
    error: Difference
    calls: int = 1
    costs: list[float] = field(default_factory=list)
    foreign: float | None = None
    clean: bool = True
    state: Mapping[str, float | None] = field(default_factory=dict)
    exact: bool = True
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.costs)

    def times_better_than(self, other: Measured) -> float:
        """Median over rounds: only samples of one round are compared."""
        return statistics.median(theirs / mine for mine, theirs in zip(self.costs, other.costs, strict=True))

    def keep(self, samples: Sequence[Sample]) -> None:
        """These samples of a CPU."""
        self.foreign = max(sample.foreign for sample in samples)
        self.clean = all(sample.clean for sample in samples)


@dataclass(frozen=True)
class Table:
    """Rows that are compared with each other.

    Attributes:
        workload, what: its name in `--only`; the table in words.
        model: a preset, or a config of `Run.models`.
        peers: who takes part, by the names in the rows. reference: what the answers must be.
        lengths: the name of the set of lengths.
        figure, unit: what the number is (throughput, p50, ...), and its unit.
        value: from the cost of a call (seconds, bytes) to a number in that unit; None is real tokens per second.
        model_pass: a cost is the seconds of a pass through the model, which has a roofline.
        passes: "forward", "forward + backward" or "forward + backward + AdamW".
        x: (name, value) of this point on a curve.
        goals, goal: for our rows, by name: factors over peers that we want to reach; a value in the unit.
        rounds: samples; None for the usual number.
        measure: how; by default `speed`.
    """

    workload: str
    what: str
    model: str
    dtype: str
    job: Job
    peers: Mapping[str, Peer]
    reference: Peer
    lengths: str = ""
    figure: str = "throughput"
    unit: str = "tokens/s"
    value: Callable[[float], float] | None = None
    model_pass: bool = True
    passes: str = "forward"
    x: tuple[str, float] | None = None
    goals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    goal: Mapping[str, float | None] = field(default_factory=dict)
    rounds: int | None = None
    measure: Callable[[Workers, Table], Result] | None = None

    def in_unit(self, cost: float) -> float:
        return sum(self.job.lengths) / cost if self.value is None else self.value(cost)


@dataclass
class Run:
    """One run of a suite.

    Attributes:
        device: "cuda" where there is a GPU, else "cpu".
        until: on the clock of time.monotonic; nothing is begun after it.
        scratch: a folder for checkpoints and logs, deleted at the end.
        models: configs beside the presets.
    """

    suite: str
    quick: bool
    device: str
    minutes: float | None
    until: float
    scratch: Path
    models: dict[str, EncoderConfig] = field(default_factory=dict)
    known_rates: dict[str, Rates] = field(default_factory=dict)

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def tries(self) -> bool:
        """A try-out on a CPU, whose figures are not results: everything is small."""
        return self.quick and not self.is_gpu

    @property
    def dtype(self) -> str:
        """What a suite measures if it says nothing else."""
        return "bfloat16" if self.is_gpu else "float32"

    @property
    def short(self) -> bool:
        """Whether there is no time for implementations that compile."""
        return self.quick or (self.minutes is not None and self.minutes < COMPILING)

    def left(self) -> float:
        return self.until - time.monotonic()

    def late(self) -> bool:
        return self.left() <= 0

    def rest(self, workload: str) -> Result:
        reason = f"was not reached within {self.minutes:g} minutes: ask for it with --only {workload}"
        return Result(workload, [], {"the rest": reason})

    def config(self, model: str) -> EncoderConfig:
        return self.models[model] if model in self.models else EncoderConfig.preset(model)

    def setup(self, model: str, dtype: str) -> Setup:
        """With the checkpoint, which is written when it is first asked for."""
        folder = self.scratch / model
        if not folder.exists():
            save_seeded(self.config(model), folder)
        return Setup(str(folder), dtype, self.device, torch.get_num_threads(), self.quick)

    def rates(self, dtype: str) -> Rates:
        """What this machine reaches in this dtype, measured in a process of its own, once in a run."""
        if dtype not in self.known_rates:
            setup = Setup("", dtype, self.device, torch.get_num_threads(), self.quick)
            one = Worker(setup, Peer(nothing), self.scratch)
            try:
                self.known_rates[dtype] = Rates.of(one.ask(worker.rates, timeout=120))
            finally:
                one.close()
        return self.known_rates[dtype]

    def checked(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Which texts are compared: the longest, the shortest, the first and the last, as far as tokens allow."""
        tokens = 20_000 if self.is_gpu else 1_500
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
        chosen: list[int] = []
        for index in dict.fromkeys([order[0], order[-1], 0, len(lengths) - 1]):
            if not chosen or sum(lengths[one] for one in chosen) + lengths[index] <= tokens:
                chosen.append(index)
        return tuple(sorted(chosen))


def nothing(setup: Setup) -> worker.Build:
    """The builder of a process that is only asked for its rates."""
    return lambda job: ()


@contextmanager
def run(
    suite: str,
    *,
    quick: bool,
    minutes: float | None,
    models: Mapping[str, EncoderConfig] | None = None,
    device: str | None = None,
) -> Iterator[Run]:
    """One run of a suite, on the GPU if there is one; a test says where, and brings a small model."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    until = time.monotonic() + 60 * (math.inf if minutes is None else minutes)
    with tempfile.TemporaryDirectory() as scratch:
        yield Run(suite, quick, device, minutes, until, Path(scratch), dict(models or {}))


def measure(here: Run, tables: Iterable[Table]) -> Iterator[Result]:
    """The results of these tables. Neighbours of one model, dtype and choice of peers share their processes."""
    for _, group in groupby(tables, lambda one: (one.model, one.dtype, dict(one.peers), one.reference)):
        with suppress(StopIteration):
            first = next(group)
            workers = Workers(here, first)
            try:
                for table in (one for part in ([first], group) for one in part):
                    if here.late():
                        yield here.rest(table.workload)
                        return
                    yield (table.measure or speed)(workers, table)
            finally:
                workers.close()


class Workers:
    """The processes of one model, which start when they are first asked."""

    def __init__(self, here: Run, table: Table) -> None:
        self.here, self.reference, self.model = here, table.reference, table.model
        self.setup = here.setup(table.model, table.dtype)
        self.left_out: dict[str, str] = {}
        self.peers: dict[str, Peer] = {}
        for name, peer in table.peers.items():
            if peer.applies(self.setup) and (peer.package is None or find_spec(peer.package)):
                if peer.slow and here.short:
                    self.left_out[name] = "is left out: it compiles for minutes"
                else:
                    self.peers[name] = peer
        self.running: dict[str, Worker] = {}
        self.identity: dict[str, Any] = {}
        self.started = False

    def start(self) -> dict[str, str]:
        """Load everything at the same time, once; why some could not, which are absent from the following tables."""
        if self.started:
            return {}
        self.started, failed = True, dict(self.left_out)
        judges = [self.judge(dtype) for dtype in self.dtypes]
        for one in [*judges, *(self.worker(name) for name in self.peers)]:
            one.send(worker.hello)
        for one in judges:
            with suppress(Failed):  # it fails again when it is asked for the reference
                self.identity = one.receive(LOADING)
        for name in list(self.peers):
            try:
                self.running[name].receive(LOADING)
            except Failed as reason:
                failed[name] = str(reason)
                self.running.pop(name).close()
                del self.peers[name]
        return failed

    def close(self) -> None:
        for one in self.running.values():
            one.close()
        self.running.clear()

    def worker(self, name: str) -> Worker:
        """The process of an implementation; a new one if the last has died."""
        return self._running(name, self.setup, self.peers[name])

    def judge(self, dtype: str) -> Worker:
        return self._running(f"reference in {dtype}", replace(self.setup, dtype=dtype), self.reference)

    def _running(self, name: str, setup: Setup, peer: Peer) -> Worker:
        if name not in self.running or not self.running[name].is_alive:
            self.running[name] = Worker(setup, peer, self.here.scratch)
        return self.running[name]

    @property
    def dtypes(self) -> list[str]:
        """Those in which the reference runs."""
        return list(dict.fromkeys(["float32", self.setup.dtype]))

    def dismiss_judges(self) -> None:
        """End the processes of the reference, whose memory others need."""
        for dtype in self.dtypes:
            self.judge(dtype).close()

    def expected(self, job: Job) -> tuple[Tensor, Tensor | None]:
        """The reference in float32, and in the dtype that is measured if that is another; may raise `Failed`."""
        exact, *plain = (self.judge(dtype).ask(worker.answer, timeout=LOADING, job=job) for dtype in self.dtypes)
        return exact, plain[0] if plain else None

    def judged(self, name: str, got: Tensor, exact: Tensor, plain: Tensor | None, job: Job) -> Difference:
        """How wrong an answer is; `WrongOutput` if it is too wrong."""
        absolute = not self.here.is_gpu and not job.backward and plain is None
        if name in self.peers and not self.peers[name].exact and got.shape == exact.shape:
            return Difference((got - exact).abs().max().item() if absolute else rms(got, exact), None)
        return difference(got, exact, plain, absolute=absolute)

    def prepared(self, job: Job) -> tuple[dict[str, Measured], dict[str, str]]:
        """Prepare a job everywhere: the implementations that are right, and why the others are not among them."""
        refused = self.start()
        try:
            exact, plain = self.expected(job)
        except Failed as reason:
            return {}, refused | {"every implementation": f"cannot be judged: the reference {reason}"}
        ready: dict[str, Measured] = {}
        window = (0.05 if self.here.quick else 0.25) * (1 if self.here.is_gpu else 2)
        seconds = min(5.0 if self.here.quick else 60.0, max(1.0, self.here.left() / 4))
        for name in self.peers:
            try:
                timeout = max(30.0, min(self.here.left(), 600.0))
                told = self.worker(name).ask(worker.prepare, timeout=timeout, job=job, window=window, seconds=seconds)
                error = self.judged(name, told["answer"], exact, plain, job)
                ready[name] = Measured(name, told["settings"], error, told["calls"], exact=self.peers[name].exact)
                if not self.peers[name].exact:
                    ready[name].more = cosines(told["answer"], exact)
            except (Failed, WrongOutput) as reason:
                refused[name] = str(reason)
        return ready, refused

    def turns(
        self, names: Iterable[str], request: Callable[..., Any], rounds: int, **arguments: Any
    ) -> tuple[dict[str, list[Any]], dict[str, str]]:
        """Answers to a request, in turns. Those to `worker.sample` are `Sample`s, and busy ones are repeated."""

        def ask(name: str) -> Any:
            found = self.running[name].ask(request, timeout=max(60.0, min(self.here.left(), 900.0)), **arguments)
            return Sample(*found) if request is worker.sample else found

        return in_turns({name: partial(ask, name) for name in names}, rounds, until=self.here.until)

    def look(self, ready: Mapping[str, Measured], names: Iterable[str]) -> None:
        """Read the clocks of a GPU while each of these runs."""
        for name in names if self.here.is_gpu else ():
            with suppress(Failed):  # the figure is right without it
                ready[name].state = self.running[name].ask(worker.sensors, timeout=60)

    def rows(self, table: Table, done: Sequence[Measured]) -> list[Row]:
        """A row for each, with factors over the others. An exact one is not worse for being slower than int8."""
        rivals = {one.name: [other for other in done if other is not one and other.exact >= one.exact] for one in done}
        return [self._row(table, one, rivals[one.name]) for one in done]

    def _row(self, table: Table, one: Measured, rivals: Sequence[Measured]) -> Row:
        lengths, dtype, gpu = table.job.lengths, self.setup.dtype, self.identity.get("gpu")
        made = row(
            suite=self.here.suite,
            workload=table.workload,
            what=table.what,
            implementation=one.name,
            settings=one.settings,
            unit=table.unit,
            values=[table.in_unit(cost) for cost in one.costs],
            dtype=dtype,
            max_error=one.error.found,
            tolerance=one.error.allowed,
            foreign_percent=one.foreign,
            clean=one.clean,
            calls=one.calls,
            times_better_than={other.name: one.times_better_than(other) for other in rivals},
            goals=table.goals.get(one.name),
        )
        return (
            made
            | {name: self.identity.get(name) for name in ("gpu", "driver", "capability")}
            | {
                "versions": made["versions"] | self.identity.get("versions", {}),
                "state": dict.fromkeys(SENSORS.values()) | dict(one.state),
                "pass": table.passes,
                "model": table.model,
                "figure": table.figure,
                "lengths": {"name": table.lengths, "sequences": len(lengths), "tokens": sum(lengths)}
                | {"longest": max(lengths, default=0)},
                "x": None if table.x is None else {"name": table.x[0], "value": table.x[1]},
                # Values to reach are meant for one GPU.
                "goal": table.goal.get(one.name) if (gpu, dtype) == ("NVIDIA H200", "bfloat16") else None,
            }
            | self._shares(table, one, gpu)
            | dict(one.more)
        )

    def _shares(self, table: Table, one: Measured, gpu: str | None) -> dict[str, Any]:
        """Operations per second, and their share of what this machine reaches; None where the cost is not a pass's."""
        if not table.model_pass:
            return shares(None)
        rates = self.here.rates(self.setup.dtype)
        backward, itemsize = "backward" in table.passes, self.setup.torch_dtype.itemsize
        of_pass = (self.here.config(table.model), table.job.lengths, itemsize, backward)
        reached = {"copy_gb_per_s": rounded(rates.copy, 1e-9), "matmul_tflop_per_s": rounded(rates.matmul, 1e-12)}
        return shares(of_pass, one.median, rates, self.setup.dtype, gpu) | {"rates": reached}

    def reasons(self, table: Table, refused: Mapping[str, str]) -> dict[str, str]:
        return {f"{table.what}: {name}": reason for name, reason in refused.items()}


def cosines(got: Tensor, exact: Tensor) -> dict[str, Any]:
    """How far the rows of an int8 model are from float32."""
    cosine = torch.nn.functional.cosine_similarity(got, exact, dim=-1)
    return {"dtype": "int8", "cosine": rounded(cosine.mean().item()), "worst_cosine": rounded(cosine.min().item())}


def speed(workers: Workers, table: Table) -> Result:
    """Rows of the implementations that are right, by the seconds of a call, and why the others have none."""
    ready, refused = workers.prepared(table.job)
    rounds = (2 if table.rounds is None else min(2, table.rounds)) if workers.here.quick else table.rounds or 5
    taken, failed = workers.turns(ready, worker.sample, rounds)
    for name, samples in taken.items():
        ready[name].costs = [sample.seconds for sample in samples]
        if not workers.here.is_gpu:
            ready[name].keep(samples)
    workers.look(ready, taken)
    done = [one for name, one in ready.items() if name in taken]
    return Result(table.workload, workers.rows(table, done), workers.reasons(table, refused | failed))


def latency(workers: Workers, table: Table, *, count: int, figures: Sequence[str] = ("p50", "p99", "device")) -> Result:
    """Rows of each figure over `count` calls, each waited for; only a GPU has a time on the device."""
    ready, refused = workers.prepared(table.job)
    rounds = 2 if workers.here.quick else table.rounds or 5
    taken, failed = workers.turns(ready, worker.latencies, rounds, count=count)
    for name, told in taken.items():
        ready[name].calls = count
        if not workers.here.is_gpu:
            ready[name].keep([Sample(0.0, one["foreign"]) for one in told])
    workers.look(ready, taken)
    rows = []
    for figure in figures:
        source, at = ("device" if figure == "device" else "host"), p99 if figure == "p99" else statistics.median
        done = [
            replace(ready[name], costs=[at(one[source]) for one in told])
            for name, told in taken.items()
            if told[0][source]
        ]
        of_figure = replace(table, figure=figure, model_pass=table.model_pass and figure != "p99")
        of_figure = replace(of_figure, **({"goals": {}} if figure == "device" else {"goal": {}}))
        rows += workers.rows(of_figure, done)
    return Result(table.workload, rows, workers.reasons(table, refused | failed))


def p99(seconds: Sequence[float]) -> float:
    """Of 200 calls the third slowest."""
    return sorted(seconds)[min(len(seconds) - 1, int(0.99 * (len(seconds) - 1)))]


NO, BETTER, MUST = "needs no GPU", "made for a GPU; on a CPU it measures a small model", "needs a GPU"


class Suite(NamedTuple):
    """A suite.

    Attributes:
        what: is measured. workloads: what `--only` takes, with a line each. against: who takes part beside ours.
        measure: takes a `Run`, the names of workloads and the suite's options; yields results as they are done.
        gpu: `NO`, `BETTER` or `MUST`, of which only --quick runs without one.
        minutes: how long it takes, in words.
        weight: its part of the time of `all`; 0 leaves it out there.
    """

    what: str
    workloads: Mapping[str, str]
    against: str
    measure: Callable[..., Iterator[Result]]
    gpu: str = NO
    minutes: str = "until everything is done, or as long as --minutes allows"
    weight: int = 0


def of_tables(make: Callable[[Run, Sequence[str]], Iterable[Table]]) -> Callable[..., Iterator[Result]]:
    """The `measure` of a suite that is nothing but tables."""
    return lambda here, names: measure(here, make(here, names))
