"""Requests that share batches: each answer is the model's own, whatever else was in the batch."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from small_models import save_colbert, save_embedder

from modernbert import ColBERT, Embedder, Session
from modernbert.serving.batcher import Batcher, QueueFull, RequestTooLarge
from modernbert.serving.joined import join

ATOL = 2e-6  # of unit vectors in float32: a product of other shape is summed in another order
TEXTS = [f"the river number {i} " + "was seen by people " * (i % 7) for i in range(40)]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> Embedder:
    return Embedder.from_pretrained(save_embedder(tmp_path_factory.mktemp("embedder")))


@pytest.fixture(scope="module")
def colbert(tmp_path_factory) -> ColBERT:
    return ColBERT.from_pretrained(save_colbert(tmp_path_factory.mktemp("colbert")))


class Held(Session):
    """A Session that waits in each call until it may go on, and remembers the tokens of each call."""

    def __init__(self, model) -> None:
        super().__init__(model)
        self.go, self.entered, self.calls = threading.Event(), threading.Event(), []

    def __call__(self, batch, *, rows=None):
        self.entered.set()
        assert self.go.wait(30)
        self.calls.append(batch.num_tokens)
        return super().__call__(batch, rows=rows)


@pytest.fixture
def held(embedder):
    """A Batcher whose thread is in its first batch, with one text, and waits there for `session.go`."""
    session = Held(embedder)
    batcher = Batcher(session, batch_tokens=64, queue_tokens=600)
    batcher.first = batcher.submit(embedder.tokenize(["river"]))
    assert session.entered.wait(30)
    yield batcher
    session.go.set()
    batcher.close()


def test_answers_of_many_threads_are_the_models_own(embedder):
    wanted = embedder.encode(TEXTS)
    batches = []
    batcher = Batcher(Session(embedder), batch_tokens=128, on_batch=lambda *row: batches.append(row))
    pieces = [range(first, min(first + size, 40)) for size in (4, 7, 40) for first in range(0, 40, size)]

    def ask(piece):
        return batcher.submit(embedder.tokenize([TEXTS[i] for i in piece])).result(30)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, pieces))
    batcher.close()
    for piece, rows in zip(pieces, answers, strict=True):
        torch.testing.assert_close(rows.values, wanted[list(piece)], rtol=0, atol=ATOL)
    assert sum(texts for texts, _, _ in batches) == sum(map(len, pieces))
    assert sum(tokens for _, tokens, _ in batches) == sum(map(len, embedder.document_ids(TEXTS))) * 3


@pytest.mark.parametrize("expansion", [False, True])
def test_queries_and_documents_of_a_colbert_share_a_batch(colbert, expansion):
    """With expansion only the queries have tokens that are not keys."""
    config = replace(colbert.config, do_query_expansion=expansion)
    model = ColBERT(colbert.encoder, colbert.tokenizer, [*colbert.dense], config).eval()
    queries, documents = model.tokenize_queries(TEXTS[:3]), model.tokenize_documents(TEXTS[3:9])
    batcher = Batcher(Session(model))
    rows = batcher.submit(join([documents, queries, documents])).result(30)
    batcher.close()
    wanted = [*model.encode_documents(TEXTS[3:9]), *model.encode_queries(TEXTS[:3])]
    for found, row in zip(rows, [*wanted, *wanted[:6]], strict=True):
        torch.testing.assert_close(found, row, rtol=0, atol=ATOL)


def test_requests_that_wait_share_a_batch_and_a_short_one_does_not_wait_for_a_long_one(held, embedder):
    long = held.submit(embedder.tokenize(TEXTS[:12]))
    short = held.submit(embedder.tokenize(["river"]))
    ended = []
    for name, future in (("long", long), ("short", short)):
        future.add_done_callback(lambda _, name=name: ended.append(name))
    held.session.go.set()
    torch.testing.assert_close(long.result(30).values, embedder.encode(TEXTS[:12]), rtol=0, atol=ATOL)
    assert ended == ["short", "long"]
    assert held.first.result(30).values.shape == (1, 32)
    assert len(held.session.calls) < 13  # not a call for each text
    assert max(held.session.calls) <= 64


def test_a_request_of_many_texts_is_not_starved_by_new_ones(held, embedder):
    one = embedder.tokenize(["river"])
    long = held.submit(embedder.tokenize(["the river"] * 30))
    others = [held.submit(one) for _ in range(30)]
    held.session.go.set()
    long.result(30)
    assert all(future.result(30) for future in others)
    assert long.result().values.shape == (30, 32)


def test_a_full_queue_refuses_and_says_when_to_come_back(held, embedder):
    many = embedder.tokenize(["river"] * 40)
    for _ in range(600 // many.batch.num_tokens):
        held.submit(many)
    with pytest.raises(QueueFull) as full:
        held.submit(many)
    assert full.value.retry_after >= 1
    waiting = held.waiting_tokens
    with pytest.raises(RequestTooLarge, match="send fewer texts"):
        held.submit(embedder.tokenize(TEXTS))
    assert held.waiting_tokens == waiting <= 600


def test_a_cancelled_request_leaves_the_queue_at_once(held, embedder):
    tokens = embedder.tokenize(["river"] * 40)
    waiting = held.submit(tokens)
    assert held.waiting_tokens == tokens.batch.num_tokens
    assert waiting.cancel()
    assert held.waiting_tokens == 0
    kept = held.submit(tokens)
    held.session.go.set()
    kept.result(30)
    assert sum(held.session.calls) == tokens.batch.num_tokens + embedder.tokenize(["river"]).batch.num_tokens


def test_a_request_that_is_cancelled_half_way_is_not_encoded_to_its_end(held, embedder):
    half, batches = held.submit(embedder.tokenize(TEXTS[:12])), []

    def after_its_first(texts: int, tokens: int, seconds: float) -> None:
        batches.append(tokens)
        if len(batches) == 2:
            assert half.cancel()

    held.on_batch = after_its_first
    held.session.go.set()
    while len(batches) < 2:
        time.sleep(0.001)
    after = held.submit(embedder.tokenize(["river"]))
    torch.testing.assert_close(after.result(30).values, embedder.encode(["river"]), rtol=0, atol=ATOL)
    assert len(held.session.calls) == 3


def test_only_the_request_that_fails_has_the_error(held, embedder):
    bad = embedder.tokenize(["mountain"])
    bad.batch.input_ids[1] = 10**6
    futures = [held.submit(embedder.tokenize([text])) for text in ("river", "violin")]
    futures.insert(1, held.submit(bad))
    held.session.go.set()
    with pytest.raises(IndexError):
        futures[1].result(30)
    for text, future in (("river", futures[0]), ("violin", futures[2])):
        torch.testing.assert_close(future.result(30).values, embedder.encode([text]), rtol=0, atol=ATOL)


def test_closing_answers_what_waits_and_refuses_what_comes_later(held, embedder):
    waiting = [held.submit(embedder.tokenize([text])) for text in TEXTS[:3]]
    closing = threading.Thread(target=held.close)
    closing.start()
    while not held._closed:
        time.sleep(0.001)
    with pytest.raises(RuntimeError, match="closed"):
        held.submit(embedder.tokenize(["river"]))
    held.session.go.set()
    closing.join(30)
    assert all(future.done() for future in waiting)


def test_no_text(held, embedder):
    with pytest.raises(ValueError, match="no text"):
        held.submit(embedder.tokenize([]))
