"""A question is tokenised and encoded once, whatever is printed about it, and a model is identified once in a run."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from stores import corpus, write_corpus

from modernbert import ColBERT
from modernbert.cli import main
from modernbert.cli.search import QUESTIONS
from modernbert.retrieval import Store, index
from modernbert.retrieval.engines import Engine, export
from modernbert.retrieval.store import identity

QUESTION = "owl night mouse"
ONCE = {"tokenised queries": 1, "passes": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", corpus(20))


@pytest.fixture(scope="module")
def store(model, source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "store"
    index([source], folder, model)
    return folder


@pytest.fixture
def work(monkeypatch) -> Counter[str]:
    """How many queries and documents were tokenised, and how many forward passes there were."""
    counts: Counter[str] = Counter()

    def count_texts(name: str, label: str) -> None:
        original = getattr(ColBERT, name)

        def counting(self, texts, **options):
            if list(texts) != [identity.PROBE]:
                counts[label] += len(texts)
            return original(self, texts, **options)

        monkeypatch.setattr(ColBERT, name, counting)

    def forward(self, batch, **options):
        counts["passes"] += 1
        return original_forward(self, batch, **options)

    original_forward = ColBERT.forward
    monkeypatch.setattr(ColBERT, "forward", forward)  # the modules of a session are of the same class
    count_texts("tokenize_queries", "tokenised queries")
    count_texts("tokenize_documents", "tokenised documents")
    return counts


@pytest.fixture
def modernbert(capsys):
    """Run a command that succeeds; returns its stdout."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        assert not end.value.code
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("options", [[], ["--no-why"], ["--json"], ["--json", "--no-why"]])
def test_a_question_to_a_store(modernbert, store, work, options):
    out = modernbert("search", QUESTION, "--index", store, *options)
    assert work == ONCE
    assert ("why" in out) == ("--no-why" not in options)


@pytest.mark.parametrize("options", [[], ["--no-why"], ["--json"]])
def test_a_question_with_a_page(modernbert, store, work, tmp_path, options):
    modernbert("search", QUESTION, "--index", store, "--html", tmp_path / "why.html", *options)
    assert work == ONCE
    assert "All 6 tokens of the query" in (tmp_path / "why.html").read_text()


def test_without_reasons_nothing_is_explained(modernbert, store, monkeypatch):
    monkeypatch.setattr(Store, "explain", lambda *_: pytest.fail("explained"))
    monkeypatch.setattr(Engine, "explain", lambda *_: pytest.fail("explained"))
    for options in (["--no-why"], ["--no-why", "--json"]):
        modernbert("search", QUESTION, "--index", store, *options)


@pytest.mark.parametrize("options", [[], ["--json"], ["--no-why"]])
def test_a_conversation(modernbert, store, work, monkeypatch, tmp_path, options):
    """What is asked about the last hits needs no more encoding."""
    lines = f"{QUESTION}\n:why 1\n:why 2\n:html {tmp_path / 'why.html'}\nhail\n:why 1\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    out = modernbert("search", "--index", store, *options)
    assert work == {"tokenised queries": 2, "passes": 2}
    assert out.count("query token") == 3
    assert (tmp_path / "why.html").exists()


def test_files_that_are_read_once(modernbert, model, source, work):
    modernbert("search", QUESTION, source, "--model", model, "--json")
    assert work["tokenised queries"] == 1


def test_the_demo(modernbert, source, work, monkeypatch):
    monkeypatch.setattr(sys.modules["modernbert.cli.search"], "DEMO", source)  # its own documents take half a minute
    modernbert("demo")
    assert work["tokenised queries"] == len(QUESTIONS)


@pytest.mark.skipif(importlib.util.find_spec("qdrant_edge") is None, reason="qdrant_edge is not installed")
def test_a_question_to_an_engine(modernbert, store, work, tmp_path):
    """An engine gives no vectors back, so that reasons need those of each hit, and without reasons nothing else."""
    with Store(store) as opened:
        export(opened, f"qdrant:{tmp_path}")
    out = modernbert("search", QUESTION, "--index", f"qdrant:{tmp_path}", "--top", 3, "--json")
    assert len(json.loads(out)["hits"][0]["matches"]) == 6
    assert work == {"tokenised queries": 1, "tokenised documents": 3, "passes": 1 + 3}
    work.clear()
    modernbert("search", QUESTION, "--index", f"qdrant:{tmp_path}", "--no-why")
    assert work == ONCE


def test_texts_and_encoded_queries_give_the_same(store):
    """`search` and `explain` take either, also mixed. A batch may change the last bits of a vector."""
    with Store(store) as opened:
        (encoded,) = opened.encode([QUESTION])
        mixed = opened.search([encoded, QUESTION, "hail", encoded])
        texts = opened.search([QUESTION, QUESTION, "hail", QUESTION])
        for ours, theirs in zip(mixed, texts, strict=True):
            assert [hit.passage_id for hit in ours] == [hit.passage_id for hit in theirs]
            assert [hit.score for hit in ours] == pytest.approx([hit.score for hit in theirs], abs=1e-5)
        hit = mixed[0][0]
        pairs = zip(opened.explain(encoded, hit), opened.explain(QUESTION, hit), strict=True)
        for ours, theirs in pairs:
            assert (ours.query, ours.document) == (theirs.query, theirs.document)
            assert ours.contribution == pytest.approx(theirs.contribution, abs=1e-5)


@pytest.mark.parametrize("command", ["search in files", "search in a store", "index", "evaluate"])
def test_a_model_is_identified_once(modernbert, model, source, store, tmp_path, monkeypatch, command):
    calls = 0
    original = identity.fingerprint

    def counting(colbert: ColBERT) -> str:
        nonlocal calls
        calls += 1
        return original(colbert)

    monkeypatch.setattr(identity, "fingerprint", counting)
    if command == "evaluate":
        pytest.importorskip("ir_measures")
        (tmp_path / "qrels").mkdir()
        (tmp_path / "qrels" / "test.tsv").write_text("q\td1\t1\n")
        (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "owl"}\n')
        (tmp_path / "corpus.jsonl").write_bytes(source.read_bytes())
    arguments = {
        "search in files": ["search", QUESTION, source, "--model", model],
        "search in a store": ["search", QUESTION, "--index", store],
        "index": ["index", source, "--output", tmp_path / "new", "--model", model],
        "evaluate": ["evaluate", tmp_path, "--model", model],
    }
    modernbert(*arguments[command])
    assert calls == 1
