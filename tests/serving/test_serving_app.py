"""The routes: each answer equals the model's own, and each error has the form that its client reads."""

from __future__ import annotations

import base64
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import save_embedder, tiny_encoder, tiny_tokenizer
from stores import corpus, write_corpus

pytest.importorskip("fastapi", reason='needs pip install "modernbert[serve]"')
pytest.importorskip("prometheus_client")

from safetensors.numpy import load
from starlette.testclient import TestClient
from strict_html import parse

from modernbert import ColBERT, Embedder, Reranker, SequenceClassifier, Session, maxsim
from modernbert.retrieval import Store, index
from modernbert.serving.app import create_app
from modernbert.serving.batcher import Batcher
from modernbert.serving.gate import Limits
from modernbert.serving.models import Served
from modernbert.serving.start import serve_models

ATOL = 2e-6  # of unit vectors in float32: a product of other shape is summed in another order
TEXTS = ["the river was seen by people", "a violin", "find the mountain which was Seen by 12 people"]
QUERY = "how does hail form inside a storm?"
DOCUMENTS = ["A bank lends money.", "Hail forms in strong thunderstorm clouds.", "Rain is water."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_embedder(folder / "embedder")
    tokenizer = tiny_tokenizer()
    Reranker(SequenceClassifier(tiny_encoder(tokenizer), labels=1), tokenizer).save_pretrained(folder / "reranker")
    write_corpus(folder / "corpus.jsonl", corpus(12))
    index([folder / "corpus.jsonl"], folder / "store", dtype="fp32")
    return folder


@pytest.fixture(scope="module")
def client(folders):
    models, searcher = serve_models([str(folders / "embedder"), str(folders / "reranker")], folders / "store")
    with TestClient(create_app(models, searcher, limits=Limits(body_bytes=200_000))) as client:
        yield client


def good(client, path: str, **body: object):
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response


def numbers(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def same(found, wanted) -> None:
    torch.testing.assert_close(torch.tensor(np.asarray(found)), torch.as_tensor(wanted), rtol=0, atol=ATOL)


def test_embeddings_in_both_formats(client, folders):
    model = Embedder.from_pretrained(folders / "embedder")
    wanted = model.encode(TEXTS)
    found = good(client, "/v1/embeddings", input=TEXTS, model="embedder").json()
    same(np.float32([row["embedding"] for row in found["data"]]), wanted)
    assert [row["index"] for row in found["data"]] == [0, 1, 2]
    count = sum(map(len, model.tokenize(TEXTS).batch.input_ids.split(model.tokenize(TEXTS).batch.lengths)))
    assert found["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert (found["object"], found["model"], found["data"][0]["object"]) == ("list", "embedder", "embedding")
    packed = good(client, "/v1/embeddings", input=TEXTS, encoding_format="base64").json()
    same([numbers(row["embedding"]) for row in packed["data"]], wanted)
    (one,) = good(client, "/v1/embeddings", input=TEXTS[1], model="embedder").json()["data"]
    same(np.float32(one["embedding"]), wanted[1])


def test_fewer_dimensions_are_the_first_ones_with_length_one(client, folders):
    model = Embedder.from_pretrained(folders / "embedder")
    found = good(client, "/v1/embeddings", input=TEXTS, dimensions=5, encoding_format="base64").json()
    wanted = torch.nn.functional.normalize(model.encode(TEXTS)[:, :5], dim=-1)
    same([numbers(row["embedding"]) for row in found["data"]], wanted)


def test_token_ids_are_what_the_model_reads(client, folders):
    model = Embedder.from_pretrained(folders / "embedder")
    ids = model.document_ids(TEXTS)
    for given, wanted in ((ids, model.encode(TEXTS)), (ids[0], model.encode(TEXTS[:1]))):
        found = good(client, "/v1/embeddings", input=given).json()
        same(np.float32([row["embedding"] for row in found["data"]]), wanted)


def test_the_kind_of_a_text_chooses_its_prompt(folders):
    from modernbert.serving.asked import embedding_tokens
    from modernbert.serving.schemas import EmbeddingsRequest

    found = Embedder.from_pretrained(folders / "embedder")
    config = {"prompts": {"query": "find ", "document": "the "}}
    model = Embedder(found.encoder, found.tokenizer, config=type(found.config)(**config))
    for kind, prompt in (("query", "find "), ("document", "the "), (None, "")):
        tokens = embedding_tokens(model, EmbeddingsRequest(input=TEXTS, input_type=kind))
        assert tokens.batch.input_ids.equal(model.tokenize(TEXTS, prompt=prompt).batch.input_ids)


def test_a_text_that_is_too_long_is_refused_or_cut_as_asked(client, folders):
    long = "people " * 90
    response = client.post("/v1/embeddings", json={"input": ["a violin", long]})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["message"].startswith("input[1] has at least ")
    (row,) = good(client, "/v1/embeddings", input=long, truncate=True).json()["data"]
    same(np.float32(row["embedding"]), Embedder.from_pretrained(folders / "embedder").encode([long])[0])


@pytest.mark.parametrize("kind", ["query", "document"])
def test_multi_vectors_in_each_form(client, kind):
    model = ColBERT.default()
    wanted = model.encode_queries(DOCUMENTS) if kind == "query" else model.encode_documents(DOCUMENTS)
    asked = {"input": DOCUMENTS, "input_type": kind}
    found = good(client, "/v1/multi-vector", **asked).json()
    for row, matrix in zip(found["data"], wanted, strict=True):
        same(np.float32(row["embeddings"]), matrix)
    packed = good(client, "/v1/multi-vector", **asked, embedding_type="base64").json()
    for row, matrix in zip(packed["data"], wanted, strict=True):
        same(numbers(row["embeddings"]).reshape(row["shape"]), matrix)
    file = good(client, "/v1/multi-vector", **asked, embedding_type="safetensors")
    tensors = load(file.content)
    same(tensors["values"], wanted.values)
    assert tensors["offsets"].tolist() == wanted.offsets.tolist()
    (size,) = struct.unpack("<Q", file.content[:8])
    assert json.loads(json.loads(file.content[8 : 8 + size])["__metadata__"]["usage"]) == found["usage"]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
@pytest.mark.parametrize("name", ["reranker", "modernbert"])
def test_rerank_gives_the_scores_of_the_model(client, folders, path, name):
    if name == "reranker":
        wanted = Reranker.from_pretrained(folders / "reranker").score(QUERY, DOCUMENTS)
    else:
        model = ColBERT.default()
        wanted = maxsim(model.encode_queries([QUERY]), model.encode_documents(DOCUMENTS))[0]
    found = good(client, path, query=QUERY, documents=DOCUMENTS, model=name).json()
    order = wanted.argsort(descending=True).tolist()
    assert [row["index"] for row in found["results"]] == order
    scores = torch.tensor([row["relevance_score"] for row in found["results"]])
    torch.testing.assert_close(scores, wanted[order], rtol=0, atol=1e-5)  # of a ColBERT a sum over the query
    texts = [row.get("document", {}).get("text") for row in found["results"]]
    assert texts == ([DOCUMENTS[i] for i in order] if path == "/v1/rerank" else [None] * 3)
    (best,) = good(client, path, query=QUERY, documents=DOCUMENTS, model=name, top_n=1).json()["results"]
    assert best["index"] == order[0]


def test_documents_of_rerank_may_be_objects_and_may_be_cut(client):
    plain = good(client, "/v1/rerank", query=QUERY, documents=DOCUMENTS, model="modernbert").json()
    objects = [{"text": text} for text in DOCUMENTS]
    assert (
        good(client, "/v1/rerank", query=QUERY, documents=objects, model="modernbert").json()["results"]
        == plain["results"]
    )
    cut = good(client, "/v2/rerank", query=QUERY, documents=DOCUMENTS, model="modernbert", max_tokens_per_doc=2).json()
    first = ColBERT.default().tokenizer.encode_batch(DOCUMENTS)
    texts = [text[: encoding.offsets[2][1]] for text, encoding in zip(DOCUMENTS, first, strict=True)]
    short = good(client, "/v2/rerank", query=QUERY, documents=texts, model="modernbert").json()
    assert cut["results"] == short["results"]


def test_search_gives_what_the_store_gives_with_reasons(client, folders):
    with Store(folders / "store") as store:
        hits = store.search(["owl and mouse"], top_k=3, where={"year": "2001"})[0]
    found = good(client, "/v1/search", query="owl and mouse", top_k=3, where={"year": "2001"}).json()
    assert [(row["id"], row["rank"]) for row in found["hits"]] == [(hit.passage.id, hit.rank) for hit in hits]
    for row, hit in zip(found["hits"], hits, strict=True):
        assert abs(row["score"] - hit.score) < 1e-5
        assert abs(sum(match["contribution"] for match in row["matches"]) - row["score"]) < 1e-4
        assert row["why"][0]["query"] in ("owl", "mouse")
    assert found["warnings"] == []
    without = good(client, "/v1/search", query="owl and mouse", reasons=False).json()
    assert "why" not in without["hits"][0]
    assert "the model reads" in good(client, "/v1/search", query="owl " * 300).json()["warnings"][0]


def test_the_page_asks_and_explains(client):
    empty = parse(client.get("/").text)
    (field,) = empty.all("input")
    assert (field.attributes["name"], field.attributes["value"]) == ("q", "")
    assert empty.all("article") == []
    page = client.get("/", params={"q": 'owl "and" <mouse>'})
    root = parse(page.text)
    assert root.all("input")[0].attributes["value"] == 'owl "and" <mouse>'
    assert len(root.all("article")) == 10
    (policy,) = root.all("meta", http_equiv="Content-Security-Policy")
    assert policy.attributes["content"].endswith("form-action 'self'")
    assert page.headers["content-type"] == "text/html; charset=utf-8"


WRONG = {
    "empty_text": ("/v1/embeddings", {"input": ["a", "  "]}, 400, r"input\[1\] is empty"),
    "empty_list": ("/v1/embeddings", {"input": []}, 400, "input is empty"),
    "no_input": ("/v1/embeddings", {}, 400, "input: Field required"),
    "a_number": ("/v1/embeddings", {"input": ["a", 3]}, 400, r"input\[1\] must be a text, got a number"),
    "null": ("/v1/embeddings", {"input": None}, 400, "input must be a list of texts, got null"),
    "an_object": ("/v1/multi-vector", {"input": {"text": "a"}}, 400, "input must be a list of texts, got an object"),
    "ids_and_a_text": ("/v1/embeddings", {"input": [[1, 2], "a"]}, 400, r"input\[1\] must be a list of token ids"),
    "an_empty_row": ("/v1/embeddings", {"input": [[1], []]}, 400, r"input\[1\].* got an empty list"),
    "a_wrong_id": ("/v1/embeddings", {"input": [[1, -3]]}, 400, "token id -3"),
    "true_is_no_id": ("/v1/embeddings", {"input": [[1, True]]}, 400, r"input\[0\] must be a list of token ids"),
    "too_many_ids": ("/v1/embeddings", {"input": [1] * 65}, 400, "has 65 tokens, but the model reads 64"),
    "half_a_character": ("/v1/embeddings", {"input": "\ud83d"}, 400, "half a surrogate pair"),
    "dimensions": ("/v1/embeddings", {"input": "a", "dimensions": 33}, 400, "dimensions is 33, but .* have 32"),
    "zero_dimensions": ("/v1/embeddings", {"input": "a", "dimensions": 0}, 400, "dimensions: .* greater than"),
    "a_number_as_text": ("/v1/embeddings", {"input": "a", "dimensions": "3"}, 400, "dimensions: .* valid integer"),
    "format": ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, 400, "encoding_format: .*'float'"),
    "unknown_field": ("/v1/embeddings", {"input": "a", "task": "x"}, 400, "task: /v1/embeddings has no such field"),
    "unknown_model": ("/v1/embeddings", {"input": "a", "model": "gpt"}, 404, "no model 'gpt': .* embedder, reranker"),
    "wrong_class": ("/v1/embeddings", {"input": "a", "model": "modernbert"}, 400, "is a ColBERT, .* needs an Embedder"),
    "wrong_class_2": ("/v1/rerank", {"query": "a", "documents": ["b"], "model": "embedder"}, 400, "is an Embedder"),
    "wrong_class_3": ("/v1/multi-vector", {"input": "a", "model": "reranker"}, 400, "is a Reranker.* needs a ColBERT"),
    "too_many_texts": ("/v1/embeddings", {"input": ["a"] * 2049}, 413, "2,049 texts"),
    "too_large": ("/v1/embeddings", {"input": "a" * 200_001}, 413, "at most 200,000 bytes"),
    "empty_query": ("/v2/rerank", {"query": " ", "documents": ["b"]}, 400, "query is empty"),
    "empty_document": ("/v2/rerank", {"query": "a", "documents": ["b", ""]}, 400, r"documents\[1\] is empty"),
    "half_a_query": ("/v1/rerank", {"query": "\ud83d", "documents": ["b"]}, 400, "^query: .* surrogate"),
    "no_text": ("/v1/rerank", {"query": "a", "documents": [{"title": "b"}]}, 400, r"documents\[0\] must be a text"),
    "top_n": ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, 400, "top_n: .* greater than"),
    "empty_question": ("/v1/search", {"query": ""}, 400, "query is empty"),
    "unknown_field_of_store": ("/v1/search", {"query": "a", "where": {"colour": 1}}, 400, "colour"),
    "no_prefilter": ("/v1/search", {"query": "a", "prefilter": True}, 400, "has no pre-filter"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_refused_as_the_client_expects(client, name):
    path, body, status, message = WRONG[name]
    headers = {"content-type": "application/json"}
    response = client.post(path, content=json.dumps(body), headers=headers)
    assert response.status_code == status, response.text
    found = response.json()
    text = found["message"] if path in ("/v1/rerank", "/v2/rerank", "/v1/multi-vector") else found["error"]["message"]
    assert re.search(message, text), text
    if "error" in found:
        assert found["error"].keys() == {"message", "type", "param", "code"}
        assert found["error"]["type"] == "invalid_request_error"
    else:
        assert found["detail"] == found["message"]


def test_what_is_not_json_and_what_is_not_there(client):
    response = client.post("/v1/embeddings", content=b'{"input": ', headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["message"][:20]) == (400, "the body is not JSON")
    response = client.post("/v1/embeddings", data={"input": "a"})
    assert "Content-Type: application/json" in response.json()["error"]["message"]
    deep = client.post("/v1/embeddings", content=b"[" * 100_000, headers={"content-type": "application/json"})
    assert deep.status_code == 400
    assert client.get("/nothing").json()["error"]["message"] == "GET /nothing: Not Found"
    assert client.get("/v1/embeddings").status_code == 405


def test_models_and_health(client):
    found = {row["id"]: (row["object"], row["class"]) for row in client.get("/v1/models").json()["data"]}
    assert found == {
        "embedder": ("model", "Embedder"),
        "reranker": ("model", "Reranker"),
        "modernbert": ("model", "ColBERT"),
    }
    assert client.get("/v1/models/reranker").json()["id"] == "reranker"
    assert client.get("/v1/models/none").json()["error"]["code"] == "model_not_found"
    assert client.get("/health").json()["status"] == "ok"


def test_metrics_count_answers_and_tokens(client):
    def figure(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    row = 'modernbert_requests_total{route="/v1/embeddings",status="%s"}'
    names = row % 200, row % 400, 'modernbert_tokens_total{model="embedder"}', 'modernbert_requests_total{route="other"'
    before = list(map(figure, names))
    count = good(client, "/v1/embeddings", input=TEXTS).json()["usage"]["total_tokens"]
    client.post("/v1/embeddings", json={"input": ""})
    client.get("/one"), client.get("/another")
    assert [figure(name) - was for name, was in zip(names, before, strict=True)] == [1, 1, count, 2]
    assert figure("modernbert_queue_tokens") == 0


def test_a_server_without_a_store_and_one_with_the_store_of_another_model(folders, tmp_path):
    models, searcher = serve_models([])
    with TestClient(create_app(models, searcher)) as client:
        assert "--index STORE" in client.post("/v1/search", json={"query": "a"}).json()["error"]["message"]
        assert "--index STORE" in client.get("/").text
        needs = client.post("/v1/embeddings", json={"input": "a"}).json()["error"]["message"]
        assert needs == "/v1/embeddings needs an Embedder, and the models of this server are modernbert (ColBERT)"
    other = ColBERT.default()
    other.dense[0].linear.weight.data.neg_()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the store was made with"):
        serve_models([str(tmp_path / "other")], folders / "store")
    with pytest.raises(ValueError, match="two models are called embedder"):
        serve_models([str(folders / "embedder")] * 2)


def test_a_model_that_fails_is_the_fault_of_the_server(folders):
    broken = Embedder.from_pretrained(folders / "embedder")
    broken.encoder.final_norm.weight.data.fill_(float("nan"))
    models = [Served("broken", broken, Batcher(Session(broken)))]
    with TestClient(create_app(models), raise_server_exceptions=False) as client:
        response = client.post("/v1/embeddings", json={"input": "a"})
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        assert 'requests_total{route="/v1/embeddings",status="500"} 1.0' in client.get("/metrics").text


def test_a_full_queue_and_a_request_that_it_never_holds(folders):
    models, _ = serve_models([str(folders / "embedder")])
    models[0].batcher.queue_tokens = 40
    with TestClient(create_app(models)) as client:
        response = client.post("/v1/embeddings", json={"input": ["people"] * 40})
        assert (response.status_code, "send fewer texts" in response.text) == (413, True)
        models[0].batcher._count = lambda: 40
        response = client.post("/v1/embeddings", json={"input": "people"})
        assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(response.headers["retry-after"]) >= 1
