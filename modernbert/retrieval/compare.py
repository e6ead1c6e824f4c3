"""Whether one of two evaluations is better: the differences of their metrics, over the same queries."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .dataset import numbered_records
from .documents.text import OnNote
from .evaluate import RESAMPLES, SEED, Metric

__all__ = ["compare", "read_metrics"]

LARGEST = 1e100
"""The largest number that a metric may be: not NaN, infinite, or an integer beyond the floats."""

BLOCK = 1 << 20
"""Values that are resampled at a time, so that memory stays small."""


@dataclass(frozen=True)
class Difference:
    """A metric in two evaluations of the same queries.

    Attributes:
        queries: how many were compared. first, second: its means.
        difference: second minus first. low, high: the 95 % interval of the difference.
        p: of a two-sided paired randomisation test: how often a difference would be as large if, for each query, a coin
            decided which of its two values is the first.
    """

    name: str
    queries: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float


def compare(first: Sequence[Metric], second: Sequence[Metric], *, on_note: OnNote = warnings.warn) -> list[Difference]:
    """The metrics that both evaluations have, compared over the queries that both have.

    `on_note` is called with the number of queries that only one of them has, which are left out. The interval is that
    of `evaluate`, over the differences. The test is SciPy's (extra `retrieval`), exact for up to 13 queries, and else
    with 10,000 random assignments and a fixed seed. Both look at the choice of queries only: how much a model would
    differ if it were trained again is another question.

    Raises:
        ValueError: they have no metric or no query in common.
        ModuleNotFoundError: scipy is not installed.
    """
    others = {metric.name: metric for metric in second}
    both = [(metric, others[metric.name]) for metric in first if metric.name in others]
    if not both:
        names = (", ".join(metric.name for metric in metrics) or "nothing" for metrics in (first, second))
        raise ValueError(f"the two have no metric in common: {' and '.join(names)}")
    one, other = (metric.per_query.keys() for metric in both[0])
    shared = [query for query in one if query in other]
    if not shared:
        raise ValueError(f"none of {len(one):,} and {len(other):,} queries is in both: are they of the same data set?")
    for name, count in (("first", len(one)), ("second", len(other))):
        if count > len(shared):
            on_note(f"queries that only the {name} has, which are left out: {count - len(shared):,}")
    return [_difference(*pair, shared) for pair in both]


def _difference(first: Metric, second: Metric, queries: Sequence[str]) -> Difference:
    a, b = (np.array([metric.per_query[query] for query in queries]) for metric in (first, second))
    change = Metric.of(first.name, dict(zip(queries, (b - a).tolist(), strict=True)))
    means = float(a.mean()), float(b.mean())
    return Difference(first.name, len(queries), *means, change.mean, change.low, change.high, _p_value(b - a))


def _p_value(differences: np.ndarray) -> float:
    """SciPy takes one sample of differences, and draws the sign of each."""
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to compare runs: pip install 'modernbert[retrieval]'") from error
    if len(differences) == 1:  # SciPy wants two. Either sign gives a difference that is as large.
        return 1.0
    found = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, BLOCK // len(differences)),
        rng=np.random.default_rng(SEED),
    )
    return float(found.pvalue)


def read_metrics(path: str | os.PathLike[str]) -> list[Metric]:
    """The metrics in a file that `modernbert evaluate --per-query` wrote: JSON lines with a query and its values.

    Raises ValueError with file and line for a line without a query, with another query's id, or with other metrics.
    """
    found: dict[str, dict[str, float]] = {}
    names: list[str] = []
    for where, record in numbered_records(Path(path)):
        query = record.get("query") if isinstance(record, dict) else None
        values = {name: value for name, value in record.items() if name != "query"} if query is not None else {}
        if not isinstance(query, str) or not values or not all(map(_is_number, values.values())):
            raise ValueError(f"{where}: expected an object with a query and the numbers of its metrics")
        if query in found:
            raise ValueError(f"{where}: the query {query} comes twice")
        names = names or list(values)
        if values.keys() != set(names):
            raise ValueError(f"{where}: expected the metrics {', '.join(names)}, got {', '.join(values)}")
        found[query] = values
    if not found:
        raise ValueError(f"{path} holds no query")
    return [Metric.of(name, {query: float(values[name]) for query, values in found.items()}) for name in names]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST
