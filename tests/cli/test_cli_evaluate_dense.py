"""`modernbert evaluate` with an `Embedder`, and with documents that are longer than any model reads."""

from __future__ import annotations

import json

import pytest
from small_models import save_colbert, save_embedder
from stores import write_corpus

from modernbert import Embedder, Session
from modernbert.retrieval.dense import dense_run
from modernbert.retrieval.documents.find import read_file

pytest.importorskip("ir_measures")

FILLER = "the market was seen by 12 people. " * 3000
ANSWER = "find the violin protein planet planet violin protein. " * 12


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"embedder": str(save_embedder(folder / "embedder")), "colbert": str(save_colbert(folder / "colbert"))}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two documents of 32,000 tokens, one with the answer at its end, and some short ones."""
    folder = tmp_path_factory.mktemp("data")
    short = [{"_id": f"d{i}", "text": f"the engine was seen by {i} people", "title": "river"} for i in range(9)]
    long = [{"_id": "filler", "text": FILLER}, {"_id": "answer", "text": FILLER + ANSWER}]
    write_corpus(folder / "corpus.jsonl", [*long, *short])
    queries = {"q": ANSWER[:150], "d3": "the engine was seen by 3 people"}
    write_corpus(folder / "queries.jsonl", [{"_id": name, "text": text} for name, text in queries.items()])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("q\tanswer\t1\nd3\td4\t1\nd3\td3\t1\n")
    return folder


@pytest.mark.parametrize("kind", ["embedder", "colbert"])
def test_what_is_at_the_end_of_a_long_document_is_found(modernbert, models, data, tmp_path, kind):
    outputs = ["--run", tmp_path / "out.trec", "--per-query", tmp_path / "each.jsonl"]
    status, out, err = modernbert("evaluate", data, "--model", models[kind], "--json", *outputs)
    assert status == 0, err
    assert json.loads((tmp_path / "each.jsonl").read_text().splitlines()[0]) == {
        "query": "q",
        "nDCG@10": 1,
        "MRR@10": 1,
        "recall@100": 1,
    }
    said = "note: documents longer than the 64 tokens that the model reads, each scored by its best window: 2\n" in err
    assert said == (kind == "embedder")
    ranked = [line.split() for line in (tmp_path / "out.trec").read_text().splitlines()]
    assert next(row[2] for row in ranked if row[0] == "q") == "answer"
    assert ("d3", "d3") not in {(row[0], row[2]) for row in ranked}
    kept = modernbert("evaluate", data, "--model", models[kind], "--json", "--keep-identical-ids")[1]
    assert json.loads(kept)["recall@100"]["mean"] == 1
    assert json.loads(out)["recall@100"]["mean"] == 0.75


def test_the_run_of_an_embedder_is_that_of_the_library(modernbert, models, data, tmp_path):
    arguments = ["evaluate", data, "--model", models["embedder"], "--json", "--keep-identical-ids"]
    assert modernbert(*arguments, "--run", tmp_path / "out.trec")[0] == 0
    session = Session(Embedder.from_pretrained(models["embedder"]))
    queries = {row["_id"]: row["text"] for row in map(json.loads, (data / "queries.jsonl").open())}
    run = dense_run(session, queries, read_file(data / "corpus.jsonl"), on_note=lambda message: None)
    written = [line.split() for line in (tmp_path / "out.trec").read_text().splitlines()]
    for query, scores in run.items():
        assert [row[2] for row in written if row[0] == query] == list(scores)


@pytest.mark.parametrize("option", [["--index", "store"], ["--engine", "onnxruntime"]])
def test_what_only_a_colbert_has_is_refused(modernbert, models, data, tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    status, _, err = modernbert("evaluate", data, "--model", models["embedder"], *option)
    assert (status, f"{option[0]} is for a ColBERT, and {models['embedder']} is an Embedder" in err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_there_is_named(modernbert, data):
    status, _, err = modernbert("evaluate", data, "--model", "./nowhere")
    assert (status, "nowhere" in err) == (2, True)
