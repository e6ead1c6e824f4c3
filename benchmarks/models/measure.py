"""Whole models against each other, a fresh process for each, in turns: what every suite of models is made with.

A suite opens a `bench` (one run, with its deadline and its checkpoints), in it a `Team` for each model and dtype (a
process for each implementation, and the reference), and gives the team a `Table` for every table of rows:

    with bench("throughput", quick=quick, minutes=minutes) as here:
        with here.team("ettin-17m", "float32", IMPLEMENTATIONS) as team:
            case = Case(lengths, some_places(lengths, here.checked))
            yield team.measure(Table("fixed-512", "Ettin-17m, 16 texts of 512 tokens", "fixed 512", case))
        if here.late():
            yield here.rest("fixed-512")

`team.measure` prepares a case everywhere, refuses who is wrong, takes samples in turns and makes rows. The steps are
there one by one too: `team.checked` (who is right, ready to be asked), `team.turns` (any command of `worker.COMMANDS`,
in turns) and `team.rows` (of whatever became of `Taken.costs`).

Another kind of model or of call is another builder: an `Implementation("module:function", options={...})` whose
function takes a `Place` and those options, loads, and returns a function from a `Case` (with `options` of its own) to
`Way`s: what to time (`run`) and what to compare (`answer`). Names to implementations are handed to `here.team`, with
`reference=` if transformers' hidden states are not what must come out; the reference runs in float32, and once more in
the dtype that is measured if that is a half.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.harness import Result
from benchmarks.models.case import Order, Place
from benchmarks.models.implementations import REFERENCE, Implementation, taking_part
from benchmarks.models.rows import Rates
from benchmarks.models.table import Table
from benchmarks.models.team import LOADING, Team
from benchmarks.models.workers import Worker
from benchmarks.seeded import save_seeded
from modernbert.config import EncoderConfig

__all__ = ["COMPILING", "LOADING", "Bench", "Table", "Team", "bench"]

COMPILING = 3.0
"""Minutes that a run must have for implementations that compile."""


@dataclass
class Bench:
    """One run of a suite.

    Attributes:
        device: "cuda" where there is a GPU, else "cpu".
        checked: tokens of the texts that are compared.
        until: on the clock of time.monotonic; nothing is begun after it.
        scratch: a folder for checkpoints, answers and logs, deleted at the end.
        models: configs beside the presets. known_rates: by dtype, each measured once.
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
        """A try-out on a CPU, whose figures are no results: everything is small."""
        return self.quick and not self.is_gpu

    @property
    def checked(self) -> int:
        return 20_000 if self.is_gpu else 1_500

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.until - time.monotonic()

    def late(self) -> bool:
        return self.left() <= 0

    def rest(self, workload: str) -> Result:
        reason = f"was not reached within {self.minutes:g} minutes: ask for it with --only {workload}"
        return Result(workload, [], {"the rest": reason})

    def config(self, model: str) -> EncoderConfig:
        return self.models[model] if model in self.models else EncoderConfig.preset(model)

    def place(self, model: str, dtype: str) -> Place:
        """The checkpoint, written when it is first asked for."""
        folder = self.scratch / model
        if not folder.exists():
            save_seeded(self.config(model), folder)
        return Place(str(folder), dtype, self.device, self.quick)

    @contextmanager
    def worker(self, order: Order) -> Iterator[Worker]:
        one = Worker(order, self.scratch)
        try:
            yield one
        finally:
            one.close()

    def rates(self, dtype: str) -> Rates:
        """What this machine reaches in this dtype, measured in a process of its own, once in a run."""
        if dtype not in self.known_rates:
            order = Order("benchmarks.models.rates:build", Place("", dtype, self.device, self.quick), self.threads)
            with self.worker(order) as one:
                self.known_rates[dtype] = Rates.of(one.ask("measure_rates", timeout=120))
        return self.known_rates[dtype]

    @property
    def short(self) -> bool:
        """Whether there is no time for those that compile."""
        return self.quick or (self.minutes is not None and self.minutes < COMPILING)

    @contextmanager
    def team(
        self,
        model: str,
        dtype: str,
        names: Mapping[str, Implementation],
        *,
        reference: Implementation = REFERENCE,
    ) -> Iterator[Team]:
        """The processes of one model in one dtype; they load it when they are first asked, and end with the block."""
        place = self.place(model, dtype)
        one = Team(self, model, place, taking_part(names, place), reference)
        try:
            yield one
        finally:
            one.close()


@contextmanager
def bench(
    suite: str,
    *,
    quick: bool,
    minutes: float | None,
    models: Mapping[str, EncoderConfig] | None = None,
    device: str | None = None,
) -> Iterator[Bench]:
    """One run of a suite, on the GPU if there is one.

    Args:
        models: configs beside the presets, by name.
        device: where a test wants it.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    until = time.monotonic() + 60 * (float("inf") if minutes is None else minutes)
    with tempfile.TemporaryDirectory() as scratch:
        yield Bench(suite, quick, device, minutes, until, Path(scratch), dict(models or {}))
