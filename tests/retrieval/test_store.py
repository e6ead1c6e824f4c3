"""Search in a store against brute force in float64: ranks, scores, filters, reasons."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import corpus, small_colbert, small_shards, write_corpus

from modernbert import ColBERT, Session
from modernbert.retrieval import Store, index
from modernbert.retrieval.passages import Document
from modernbert.retrieval.store import ranking
from modernbert.retrieval.windows import batch, windows

QUERIES = ["owl night mouse", "which storm brought hail?", "peace treaty", "number 31"]
# The largest error of a similarity by rounding a unit vector, times the tokens of a query: half a step of float16
# at 1 is 2^-11; of int8, half of 1/127 of the largest component, in each of 16 components.
TOLERANCE = {"fp32": 2e-5, "fp16": 24 * 2**-11, "int8": 24 * 16**0.5 / 254}


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def store(request, colbert, tmp_path_factory):
    """60 records in shards of 16 passages, some of which hold parts of one document."""
    folder = tmp_path_factory.mktemp("store")
    source = write_corpus(folder / "corpus.jsonl", corpus(60))
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch, 16)
        index([source], folder / "store", colbert, dtype=request.param)
    with Store(folder / "store", colbert) as store:
        assert len(list((folder / "store" / "shards").iterdir())) > 5
        yield store


@pytest.fixture(scope="module")
def brute(colbert):
    """For every passage its document, text and vectors in float64, each window encoded alone."""
    rows = []
    for number, record in enumerate(corpus(60)):
        document = Document("c", record["_id"], record["title"], record["text"], number + 1)
        for window in windows(colbert, [document]):
            (matrix,) = Session(colbert).encode_tokens(batch([window]))
            rows.append((record["_id"], window.passage.text, matrix.double().numpy()))
    return rows


def scores(colbert: ColBERT, brute, query: str) -> np.ndarray:
    query_QE = colbert.encode_queries([query])[0].double().numpy()
    return np.array([(query_QE @ matrix.T).max(axis=1).sum() for _, _, matrix in brute])


@pytest.mark.parametrize("query", QUERIES)
def test_all_passages_are_ranked_by_maxsim(colbert, store, brute, query):
    expected, tolerance = scores(colbert, brute, query), TOLERANCE[store.dtype]
    hits = store.search([query], top_k=1000)[0]
    assert len(store) == len(hits) == len(brute)
    assert [hit.rank for hit in hits] == list(range(1, len(brute) + 1))
    place = {text: i for i, (_, text, _) in enumerate(brute)}
    for hit in hits:
        assert abs(hit.score - expected[place[hit.passage.text]]) < tolerance
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(expected)[::-1], atol=tolerance)


def test_the_best_are_the_head_of_the_whole_ranking_for_any_number_of_queries(store, monkeypatch):
    monkeypatch.setattr(ranking, "QUERIES_AT_ONCE", 2)
    monkeypatch.setattr(ranking, "TOKENS_AT_ONCE", 100)
    together = store.search(QUERIES, top_k=7)
    for query, hits in zip(QUERIES, together, strict=True):
        alone = store.search([query], top_k=60)[0][:7]
        assert [hit.passage_id for hit in hits] == [hit.passage_id for hit in alone]
        np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in alone], atol=1e-5)
    assert store.search([]) == []


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("top_k", [1, 5, 100])
def test_a_document_counts_once_by_its_best_passage(colbert, store, brute, query, top_k):
    best: dict[str, float] = {}
    for (name, _, _), score in zip(brute, scores(colbert, brute, query), strict=True):
        best[name] = max(best.get(name, -np.inf), score)
    hits = store.search([query], top_k=top_k, by="document")[0]
    names = [hit.passage.id for hit in hits]
    assert len(set(names)) == len(names) == min(top_k, 60)
    for hit in hits:
        assert abs(hit.score - best[hit.passage.id]) < TOLERANCE[store.dtype]
    np.testing.assert_allclose(
        [hit.score for hit in hits], sorted(best.values(), reverse=True)[:top_k], atol=TOLERANCE[store.dtype]
    )
    run = store.run({"q": query}, top_k=top_k)["q"]
    assert list(run) == names
    assert list(run.values()) == [hit.score for hit in hits]


def test_equal_scores_are_ranked_as_indexed(colbert, tmp_path, monkeypatch):
    small_shards(monkeypatch, 4)
    twins = [{"_id": f"t{i}", "text": "owl night"} for i in range(11)]
    index([write_corpus(tmp_path / "corpus.jsonl", twins)], tmp_path / "store", colbert)
    with Store(tmp_path / "store", colbert) as store:
        for top_k in (1, 3, 11):
            for by in ("passage", "document"):
                hits = store.search(["owl"], top_k=top_k, by=by)[0]
                assert [hit.passage.id for hit in hits] == [f"t{i}" for i in range(top_k)]


def test_filters_search_only_what_they_name(store):
    query, everything = QUERIES[0], store.search([QUERIES[0]], top_k=1000)[0]

    def expected(keep) -> list[int]:
        return [hit.passage_id for hit in everything if keep(hit.passage.metadata)]

    def found(**options) -> list[int]:
        return [hit.passage_id for hit in store.search([query], top_k=1000, **options)[0]]

    assert found(where={"year": "2001"}) == expected(lambda m: m["year"] == "2001")
    assert found(where={"even": "true"}) == expected(lambda m: m["even"])
    assert found(where={"even": "false", "year": "2002"}) == expected(lambda m: not m["even"] and m["year"] == "2002")
    assert found(path="*.md") == found(where={"year": "2001' OR 1"}) == []
    with pytest.raises(ValueError, match="no document has the field 'nothing'; the fields are: even, year"):
        found(where={"nothing": "1"})
    assert found(path="corpus.jsonl") == found(path="*/corpus.*") == found() == expected(lambda m: True)


@pytest.mark.parametrize("query", QUERIES)
def test_reasons_sum_to_the_score_and_name_real_words(store, query):
    for hit in store.search([query], top_k=5)[0]:
        matches = store.explain(query, hit)
        assert abs(sum(match.contribution for match in matches) - hit.score) < 2e-5
        for match in matches:
            for text, span in ((query, match.query), (hit.passage.content, match.document)):
                assert span is None or text[slice(*span)].strip() != ""


def test_batches_are_everything_once(store, brute):
    numbers, matrices = [], []
    for keys, passages, vectors in store.batches():
        assert len(keys) == len(passages) == len(vectors)
        assert store.passages(keys) == passages
        numbers += keys
        matrices += list(vectors)
    assert len(set(numbers)) == len(brute)
    for matrix, (_, _, expected) in zip(matrices, brute, strict=True):
        assert matrix.dtype == torch.float32
        np.testing.assert_allclose(matrix.numpy(), expected, atol=TOLERANCE[store.dtype] / 24 * 2)


def test_a_document_that_fits_has_the_models_own_vectors(colbert, tmp_path):
    records = [record for i, record in enumerate(corpus(30)) if i % 7 != 3]
    index([write_corpus(tmp_path / "corpus.jsonl", records)], tmp_path / "store", colbert, dtype="fp32")
    expected = colbert.encode_documents([f"{record['title']} {record['text']}" for record in records])
    with Store(tmp_path / "store", colbert) as store:
        ((_, passages, vectors),) = store.batches()
    assert [passage.id for passage in passages] == [record["_id"] for record in records]
    assert torch.equal(vectors.offsets, expected.offsets)
    np.testing.assert_allclose(vectors.values.numpy(), expected.values.numpy(), atol=2e-6)


def test_wrong_questions(store):
    with pytest.raises(ValueError, match=r"must be a list of texts, got the text 'owls'; write \[query\]"):
        store.search("owls")
    with pytest.raises(ValueError, match="top_k is 0"):
        store.search(["owls"], top_k=0)


def test_a_store_remembers_its_model(colbert, modernbert_tokenizer_file, tmp_path):
    """By its folder. Another model is refused; the same one in bfloat16 is not."""
    colbert.save_pretrained(tmp_path / "model")
    source = write_corpus(tmp_path / "corpus.jsonl", corpus(5))
    index([source], tmp_path / "store", tmp_path / "model")
    with Store(tmp_path / "store") as store:
        assert store.model == str(tmp_path / "model")
        assert store.search(["owl"])[0]
    Store(tmp_path / "store", ColBERT.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)).close()
    torch.manual_seed(1)
    other = small_colbert(modernbert_tokenizer_file.parent)
    longer = ColBERT(colbert.encoder, colbert.tokenizer, list(colbert.dense), replace(colbert.config, query_length=30))
    for wrong in (other, longer):
        with pytest.raises(ValueError, match=r"the store was made with .*model, and this model is different"):
            Store(tmp_path / "store", wrong)
        with pytest.raises(ValueError, match="the store was made with"):
            index([source], tmp_path / "store", wrong)
    index([source], tmp_path / "nameless", colbert)
    with pytest.raises(ValueError, match="a model that had no name"):
        Store(tmp_path / "nameless")


def test_a_run_needs_ids_that_differ(colbert, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_corpus(tmp_path / name / "corpus.jsonl", corpus(3))
    index([tmp_path / "a", tmp_path / "b"], tmp_path / "store", colbert)
    with (
        Store(tmp_path / "store", colbert) as store,
        pytest.raises(ValueError, match="several documents with the id 'd0'"),
    ):
        store.run({"q": "owl"})


def test_a_folder_that_cannot_be_written_to_can_be_searched(colbert, tmp_path):
    source = write_corpus(tmp_path / "corpus.jsonl", corpus(5))
    index([source], tmp_path / "store", colbert)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "store").rglob("*"))
    (tmp_path / "store").chmod(0o500)
    try:
        with Store(tmp_path / "store", colbert) as store:
            assert store.search(["owl"])[0]
    finally:
        (tmp_path / "store").chmod(0o700)
    after = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "store").rglob("*"))
    assert before == after


def test_names_that_an_address_would_misread(colbert, tmp_path):
    """The table is opened by a URI: `?`, `#` and `%` in a folder's name are part of the name."""
    folder = tmp_path / "50% off? #1 – ä"
    index([write_corpus(tmp_path / "corpus.jsonl", corpus(3))], folder, colbert)
    with Store(folder, colbert) as store:
        assert len(store.search(["owl"])[0]) == 3
    assert json.loads((folder / "store.json").read_text())["documents"] == 3
    assert not Path(str(folder).split("?")[0]).exists()


@pytest.fixture(scope="module", params=["fp16", "int8", "4bit", "2bit"])
def filtered(request, colbert, tmp_path_factory):
    """A store with a pre-filter that has grown and shrunk since."""
    folder = tmp_path_factory.mktemp("filtered")
    source = folder / "corpus.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch, 16)
        index([write_corpus(source, corpus(60))], folder / "store", colbert, dtype=request.param, prefilter=True)
        index([write_corpus(source, corpus(200))], folder / "store", colbert)
        index([write_corpus(source, corpus(200)[5:])], folder / "store", colbert)
    with Store(folder / "store", colbert) as store:
        yield store


def test_a_pre_filter_that_lets_everything_through_is_exact(filtered, monkeypatch):
    monkeypatch.setattr("modernbert.retrieval.store.search.LARGE", 1)
    monkeypatch.setattr("modernbert.retrieval.store.prefilter.CANDIDATES", 10_000)
    for options in ({}, {"by": "document"}, {"where": {"year": "2001"}}, {"path": "nothing"}):
        exact = filtered.search(QUERIES, top_k=20, **options)
        likely = filtered.search(QUERIES, top_k=20, prefilter=True, **options)
        for ours, theirs in zip(likely, exact, strict=True):
            assert [hit.passage_id for hit in ours] == [hit.passage_id for hit in theirs]
            np.testing.assert_allclose([hit.score for hit in ours], [hit.score for hit in theirs], atol=1e-5)


def test_a_pre_filter_finds_most_and_scores_it_the_same(filtered, monkeypatch):
    """Of 214 passages, 40 are scored; the scores of those found are exact."""
    monkeypatch.setattr("modernbert.retrieval.store.search.LARGE", 1)
    monkeypatch.setattr("modernbert.retrieval.store.prefilter.CANDIDATES", 40)
    found = 0
    for query in QUERIES:
        exact = {hit.passage_id: hit.score for hit in filtered.search([query], top_k=1000)[0]}
        likely = filtered.search([query], top_k=10, prefilter=True)[0]
        assert len(likely) == 10
        for hit in likely:
            assert abs(hit.score - exact[hit.passage_id]) < 1e-5
        found += len({hit.passage_id for hit in likely} & set(list(exact)[:10]))
    assert found >= 30


def test_a_pre_filter_is_used_for_as_many_passages_as_are_worth_it(filtered, monkeypatch):
    """Of one search by the passages of its shards, whatever matches in them."""
    used: list[int] = []
    likely = Store._likely
    monkeypatch.setattr(Store, "_likely", lambda self, *rest: (used.append(len(self)), likely(self, *rest))[1])
    for large, options in ((len(filtered) + 1, {}), (1, {"path": "nothing"})):
        monkeypatch.setattr("modernbert.retrieval.store.search.LARGE", large)
        found = filtered.search(QUERIES, prefilter=True, **options)
        assert found == filtered.search(QUERIES, **options)
    assert not used
    monkeypatch.setattr("modernbert.retrieval.store.search.LARGE", len(filtered))
    filtered.search(QUERIES, prefilter=True, where={"year": "2001"})
    assert used


def test_a_store_without_a_pre_filter_says_how_to_get_one(store):
    with pytest.raises(ValueError, match=r"has no pre-filter; modernbert index .* --prefilter gives it one"):
        store.search(["owl"], prefilter=True)
