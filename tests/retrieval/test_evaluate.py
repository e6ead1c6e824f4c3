"""Metrics against hand-computed values, formulas in NumPy and SciPy's bootstrap; errors of broken files."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import math
import os
import sys
import threading

import numpy as np
import pytest
from scipy import stats

from modernbert.retrieval import evaluate
from modernbert.retrieval.evaluate import find_dataset, read_qrels, read_queries, write_run

measures = pytest.mark.skipif(
    importlib.util.find_spec("ir_measures") is None, reason="ir-measures is not installed (extra retrieval)"
)


def by_name(run, qrels, note=lambda message: None):
    return {measured.name: measured for measured in evaluate.evaluate(run, qrels, on_note=note)}


def formulas(ranking: list[str], grades: dict[str, int]) -> tuple[float, float, float]:
    """nDCG@10 with linear gains, MRR@10, recall@100, as their definitions read."""
    gains = [max(grades.get(document, 0), 0) for document in ranking]
    ideal = sorted((max(grade, 0) for grade in grades.values()), reverse=True)
    discounts = 1 / np.log2(np.arange(2, 12))
    dcg, best = (sum(g * d for g, d in zip(some[:10], discounts, strict=False)) for some in (gains, ideal))
    first = next((rank for rank, gain in enumerate(gains[:10], start=1) if gain), None)
    relevant = sum(gain > 0 for gain in ideal)
    return (
        dcg / best if best else 0.0,
        1 / first if first else 0.0,
        sum(gain > 0 for gain in gains[:100]) / relevant if relevant else 0.0,
    )


@measures
def test_values_computed_by_hand():
    run = {"q1": {"a": 3.0, "b": 2.0, "c": 1.0}, "q2": {"x": 1.0, "y": 0.5}}
    qrels = {"q1": {"b": 2, "c": 1, "z": 1}, "q2": {"x": 1}}
    found = by_name(run, qrels)
    ideal = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    expected = (2 / math.log2(3) + 1 / math.log2(4)) / ideal
    assert found["nDCG@10"].per_query == pytest.approx({"q1": expected, "q2": 1.0}, abs=1e-9)
    assert found["MRR@10"].per_query == pytest.approx({"q1": 0.5, "q2": 1.0})
    assert found["recall@100"].per_query == pytest.approx({"q1": 2 / 3, "q2": 1.0})
    assert [*found] == ["nDCG@10", "MRR@10", "recall@100"]
    assert found["MRR@10"].mean == pytest.approx(0.75)


@measures
def test_values_are_those_of_the_formulas():
    """Random runs with graded, zero and negative judgements, deeper than every cut."""
    random = np.random.default_rng(3)
    run, qrels, expected = {}, {}, {}
    for q in range(40):
        documents = [f"d{i}" for i in random.permutation(300)]
        length = int(random.integers(1, 200))
        run[f"q{q}"] = {d: float(s) for d, s in zip(documents[:length], np.linspace(9, 1, length), strict=True)}
        qrels[f"q{q}"] = {f"d{i}": int(random.integers(-1, 4)) for i in random.integers(300, size=30)}
        expected[f"q{q}"] = formulas(documents[:length], qrels[f"q{q}"])
    found = by_name(run, qrels)
    for place, name in enumerate(found):
        values = {q: row[place] for q, row in expected.items()}
        assert found[name].per_query == pytest.approx(values, abs=1e-6)
        assert found[name].mean == pytest.approx(np.mean([*values.values()]), abs=1e-6)


@measures
def test_the_earlier_of_two_equal_scores_is_ranked_first():
    """trec_eval would rank them by document id, descending."""
    for order in itertools.permutations(["a", "b", "c"]):
        found = by_name({"q": dict.fromkeys(order, 1.0)}, {"q": {"b": 1}})
        assert found["MRR@10"].mean == pytest.approx(1 / (order.index("b") + 1))


@measures
def test_judged_queries_without_results_count_nothing_and_the_others_are_left_out():
    notes: list[str] = []
    run = {"found": {"a": 1.0}, "empty": {}, "unjudged": {"a": 1.0}}
    qrels = {"found": {"a": 1}, "empty": {"a": 1}, "absent": {"a": 1}, "barren": {"a": 0}}
    found = by_name(run, qrels, notes.append)
    for measured in found.values():
        assert measured.per_query == {"found": 1.0, "empty": 0.0, "absent": 0.0, "barren": 0.0}
        assert measured.mean == 0.25
    assert notes == [
        "judged queries without a result, which count as 0: 3",
        "judged queries without a relevant document, which count as 0: 1",
        "queries without a judgement, which are left out: 1",
    ]


@measures
def test_runs_of_nothing():
    """One query, results for none of the judged ones, and a run of another set."""
    one = by_name({"q": {"a": 1.0}}, {"q": {"a": 1}})["nDCG@10"]
    assert (one.mean, one.low, one.high) == (1.0, 1.0, 1.0)
    assert by_name({"q": {}}, {"q": {"a": 1}})["nDCG@10"].mean == 0
    with pytest.raises(ValueError, match="none of 1 queries of the run is among the 2 judged ones"):
        evaluate.evaluate({"z": {"a": 1.0}}, {"q": {"a": 1}, "r": {"a": 1}})


@measures
def test_intervals_are_those_of_scipys_percentile_bootstrap():
    """Equal up to the error of 10,000 resamples: the density of the mean at its quantile sets it."""
    random = np.random.default_rng(5)
    for size in (12, 60, 400):
        ranks = random.integers(1, 15, size=size)
        run = {f"q{q}": {f"d{i}": -float(i) for i in range(1, 15)} for q in range(size)}
        found = by_name(run, {f"q{q}": {f"d{rank}": 1} for q, rank in enumerate(ranks)})["MRR@10"]
        values = np.array([*found.per_query.values()])
        theirs = stats.bootstrap(
            (values,), np.mean, n_resamples=10_000, method="percentile", rng=random
        ).confidence_interval
        deviation = values.std() / math.sqrt(size)
        # A 2.5 % quantile of 10,000 draws has the standard error sqrt(p (1 - p) / n) / density(-1.96) = 0.027.
        assert found.low == pytest.approx(theirs.low, abs=5 * 0.027 * math.sqrt(2) * deviation)
        assert found.high == pytest.approx(theirs.high, abs=5 * 0.027 * math.sqrt(2) * deviation)
        assert found.low < found.mean < found.high
        assert by_name(run, {f"q{q}": {f"d{rank}": 1} for q, rank in enumerate(ranks)})["MRR@10"] == found


@measures
def test_many_queries_are_resampled_piece_by_piece():
    """The size of a block changes memory, not results."""
    values = np.random.default_rng(7).random(3000)
    low, high = stats.norm.interval(0.95, values.mean(), values.std() / math.sqrt(3000))
    mean, *ends = evaluate._mean(values)
    assert mean == values.mean()
    assert ends == pytest.approx([low, high], abs=7e-4)


def test_missing_ir_measures_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'modernbert\[retrieval\]'"):
        evaluate.evaluate({"q": {"a": 1.0}}, {"q": {"a": 1}})


@measures
def test_a_written_run_is_read_as_it_is_by_ir_measures(tmp_path):
    """Ranks from 1; scores in float32, equal ones lowered by one step each, so that every tool gives the same ranks."""
    import ir_measures

    scores = {"b": 1 / 3, "z": 2.5, "c": 1 / 3, "a": 1 / 3, "y": -1e-7, "x": 31.123456789}
    write_run(tmp_path / "run.trec", {"q1": scores, "q2": {}, "q3": {"a": 0.0}}, tag="mine")
    lines = [line.split(" ") for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert [line[2] for line in lines] == ["x", "z", "b", "c", "a", "y", "a"]
    assert [line[3] for line in lines] == ["1", "2", "3", "4", "5", "6", "1"]
    assert {(line[0], line[1], line[5]) for line in lines} == {("q1", "Q0", "mine"), ("q3", "Q0", "mine")}
    written = np.array([line[4] for line in lines[:6]], np.float32)
    assert (np.diff(written) < 0).all()
    np.testing.assert_allclose(written, sorted(scores.values(), reverse=True), rtol=3e-7)
    assert written[0] == np.float32(31.123456789)
    assert written[2] == np.float32(1 / 3)
    read = [(row.query_id, row.doc_id) for row in ir_measures.read_trec_run(str(tmp_path / "run.trec"))]
    assert read == [(line[0], line[2]) for line in lines]
    # trec_eval ignores ranks, but sees the same order: c is third among a, b and c by id, second by rank.
    (value,) = ir_measures.iter_calc(
        [ir_measures.RR], {"q1": {"c": 1}}, {"q1": {line[2]: float(line[4]) for line in lines[:6]}}
    )
    assert value.value == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("run", "tag", "message"),
    [
        ({"q 1": {"a": 1.0}}, "t", "'q 1' is empty or contains white space"),
        ({"q": {"a\tb": 1.0}}, "t", r"'a\\tb' is empty or contains white space"),
        ({"q": {"": 1.0}}, "t", "'' is empty"),
        ({"q": {"a": 1.0}}, "my run", "'my run' is empty or contains white space"),
        ({"q": {"a": math.nan}}, "t", "query q, document a is nan"),
        ({"q": {"a": -math.inf}}, "t", "query q, document a is -inf"),
    ],
)
def test_what_a_run_cannot_hold_leaves_the_old_one(tmp_path, run, tag, message):
    path = tmp_path / "run.trec"
    path.write_text("old\n")
    with pytest.raises(ValueError, match=message):
        write_run(path, {"good": {"a": 1.0}, **run}, tag)
    assert path.read_text() == "old\n"
    assert os.listdir(tmp_path) == ["run.trec"]


def test_a_run_appears_whole(tmp_path):
    """A reader sees the old run or the new one at all times."""
    path, seen, done = tmp_path / "run.trec", set(), threading.Event()
    run = {f"q{q}": {f"d{i}": -float(i) for i in range(100)} for q in range(40)}
    write_run(path, {"old": {"a": 1.0}})

    def look() -> None:
        while not done.is_set():
            seen.add(path.read_text().count("\n"))

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(5):
        write_run(path, run)
    done.set()
    reader.join()
    assert seen <= {1, 4000}
    with pytest.raises(FileNotFoundError):
        write_run(tmp_path / "nowhere" / "run.trec", run)


QUERIES = '{"_id": "q1", "text": "owls?", "metadata": {}}\n\n{"_id": 7, "text": ""}\n'


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_queries_are_read_in_order(tmp_path, suffix):
    path = tmp_path / f"queries.jsonl{suffix}"
    path.write_bytes(gzip.compress(QUERIES.encode()) if suffix else QUERIES.encode())
    assert [*read_queries(path).items()] == [("q1", "owls?"), ("7", "")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: not JSON"),
        ("[1]", 'line 2: expected an object with "_id" and a string "text"'),
        ('{"text": "x"}', 'line 2: expected an object with "_id"'),
        ('{"_id": true, "text": "x"}', 'line 2: expected an object with "_id"'),
        ('{"_id": "b", "text": null}', 'line 2: expected an object with "_id"'),
        ('{"_id": "a", "text": "y"}', "line 2: the query id a comes twice"),
        ("[" * 100_000, "line 2: not JSON"),
        (b"\xff\xfe", "line 2: not UTF-8"),
    ],
)
def test_broken_queries_are_named(tmp_path, line, message):
    path = tmp_path / "queries.jsonl"
    path.write_bytes(b'{"_id": "a", "text": "x"}\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_queries(path)
    assert str(path) in str(caught.value)


def test_a_broken_gzip_file_and_an_empty_one_are_named(tmp_path):
    (tmp_path / "queries.jsonl.gz").write_bytes(gzip.compress(QUERIES.encode())[:-9])
    with pytest.raises(ValueError, match=r"queries.jsonl.gz: broken gzip file"):
        read_queries(tmp_path / "queries.jsonl.gz")
    (tmp_path / "queries.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no query"):
        read_queries(tmp_path / "queries.jsonl")
    (tmp_path / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(ValueError, match="holds no judgement"):
        read_qrels(tmp_path / "test.tsv")


@pytest.mark.parametrize(
    "text",
    [
        "query-id\tcorpus-id\tscore\nq 1\td 1\t2\nq 1\td2\t0\nq2\td 1\t-1\n",
        "q 1\td 1\t2\r\n\r\nq 1\td2\t0\r\nq2\td 1\t-1.0\r\nq 1\td2\t0\r\n",
        "\ufeffquery-id\tcorpus-id\tscore\nq 1\td 1\t2.0\nq 1\td2\t0\nq2\td 1\t-1",
    ],
)
def test_judgements_of_beir_are_read(tmp_path, text):
    (tmp_path / "test.tsv").write_text(text, encoding="utf-8", newline="")
    assert read_qrels(tmp_path / "test.tsv") == {"q 1": {"d 1": 2, "d2": 0}, "q2": {"d 1": -1}}


def test_judgements_of_trec_are_read_as_ir_measures_reads_them(tmp_path):
    (tmp_path / "qrels.txt").write_text("q1 0 d1 2\nq1\t0\td2\t0\nq2 Q0 d1 1\n")
    assert read_qrels(tmp_path / "qrels.txt") == {"q1": {"d1": 2, "d2": 0}, "q2": {"d1": 1}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1\td1", "line 2: expected 3 columns .BEIR. or 4 .TREC., got 2"),
        ("q1 d1 1 x y", "line 2: expected 3 columns .BEIR. or 4 .TREC., got 5"),
        ("q1\td1\tyes", "line 2: the score must be a whole number, got 'yes'"),
        ("q1\td1\t0.5", "line 2: the score must be a whole number, got '0.5'"),
        ("q1\td1\tnan", "line 2: the score must be a whole number"),
        ("q\td\t2", "line 2: query q and document d are judged twice"),
    ],
)
def test_broken_judgements_are_named(tmp_path, line, message):
    path = tmp_path / "test.tsv"
    path.write_text(f"q\td\t1\n{line}\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_qrels(path)
    assert str(path) in str(caught.value)


def test_a_trec_file_has_no_header(tmp_path):
    (tmp_path / "qrels.txt").write_text("query 0 document grade\n")
    with pytest.raises(ValueError, match="line 1: the score must be a whole number, got 'grade'"):
        read_qrels(tmp_path / "qrels.txt")


def beir(folder, *splits, packed=False):
    """A BEIR folder of one document and one query."""
    (folder / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        line = json.dumps({"_id": "1", "text": "x"}).encode()
        file = folder / f"{name}.jsonl{'.gz' * packed}"
        file.write_bytes(gzip.compress(line) if packed else line)
    for split in splits:
        (folder / "qrels" / split).write_text("1\t1\t1\n")
    return folder


def test_the_files_of_a_set_are_found(tmp_path):
    """The requested split, test, or the only one."""
    plain = beir(tmp_path / "plain", "test.tsv", "dev.tsv", "train.tsv")
    assert find_dataset(plain) == (plain / "corpus.jsonl", plain / "queries.jsonl", plain / "qrels/test.tsv")
    assert find_dataset(plain, "dev").qrels == plain / "qrels/dev.tsv"
    packed = beir(tmp_path / "packed", "dev.tsv.gz", packed=True)
    assert find_dataset(packed) == (
        packed / "corpus.jsonl.gz",
        packed / "queries.jsonl.gz",
        packed / "qrels/dev.tsv.gz",
    )


def test_what_is_missing_in_a_set_is_named(tmp_path):
    several = beir(tmp_path / "several", "dev.tsv", "train.tsv")
    with pytest.raises(ValueError, match="holds dev, train: say which split"):
        find_dataset(several)
    with pytest.raises(FileNotFoundError, match="has no split test; it holds dev, train"):
        find_dataset(several, "test")
    with pytest.raises(FileNotFoundError, match=r"no test.tsv or test.tsv.gz in .*qrels: a BEIR folder has"):
        find_dataset(beir(tmp_path / "none"))
    (several / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no queries.jsonl or queries.jsonl.gz"):
        find_dataset(several, "dev")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_dataset(tmp_path / "nowhere")
