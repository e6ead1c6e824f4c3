"""The processes of one model: who is right is asked in turns, and rows are made of the answers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.harness import Failed, Result, Sample, WrongOutput, in_turns
from benchmarks.models.case import Case, Order, Place
from benchmarks.models.comparison import Error, Taken, error
from benchmarks.models.implementations import Implementation
from benchmarks.models.rows import model_row
from benchmarks.models.table import Table
from benchmarks.models.workers import Worker
from benchmarks.rows import Row

if TYPE_CHECKING:
    from benchmarks.models.measure import Bench

LOADING = 240.0
"""Seconds in which a model is loaded."""


class Team:
    """Whoever takes part, each in its process; `refused` says who could not even load."""

    def __init__(
        self,
        here: Bench,
        model: str,
        place: Place,
        names: Mapping[str, Implementation],
        reference: Implementation,
    ) -> None:
        self.here, self.model, self.place, self.reference = here, model, place, reference
        self.names = {name: one for name, one in names.items() if not (one.slow and here.short)}
        self.left_out = {name: "is left out: it compiles for minutes" for name in names if name not in self.names}
        self.workers: dict[str, Worker] = {}
        self.identity: dict[str, Any] | None = None
        self.started = False

    def start(self) -> dict[str, str]:
        """Load everything at the same time; why some could not. They stay away from the following tables."""
        if self.started:
            return {}
        self.started, failed = True, dict(self.left_out)
        workers = {name: self.worker(name, one) for name, one in self.names.items()}
        judges = [self.judge(dtype) for dtype in self.dtypes]
        for worker in [*judges, *workers.values()]:
            worker.send("hello")
        for worker in judges:
            with suppress(Failed):  # said again, and heard, when it is asked for the reference
                self.identity = worker.receive(LOADING)
        for name, worker in workers.items():
            try:
                worker.receive(LOADING)
            except Failed as reason:
                failed[name] = str(reason)
                worker.close()
                del self.names[name], self.workers[name]
        return failed

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def worker(self, name: str, one: Implementation, dtype: str | None = None) -> Worker:
        """The process of an implementation; a new one where the last has died."""
        found = self.workers.get(name)
        if found is None or not found.process.is_alive():
            place = replace(self.place, dtype=dtype or self.place.dtype)
            found = Worker(Order(one.builder, place, self.here.threads, one.options), self.here.scratch)
            self.workers[name] = found
        return found

    @property
    def dtypes(self) -> list[str]:
        """Those in which the reference runs."""
        return list(dict.fromkeys(["float32", self.place.dtype]))

    def judge(self, dtype: str) -> Worker:
        return self.worker(f"reference in {dtype}", self.reference, dtype)

    def dismiss_judges(self) -> None:
        """End the processes of the reference, whose memory somebody else needs."""
        for dtype in self.dtypes:
            self.judge(dtype).close()

    def file(self) -> Path:
        return Path(tempfile.mkstemp(dir=self.here.scratch, suffix=".pt")[1])

    def expected(self, case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The reference in float32, and in the dtype that is measured if that is another.

        Raises:
            Failed: there is none, and so nobody can be judged.
        """
        answers: list[torch.Tensor] = []
        for dtype in self.dtypes:
            worker = self.judge(dtype)
            answers.append(self.asked(worker, "answer", timeout=LOADING, case=case))
            worker.ask("rest", timeout=LOADING)
        return answers[0], answers[1] if len(answers) > 1 else None

    def asked(self, worker: Worker, command: str, *, timeout: float, **arguments: Any) -> torch.Tensor:
        """A tensor that a process wrote to a file."""
        file = self.file()
        worker.ask(command, timeout=timeout, file=str(file), **arguments)
        found = torch.load(file, weights_only=True)
        file.unlink()
        return found

    def judged(self, got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor | None, case: Case) -> Error:
        """How wrong an answer is; `WrongOutput` if it is too wrong."""
        return error(got, exact, plain, absolute=not self.here.is_gpu and not case.backward and plain is None)

    def checked(self, case: Case) -> tuple[dict[str, Taken], dict[str, str]]:
        """Prepare a case everywhere: who is right, with nothing measured yet, and why the others are not there."""
        refused = self.start()
        try:
            exact, plain = self.expected(case)
        except Failed as reason:
            return {}, refused | {"every implementation": f"cannot be judged: the reference {reason}"}
        ready: dict[str, Taken] = {}
        for name, one in self.names.items():
            worker, file = self.worker(name, one), self.file()
            window = (0.05 if self.here.quick else 0.25) * (1 if self.here.is_gpu else 2)
            try:
                told = worker.ask(
                    "prepare",
                    timeout=max(30.0, min(self.here.left(), 600.0)),
                    case=case,
                    file=str(file),
                    window=window,
                    seconds=min(5.0 if self.here.quick else 60.0, max(1.0, self.here.left() / 4)),
                )
                judged = self.judged(torch.load(file, weights_only=True), exact, plain, case)
                ready[name] = Taken(name, told["settings"], judged, told["calls"])
            except (Failed, WrongOutput) as reason:
                refused[name] = str(reason)
            file.unlink()
        return ready, refused

    def turns(
        self, names: Sequence[str], command: str, rounds: int, **arguments: Any
    ) -> tuple[dict[str, list[Any]], dict[str, str]]:
        """Answers to a command, in turns. Of `sample` they are `Sample`s, and busy ones are repeated."""

        def ask(name: str) -> Any:
            found = self.workers[name].ask(command, timeout=max(60.0, min(self.here.left(), 900.0)), **arguments)
            return Sample(*found) if command == "sample" else found

        asks = {name: partial(ask, name) for name in names}
        return in_turns(asks, rounds, until=self.here.until)

    def measure(self, table: Table, *, rounds: int | None = None) -> Result:
        """Rows of whoever is right, and why the others have none."""
        ready, refused = self.checked(table.case)
        rounds = rounds or (2 if self.here.quick else 5)
        taken, failed = self.turns(list(ready), "sample", rounds)
        for name, samples in taken.items():
            one = ready[name]
            one.costs = [sample.seconds for sample in samples]
            if not self.here.is_gpu:
                one.foreign = max(sample.foreign for sample in samples)
                one.clean = all(sample.clean for sample in samples)
        self.look(ready, taken)
        done = [one for name, one in ready.items() if name in taken]
        return Result(table.workload, self.rows(table, done), self.reasons(table, refused | failed))

    def look(self, ready: Mapping[str, Taken], names: Sequence[str] | Mapping[str, Any]) -> None:
        """Read the clocks of a GPU while each of them runs."""
        for name in names if self.here.is_gpu else ():
            try:
                ready[name].state = self.workers[name].ask("sensors", timeout=60)
            except Failed:
                continue  # the figure stands without it

    def rows(self, table: Table, done: Sequence[Taken]) -> list[Row]:
        """A row for each, with factors over the others."""
        config, identity = self.here.config(self.model), self.identity or {}
        circumstances = (self.here.suite, self.model, self.place.dtype, config, identity)
        return [model_row(table, one, done, self.here.rates(self.place.dtype), *circumstances) for one in done]

    def reasons(self, table: Table, refused: Mapping[str, str]) -> dict[str, str]:
        return {f"{table.what}: {name}": reason for name, reason in refused.items()}
