"""`modernbert compare` on what `modernbert evaluate` writes."""

from __future__ import annotations

import json

import pytest
from stores import corpus, small_colbert, write_corpus

pytest.importorskip("ir_measures")


@pytest.fixture(scope="module")
def results(modernbert_tokenizer_file, tmp_path_factory):
    """A folder with a data set, and for two models its run and its metrics of each query."""
    from modernbert.cli import main

    folder = tmp_path_factory.mktemp("compare")
    data = folder / "data"
    (data / "qrels").mkdir(parents=True)
    write_corpus(data / "corpus.jsonl", corpus(30))
    write_corpus(data / "queries.jsonl", [{"_id": f"q{i}", "text": f"owl number {i}"} for i in range(8)])
    (data / "qrels" / "test.tsv").write_text("".join(f"q{i}\td{2 * i}\t1\n" for i in range(8)))
    for name, length in (("a", 40), ("b", 24)):
        small_colbert(modernbert_tokenizer_file.parent, document_length=length).save_pretrained(folder / name)
        outputs = ["--run", folder / f"{name}.trec", "--per-query", folder / f"{name}.jsonl"]
        with pytest.raises(SystemExit) as end:
            main([str(x) for x in ("evaluate", data, "--model", folder / name, "--json", *outputs)])
        assert not end.value.code
    return folder


def means(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "query"}


def test_runs_and_metrics_of_each_query_give_the_same(modernbert, results):
    status, out, err = modernbert("compare", results / "a.jsonl", results / "b.jsonl", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found.pop("queries") == 8
    first, second = means(results / "a.jsonl"), means(results / "b.jsonl")
    assert {name: row["first"] for name, row in found.items()} == pytest.approx(first)
    assert {name: row["second"] for name, row in found.items()} == pytest.approx(second)
    for row in found.values():
        assert row["difference"] == pytest.approx(row["second"] - row["first"])
        assert row["low"] <= row["difference"] <= row["high"]
        assert 0 < row["p"] <= 1
    qrels = ["--qrels", results / "data" / "qrels" / "test.tsv"]
    status, of_runs, err = modernbert("compare", results / "a.trec", results / "b.trec", *qrels, "--json")
    assert (status, of_runs, err) == (0, out, "")
    status, table, _ = modernbert("compare", results / "a.jsonl", results / "b.jsonl")
    assert "8 queries" in table
    assert f"{found['MRR@10']['p']:.4f}" in table


def test_a_run_that_lacks_a_query_is_named(modernbert, results, tmp_path):
    short = tmp_path / "short.trec"
    lines = (results / "a.trec").read_text().splitlines()
    short.write_text("".join(f"{line}\n" for line in lines if not line.startswith("q0 ")))
    qrels = ["--qrels", results / "data" / "qrels" / "test.tsv"]
    status, out, err = modernbert("compare", results / "a.trec", short, *qrels, "--json")
    assert (status, json.loads(out)["queries"]) == (0, 8)
    assert err == f"note: {short}: judged queries without a result, which count as 0: 1\n"
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join((results / "a.jsonl").read_text().splitlines()[1:]))
    status, out, err = modernbert("compare", results / "a.jsonl", fewer, "--json")
    assert (status, json.loads(out)["queries"]) == (0, 7)
    assert err == "note: queries that only the first has, which are left out: 1\n"


def test_runs_are_taken_as_they_are(modernbert, tmp_path):
    """`evaluate --run` has left out the documents with the id of their query, unless they were to be kept."""
    (tmp_path / "qrels.txt").write_text("1 0 1 1\n2 0 2 1\n")
    for name, scores in (("kept", "1 2"), ("other", "2 1")):
        rows = [
            f"{query} Q0 {document} {rank} {-rank} x\n"
            for query in "12"
            for rank, document in enumerate(scores.split())
        ]
        (tmp_path / f"{name}.trec").write_text("".join(rows))
    runs = [tmp_path / "kept.trec", tmp_path / "other.trec"]
    status, out, err = modernbert("compare", *runs, "--qrels", tmp_path / "qrels.txt", "--json")
    assert (status, err) == (0, "")
    row = json.loads(out)["MRR@10"]
    assert (row["first"], row["second"]) == (0.75, 0.75)


def test_what_is_not_there_or_of_the_other_kind_is_refused(modernbert, results):
    status, _, err = modernbert("compare", results / "gone", results / "a.jsonl")
    assert (status, f"no such file: {results / 'gone'}" in err) == (2, True)
    status, _, err = modernbert("compare", results / "a.trec", results / "b.trec")
    assert (status, "line 1: not JSON" in err, "--qrels" in err) == (2, True, True)
