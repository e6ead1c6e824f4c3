"""`compare`: two evaluations of the same queries, against SciPy's and ir-measures' own numbers."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from modernbert.retrieval.compare import compare, read_metrics
from modernbert.retrieval.evaluate import Metric, evaluate, read_run, write_run

pytest.importorskip("ir_measures")
stats = pytest.importorskip("scipy.stats")


def metric(values, name="nDCG@10", first=0) -> Metric:
    return Metric.of(name, {f"q{first + i}": float(value) for i, value in enumerate(values)})


def pair(count: int, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    first = random.random(count)
    return first, first + random.normal(shift, 0.2, count)


@pytest.mark.parametrize(("count", "shift"), [(2, 0.1), (9, 0.1), (13, 0.2), (60, 0.0), (60, 0.05), (1500, 0.01)])
def test_p_is_that_of_scipys_test_of_two_samples_and_near_that_of_the_t_test(count, shift):
    first, second = pair(count, shift)
    (found,) = compare([metric(first)], [metric(second)])
    theirs = stats.permutation_test(
        (second, first),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        n_resamples=10_000 if count < 1000 else 2_000,
        rng=1,
    )
    drawn = 2**count > 10_000
    error = math.sqrt(theirs.pvalue * (1 - theirs.pvalue) / 2_000) if drawn else 0
    assert found.p == pytest.approx(theirs.pvalue, abs=5 * error + 1e-12)
    if drawn:
        assert found.p == pytest.approx(stats.ttest_rel(second, first).pvalue, abs=0.03)
    assert found.difference == pytest.approx(second.mean() - first.mean())
    assert (found.first, found.second) == pytest.approx((first.mean(), second.mean()))


def test_the_interval_is_scipys_percentile_bootstrap_of_the_differences():
    first, second = pair(200, 0.03)
    (found,) = compare([metric(first)], [metric(second)])
    theirs = stats.bootstrap((second - first,), np.mean, method="percentile", n_resamples=10_000, rng=2)
    deviation = (second - first).std() / math.sqrt(200)
    # The standard error of a 2.5 % quantile of 10,000 draws is 0.027 deviations, as in test_evaluate.py.
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=5 * 0.027 * math.sqrt(2) * deviation)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=5 * 0.027 * math.sqrt(2) * deviation)


def test_two_of_the_same_do_not_differ_and_the_order_gives_the_sign():
    first, second = pair(40, 0.3)
    (same,) = compare([metric(first)], [metric(first)])
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    (one,), (other,) = (compare([metric(a)], [metric(b)]) for a, b in ((first, second), (second, first)))
    assert one.difference == -other.difference > 0
    assert one.p == other.p < 0.001
    assert compare([metric(first)], [metric(second)]) == [one]


def test_one_query_says_nothing():
    (found,) = compare([metric([0.2])], [metric([0.9])])
    assert (found.queries, found.p) == (1, 1)


def test_queries_of_one_alone_are_left_out_and_counted():
    notes: list[str] = []
    first, second = metric([0.1, 0.5, 0.3]), metric([0.9, 0.7], first=1)
    (found,) = compare([first], [second], on_note=notes.append)
    assert (found.queries, found.first, found.second) == (2, pytest.approx(0.4), pytest.approx(0.8))
    assert notes == ["queries that only the first has, which are left out: 1"]
    compare([second], [first], on_note=notes.append)
    assert notes[1:] == ["queries that only the second has, which are left out: 1"]


def test_the_order_of_queries_is_not_important():
    first, second = pair(30, 0.1)
    (plain,) = compare([metric(first)], [metric(second)])
    turned = Metric.of("nDCG@10", dict(reversed(metric(second).per_query.items())))
    assert compare([metric(first)], [turned]) == [plain]


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(ValueError, match="none of 2 and 1 queries is in both: are they of the same data set"):
        compare([metric([0, 1])], [metric([1], first=7)])
    with pytest.raises(ValueError, match="no metric in common: nDCG@10 and MRR@10"):
        compare([metric([0, 1])], [metric([0, 1], "MRR@10")])
    with pytest.raises(ValueError, match="no metric in common: nothing and MRR@10"):
        compare([], [metric([0, 1], "MRR@10")])


def test_only_what_both_measured_is_compared():
    first = [metric([0, 1]), metric([1, 1], "MRR@10")]
    assert [found.name for found in compare(first, [metric([1, 1], "MRR@10"), metric([1], "mine")])] == ["MRR@10"]


def test_a_missing_scipy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'modernbert\[retrieval\]'"):
        compare([metric([0, 1])], [metric([1, 1])])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"nDCG@10": 1}'], "line 1: expected an object with a query"),
        (['{"query": "q"}'], "line 1: expected an object with a query and the numbers"),
        (['{"query": 3, "a": 1}'], "line 1: expected an object with a query"),
        (['{"query": "q", "a": true}'], "line 1: expected"),
        (['{"query": "q", "a": "1"}'], "line 1: expected"),
        (['{"query": "q", "a": NaN}'], "line 1: expected"),
        (['{"query": "q", "a": -Infinity}'], "line 1: expected"),
        (['{"query": "q", "a": 1' + "0" * 400 + "}"], "line 1: expected"),
        (["[1]"], "line 1: expected"),
        (['{"query": "q", "a": 1}', '{"query": "q", "a": 1}'], "line 2: the query q comes twice"),
        (['{"query": "q", "a": 1}', '{"query": "r", "b": 1}'], "line 2: expected the metrics a, got b"),
        (["q1 Q0 d1 1 2.5 tag"], "line 1: not JSON"),
        ([], "holds no query"),
    ],
)
def test_broken_files_of_metrics_are_named(tmp_path, lines, message):
    path = tmp_path / "each.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError, match=message) as caught:
        read_metrics(path)
    assert str(path) in str(caught.value)


def test_files_that_are_not_there_are_named(tmp_path):
    for read in (read_metrics, read_run):
        with pytest.raises(FileNotFoundError, match=r"no such file: .*gone"):
            read(tmp_path / "gone")


def test_a_written_run_is_read_with_its_ranks(tmp_path):
    run = {"q1": {"b": 0.5, "a": 0.5, "c": 2.0}, "q2": {"a": -1.0}}
    write_run(tmp_path / "run.trec", run)
    found = read_run(tmp_path / "run.trec")
    assert {query: list(scores) for query, scores in found.items()} == {"q1": ["c", "b", "a"], "q2": ["a"]}
    qrels = {"q1": {"a": 1}, "q2": {"a": 1}}
    assert evaluate(found, qrels) == evaluate(run, qrels)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["q Q0 d 1 2.5"], "line 1: expected the 6 columns of a TREC run, got 5"),
        (["q\td\t1"], "line 1: expected the 6 columns of a TREC run, got 3"),
        (["q Q0 d 1 high tag"], "line 1: the score must be a number, got 'high'"),
        (["q Q0 d 1 nan tag"], "line 1: the score must be a number"),
        (["q Q0 d 1 2 tag", "q Q0 d 2 1 tag"], "line 2: the document d comes twice for the query q"),
        ([""], "holds no result"),
    ],
)
def test_broken_runs_are_named(tmp_path, lines, message):
    path = tmp_path / "run.trec"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError, match=message) as caught:
        read_run(path)
    assert str(path) in str(caught.value)


def test_a_line_of_metrics_may_have_them_in_another_order(tmp_path):
    rows = [{"query": "a", "x": 1, "y": 0}, {"y": 0.5, "x": 0.25, "query": "b"}]
    (tmp_path / "each.jsonl").write_text("\n".join(map(json.dumps, rows)))
    x, y = read_metrics(tmp_path / "each.jsonl")
    assert (x.name, x.per_query, y.per_query) == ("x", {"a": 1, "b": 0.25}, {"a": 0, "b": 0.5})
