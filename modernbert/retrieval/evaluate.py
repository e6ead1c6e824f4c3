"""How good a search is: BEIR folders and TREC runs in, nDCG@10, MRR@10 and recall@100 with intervals out."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .store.format import replacing

Run = dict[str, dict[str, float]]
"""Query id to document id to score. Of documents with equal scores, the one that comes first is ranked first."""
Qrels = dict[str, dict[str, int]]
"""Query id to document id to relevance: 0 and below is not relevant, what is not listed is not relevant either."""

MEASURES = {"nDCG@10": "nDCG@10", "MRR@10": "RR@10", "recall@100": "R@100"}  # our name: that of ir-measures
RESAMPLES, SEED = 10_000, 0


class Dataset(NamedTuple):
    """The three files of a set in BEIR's layout."""

    corpus: Path
    queries: Path
    qrels: Path


@dataclass(frozen=True)
class Measured:
    """A measure, its mean over queries, the ends of the mean's 95 % interval, and its value for every query."""

    name: str
    mean: float
    low: float
    high: float
    per_query: dict[str, float]


def find_dataset(folder: str | os.PathLike[str], split: str | None = None) -> Dataset:
    """The files of a BEIR folder: `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`, each `.gz` or not.

    `split` is test if there is one, else the only one there is.

    Raises:
        FileNotFoundError: a file that is not there, by name.
        ValueError: several splits, none of them test.
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

    Raises ValueError with file and line for a broken record or an id that comes twice.
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
        # JSON can spell half a surrogate pair ("\ud800"), which is no character and which no tokenizer takes.
        queries[str(name)] = record["text"].encode("utf-8", "replace").decode()
    if not queries:
        raise ValueError(f"{path} holds no query")
    return queries


def read_qrels(path: str | os.PathLike[str]) -> dict[str, dict[str, int]]:
    """Judgements, from BEIR's tsv (`query-id corpus-id score` under a header) or TREC's four columns.

    Raises ValueError with file and line for a broken line or a pair that is judged twice, differently.
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

    Scores are float32 and read back as such. Tools rank a run by its scores and break ties by document id, each in
    its own way; so that all of them see our ranks, a score that ties is lowered to the next float32.

    Raises:
        ValueError: an id with blanks, which the format cannot hold; a score that is no finite number.
        OSError: the file cannot be written; one that was there is then as it was.
    """
    with replacing(Path(path).resolve()) as beside, beside.open("w", encoding="utf-8", newline="\n") as file:
        for query, scores in run.items():
            last = np.float32(np.inf)
            for rank, (document, score) in enumerate(_ranked(scores), start=1):
                for name in (query, document, tag):
                    if len(name.split()) != 1 or name != name.strip():
                        raise ValueError(f"the id {name!r} is empty or has blanks, which a TREC run cannot hold")
                if not math.isfinite(score):
                    raise ValueError(f"the score of query {query}, document {document} is {score}, no finite number")
                last = min(np.float32(score), np.nextafter(last, np.float32(-np.inf)))
                file.write(f"{query} Q0 {document} {rank} {last!s} {tag}\n")


def measure(run: Run, qrels: Qrels, *, note: Callable[[str], None] = warnings.warn) -> list[Measured]:
    """nDCG@10, MRR@10 and recall@100 of a run, through ir-measures (extra `retrieval`).

    The mean is over the queries of `qrels`. One without a result, or without a relevant document, counts 0, as
    `trec_eval -c` has it; one without judgements is left out. `note` is told of each of these. Ranks are those that
    `write_run` writes. The interval is a percentile bootstrap over queries, 10,000 resamples of a fixed seed: it says
    how far the mean would move with other queries of the same kind, and little where there are few.

    Raises:
        ValueError: no query of the run is judged.
        ModuleNotFoundError: ir-measures is not installed.
    """
    try:
        import ir_measures
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("measuring needs ir-measures: pip install 'modernbert[retrieval]'") from error
    if not run.keys() & qrels.keys():
        raise ValueError(
            f"none of {len(run)} queries of the run is among the {len(qrels)} judged ones: do they belong together?"
        )
    unanswered = sum(not run.get(query) for query in qrels)
    barren = sum(all(grade < 1 for grade in grades.values()) for grades in qrels.values())
    for count, kind in (
        (unanswered, "judged queries without a result, which count 0"),
        (barren, "judged queries without a relevant document, which count 0"),
        (len(run.keys() - qrels.keys()), "queries without a judgement, which are left out"),
    ):
        if count:
            note(f"{kind}: {count}")
    # Descending whole numbers in place of scores: a tie would be broken by document id.
    ranked = {query: {d: -float(i) for i, (d, _) in enumerate(_ranked(scores))} for query, scores in run.items()}
    values = {name: dict.fromkeys(qrels, 0.0) for name in MEASURES}
    names = {ir_measures.parse_measure(theirs): ours for ours, theirs in MEASURES.items()}
    for metric in ir_measures.iter_calc(list(names), qrels, ranked):
        values[names[metric.measure]][metric.query_id] = float(metric.value)
    return [Measured(name, *_mean(np.array([*found.values()])), found) for name, found in values.items()]


def _mean(values: np.ndarray) -> tuple[float, float, float]:
    """The mean and the ends of its interval."""
    random, n = np.random.default_rng(SEED), len(values)
    rows = max(1, (1 << 20) // n)  # resamples at a time, so that memory stays small
    sizes = [min(rows, RESAMPLES - done) for done in range(0, RESAMPLES, rows)]
    means = np.concatenate([values[random.integers(n, size=(size, n))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def _ranked(scores: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(scores.items(), key=lambda pair: -pair[1])


def _either(path: Path) -> Path:
    """The file, or the same with `.gz`."""
    packed = path.with_name(f"{path.name}.gz")
    for file in (path, packed):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"no {path.name} or {packed.name} in {path.parent}: a BEIR folder has corpus.jsonl, queries.jsonl and "
        "qrels/test.tsv"
    )


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """Where each line that is not blank stands, and the line."""
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                try:
                    line = raw.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where}: not UTF-8 ({error})") from error
                if line.strip():
                    yield where, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: broken gzip file ({error}); fetch or compress it again") from error
