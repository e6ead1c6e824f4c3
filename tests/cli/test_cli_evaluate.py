"""`modernbert evaluate`: what is checked before the work, and what never costs the measures."""

from __future__ import annotations

import json
import shutil

import pytest
from stores import corpus, write_corpus

pytest.importorskip("ir_measures")


def dataset(folder, documents, queries, judgements):
    """A folder in BEIR's layout from texts by id, and judgements."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        write_corpus(folder / f"{name}.jsonl", [{"_id": key, "text": text} for key, text in texts.items()])
    rows = "".join(f"{query}\t{document}\t{grade}\n" for query, document, grade in judgements)
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    return folder


@pytest.fixture
def argu(tmp_path):
    """F08, as ArguAna: each query is a document, and its counterpart is relevant."""
    texts = {"a-con": "a ban on cars", "b-con": "school uniforms"}
    documents = {**texts, "a-pro": "a ban on cars in cities", "b-pro": "school uniforms of pupils"}
    return dataset(tmp_path / "argu", documents, texts, [("a-con", "a-pro", 1), ("b-con", "b-pro", 1)])


def test_documents_with_the_id_of_the_query_are_left_out(modernbert, model, argu, tmp_path):
    arguments = ["evaluate", argu, "--model", model, "--json", "--run", tmp_path / "out.trec"]
    status, out, err = modernbert(*arguments)
    assert status == 0
    assert json.loads(out)["recall@100"]["mean"] == 1
    assert "note: documents with the id of their query, which are left out: 2, judged relevant: 0\n" in err
    dropped = [line.split() for line in (tmp_path / "out.trec").read_text().splitlines()]
    assert all(row[0] != row[2] for row in dropped)
    assert [row[3] for row in dropped] == ["1", "2", "3"] * 2
    status, out, err = modernbert(*arguments, "--keep-identical-ids")
    assert json.loads(out)["MRR@10"]["mean"] < 1
    assert "left out" not in err
    assert len((tmp_path / "out.trec").read_text().splitlines()) == 8


def test_a_document_that_is_left_out_takes_no_place_in_the_run(modernbert, model, tmp_path):
    """The hundredth other document is still found."""
    folder = tmp_path / "beir"
    folder.mkdir()
    write_corpus(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": "owl"} for i in range(101)])
    (folder / "queries.jsonl").write_text('{"_id": "d0", "text": "owl"}\n')
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("d0\td100\t1\n")
    arguments = ["evaluate", folder, "--model", model, "--json", "--run", tmp_path / "out.trec"]
    for options, value, names in (((), 1, range(1, 101)), (["--keep-identical-ids"], 0, range(100))):
        status, out, _ = modernbert(*arguments, *options)
        assert (status, json.loads(out)["recall@100"]["mean"]) == (0, value)
        rows = [line.split()[2] for line in (tmp_path / "out.trec").read_text().splitlines()]
        assert rows == [f"d{i}" for i in names]


@pytest.mark.parametrize(
    ("documents", "query", "shown"),
    [
        (["doc 1", "doc 2"], "q1", "'doc 1'"),
        (["d1", "d2"], "q 1", "'q 1'"),
        (["d1", "d2\u00a0"], "q1", r"'d2\xa0'"),
        (["d1", "d\t2"], "q1", r"'d\t2'"),
    ],
)
def test_ids_that_a_run_cannot_hold_do_not_cost_the_measures(modernbert, model, tmp_path, documents, query, shown):
    """F09: they are noted before the work; the measures are printed, and all but the run is written."""
    texts = dict(zip(documents, ("salt dissolves in water", "wood floats"), strict=True))
    folder = tmp_path / "blank"
    (folder / "qrels").mkdir(parents=True)
    write_corpus(folder / "corpus.jsonl", [{"_id": name, "text": text} for name, text in texts.items()])
    write_corpus(folder / "queries.jsonl", [{"_id": query, "text": "does wood float?"}])
    judged = [{"query-id": query, "corpus-id": documents[1], "score": 1}]
    write_corpus(folder / "qrels" / "test.jsonl", judged)
    run, each = tmp_path / "out.trec", tmp_path / "each.jsonl"
    arguments = ["evaluate", folder, "--model", model, "--json"]
    status, plain, err = modernbert(*arguments)
    assert (status, "run" in err) == (0, False)
    status, out, err = modernbert(*arguments, "--run", run, "--per-query", each)
    assert (status, out) == (1, plain)
    first = err.splitlines()[0]
    assert first.startswith("note: --run is left out: the id ")
    assert shown in first
    assert json.loads(each.read_text())["query"] == query
    assert not run.exists()


def test_a_run_of_queries_is_refused_before_the_work(modernbert, model, tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus.jsonl", [{"_id": "doc 1", "text": "owl"}])
    write_corpus(tmp_path / "queries.jsonl", [{"_id": "q", "text": "owl"}])
    modernbert("index", tmp_path / "corpus.jsonl", "--output", tmp_path / "store", "--model", model)
    monkeypatch.setattr("modernbert.retrieval.store.search.Store.run", lambda *_, **__: pytest.fail("some work"))
    run = ["--queries", tmp_path / "queries.jsonl", "--run", tmp_path / "out.trec"]
    status, _, err = modernbert("search", "--index", tmp_path / "store", *run)
    assert (status, "the id 'doc 1' is empty or contains white space" in err) == (2, True)


def test_what_the_files_lack_of_each_other_is_noted_with_counts(modernbert, model, tmp_path):
    documents, queries = {"d1": "owl", "d2": "mouse"}, {"q1": "owl", "q2": "ice", "extra": "hail"}
    judgements = [("q1", "d1", 1), ("q1", "gone", 2), ("q2", "gone", 1), ("q2", "lost", 0), ("absent", "d2", 1)]
    folder = dataset(tmp_path / "set", documents, queries, judgements)
    status, out, err = modernbert("evaluate", folder, "--model", model, "--json")
    assert (status, json.loads(out)["queries"]) == (0, 3)
    for note in (
        "judged queries that the queries lack, which count as 0: 1",
        "queries without a judgement, which are left out: 1",
        "judged documents that the corpus lacks, in 2 judgements as relevant: 2",
    ):
        assert f"note: {note}\n" in err


def test_files_that_do_not_belong_together_are_refused_before_the_work(modernbert, argu, monkeypatch):
    monkeypatch.setattr("modernbert.retrieval.index", lambda *_, **__: pytest.fail("some work"))
    (argu / "queries.jsonl").write_text('{"_id": "other", "text": "x"}\n')
    status, _, err = modernbert("evaluate", argu)
    assert (status, "none of the 2 judged queries is among the 1 queries" in err) == (2, True)
    shutil.rmtree(argu / "qrels")
    assert modernbert("evaluate", argu)[0] == 2


def test_a_disk_that_fills_up_leaves_the_measures(modernbert, model, argu, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "out.trec"))

    monkeypatch.setattr("modernbert.retrieval.evaluate.write_run", full)
    status, out, err = modernbert("evaluate", argu, "--model", model, "--json", "--run", tmp_path / "out.trec")
    assert (status, json.loads(out)["recall@100"]["mean"]) == (2, 1)
    assert "No space left" in err


def test_a_corpus_in_parts_is_evaluated_like_one_in_a_file(modernbert, model, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = [{"_id": row["_id"], "text": row["text"]} for row in corpus(20)]
    folder = dataset(tmp_path / "one", {row["_id"]: row["text"] for row in records}, {"q": "owl"}, [("q", "d3", 1)])
    shutil.copytree(folder, tmp_path / "parts")
    (tmp_path / "parts" / "corpus.jsonl").unlink()
    (tmp_path / "parts" / "corpus").mkdir()
    for number, some in enumerate((records[:9], records[9:])):
        file = tmp_path / "parts" / "corpus" / f"test-{number:05}-of-00002.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(some), file)
    results = []
    for name in ("one", "parts"):
        arguments = ["evaluate", tmp_path / name, "--model", model, "--json", "--index", tmp_path / "store"]
        status, out, _ = modernbert(*arguments)
        assert status == 0
        results.append({key: value for key, value in json.loads(out).items() if key != "dataset"})
    assert results[0] == results[1]
