"""Latency of queries, from ids on the host to vectors on the device: p50, p99 and the device; and the cold start."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from benchmarks.harness import FOREIGN_LIMIT, Result
from benchmarks.models import cold_start
from benchmarks.models.case import Case
from benchmarks.models.comparison import Taken
from benchmarks.models.implementations import GRAPHS, IMPLEMENTATIONS, OURS, PACKED_ENCODERS, SDPA, SDPA_COMPILED
from benchmarks.models.measure import Bench, Table, Team, bench

QUERY, BATCHES, COLD = "query-32", "batches", "cold-start"
WORKLOADS = {
    QUERY: "one query of 32 tokens",
    BATCHES: "1, 2, 4, 8 and 32 queries of 8 to 32 tokens in a call",
    COLD: "from the start of a process to its first vector, the checkpoint on the disk and in its cache",
}
NAMES = (OURS, GRAPHS, SDPA, SDPA_COMPILED, PACKED_ENCODERS)
BATCH_SIZES = (1, 8, 32, 2, 4)

ON_DEVICE = {"ettin-17m": 150.0, "modernbert-base": 450.0}
"""Microseconds on the device that a query of 32 tokens may take with graphs on an H200 in bfloat16."""


def run(*, quick: bool, only: Sequence[str], minutes: float | None = None) -> Iterator[Result]:
    """Ettin-17m and ModernBERT-base in bfloat16 on a GPU; Ettin-17m in float32 on a CPU."""
    workloads = [name for name in WORKLOADS if not only or name in only]
    with bench("latency", quick=quick, minutes=minutes) as here:
        models = ("ettin-17m", "modernbert-base") if here.is_gpu else ("ettin-17m",)
        for model in models[:1] if quick else models:
            names = {name: IMPLEMENTATIONS[name] for name in NAMES}
            with here.team(model, "bfloat16" if here.is_gpu else "float32", names) as team:
                for workload in workloads:
                    for count in counts(here, workload):
                        if here.late():
                            yield here.rest(workload)
                            break
                        yield measured(team, table(here, model, workload, count))
                if COLD in workloads and not here.late():
                    yield cold(team, here, model)


def counts(here: Bench, workload: str) -> Sequence[int]:
    """Texts of a call."""
    if workload == BATCHES:
        return (1, 8) if here.tries else BATCH_SIZES
    return (1,) if workload == QUERY else ()


def table(here: Bench, model: str, workload: str, count: int) -> Table:
    """Of p50; the other figures differ in `figure` only."""
    lengths = (32,) if workload == QUERY else lengths_of(count)
    words = "one query of 32 tokens" if workload == QUERY else f"{count} queries of 8 to 32 tokens"
    goals = {SDPA: 5.0} if here.is_gpu and workload == QUERY else {}
    return Table(
        workload,
        f"{model}, {words}, ids on the host to vectors on the device",
        words,
        Case(lengths, tuple(range(count)), from_host=True),
        "p50",
        "us",
        lambda seconds: 1e6 * seconds,
        x=("batch", count) if workload == BATCHES else None,
        goals={GRAPHS: goals, OURS: {} if here.is_gpu else goals},
    )


def lengths_of(count: int) -> tuple[int, ...]:
    """From 8 to 32 tokens, evenly, the longest first; a single query has 20."""
    return (20,) if count == 1 else tuple(round(32 - 24 * at / (count - 1)) for at in range(count))


def measured(team: Team, made: Table) -> Result:
    """Rows of every figure."""
    quick = team.here.quick
    ready, refused = team.checked(made.case)
    taken, failed = team.turns(list(ready), "latencies", 2 if quick else 5, count=20 if quick else 200)
    for name, rounds in taken.items():
        one = ready[name]
        one.calls = len(rounds[0]["host"])
        if not team.here.is_gpu:
            foreign = max(told["foreign"] for told in rounds)
            one.foreign, one.clean = foreign, foreign <= FOREIGN_LIMIT
    team.look(ready, taken)
    rows = []
    for figure in ("p50", "p99", "device"):
        of_figure = figures(ready, taken, figure)
        goal = ON_DEVICE.get(team.model) if figure == "device" and made.workload == QUERY else None
        one = replace(made, figure=figure, goal={GRAPHS: goal}, model_pass=figure != "p99")
        one = one if figure != "device" else replace(one, goals={})
        rows += team.rows(one, of_figure)
    return Result(made.workload, rows, team.reasons(made, refused | failed))


def figures(ready: Mapping[str, Taken], taken: Mapping[str, list[dict]], figure: str) -> list[Taken]:
    """One figure a round of whoever has it: a CPU has no device beside the host."""
    source = "device" if figure == "device" else "host"
    found = []
    for name, rounds in taken.items():
        if rounds[0][source]:
            at = percentile if figure == "p99" else statistics.median
            found.append(replace(ready[name], costs=[at(told[source]) for told in rounds]))
    return found


def percentile(seconds: Sequence[float]) -> float:
    """p99: of 200 calls the third slowest."""
    return sorted(seconds)[min(len(seconds) - 1, int(0.99 * (len(seconds) - 1)))]


def cold(team: Team, here: Bench, model: str) -> Result:
    """A new process each time, in turns."""
    made = Table(
        COLD,
        f"{model}, from the start of a process to the first vector of a text of 32 tokens",
        "one query of 32 tokens",
        Case((32,), (0,)),
        "cold start",
        "ms",
        lambda seconds: 1e3 * seconds,
        model_pass=False,
    )
    done, refused = cold_start.measure(team, made.case, rounds=2 if here.quick else 5)
    return Result(COLD, team.rows(made, done), team.reasons(made, refused))
