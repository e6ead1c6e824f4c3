"""`dense_run`: exact search with an `Embedder`, against sentence-transformers and against vectors of all texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import save_embedder, tiny_encoder, tiny_tokenizer

from modernbert import Embedder, Session, pack
from modernbert.heads.embedder import EmbedderConfig
from modernbert.retrieval import dense
from modernbert.retrieval.dense import SIMILARITIES, dense_run
from modernbert.retrieval.evaluate import evaluate
from modernbert.retrieval.passages import Document
from modernbert.truncation import TruncationWarning

WORDS = ["river", "mountain", "engine", "pressure", "violin", "market", "planet", "protein", "seen", "people", "12"]


def embedder(**settings) -> Embedder:
    tokenizer = tiny_tokenizer()
    return Embedder(tiny_encoder(tokenizer), tokenizer, config=EmbedderConfig(**{"max_length": 64, **settings})).eval()


def record(name: str, text: str, title: str = "") -> Document:
    return Document("corpus.jsonl", name, title, text, line=1)


def texts(count: int, seed: int = 0, longest: int = 10) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(2, longest))) + f" {i}." for i in range(count)]


@pytest.mark.parametrize("pooling", ["mean", "weightedmean"])
@pytest.mark.parametrize("prompts", [{}, {"query": "find: ", "document": "text: "}])
def test_measures_are_those_of_sentence_transformers(tmp_path, pooling, prompts):
    """Prompts and titles included."""
    pytest.importorskip("ir_measures")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    model = embedder(pooling=pooling, prompts=prompts)
    model.save_pretrained(tmp_path / "model")
    documents = [record(f"d{i}", text, "the title" if i % 3 else "") for i, text in enumerate(texts(110))]
    queries = {f"q{i}": text for i, text in enumerate(texts(30, seed=1))}
    corpus = {document.id: document.content for document in documents}
    reference = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    scores = reference.encode_query([*queries.values()]) @ reference.encode_document([*corpus.values()]).T
    gaps = np.diff(np.sort(scores)).min(axis=1)
    # Queries whose ranks do not depend on rounding.
    queries = {query: text for (query, text), gap in zip(queries.items(), gaps, strict=True) if gap > 1e-6}
    assert len(queries) > 15
    random = np.random.default_rng(2)
    qrels = {query: {f"d{i}": 1 for i in random.integers(110, size=4)} for query in queries}
    relevant = {query: set(found) for query, found in qrels.items()}
    evaluator = InformationRetrievalEvaluator(queries, corpus, relevant, precision_recall_at_k=[100])
    theirs = evaluator(reference)
    run = dense_run(Session(model), queries, documents)
    ours = {metric.name: metric.mean for metric in evaluate(run, qrels)}
    assert ours["nDCG@10"] == pytest.approx(theirs["cosine_ndcg@10"], abs=1e-6)
    assert ours["MRR@10"] == pytest.approx(theirs["cosine_mrr@10"], abs=1e-6)
    assert ours["recall@100"] == pytest.approx(theirs["cosine_recall@100"], abs=1e-6)
    assert 0 < ours["nDCG@10"] < 1


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_similarity_of_the_model_ranks(tmp_path, similarity):
    """Vectors have different lengths here, so that cosine and dot product differ."""
    model = embedder(normalize=False, similarity=similarity)
    contents, asked = texts(50), texts(3, seed=1)
    run = dense_run(Session(model), dict(zip("abc", asked, strict=True)), map(record, map(str, range(50)), contents))
    util = pytest.importorskip("sentence_transformers.util")
    theirs = {"cosine": util.cos_sim, "dot": util.dot_score}.get(similarity) or getattr(util, f"{similarity}_sim")
    scores = theirs(model.encode_queries(asked), model.encode_documents(contents))
    for found, row in zip(run.values(), scores, strict=True):
        assert list(found) == [str(i) for i in row.argsort(descending=True).tolist()]
        np.testing.assert_allclose([*found.values()], row.sort(descending=True).values, rtol=1e-4, atol=1e-5)


def test_a_similarity_without_a_function_is_refused():
    with pytest.raises(ValueError, match="similarity of the model is 'mine': set cosine, dot, euclidean, manhattan"):
        dense_run(Session(embedder(similarity="mine")), {"q": "river"}, [])


def test_the_end_of_a_document_of_32000_tokens_is_found(monkeypatch):
    """Windows are encoded in groups, so that memory is that of a group; the last word is as good as the first."""
    model, notes, sizes = embedder(), [], []
    encode = Session.encode_tokens
    monkeypatch.setattr(dense, "TOKENS", 1000)
    monkeypatch.setattr(Session, "encode_tokens", lambda self, x: sizes.append(x.batch.lengths) or encode(self, x))
    filler = "the market was seen by 12 people. " * 3000
    assert model.tokenize([filler]).batch.num_tokens == 64
    assert len(model.tokenizer.encode_beginnings([filler], max_length=10**9)[0].ids) > 32_000
    wanted = "violin protein " * 40
    documents = [record("long", filler + wanted), record("filler", filler), record("short", "the river.")]
    run = dense_run(Session(model), {"q": wanted[:150]}, documents, on_note=notes.append)
    assert next(iter(run["q"])) == "long"
    assert run["q"].keys() == {"long", "filler", "short"}
    assert max(map(sum, sizes)) < 1000 + 64
    assert max(map(max, sizes)) <= 64
    assert notes == ["documents longer than the 64 tokens that the model reads, each scored by its best window: 2"]


def test_a_document_scores_as_its_best_window_wherever_groups_end(monkeypatch):
    model, asked = embedder(prompts={"document": "text: "}), {"a": "river seen", "b": "violin 12"}
    long = [record(f"d{i}", " ".join(texts(20, seed=i)), title="planet engine") for i in range(5)]
    whole = dense_run(Session(model), asked, long, on_note=lambda message: None)
    cuts = [[window.ids.tolist() for window in dense._windows(model, [document])] for document in long]
    prompt = model.tokenize([""], prompt_name="document").batch.input_ids.tolist()[:-2]
    header = model.tokenize(["planet engine"], prompt_name="document").batch.input_ids.tolist()[:-1]
    assert all(len(rows) > 2 for rows in cuts)
    assert all(row[: len(header)] == header for rows in cuts for row in rows)
    assert header[: len(prompt)] == prompt
    vectors = [torch.nn.functional.normalize(model(pack(rows)), dim=-1) for rows in cuts]
    for name, text in asked.items():
        best = {
            d.id: float((x @ model.encode_queries([text])[0]).detach().max())
            for d, x in zip(long, vectors, strict=True)
        }
        assert whole[name] == pytest.approx(best, abs=1e-5)
    for size in (1, 70, 500):
        monkeypatch.setattr(dense, "TOKENS", size)
        notes: list[str] = []
        again = dense_run(Session(model), asked, long, top_k=3, on_note=notes.append)
        assert [note.rsplit(": ", 1)[1] for note in notes] == ["5"]
        for name, found in again.items():
            assert found == pytest.approx(dict(list(whole[name].items())[:3]), abs=1e-5)


def test_every_token_of_a_long_document_is_in_a_window():
    model = embedder()
    text = " ".join(texts(40))
    whole = model.tokenizer.encode_beginnings([text], max_length=10**9)[0].ids[1:-1]
    rows = [window.ids.tolist()[1:-1] for window in dense._windows(model, [record("d", text)])]
    at = 0
    for row in rows:  # Each window begins with what the one before it ended with.
        start = next(i for i in range(at, -1, -1) if whole[i : i + len(row)] == row)
        at = start + len(row)
    assert at == len(whole)


def test_a_short_document_is_read_as_by_encode_documents():
    model = embedder(prompts={"document": "text: "})
    for title, text in (("", "a river"), ("engine", "a river"), ("engine", ""), ("", "a river ")):
        (window,) = dense._windows(model, [record("d", text, title)])
        content = record("d", text, title).content.rstrip()
        assert window.ids.tolist() == model.document_ids([content])[0]


def test_long_queries_warn_and_odd_inputs_are_refused():
    model = embedder()
    with pytest.warns(TruncationWarning, match=r"query 'q' \('river river"):
        dense_run(Session(model), {"q": "river " * 100}, [record("d", "river")])
    with pytest.raises(ValueError, match="several documents have the id 'd'"):
        dense_run(Session(model), {"q": "river"}, [record("d", "river"), record("d", "engine")])
    with pytest.raises(ValueError, match="top_k is 0"):
        dense_run(Session(model), {"q": "river"}, [record("d", "river")], top_k=0)
    full = Session(embedder(prompts={"document": "a river and an engine and a market: "}, max_length=8))
    with pytest.raises(ValueError, match="the prompt for documents fills the 8 tokens"):
        dense_run(full, {"q": "river"}, [record("d", "river")])
    assert dense_run(Session(model), {"q": "river"}, []) == {"q": {}}
    assert dense_run(Session(model), {"q": "river"}, [record("d", "")]) == {"q": {}}


def test_a_saved_embedder_gives_the_same(tmp_path):
    loaded = Embedder.from_pretrained(save_embedder(tmp_path / "model"))
    documents = list(map(record, map(str, range(20)), texts(20)))
    again = Embedder.from_pretrained(tmp_path / "model")
    assert dense_run(Session(loaded), {"q": "river"}, documents) == dense_run(Session(again), {"q": "river"}, documents)
