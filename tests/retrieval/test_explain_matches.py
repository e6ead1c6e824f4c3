"""Which token found which, on a real but untrained ColBERT: its vectors still follow the tokens."""

from __future__ import annotations

import numpy as np
import pytest

from modernbert import ColBERT, Encoder, EncoderConfig, Session, Tokenizer
from modernbert.heads.colbert import ColBERTConfig
from modernbert.retrieval import explain as explaining
from modernbert.retrieval.explain import TokenMatch, WordMatch, strongest_words
from modernbert.retrieval.queries import encode_queries

TEXTS = [
    "Glaciers move under their own weight.",
    "The mitochondrion gives a cell its energy, and more: heat.",
    "Nocturnal owls hunt mice at midnight",
    "猫は夜に狩りをする。",
    "A treaty ended the Thirty Years' War in 1648!",
    "midnight",
]
QUERIES = ["who hunts mice at midnight?", "treaty of 1648", "猫", "energy's cell-like mitochondrion"]


@pytest.fixture(scope="module", params=["plain", "expansion"])
def colbert(request, modernbert_tokenizer_file) -> ColBERT:
    config = EncoderConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2)
    settings = ColBERTConfig(do_query_expansion=request.param == "expansion", query_length=24)
    tokenizer = Tokenizer.from_pretrained(modernbert_tokenizer_file.parent)
    return ColBERT.from_encoder(Encoder.from_config(config), tokenizer, dim=24, config=settings).eval()


def explain(colbert: ColBERT, query: str, documents: list[str]) -> list[list[TokenMatch]]:
    session = Session(colbert)
    return explaining.explain(session, encode_queries(session, [query])[0], documents)


@pytest.mark.parametrize("query", QUERIES)
def test_contributions_are_the_score_in_parts(colbert, query):
    """One match for each query vector: similarity and place as in float64, and their sum is the score."""
    rows = colbert.encode_queries([query])[0].double().numpy()
    for document, matches in zip(TEXTS, explain(colbert, query, TEXTS), strict=True):
        columns = colbert.encode_documents([document])[0].double().numpy()
        assert abs(sum(match.contribution for match in matches) - (rows @ columns.T).max(axis=1).sum()) < 2e-5
        tokens = colbert.tokenize_documents([document])
        spans = [span for span, kept in zip(tokens.spans[0], tokens.keep, strict=True) if kept]
        assert len(matches) == len(rows)
        for match, similarities in zip(matches, rows @ columns.T, strict=True):
            assert abs(match.contribution - similarities.max()) < 2e-6
            best = {spans[i] for i in np.flatnonzero(similarities > similarities.max() - 2e-6)}
            assert match.document in best


def test_spans_are_characters_of_the_callers_texts(colbert):
    query, document = "  mice at midnight?", "  Nocturnal owls\thunt mice"
    (matches,) = explain(colbert, query, [document])
    named = [query[match.query[0] : match.query[1]].strip() for match in matches if match.query]
    assert "".join(named) == "miceatmidnight?"
    for match in matches:
        if match.query and query[match.query[0] : match.query[1]].strip() == "mice":
            assert document[match.document[0] : match.document[1]].strip() == "mice"


def test_strongest_words_are_whole_words_with_their_tokens_summed(colbert):
    """Tokens of a word are joined, punctuation and special tokens left out, nothing is counted twice."""
    query, document = "energy's mitochondrion, midnight?", "A cell-like mitochondrion at midnight."
    (matches,) = explain(colbert, query, [document])
    words = strongest_words(matches, query, document)
    assert {word.query for word in words} == {"energy's", "mitochondrion", "midnight"}
    assert [word.contribution for word in words] == sorted((w.contribution for w in words), reverse=True)
    found = {word.query: word.document for word in words}
    assert found["mitochondrion"] == "mitochondrion"
    assert found["midnight"] == "midnight"
    for word in words:
        start = query.index(word.query)
        inside = [m for m in matches if m.query and start <= m.query[1] - 1 < start + len(word.query)]
        assert abs(word.contribution - sum(match.contribution for match in inside)) < 1e-6
    assert strongest_words(matches, query, document, limit=1) == words[:1]


def test_a_word_is_found_where_most_of_its_tokens_are():
    """Not where its single strongest token is, here the "pur" of Bishnupur."""
    query, document = "Manipur?", "Bishnupur in Manipur"
    matches = [
        TokenMatch(None, None, 0.5),
        TokenMatch((0, 1), (13, 14), 0.75),
        TokenMatch((1, 4), (14, 17), 0.5),
        TokenMatch((4, 7), (6, 9), 1.0),
        TokenMatch((7, 8), None, 0.25),
    ]
    assert strongest_words(matches, query, document) == [WordMatch("Manipur", "Manipur", 2.25)]
    assert strongest_words([TokenMatch((0, 7), None, 1.0)], query, document) == [WordMatch("Manipur", None, 1.0)]


def test_words_of_scripts_without_spaces_are_characters(colbert):
    (matches,) = explain(colbert, "猫は狩り", ["猫は夜に狩りをする。"])
    words = strongest_words(matches, "猫は狩り", "猫は夜に狩りをする。", limit=10)
    assert {len(word.query) for word in words} == {1}
    assert {"猫", "は"} <= {word.query for word in words}
