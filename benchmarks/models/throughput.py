"""Tokens per second of whole encoders, forward, by model and by the four sets of lengths of the ModernBERT paper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.harness import Result
from benchmarks.models import texts
from benchmarks.models.case import Case, some_places
from benchmarks.models.implementations import (
    EAGER,
    FLASH,
    FLASH_COMPILED,
    GRAPHS,
    IMPLEMENTATIONS,
    OURS,
    PACKED_ENCODERS,
    SDPA,
    SDPA_COMPILED,
    Implementation,
)
from benchmarks.models.measure import Bench, Table, bench

SETS = {
    "fixed-512": "fixed 512",
    "variable-short": "variable short",
    "fixed-8192": "fixed 8192",
    "variable-long": "variable long",
}
WORKLOADS = {name: f"tokens per second, texts of {texts.WORDS[lengths]}" for name, lengths in SETS.items()}

MODELS = ("modernbert-base", "ettin-17m", "ettin-32m", "ettin-68m", "modernbert-large", "ettin-1b")

TOKENS = 65_536
"""Of a call on a GPU: enough to fill it. The mean text decides how many texts these are."""

ON_CPU = {"fixed 512": 8, "variable short": 16, "fixed 8192": 1, "variable long": 2}
QUICK = {"fixed 512": 2, "variable short": 4, "fixed 8192": 1, "variable long": 1}
MEAN = {"fixed 512": 512, "variable short": 256, "fixed 8192": 8192, "variable long": 4096}

PEERS = {"fixed": {SDPA: 2.0, EAGER: 2.0, SDPA_COMPILED: 1.1, FLASH_COMPILED: 1.1, FLASH: 1.1, PACKED_ENCODERS: 1.05}}
PEERS["variable"] = PEERS["fixed"] | {SDPA: 3.0, EAGER: 3.0, SDPA_COMPILED: 1.3, FLASH_COMPILED: 1.3, FLASH: 1.3}

GOALS = {
    ("modernbert-base", "fixed 512"): 2.0e6,
    ("modernbert-base", "variable short"): 2.0e6,
    ("modernbert-base", "fixed 8192"): 1.0e6,
    ("modernbert-base", "variable long"): 1.3e6,
    ("ettin-17m", "fixed 512"): 20e6,
}
"""Tokens per second that we mean to reach on an H200 in bfloat16."""


def run(*, quick: bool, only: Sequence[str], minutes: float | None = None) -> Iterator[Result]:
    """Every model in bfloat16 on a GPU; Ettin-17m in float32 on a CPU."""
    workloads = [name for name in WORKLOADS if not only or name in only]
    with bench("throughput", quick=quick, minutes=minutes) as here:
        models = MODELS[:2] if here.is_gpu and quick else MODELS if here.is_gpu else ("ettin-17m",)
        for model in models:
            if here.late():
                yield here.rest(workloads[0])
                return
            with here.team(model, "bfloat16" if here.is_gpu else "float32", taking_part(here, model)) as team:
                for workload in workloads:
                    if here.late():
                        yield here.rest(workload)
                        break
                    yield team.measure(table(here, model, workload))


def taking_part(here: Bench, model: str) -> dict[str, Implementation]:
    """All, but what compiles takes part for one model only: it takes minutes for each."""
    if here.quick:
        return {name: IMPLEMENTATIONS[name] for name in (OURS, GRAPHS, SDPA, FLASH)}
    return {name: one for name, one in IMPLEMENTATIONS.items() if not one.slow or model == MODELS[0]}


def table(here: Bench, model: str, workload: str) -> Table:
    name = SETS[workload]
    count = QUICK[name] if here.quick else TOKENS // MEAN[name] if here.is_gpu else ON_CPU[name]
    lengths = texts.in_set(name, count, short=here.tries)
    means = here.is_gpu  # the factors are meant for a GPU
    goal = GOALS.get((model, name))
    return Table(
        workload,
        f"{model}, {count} texts of {texts.words(name, short=here.tries)}",
        name,
        Case(lengths, some_places(lengths, here.checked)),
        goals={OURS: PEERS[name.split()[0]]} if means and model == "modernbert-base" else {},
        goal={OURS: goal, GRAPHS: goal} if goal else {},
    )
