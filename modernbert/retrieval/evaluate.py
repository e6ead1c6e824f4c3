"""How good a search is: nDCG@10, MRR@10 and recall@100 with intervals, for data sets and TREC runs."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import replacing
from .dataset import find_dataset, numbered_lines, read_qrels, read_queries
from .documents.text import OnNote

__all__ = ["evaluate", "find_dataset", "read_qrels", "read_queries", "read_run", "write_run"]

Run = dict[str, dict[str, float]]
"""Query id to document id to score. Among equal scores, the document that comes first is ranked first."""
Qrels = dict[str, dict[str, int]]
"""Query id to document id to relevance. Documents with 0 or less, and those that are not listed, are not relevant."""

METRICS = {"nDCG@10": "nDCG@10", "MRR@10": "RR@10", "recall@100": "R@100"}  # our names, and those of ir-measures
RESAMPLES, SEED = 10_000, 0


@dataclass(frozen=True)
class Metric:
    """A metric: its mean over queries, the 95 % interval of the mean, and its value for every query."""

    name: str
    mean: float
    low: float
    high: float
    per_query: dict[str, float]

    @classmethod
    def of(cls, name: str, per_query: dict[str, float]) -> Metric:
        """The metric with these values."""
        return cls(name, *_mean(np.array([*per_query.values()])), per_query)


def write_run(path: str | os.PathLike[str], run: Run, tag: str = "modernbert") -> None:
    """Write a TREC run: `query Q0 document rank score tag`, ranks from 1, best first. Atomic.

    Scores are written as float32, without ties: see `untied`.

    Raises:
        ValueError: an id is empty or contains white space, which the format does not allow, or a score is not finite.
        OSError: the file cannot be written. An existing file is then unchanged.
    """
    with replacing(Path(os.path.realpath(path))) as beside, beside.open("w", encoding="utf-8", newline="\n") as file:
        for query, scores in run.items():
            for rank, (document, score) in enumerate(untied(scores).items(), start=1):
                for name in (query, document, tag):
                    if problem := run_problem(name):
                        raise ValueError(problem)
                if not math.isfinite(score):
                    raise ValueError(f"the score of query {query}, document {document} is {score}, which is not finite")
                file.write(f"{query} Q0 {document} {rank} {np.float32(score)!s} {tag}\n")


def untied(scores: dict[str, float]) -> dict[str, float]:
    """The scores of a query in float32, best first.

    Tools rank by scores and break ties by document id, each in a different way. To give them all the same ranks, a
    tied score is lowered to the next float32.
    """
    found, last = {}, np.float32(np.inf)
    for document, score in _ranked(scores):
        last = min(np.float32(score), np.nextafter(last, np.float32(-np.inf)))
        found[document] = float(last)
    return found


def read_run(path: str | os.PathLike[str]) -> Run:
    """A TREC run. Its ranks are not read: the order is that of the scores, and of the lines among equal scores.

    Raises ValueError with file and line for a broken line or a document that comes twice for a query.
    """
    run: Run = {}
    for where, line in numbered_lines(Path(path)):
        fields = line.split()
        if len(fields) != 6:
            raise ValueError(f"{where}: expected the 6 columns of a TREC run, got {len(fields)}: {line.strip()[:80]}")
        query, document = fields[0], fields[2]
        try:
            score = float(fields[4])
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(f"{where}: the score must be a number, got {fields[4]!r:.80}")
        found = run.setdefault(query, {})
        if document in found:
            raise ValueError(f"{where}: the document {document} comes twice for the query {query}")
        found[document] = score
    if not run:
        raise ValueError(f"{path} holds no result")
    return run


def run_problem(name: str) -> str | None:
    """Why a TREC run cannot hold the id of a query or document; None if it can."""
    if name.split() == [name]:
        return None
    return f"the id {name!r} is empty or contains white space, which a TREC run does not allow"


def without_identical_ids(run: Run) -> Run:
    """The run without each document that has the id of its query."""
    return {query: {d: score for d, score in scores.items() if d != query} for query, scores in run.items()}


def check_measures() -> None:
    """Raise ModuleNotFoundError if ir-measures is not installed."""
    try:
        import ir_measures  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("evaluation needs ir-measures: pip install 'modernbert[retrieval]'") from error


def evaluate(
    run: Run, qrels: Qrels, *, ignore_identical_ids: bool = True, on_note: OnNote = warnings.warn
) -> list[Metric]:
    """nDCG@10, MRR@10 and recall@100 of a run, computed by ir-measures (extra `retrieval`).

    The mean is over the queries of `qrels`. A query without a result or without a relevant document counts as 0, as
    in `trec_eval -c`; a query without judgements is left out. `on_note` is called with their numbers. The ranks are
    those that `write_run` writes. The interval is a percentile bootstrap over queries with 10,000 resamples and a fixed
    seed. It shows how far the mean would move with other queries of the same kind; with few queries it is unreliable.

    Args:
        ignore_identical_ids: leave out documents that have the id of their query, as BEIR does, and MTEB for the sets
            of BEIR: in ArguAna and others, the query is a document itself.

    Raises:
        ValueError: no query of the run is judged.
        ModuleNotFoundError: ir-measures is not installed.
    """
    check_measures()
    import ir_measures

    if not run.keys() & qrels.keys():
        raise ValueError(
            f"none of {len(run)} queries of the run is among the {len(qrels)} judged ones: do they belong together?"
        )
    if ignore_identical_ids:
        same = [query for query in qrels if query in run.get(query, ())]
        run = without_identical_ids(run)
        if same:
            lost = sum(qrels[query].get(query, 0) > 0 for query in same)
            on_note(f"documents with the id of their query, which are left out: {len(same)}, judged relevant: {lost}")
    unanswered = sum(not run.get(query) for query in qrels)
    barren = sum(all(grade < 1 for grade in grades.values()) for grades in qrels.values())
    for count, kind in (
        (unanswered, "judged queries without a result, which count as 0"),
        (barren, "judged queries without a relevant document, which count as 0"),
        (len(run.keys() - qrels.keys()), "queries without a judgement, which are left out"),
    ):
        if count:
            on_note(f"{kind}: {count}")
    # Ranks in place of scores, because ir-measures would break ties by document id.
    ranked = {query: {d: -float(i) for i, (d, _) in enumerate(_ranked(scores))} for query, scores in run.items()}
    values = {name: dict.fromkeys(qrels, 0.0) for name in METRICS}
    names = {ir_measures.parse_measure(theirs): ours for ours, theirs in METRICS.items()}
    for metric in ir_measures.iter_calc(list(names), qrels, ranked):
        values[names[metric.measure]][metric.query_id] = float(metric.value)
    return [Metric.of(name, found) for name, found in values.items()]


def _mean(values: np.ndarray) -> tuple[float, float, float]:
    """The mean, and the ends of its interval."""
    random, n = np.random.default_rng(SEED), len(values)
    rows = max(1, (1 << 20) // n)  # resamples at a time, so that memory stays small
    sizes = [min(rows, RESAMPLES - done) for done in range(0, RESAMPLES, rows)]
    means = np.concatenate([values[random.integers(n, size=(size, n))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def _ranked(scores: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(scores.items(), key=lambda pair: -pair[1])
