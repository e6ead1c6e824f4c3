"""The workloads of `retrieval` that search: exactly and with the pre-filter, in stores of several sizes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from benchmarks.harness import FOREIGN_LIMIT, Result, WrongOutput
from benchmarks.retrieval import synthetic as texts
from benchmarks.retrieval.figures import float64_difference, percentiles, recall, score_difference
from benchmarks.retrieval.stores import FULL, QUERY_TOKENS, TOKENS, TOP, WIDTH, Bench, described
from benchmarks.rows import Row

SCORES = 1e-4  # the tolerance of a score
LIMIT_MB = 4096  # what indexing and searching a million passages may take
WHAT = f"Search for the best {TOP} passages of {TOKENS} tokens, a query of {QUERY_TOKENS} tokens at a time"


class Case(NamedTuple):
    """A search of a store: how large, of which width if it is synthetic, in which way, and how fast it has to be."""

    passages: int
    width: int | None
    prefilter: bool
    at_most: float | None = None


def searches(bench: Bench, workload: str, cases: Sequence[Case]) -> Result:
    found, refused = [], {}
    for case in cases:
        try:
            found += search_rows(bench, workload, case)
        except WrongOutput as reason:
            refused[f"{described(case.passages, case.width)}, {_way(case)}"] = str(reason)
    return Result(workload, found, refused)


def search_rows(bench: Bench, workload: str, case: Case) -> list[Row]:
    """p50, p99 and peak memory; of a pre-filter on real vectors the recall too. Raises WrongOutput."""
    passages, width, prefilter, at_most = case
    queries = bench.sizes.queries
    exact, _ = bench.search(passages, width, prefilter=False)
    done, peak = bench.search(passages, width, prefilter=prefilter)
    if prefilter:
        error = score_difference(exact["found"], done["found"])
    else:
        checked = texts.queries(2, QUERY_TOKENS)
        error = float64_difference(bench.store(passages, width), width, checked, done["found"][: len(checked)])
    if not error <= SCORES:
        raise WrongOutput(f"differs from the reference by {error:.2g}, allowed are {SCORES:g}")
    foreign = max(one["foreign"] for one in done["passes"])
    row = partial(
        bench.row,
        workload=workload,
        what=WHAT,
        corpus=described(passages, width),
        implementation=_way(case),
        synthetic=bool(width),
    )
    timed: dict[str, Any] = {"foreign_percent": foreign, "clean": foreign <= FOREIGN_LIMIT}
    timed |= {"max_error": error, "tolerance": SCORES}
    timed |= {"unit": "ms", "calls": queries, "settings": f"Store.search, {queries} queries, after load"}
    p50, p99 = (percentiles(done["passes"], percent) for percent in (50, 99))
    rows = [row(figure="p50", values=p50, at_most=at_most, **timed), row(figure="p99", values=p99, **timed)]
    if prefilter and not width:
        at_least = 0.99 if at_most else None
        values = [recall(exact["found"], done["found"])]
        settings = f"{queries} beginnings of paragraphs that are in no passage"
        figure = f"recall@{TOP} of exact search"
        rows.append(row(figure=figure, unit="", values=values, at_least=at_least, settings=settings))
    settings = f"of the process, mapped files not counted; first answer after {done['load_seconds']:.1f} s"
    bound = LIMIT_MB if passages == FULL.synthetic else None
    return [*rows, row(figure="peak memory", unit="MB", values=[peak], at_most=bound, settings=settings)]


def search_exact(bench: Bench, workload: str) -> Result:
    return searches(bench, workload, [Case(bench.sizes.search, width, False, 90) for width in (WIDTH, None)])


def search_prefilter(bench: Bench, workload: str) -> Result:
    return searches(bench, workload, [Case(bench.sizes.search, width, True, 30) for width in (WIDTH, None)])


def search_scale(bench: Bench, workload: str) -> Result:
    """The largest store is written, searched and deleted: it takes 12 GB."""
    found = searches(bench, workload, [Case(n, None, way) for n in bench.sizes.scale for way in (False, True)])
    count = bench.sizes.synthetic
    needed, free = 14_000 * count, shutil.disk_usage(bench.work).free
    if free < needed:
        found.refused[described(count, WIDTH)] = f"needs {needed / 1e9:.0f} GB of disk, and {free / 1e9:.0f} are free"
        return found
    folder = bench.folder(count, WIDTH)
    shutil.rmtree(folder, ignore_errors=True)  # What an interrupted run has left would make it look faster.
    built, peak = bench.build(count, WIDTH, folder, prefilter=False, limit_mb=LIMIT_MB)
    listed, peak_of_lists = bench.build(count, WIDTH, folder, prefilter=True)
    row = partial(bench.row, workload=workload, what=WHAT, corpus=described(count, WIDTH), synthetic=True)
    built_how: dict[str, Any] = {"implementation": "index", "settings": f"under RLIMIT_DATA of {LIMIT_MB} MB"}
    listed_how: dict[str, Any] = {"implementation": "index --prefilter", "settings": "of a store that has none yet"}
    written = [
        row(figure="peak memory", unit="MB", values=[peak], at_most=LIMIT_MB, **built_how),
        row(figure="rate", unit="passages/s", values=[built["passages"] / built["seconds"]], **built_how),
        row(figure="peak memory", unit="MB", values=[peak_of_lists], at_most=LIMIT_MB, **listed_how),
        row(figure="rate", unit="passages/s", values=[listed["passages"] / listed["seconds"]], **listed_how),
    ]
    largest = searches(bench, workload, [Case(count, WIDTH, way) for way in (False, True)])
    shutil.rmtree(folder.parent)
    return Result(workload, [*found.rows, *written, *largest.rows], {**found.refused, **largest.refused})


def _way(case: Case) -> str:
    return "pre-filter" if case.prefilter else "exact"
