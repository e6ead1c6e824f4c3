"""The efficiency protocol of the ModernBERT paper: tokens per second of its four sets, and the largest batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.harness import Result
from benchmarks.models import texts
from benchmarks.models.case import Case, some_places
from benchmarks.models.comparison import Taken, largest_batch
from benchmarks.models.implementations import (
    FLASH,
    FLASH_COMPILED,
    IMPLEMENTATIONS,
    OURS,
    SDPA,
    SDPA_COMPILED,
)
from benchmarks.models.measure import Bench, Table, Team, bench
from benchmarks.models.workers import Failed

WORKLOADS = {
    "bfloat16": "tokens per second of the four sets in bfloat16, 512 short or 32 long documents a batch",
    "float32": "the same in float32 without TF32, as published",
    "largest-batch-bfloat16": "the most texts of 512 and of 8192 tokens that fit into the GPU at once, in bfloat16",
    "largest-batch-float32": "the same in float32",
}
SETS = ("fixed 512", "variable short", "fixed 8192", "variable long")
NAMES = (OURS, SDPA, FLASH, SDPA_COMPILED, FLASH_COMPILED)
BATCH = {512: 512, 8192: 32}

PUBLISHED = {
    "modernbert-base": {"fixed 512": 148.1, "variable short": 147.3, "fixed 8192": 123.7, "variable long": 133.8},
    "modernbert-large": {"fixed 512": 52.3, "variable short": 52.9, "fixed 8192": 46.8, "variable long": 49.8},
}
"""Table 2 of the paper, thousand tokens per second of its own implementation on one RTX 4090, in float32 but for
attention. It stands in `what`, never in a row."""

LIMIT = {512: 8192, 8192: 512}
"""Texts of a batch above which the largest is not looked for."""


def run(*, quick: bool, only: Sequence[str], minutes: float | None = None) -> Iterator[Result]:
    """ModernBERT-base and -large on a GPU, Ettin-17m on a CPU."""
    workloads = [name for name in WORKLOADS if not only or name in only]
    with bench("paper-table", quick=quick, minutes=minutes) as here:
        if here.tries and not only:
            workloads = [name for name in workloads if name != "largest-batch-bfloat16"]
        models = ("modernbert-base", "modernbert-large") if here.is_gpu else ("ettin-17m",)
        for model in models[:1] if quick else models:
            for workload in workloads:
                if here.late():
                    yield here.rest(workload)
                elif workload.startswith("largest"):
                    yield from largest(here, model, workload)
                else:
                    yield from speed(here, model, workload)


def speed(here: Bench, model: str, dtype: str) -> Iterator[Result]:
    """A table for each set."""
    # What compiles takes minutes for each set.
    slow = dtype == "bfloat16" and model == "modernbert-base"
    names = {name: IMPLEMENTATIONS[name] for name in NAMES if slow or not IMPLEMENTATIONS[name].slow}
    # bfloat16 is slow where a CPU has none, and one set shows that it works.
    sets = SETS[1:2] if here.tries and dtype == "bfloat16" else SETS
    with here.team(model, dtype, names) as team:
        for name in sets:
            if here.late():
                yield here.rest(dtype)
                return
            yield team.measure(table(here, model, dtype, name), rounds=2 if here.quick else 3)


def table(here: Bench, model: str, dtype: str, name: str) -> Table:
    count = documents(here, name, dtype)
    lengths = texts.in_set(name, count, short=here.tries)
    batch = BATCH[8192 if texts.is_long(name) else 512]
    parts = [f"{model}, {dtype}: {texts.words(name, short=here.tries)}"]
    parts.append(f"{count:,} of the paper's {texts.DOCUMENTS:,} documents, batches of {batch}")
    if model in PUBLISHED:
        parts.append(f"published: {PUBLISHED[model][name]:g} thousand tokens/s on an RTX 4090")
    case = Case(lengths, some_places(lengths, here.checked), batch=batch)
    return Table(dtype, "; ".join(parts), name, case)


def documents(here: Bench, name: str, dtype: str) -> int:
    """As many of a set as the time allows: all short ones and 512 long ones in a long run, in bfloat16."""
    if not here.is_gpu:
        return (1 if here.quick else 2) if texts.is_long(name) else (2 if here.quick else 32)
    whole = texts.DOCUMENTS // 16 if texts.is_long(name) else texts.DOCUMENTS
    if here.quick:
        return whole // 64
    short = here.minutes is not None and here.minutes < 15
    return whole // (8 if short else 1) // (4 if dtype == "float32" else 1)


def largest(here: Bench, model: str, workload: str) -> Iterator[Result]:
    """A table for each length. Each implementation has the GPU for itself."""
    if not here.is_gpu and not here.quick:
        yield Result(workload, [], {"every implementation": "is left out: it is asked of the memory of a GPU"})
        return
    dtype = workload.rpartition("-")[2]
    tables = [size_table(here, model, workload, dtype, length) for length in ((512,) if here.tries else (512, 8192))]
    done: dict[str, list[Taken]] = {table.what: [] for table in tables}
    refused: dict[str, str] = {}
    for name in [SDPA, OURS] if here.quick else [SDPA, FLASH, OURS]:
        if here.late():
            refused[name] = f"was not reached within {here.minutes:g} minutes: ask for it with --only {workload}"
            continue
        with here.team(model, dtype, {name: IMPLEMENTATIONS[name]}) as team:
            ready = {table.what: team.checked(table.case) for table in tables}
            team.dismiss_judges()
            for table in tables:
                taken, reasons = ready[table.what]
                refused |= team.reasons(table, reasons)
                for one in taken.values():
                    try:
                        one.costs = [1 / most(team, name, table.case.lengths[0], table.case.options["limit"])]
                        done[table.what].append(one)
                    except Failed as reason:
                        refused |= team.reasons(table, {name: str(reason)})
    for table in tables:
        yield Result(workload, team.rows(table, done[table.what]), refused)
        refused = {}


def size_table(here: Bench, model: str, workload: str, dtype: str, length: int) -> Table:
    """Costs are shares of a batch, because less of them is better."""
    limit, tokens = (LIMIT[length], length) if here.is_gpu else (3, 32)
    return Table(
        workload,
        f"{model}, {dtype}: the largest batch of texts of {tokens} tokens, looked for up to {limit:,}",
        f"fixed {tokens}",
        Case((tokens,) * 2, (0,), batch=2, options={"limit": limit}),
        "largest batch",
        "sequences",
        lambda cost: 1 / cost,
        model_pass=False,
    )


def most(team: Team, name: str, tokens: int, limit: int) -> int:
    """The largest batch of an implementation."""

    def fits(count: int) -> bool:
        return team.workers[name].ask("fits", timeout=120, case=Case((tokens,) * count, (0,), batch=count))

    found = largest_batch(fits, limit)
    if not found:
        raise Failed("has no memory for a single text")
    return found
