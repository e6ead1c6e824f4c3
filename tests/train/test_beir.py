"""nDCG on a BEIR folder during training: the numbers of `modernbert evaluate` where no document is cut."""

import json

import pytest

from modernbert.cli.temporary import temporary_store
from modernbert.heads.colbert import ColBERT
from modernbert.retrieval.dataset import read_qrels, read_queries
from modernbert.retrieval.evaluate import evaluate
from modernbert.retrieval.store.identity import load_model
from modernbert.train.beir import beir

DOCUMENTS = [
    ("d1", "Volcanoes", "Hot lava flows down the slope of the volcano."),
    ("d2", "", "The violin has four strings and is played with a bow."),
    ("d3", "Tides", "The moon pulls the water of the sea, twice a day."),
    ("d4", "Bread", "Yeast makes the dough rise before it is baked."),
    ("d5", "Engines", "A diesel engine ignites its fuel by pressure."),
]
QUERIES = {"q1": "what does lava do", "q2": "why is there a tide", "d4": "Yeast makes the dough rise", "q9": "unjudged"}
QRELS = [("q1", "d1", 1), ("q2", "d3", 2), ("d4", "d5", 1), ("d4", "d4", 1)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "qrels").mkdir()
    lines = [json.dumps({"_id": name, "title": title, "text": text}) for name, title, text in DOCUMENTS]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"_id": name, "text": text}) for name, text in QUERIES.items()]
    (tmp_path / "queries.jsonl").write_text("\n".join(lines))
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in QRELS)]
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join(lines))
    return tmp_path


def test_the_numbers_are_those_of_the_command(folder):
    measure = beir(folder, ColBERT.default())
    judged = read_qrels(folder / "qrels" / "test.tsv")
    queries = {name: text for name, text in read_queries(folder / "queries.jsonl").items() if name in judged}
    with temporary_store([folder / "corpus.jsonl"], load_model(None), lambda message: None) as store:
        wanted = evaluate(store.run(queries, top_k=101), judged, on_note=lambda message: None)
    assert measure() == pytest.approx({metric.name: metric.mean for metric in wanted})
    assert measure()["nDCG@10"] > 0.5


def test_a_model_in_parts_is_refused(folder, monkeypatch):
    """Encoding it would hang or fail in a later step of the training."""
    measure = beir(folder, ColBERT.default())
    monkeypatch.setattr("modernbert.train.beir.is_sharded", lambda parameter: True)
    with pytest.raises(ValueError, match="in parts on several ranks cannot be measured on a BEIR folder"):
        measure()


def test_a_folder_without_judgements_is_refused_before_the_run(folder):
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nelsewhere\td1\t1\n")
    with pytest.raises(ValueError, match="5 documents and 0 queries with judgements"):
        beir(folder, ColBERT.default())
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no corpus\.jsonl"):
        beir(folder, ColBERT.default())
