"""How to measure: a process for each implementation, in turns, on a quiet machine, and only if the answer is right.

A suite makes `Table`s, one for each group of rows that are compared with each other. `measure` starts the workers of a
model, prepares a job in each, refuses wrong answers, takes samples in turns, and writes rows with the factors.
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
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import worker
from benchmarks.clock import Rates, Refused
from benchmarks.inputs import save_seeded
from benchmarks.rows import Row, rounded, row
from benchmarks.work import shares
from benchmarks.worker import Job, Peer, Setup, Worker
from modernbert import EncoderConfig

FOREIGN_LIMIT = 6.0
"""Percent of one core that everything else may use during a sample."""

ABSOLUTE = RELATIVE = 1e-4
"""The largest difference from the reference in float32 on a CPU; as a share of it where sums have another order (on a
GPU, and backward). One product in TF32 errs by more."""

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
                while isinstance(one, Sample) and not one.clean and left[name] > 0:
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


def difference(got: Tensor, exact: Tensor, plain: Tensor | None, *, absolute: bool) -> Difference:
    """Judge an answer, or raise `Refused`.

    Args:
        exact: the reference in float32.
        plain: the reference in the dtype that is measured; None for float32. Twice its root mean square error and a
            rounding step of bfloat16 are allowed.
        absolute: for float32, the largest absolute difference counts.
    """
    if got.shape != exact.shape:
        raise Refused(f"returned shape {tuple(got.shape)}, the reference has {tuple(exact.shape)}")
    found, allowed = rms(got, exact), RELATIVE
    if plain is not None:
        allowed = 2 * rms(plain, exact) + torch.finfo(torch.bfloat16).eps
    elif absolute:
        found, allowed = (got.double() - exact.double()).abs().max().item(), ABSOLUTE
    if not found <= allowed:  # NaN is refused too
        raise Refused(f"differs from the reference by {found:.2g}, allowed are {allowed:.2g}")
    return Difference(found, allowed)


def rms(got: Tensor, exact: Tensor) -> float:
    """Root mean square error as a share of the reference."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@dataclass
class Measured:
    """An implementation that is right, and what was measured of it, one cost a round (seconds or bytes).

    Attributes:
        foreign: percent of a core that others used, the worst of the samples; None where it does not matter.
        exact: whether it was compared with a tolerance. more: further fields of its row.
    """

    name: str
    settings: str
    error: Difference
    calls: int = 1
    costs: list[float] = field(default_factory=list)
    foreign: float | None = None
    clean: bool = True
    exact: bool = True
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.costs)

    def times_better_than(self, other: Measured) -> float:
        """Median over rounds: only samples of one round are compared."""
        return statistics.median(theirs / mine for mine, theirs in zip(self.costs, other.costs, strict=True))

    def quiet(self, samples: Sequence[Sample]) -> Measured:
        """With what others used during these samples of a CPU."""
        self.foreign, self.clean = max(one.foreign for one in samples), all(one.clean for one in samples)
        return self

    def row(self, others: Sequence[Measured], value: Callable[[float], float], **more: Any) -> Row:
        """With factors over these others. An exact implementation is not worse for being slower than int8."""
        rivals = {other.name: other for other in others if other is not self and other.exact >= self.exact}
        known = {"implementation": self.name, "settings": self.settings, "calls_per_sample": self.calls}
        known |= {"foreign_percent": rounded(self.foreign, digits=2), "clean": self.clean}
        known["times_better_than"] = {name: rounded(self.times_better_than(other)) for name, other in rivals.items()}
        errors = {"max_error": self.error.found, "tolerance": self.error.allowed}
        return row([value(cost) for cost in self.costs], **errors, **known | more | self.more)


@dataclass(frozen=True)
class Table:
    """Rows that are compared with each other.

    Attributes:
        workload, what: its name in `--only`; the table in words.
        model: a preset, or a config of `Run.models`.
        figure, unit: what the number is (throughput, p50, ...).
        value: from the cost of a call to a number in the unit; None is real tokens per second.
        model_pass: a cost is the seconds of a pass through the model, which has a roofline.
        x: (name, value) of this point on a curve.
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
    x: tuple[str, float] | None = None
    rounds: int = 5
    measure: Callable[[Workers, Table], Result] | None = None

    def in_unit(self, cost: float) -> float:
        return sum(self.job.lengths) / cost if self.value is None else self.value(cost)


MS: dict[str, Any] = {"figure": "time", "unit": "ms", "value": lambda seconds: 1e3 * seconds}


@dataclass
class Run:
    """One run of a suite; nothing is begun after `until`, and `scratch` is deleted at the end."""

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

    def left(self) -> float:
        return self.until - time.monotonic()

    def rest(self, workload: str) -> Result:
        reason = f"was not reached within {self.minutes:g} minutes: ask for it with --only {workload}"
        return Result(workload, [], {"the rest": reason})

    def config(self, model: str) -> EncoderConfig:
        return self.models[model] if model in self.models else EncoderConfig.preset(model)

    def setup(self, model: str, dtype: str) -> Setup:
        """With the checkpoint, which is written when it is first asked for."""
        folder = self.scratch / model
        if model and not folder.exists():
            save_seeded(self.config(model), folder)
        return Setup(str(folder), dtype, self.device, torch.get_num_threads(), self.quick)

    def rates(self, dtype: str) -> Rates:
        """What this machine reaches in this dtype, measured in a process of its own, once in a run."""
        if dtype not in self.known_rates:
            one = Worker(self.setup("", dtype), Peer(nothing), self.scratch)
            self.known_rates[dtype] = one.ask(worker.rates, timeout=120)
            one.close()
        return self.known_rates[dtype]

    def checked(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Which texts are compared: the longest, the shortest, the first and the last, as far as tokens allow."""
        left, order = 20_000 if self.is_gpu else 1_500, sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
        chosen: list[int] = []
        for index in dict.fromkeys([order[0], order[-1], 0, len(lengths) - 1]):
            if not chosen or lengths[index] <= left:
                chosen.append(index)
                left -= lengths[index]
        return tuple(sorted(chosen))


def nothing(setup: Setup) -> worker.Build:
    """The builder of a process that is not asked for a job."""
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
    """One run of a suite, on the GPU if there is one; a test says where, and brings small models."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    until = time.monotonic() + 60 * (math.inf if minutes is None else minutes)
    with tempfile.TemporaryDirectory() as scratch:
        yield Run(suite, quick, device, minutes, until, Path(scratch), dict(models or {}))


def measure(here: Run, tables: Iterable[Table]) -> Iterator[Result]:
    """The results of these tables. Neighbours of one model, dtype and choice of peers share their processes."""
    for _, group in groupby(tables, lambda one: (one.model, one.dtype, dict(one.peers), one.reference)):
        first = next(group)
        with workers_of(here, first) as workers:
            for table in chain([first], group):
                if here.left() <= 0:
                    yield here.rest(table.workload)
                    return
                yield (table.measure or speed)(workers, table)


@contextmanager
def workers_of(here: Run, table: Table) -> Iterator[Workers]:
    workers = Workers(here, table)
    try:
        yield workers
    finally:
        for one in workers.running.values():
            one.close()


class Workers:
    """The processes of one model, which start when they are first asked."""

    def __init__(self, here: Run, table: Table) -> None:
        self.here, self.reference, self.model = here, table.reference, table.model
        self.setup = here.setup(table.model, table.dtype)
        known = {
            name: peer
            for name, peer in table.peers.items()
            if peer.applies(self.setup) and (peer.package is None or find_spec(peer.package))
        }
        short = here.quick or (here.minutes is not None and here.minutes < COMPILING)
        self.peers = {name: peer for name, peer in known.items() if not (peer.slow and short)}
        self.left_out = {name: "is left out: it compiles for minutes" for name in known if name not in self.peers}
        self.running: dict[str, Worker] = {}
        self.identity: dict[str, Any] = {}
        self.started = False

    def start(self) -> dict[str, str]:
        """Load everything at the same time, once; why some could not, which are absent from the following tables."""
        if self.started:
            return {}
        self.started, refused = True, dict(self.left_out)
        judges = [self.judge(dtype) for dtype in self.dtypes]
        for one in [*judges, *map(self.worker, self.peers)]:
            one.send(worker.hello)
        for one in judges:
            with suppress(Refused):  # it fails again when it is asked for the reference
                self.identity = one.receive(LOADING)
        for name in list(self.peers):
            try:
                self.running[name].receive(LOADING)
            except Refused as reason:
                refused[name] = str(reason)
                self.running.pop(name).close()
                del self.peers[name]
        return refused

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
        """The reference in float32, and in the dtype that is measured if that is another."""
        try:
            found = [self.judge(dtype).ask(worker.answer, timeout=LOADING, job=job) for dtype in self.dtypes]
        except Refused as reason:
            raise Refused(f"cannot be judged: the reference {reason}") from reason
        return found[0], found[1] if len(found) > 1 else None

    def judged(self, name: str, got: Tensor, exact: Tensor, plain: Tensor | None, job: Job) -> Difference:
        """How wrong an answer is, or `Refused`."""
        absolute = not self.here.is_gpu and not job.backward and plain is None
        if name in self.peers and not self.peers[name].exact and got.shape == exact.shape:
            return Difference((got - exact).abs().max().item() if absolute else rms(got, exact), None)
        return difference(got, exact, plain, absolute=absolute)

    def prepared(self, job: Job) -> tuple[dict[str, Measured], dict[str, str]]:
        """Prepare a job everywhere: the implementations that are right, and why the others are not among them."""
        refused = self.start()
        try:
            exact, plain = self.expected(job)
        except Refused as reason:
            return {}, refused | {"every implementation": str(reason)}
        ready: dict[str, Measured] = {}
        window = (0.05 if self.here.quick else 0.25) * (1 if self.here.is_gpu else 2)
        seconds = min(5.0 if self.here.quick else 60.0, max(1.0, self.here.left() / 4))
        for name, peer in self.peers.items():
            try:
                timeout = max(30.0, min(self.here.left(), 600.0))
                told = self.worker(name).ask(worker.prepare, timeout=timeout, job=job, window=window, seconds=seconds)
                error = self.judged(name, told["answer"], exact, plain, job)
                more = cosines(told["answer"], exact) if name.endswith("int8") else {}
                ready[name] = Measured(name, told["settings"], error, told["calls"], exact=peer.exact, more=more)
            except Refused as reason:
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
            with suppress(Refused):  # the figure is right without it
                ready[name].more["state"] = self.running[name].ask(worker.sensors, timeout=60)

    def result(self, table: Table, done: Sequence[Measured], refused: Mapping[str, str]) -> Result:
        """A row for each, with factors over the others, and the reasons of those without one."""
        lengths, known = table.job.lengths, dict(self.identity)
        versions = known.pop("versions", {})
        known |= {"suite": self.here.suite, "workload": table.workload, "what": table.what, "unit": table.unit}
        known |= {"dtype": self.setup.dtype, "model": table.model, "figure": table.figure}
        known["pass"] = "forward + backward" if table.job.backward else "forward"
        known["lengths"] = {"sequences": len(lengths), "tokens": sum(lengths), "longest": max(lengths, default=0)}
        known["x"] = None if table.x is None else dict(zip(("name", "value"), table.x, strict=True))
        rows = []
        for one in done:
            of_pass = self._shares(table, one) if table.model_pass else {}
            made = one.row(done, table.in_unit, **known, **of_pass)
            rows.append(made | {"versions": made["versions"] | versions})
        return Result(table.workload, rows, {f"{table.what}: {name}": reason for name, reason in refused.items()})

    def _shares(self, table: Table, one: Measured) -> Row:
        rates, setup = self.here.rates(self.setup.dtype), self.setup
        return shares(
            self.here.config(table.model), table.job, one.median, rates, setup.torch_dtype, self.identity.get("gpu")
        )


def cosines(got: Tensor, exact: Tensor) -> Row:
    """How far the rows of an int8 model are from float32."""
    cosine = F.cosine_similarity(got, exact, dim=-1)
    return {"dtype": "int8", "cosine": rounded(cosine.mean().item()), "worst_cosine": rounded(cosine.min().item())}


def speed(workers: Workers, table: Table) -> Result:
    """Rows of the implementations that are right, by the seconds of a call, and why the others have none."""
    ready, refused = workers.prepared(table.job)
    taken, failed = workers.turns(ready, worker.sample, 2 if workers.here.quick else table.rounds)
    for name, samples in taken.items():
        ready[name].costs = [sample.seconds for sample in samples]
        if not workers.here.is_gpu:
            ready[name].quiet(samples)
    workers.look(ready, taken)
    return workers.result(table, [ready[name] for name in ready if name in taken], refused | failed)


def latency(workers: Workers, table: Table, *, count: int, figures: Sequence[str] = ("p50", "p99", "device")) -> Result:
    """Rows of each figure over `count` calls, each waited for; only a GPU has a time on the device."""
    ready, refused = workers.prepared(table.job)
    taken, failed = workers.turns(ready, worker.latencies, 2 if workers.here.quick else table.rounds, count=count)
    workers.look(ready, taken)
    found = workers.result(table, [], refused | failed)
    for figure in figures:
        source, at = ("device" if figure == "device" else "host"), p99 if figure == "p99" else statistics.median
        done = []
        for name, told in taken.items():
            if told[0][source]:
                one = replace(ready[name], calls=count, costs=[at(each[source]) for each in told])
                done.append(one if workers.here.is_gpu else one.quiet([Sample(0.0, each["foreign"]) for each in told]))
        of_pass = table.model_pass and figure != "p99"
        found.rows.extend(workers.result(replace(table, figure=figure, model_pass=of_pass), done, {}).rows)
    return found


def p99(seconds: Sequence[float]) -> float:
    """Of 200 calls the third slowest."""
    return sorted(seconds)[int(0.99 * (len(seconds) - 1))]


NO, BETTER, MUST = "needs no GPU", "made for a GPU; on a CPU it measures a small model", "needs a GPU"


class Suite(NamedTuple):
    """A suite.

    Attributes:
        what: is measured. workloads: what `--only` takes, with a line each. against: the other implementations.
        measure: takes a `Run`, the names of workloads and the suite's options; yields results as they are done.
        gpu: `NO`, `BETTER` or `MUST`, of which only --quick runs without one. minutes: in words.
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
