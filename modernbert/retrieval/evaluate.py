"""How good a search is: nDCG@10, MRR@10 and recall@100 with intervals, for BEIR folders and TREC runs."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import replacing
from .documents.text import OnNote, gzip_errors

Run = dict[str, dict[str, float]]
"""Query id to document id to score. Among equal scores, the document that comes first is ranked first."""
Qrels = dict[str, dict[str, int]]
"""Query id to document id to relevance. Documents with 0 or less, and those that are not listed, are not relevant."""

METRICS = {"nDCG@10": "nDCG@10", "MRR@10": "RR@10", "recall@100": "R@100"}  # our names, and those of ir-measures
RESAMPLES, SEED = 10_000, 0


class Dataset(NamedTuple):
    """The three files of a data set in BEIR's layout."""

    corpus: Path
    queries: Path
    qrels: Path


@dataclass(frozen=True)
class Metric:
    """A metric: its mean over queries, the 95 % interval of the mean, and its value for every query."""

    name: str
    mean: float
    low: float
    high: float
    per_query: dict[str, float]


def find_dataset(folder: str | os.PathLike[str], split: str | None = None) -> Dataset:
    """The files of a BEIR folder: `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`, each `.gz` or not.

    The default `split` is test, or else the only one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there are several splits, and none of them is test.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    corpus, queries = (_either(folder / name) for name in ("corpus.jsonl", "queries.jsonl"))
    splits = sorted({file.name.removesuffix(".gz").removesuffix(".tsv") for file in folder.glob("qrels/*.tsv*")})
    if split is None and len(splits) > 1 and "test" not in splits:
        raise ValueError(f"{folder / 'qrels'} holds {', '.join(splits)}: say which split")
    chosen = split or ("test" if "test" in splits or not splits else splits[0])
    if splits and chosen not in splits:
        raise FileNotFoundError(f"{folder / 'qrels'} has no split {chosen}; it holds {', '.join(splits)}")
    return Dataset(corpus, queries, _either(folder / "qrels" / f"{chosen}.tsv"))


def read_queries(path: str | os.PathLike[str]) -> dict[str, str]:
    """Query texts by id, from JSON lines with `_id` and `text` (BEIR's `queries.jsonl`, `.gz` or not), in order.

    Raises ValueError with file and line for a broken record or a repeated id.
    """
    queries: dict[str, str] = {}
    for where, line in _lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error}); queries have one JSON object a line") from error
        name = record.get("_id") if isinstance(record, dict) else None
        if isinstance(name, bool) or not isinstance(name, (str, int)) or not isinstance(record.get("text"), str):
            raise ValueError(f'{where}: expected an object with "_id" and a string "text", got {line.strip()[:80]}')
        if str(name) in queries:
            raise ValueError(f"{where}: the query id {name} comes twice; ids must be unique")
        # JSON can contain half a surrogate pair ("\ud800"), which is not a character: tokenizers fail on it.
        queries[str(name)] = record["text"].encode("utf-8", "replace").decode()
    if not queries:
        raise ValueError(f"{path} holds no query")
    return queries


def read_qrels(path: str | os.PathLike[str]) -> dict[str, dict[str, int]]:
    """Judgements, from BEIR's tsv (`query-id corpus-id score` under a header) or TREC's four columns.

    Raises ValueError with file and line for a broken line or a pair with two different judgements.
    """
    qrels: dict[str, dict[str, int]] = {}
    for number, (where, line) in enumerate(_lines(path)):
        columns = line.rstrip("\r\n").split("\t")
        is_beir = len(columns) == 3
        fields = columns if is_beir else line.split()
        if len(fields) not in (3, 4):
            raise ValueError(f"{where}: expected 3 columns (BEIR) or 4 (TREC), got {len(fields)}: {line.strip()[:80]}")
        query, document, grade = fields[0], fields[-2], fields[-1].strip()
        if not re.fullmatch(r"-?\d{1,9}(\.0*)?", grade):
            if number == 0 and is_beir:
                continue  # the header
            raise ValueError(f"{where}: the score must be a whole number, got {grade!r}")
        score = int(float(grade))
        if qrels.setdefault(query, {}).setdefault(document, score) != score:
            raise ValueError(f"{where}: query {query} and document {document} are judged twice, differently")
    if not qrels:
        raise ValueError(f"{path} holds no judgement")
    return qrels


def write_run(path: str | os.PathLike[str], run: Run, tag: str = "modernbert") -> None:
    """Write a TREC run: `query Q0 document rank score tag`, ranks from 1, best first. Atomic.

    Scores are written as float32. Tools rank a run by its scores and break ties by document id, each in a different
    way. To give them all the same ranks, a tied score is lowered to the next float32.

    Raises:
        ValueError: an id contains white space, which the format does not allow, or a score is not finite.
        OSError: the file cannot be written. An existing file is then unchanged.
    """
    with replacing(Path(os.path.realpath(path))) as beside, beside.open("w", encoding="utf-8", newline="\n") as file:
        for query, scores in run.items():
            last = np.float32(np.inf)
            for rank, (document, score) in enumerate(_ranked(scores), start=1):
                for name in (query, document, tag):
                    if len(name.split()) != 1 or name != name.strip():
                        raise ValueError(
                            f"the id {name!r} is empty or contains white space, which a TREC run does not allow"
                        )
                if not math.isfinite(score):
                    raise ValueError(f"the score of query {query}, document {document} is {score}, which is not finite")
                last = min(np.float32(score), np.nextafter(last, np.float32(-np.inf)))
                file.write(f"{query} Q0 {document} {rank} {last!s} {tag}\n")


def evaluate(run: Run, qrels: Qrels, *, on_note: OnNote = warnings.warn) -> list[Metric]:
    """nDCG@10, MRR@10 and recall@100 of a run, computed by ir-measures (extra `retrieval`).

    The mean is over the queries of `qrels`. A query without a result or without a relevant document counts as 0, as
    in `trec_eval -c`; a query without judgements is left out. `on_note` is called with their numbers. The ranks are
    those that `write_run` writes. The interval is a percentile bootstrap over queries with 10,000 resamples and a fixed
    seed. It shows how far the mean would move with other queries of the same kind; with few queries it is unreliable.

    Raises:
        ValueError: no query of the run is judged.
        ModuleNotFoundError: ir-measures is not installed.
    """
    try:
        import ir_measures
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("evaluation needs ir-measures: pip install 'modernbert[retrieval]'") from error
    if not run.keys() & qrels.keys():
        raise ValueError(
            f"none of {len(run)} queries of the run is among the {len(qrels)} judged ones: do they belong together?"
        )
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
    return [Metric(name, *_mean(np.array([*found.values()])), found) for name, found in values.items()]


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


def _either(path: Path) -> Path:
    """The file, or its `.gz` variant."""
    packed = path.with_name(f"{path.name}.gz")
    for file in (path, packed):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"no {path.name} or {packed.name} in {path.parent}: a BEIR folder has corpus.jsonl, queries.jsonl and "
        "qrels/test.tsv"
    )


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """File and line number of every line that is not blank, as text for messages, and the line."""
    path = Path(path)
    with gzip_errors(str(path)), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error})") from error
            if line.strip():
                yield where, line
