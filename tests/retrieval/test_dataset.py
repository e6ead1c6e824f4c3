"""Data sets in the layouts of BEIR, MTEB and NanoBEIR, and BEIR's rule for documents with the id of their query."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from modernbert.retrieval.dataset import find_dataset, parts, parts_pattern, read_ids, read_qrels, read_queries
from modernbert.retrieval.documents.find import read_file
from modernbert.retrieval.evaluate import evaluate

CORPUS = [{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(4)]
QUERIES = [{"_id": "q1", "text": "one"}, {"_id": "q2", "text": "two"}]
QRELS = [{"query-id": "q1", "corpus-id": "d1", "score": 2}, {"query-id": "q2", "corpus-id": "d2", "score": 1}]


def write(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".tsv":
        lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


LAYOUTS = {
    "BEIR": ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"),
    "MTEB, JSON lines": ("corpus.jsonl", "queries.jsonl", "qrels/test.jsonl"),
    "MTEB, packed": ("corpus.jsonl.gz", "queries.jsonl.gz", "qrels/test.jsonl.gz"),
    "MTEB, parquet": (
        "corpus/corpus-00000-of-00001.parquet",
        "queries/queries-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
    ),
    "MTEB, by split": (
        "corpus/test-00000-of-00001.parquet",
        "queries/test-00000-of-00001.parquet",
        "default/test-00000-of-00001.parquet",
    ),
    "converted by the hub": ("corpus/corpus/0000.parquet", "queries/queries/0000.parquet", "default/test/0000.parquet"),
    "NanoBEIR": (
        "corpus/train-00000-of-00001.parquet",
        "queries/train-00000-of-00001.parquet",
        "qrels/train-00000-of-00001.parquet",
    ),
    "folders of JSON lines": ("corpus/test.jsonl", "queries/test.jsonl", "default/test.jsonl"),
    "mixed": ("corpus.parquet", "query/test.jsonl", "qrels.tsv"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read(tmp_path, layout):
    for name, rows in zip(LAYOUTS[layout], (CORPUS, QUERIES, QRELS), strict=True):
        write(tmp_path / name, rows)
    (tmp_path / "README.md").write_text("the card")
    dataset = find_dataset(tmp_path)
    assert dataset == tuple(tmp_path / name for name in LAYOUTS[layout])
    assert list(read_ids(dataset.corpus)) == ["d0", "d1", "d2", "d3"]
    assert read_queries(dataset.queries) == {"q1": "one", "q2": "two"}
    assert read_qrels(dataset.qrels) == {"q1": {"d1": 2}, "q2": {"d2": 1}}


@pytest.mark.parametrize("place", ["{}/test-{:05}-of-00002", "{}/test/{:04}"])
def test_parts_are_joined_and_other_splits_left_out(tmp_path, place):
    """Also in a folder whose name looks like a pattern."""
    folder = tmp_path / "set [1]*"
    for kind, rows in (("corpus", CORPUS), ("queries", QUERIES), ("qrels", QRELS)):
        for number, some in enumerate((rows[:1], rows[1:])):
            write(folder / f"{place.format(kind, number)}.parquet", some)
        write(folder / kind / "train-00000-of-00001.parquet", [rows[0] | {"score": 1}])
    dataset = find_dataset(folder)
    assert len(parts(dataset.corpus)) == 2
    assert list(read_ids(dataset.corpus)) == ["d0", "d1", "d2", "d3"]
    assert read_queries(dataset.queries) == {"q1": "one", "q2": "two"}
    assert read_qrels(dataset.qrels) == {"q1": {"d1": 2}, "q2": {"d2": 1}}
    assert "/set [[]1][*]/corpus/" in parts_pattern(dataset.corpus)
    assert find_dataset(folder, "train").corpus == folder / "corpus" / "train-00000-of-00001.parquet"


def test_splits_are_sets_in_nano_beir(tmp_path):
    for name in ("NanoArguAna", "NanoNQ"):
        for kind, rows in (("corpus", CORPUS), ("queries", QUERIES), ("qrels", QRELS)):
            write(tmp_path / kind / f"{name}-00000-of-00001.parquet", rows)
    assert {file.name for file in find_dataset(tmp_path, "NanoNQ")} == {"NanoNQ-00000-of-00001.parquet"}
    with pytest.raises(ValueError, match="holds NanoArguAna, NanoNQ: say which split"):
        find_dataset(tmp_path)
    (tmp_path / "corpus" / "NanoNQ-00000-of-00001.parquet").rename(tmp_path / "corpus" / "other.parquet")
    with pytest.raises(ValueError, match="corpus holds NanoArguAna, other, and the judgements are those of 'NanoNQ'"):
        find_dataset(tmp_path, "NanoNQ")


def test_judgements_without_a_score_mean_relevant(tmp_path):
    write(tmp_path / "qrels.parquet", [{"query-id": "q", "corpus-id": "d"}])
    write(tmp_path / "qrels.jsonl", [{"query-id": 1, "corpus-id": 2, "score": -1.0}])
    assert read_qrels(tmp_path / "qrels.parquet") == {"q": {"d": 1}}
    assert read_qrels(tmp_path / "qrels.jsonl") == {"1": {"2": -1}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query-id": "q", "corpus-id": "d", "score": 0.5}, "the score must be a whole number, got '0.5'"),
        ({"query-id": "q", "corpus-id": "d", "score": None}, "the score must be a whole number, got 'None'"),
        ({"query-id": "q", "score": 1}, 'expected an object with "query-id" and "corpus-id", got {"query-id": "q"'),
        ({"query-id": None, "corpus-id": "d"}, 'expected an object with "query-id" and "corpus-id"'),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_broken_judgement_is_named(tmp_path, row, message, suffix):
    path = tmp_path / f"test{suffix}"
    write(path, [row])
    with pytest.raises(ValueError, match=message) as caught:
        read_qrels(path)
    assert str(caught.value).startswith(f"{path}, {'row' if suffix == '.parquet' else 'line'} 1: ")


def test_a_fraction_in_the_first_line_is_not_a_header(tmp_path):
    (tmp_path / "test.tsv").write_text("q\td\t0.5\nq\te\t1\n")
    with pytest.raises(ValueError, match="line 1: the score must be a whole number"):
        read_qrels(tmp_path / "test.tsv")


def test_queries_may_have_an_id_without_underscore(tmp_path):
    write(tmp_path / "queries.jsonl", [{"id": 3, "text": "x"}])
    assert read_queries(tmp_path / "queries.jsonl") == {"3": "x"}


def test_parquet_is_a_kind_of_records(tmp_path):
    """With the values that JSON lacks, and the share of the bytes as progress."""
    pytest.importorskip("pyarrow")
    day = datetime.date(2024, 1, 15)
    rows = [{"id": str(i), "text": f"text {i}", "day": day, "tags": ["a"], "score": float("nan")} for i in range(700)]
    write(tmp_path / "a.parquet", rows)
    told: list[int] = []
    documents = list(read_file(tmp_path / "a.parquet", on_bytes=told.append))
    assert [(document.id, document.line) for document in documents[:2]] == [("0", 1), ("1", 2)]
    assert documents[-1].metadata == {"day": "2024-01-15", "tags": ["a"], "score": None}
    assert (len(documents), sum(told)) == (700, (tmp_path / "a.parquet").stat().st_size)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"b\.parquet: broken parquet file"):
        list(read_file(tmp_path / "b.parquet"))
    write(tmp_path / "c.parquet", [{"id": "x"}])
    with pytest.raises(ValueError, match=r'c\.parquet, line 1: expected an object with a string "text"'):
        list(read_file(tmp_path / "c.parquet"))


def beirs(run, qrels, k=10):
    """nDCG@k, recall@100 and MRR@k of pytrec_eval after BEIR's `ignore_identical_ids`, the mean over judged queries."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    kept = {query: {d: score for d, score in scores.items() if d != query} for query, scores in run.items()}
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {f"ndcg_cut.{k}", "recall.100", "recip_rank"})
    cut = {query: dict(sorted(scores.items(), key=lambda pair: -pair[1])[:k]) for query, scores in kept.items()}
    values, first = evaluator.evaluate(kept), evaluator.evaluate(cut)
    return [
        np.mean([values[query][f"ndcg_cut_{k}"] for query in qrels]),
        np.mean([first[query]["recip_rank"] for query in qrels]),
        np.mean([values[query]["recall_100"] for query in qrels]),
    ]


def test_measures_are_those_of_beir(tmp_path):
    """Queries that are documents, some of them judged for themselves, with negative grades and ids that look alike."""
    pytest.importorskip("ir_measures")
    random = np.random.default_rng(11)
    run, qrels = {}, {}
    for q in range(60):
        documents = [str(d) for d in random.permutation(200)[:120]]
        scores = random.permutation(1000)[:120].astype(float)
        run[str(q)] = dict(zip(documents, scores.tolist(), strict=True)) | {str(q): 2000.0}
        qrels[str(q)] = {str(d): int(random.integers(-1, 3)) for d in random.integers(200, size=20)}
        qrels[str(q)][str(int(random.integers(200)))] = 1
    notes: list[str] = []
    found = [metric.mean for metric in evaluate(run, qrels, on_note=notes.append)]
    assert found == pytest.approx(beirs(run, qrels), abs=1e-9)
    judged = sum(grades.get(query, 0) > 0 for query, grades in qrels.items())
    assert notes == [f"documents with the id of their query, which are left out: 60, judged relevant: {judged}"]
    kept = [metric.mean for metric in evaluate(run, qrels, ignore_identical_ids=False, on_note=notes.append)]
    assert kept[1] != found[1]
    assert len(notes) == 1


def test_parts_of_a_split_are_told_from_one_with_a_longer_name(tmp_path):
    for kind, rows in (("corpus", CORPUS), ("queries", QUERIES), ("qrels", QRELS)):
        for split in ("test", "test-hard"):
            for number in range(2):
                some = rows[number::2] if split == "test" else [rows[0] | {"_id": f"hard{number}"}]
                write(tmp_path / kind / f"{split}-{number:05}-of-00002.jsonl", some)
    assert sorted(read_ids(find_dataset(tmp_path).corpus)) == ["d0", "d1", "d2", "d3"]
    assert list(read_ids(find_dataset(tmp_path, "test-hard").corpus)) == ["hard0", "hard1"]


def test_parts_with_the_name_of_their_folder(tmp_path):
    """As `datasets` writes a config whose split has the same name."""
    write(tmp_path / "queries.jsonl", QUERIES)
    write(tmp_path / "qrels" / "test.tsv", QRELS)
    for number in range(2):
        write(tmp_path / "corpus" / f"corpus-{number:05}-of-00002.jsonl", CORPUS[number::2])
    assert find_dataset(tmp_path).corpus == tmp_path / "corpus" / "corpus-[0-9]*.jsonl"
    assert len(list(read_ids(find_dataset(tmp_path).corpus))) == 4
