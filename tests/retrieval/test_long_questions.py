"""A question that is longer than the model reads is named, wherever it is asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stores import corpus, small_colbert, write_corpus

from modernbert import ColBERT
from modernbert.retrieval import Store, index
from modernbert.retrieval.explain import explain
from modernbert.tokenizer import TruncationWarning

LONG = "we walked through the old town and then we asked about owls and peace and a treaty and rivers and hail"


@pytest.fixture(scope="module")
def colbert(modernbert_tokenizer_file: Path) -> ColBERT:
    return small_colbert(modernbert_tokenizer_file.parent)


@pytest.fixture(scope="module")
def store(colbert: ColBERT, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("long")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # documents are cut into passages, so nothing of them is lost
        index([write_corpus(folder / "corpus.jsonl", corpus(10))], folder / "store", colbert)
    with Store(folder / "store", colbert) as opened:
        yield opened


def messages(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if issubclass(one.category, TruncationWarning)]


@pytest.mark.parametrize("name", ["encode", "search"])
def test_a_store_names_the_question(store: Store, name: str) -> None:
    (message,) = messages(lambda: getattr(store, name)(["owl", LONG, LONG]))
    assert message.startswith("queries[1] ('we walked through the old town and then ' ...) has at least ")
    assert "of which the model reads 24 (2 of 3 texts are longer than it reads)" in message
    assert not messages(lambda: getattr(store, name)(["owl"]))


def test_indices_are_those_of_the_argument(store: Store) -> None:
    (encoded,) = store.encode(["owl"])
    (message,) = messages(lambda: store.search([encoded, "owl", encoded, LONG]))
    assert message.startswith("queries[3] ")
    assert not messages(lambda: store.search([encoded]))


def test_a_run_names_the_question_by_its_id(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, not for each group of queries that are encoded together."""
    monkeypatch.setattr("modernbert.retrieval.store.search.RUN_QUERIES", 2)
    queries = {f"q{i}": LONG if i % 2 else "owl" for i in range(7)}
    (message,) = messages(lambda: store.run(queries))
    assert message.startswith("query 'q1' (")
    assert "(3 of 7 texts" in message
    wanted = {name: store.search([text], by="document", top_k=3)[0] for name, text in queries.items()}
    for name, found in store.run(queries, top_k=3).items():
        assert list(found) == [hit.passage.id for hit in wanted[name]]


def test_an_explanation_of_a_long_document_says_so(store: Store) -> None:
    (query,) = store.encode(["owl"])
    (message,) = messages(lambda: explain(store.session, query, ["owl", "owl " * 60]))
    assert message.startswith("documents[1] has at least ")


def test_queries_of_any_iterable(store: Store) -> None:
    """A generator was used up by the check, and found nothing without a word."""
    (wanted,) = store.search(["owl"])
    (got,) = store.search(query for query in ["owl"])  # pyright: ignore
    assert [hit.passage_id for hit in got] == [hit.passage_id for hit in wanted]


@pytest.mark.parametrize(
    ("queries", "words"),
    [
        ("owl", "queries must be a list of texts, got the text 'owl'"),
        (b"owl", "got one bytes"),
        (None, "got one NoneType"),
        (5, "got one int"),
        ({"q1": "owl"}, "got one dict"),
        ({"owl"}, "got one set"),
        (["owl", None], r"queries\[1\] is None; give a text"),
        (["owl", ["ice"]], r"queries\[1\] is \['ice'\]"),
        (["owl", b"ice"], r"queries\[1\] is b'ice'"),
    ],
)
def test_wrong_queries_are_named(store: Store, queries: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        store.search(queries)
    with pytest.raises(ValueError, match=words):
        store.encode(queries)


@pytest.mark.parametrize(
    ("queries", "words"),
    [
        (["owl"], "queries must be a dict of ids and texts, got one list"),
        ("owl", "queries must be a dict of ids and texts, got one str"),
        ({"q": None}, r"queries\['q'\] is None; give an id and a text"),
        ({"q": ["owl"]}, r"queries\['q'\] is \['owl'\]"),
        ({1: "owl"}, r"queries\[1\] is 'owl'; give an id and a text, both as texts"),
    ],
)
def test_wrong_queries_of_a_run_are_named(store: Store, queries: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        store.run(queries)


def test_what_is_not_a_hit_is_named(store: Store) -> None:
    """The list of hits in place of one, and a passage in place of its hit."""
    hits = store.search(["owl"])[0]
    for wrong in (hits, hits[0].passage, None, 1):
        with pytest.raises(ValueError, match=r"hit is .*; give one of the hits of a search"):
            store.explain("owl", wrong)  # pyright: ignore
    with pytest.raises(ValueError, match=r"queries\[0\] is \['owl'\]"):
        store.explain(["owl"], hits[0])  # pyright: ignore
