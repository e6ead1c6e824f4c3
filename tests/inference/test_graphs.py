"""A batch in a graph's bucket gives the rows that it has alone.

Without a GPU a stand-in takes the place of the graph: it runs the captured function again on the same memory, which is
all that a replay does. Captures of real graphs are marked `gpu`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hf_twin import TINY, random_ids, twins
from torch import Tensor, nn

from modernbert import ColBERT, Encoder, Packed, Session, pack
from modernbert.inference import graphs
from modernbert.inference.graphs import LONG, Bucket, Graphs, bucket_sizes, fill

MIXES = {
    "one query": [7],
    "a full bucket": [16, 16],
    "a full bucket, all places taken": [8, 8, 8, 8],
    "ragged": [5, 70, 3, 129, 1],
    "many short": [1] * 40,
    "with an empty one": [0, 9, 0],
    "nothing": [],
}


def stand_in(captures: list[Any]) -> Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]:
    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        output = run().clone()
        captures.append(output)
        return lambda: output.copy_(run()), output

    return capture


@pytest.fixture
def encoder() -> Encoder:
    return twins(TINY)[1].eval()


def replays(model: nn.Module, captures: list[Any] | None = None) -> Graphs:
    return Graphs(model, torch.device("cpu"), capture=stand_in([] if captures is None else captures))


@torch.no_grad()
def replay(made: Graphs, batch: Packed, rows: Tensor | None = None) -> Tensor:
    bucket = made.bucket(batch)
    assert bucket is not None
    return made.replay(bucket, batch, rows)


def batch_of(lengths: list[int]) -> Packed:
    return pack(random_ids(lengths, TINY.vocab_size))


def expanded(lengths: list[int]) -> Packed:
    """Half of every sequence are query-only rows."""
    ids = torch.tensor(random_ids([max(lengths)] * len(lengths), TINY.vocab_size))
    place, length = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    keys = place < (length + 1) // 2
    return pack(ids, keys, query_mask=(place < length) & ~keys)


@pytest.mark.parametrize("name", MIXES)
def test_a_graph_gives_the_rows_of_the_batch_alone(encoder: Encoder, name: str) -> None:
    made = replays(encoder)
    # What another batch left in the bucket must not be seen.
    replay(made, batch_of([4, 17, 9]))
    batch = batch_of(MIXES[name])
    with torch.no_grad():
        wanted = encoder(batch)
    got = replay(made, batch)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    rows = torch.arange(0, batch.num_tokens, 3)
    torch.testing.assert_close(replay(made, batch, rows), wanted[rows], rtol=0, atol=2e-5)


def test_query_rows_have_graphs_of_their_own(encoder: Encoder) -> None:
    made = replays(encoder)
    for lengths in ([5, 30, 80], [9], [64, 2]):
        batch = expanded(lengths)
        with torch.no_grad():
            wanted = encoder(batch)
        torch.testing.assert_close(replay(made, batch), wanted, rtol=0, atol=2e-5)
    assert replay(made, batch_of([9])).shape == (9, TINY.hidden_size)
    assert {bucket.keys for bucket in made._graphs} == {True, False}


def test_a_bucket_is_captured_once(encoder: Encoder) -> None:
    captures: list[Any] = []
    made = replays(encoder, captures)
    for length in (3, 20, 32):
        replay(made, batch_of([length]))
    assert len(captures) == 1
    replay(made, batch_of([33]))
    assert len(captures) == 2


def test_the_result_is_the_callers(encoder: Encoder) -> None:
    """The next replay overwrites the memory of the graph, not what was returned before."""
    made = replays(encoder)
    first = replay(made, batch_of([20]))
    kept = first.clone()
    replay(made, batch_of([21]))
    assert torch.equal(first, kept)


def test_a_graph_made_in_inference_mode_serves_outside_of_it(encoder: Encoder) -> None:
    made = replays(encoder)
    with torch.inference_mode():
        wanted = replay(made, batch_of([9])).clone()
    got = replay(made, batch_of([9]))
    assert not got.is_inference()
    assert not got.requires_grad
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_a_bucket_longer_than_the_model_does_not_warn() -> None:
    encoder = twins(replace(TINY, max_position_embeddings=1100))[1].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replay(replays(encoder), batch_of([1099])).shape[0] == 1099


def test_threads_take_turns(encoder: Encoder) -> None:
    made, batches = replays(encoder), [batch_of([length, 3]) for length in (5, 9, 12, 20)] * 4
    wanted = [replay(made, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for got, exact in zip(pool.map(lambda batch: replay(made, batch), batches), wanted, strict=True):
            assert torch.equal(got, exact)


def test_bucket_sizes() -> None:
    sizes = bucket_sizes(1000)
    assert sizes[:9] == [32, 40, 48, 56, 64, 80, 96, 112, 128]
    assert sizes[-2:] == [896, 1000]
    assert bucket_sizes(64)[-2:] == [56, 64]
    for smaller, larger in pairwise(sizes):
        assert smaller < larger <= 1.25 * smaller


def test_a_bucket_has_room_for_tokens_and_texts_and_knows_long_ones(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MAX_TOKENS", 8192)
    made = replays(encoder)
    assert made.bucket(batch_of([32])) == Bucket(32, 32, False)
    assert made.bucket(batch_of([8] * 4)) == Bucket(32, 32, False)
    assert made.bucket(batch_of([1] * 4)) == Bucket(40, 40, False)  # what is left over needs a place
    assert made.bucket(batch_of([500] * 4)) == Bucket(2048, LONG, False)
    assert made.bucket(batch_of([LONG, LONG])) == Bucket(2048, LONG, False)
    assert made.bucket(batch_of([LONG + 1, 5000])) == Bucket(6144, 6144, False)
    assert made.bucket(batch_of([LONG + 1] * 5)) == Bucket(6144, 2048, False)
    assert made.bucket(batch_of([8193])) is None
    # One free place of 5,120 // 8 would have to take 3,203 tokens.
    assert made.bucket(batch_of([3] * 639)) == Bucket(6144, LONG, False)


@pytest.mark.parametrize("lengths", [[], [3], [10, 20], [32], [1, 1, 1], [0, 5, 0]])
def test_free_places_share_what_is_left_over(lengths: list[int]) -> None:
    bucket = Bucket(32, 32, False)
    row = torch.full((2 * 32 + 5,), 7, dtype=torch.int32)
    fill(row, batch_of(lengths), bucket)
    cu_seqlens = row[64:]
    assert cu_seqlens[: len(lengths) + 1].tolist() == batch_of(lengths).cu_seqlens.tolist()
    assert int(cu_seqlens[-1]) == 32
    fillers = cu_seqlens[len(lengths) :].diff()
    assert int(fillers.max()) - int(fillers.min()) <= 1


def test_what_fills_up_sees_itself_alone() -> None:
    """Key lengths that an earlier batch left there would reach beyond the last token."""
    bucket = Bucket(32, 32, True)
    row = torch.full((2 * 32 + 5 + 4,), 30, dtype=torch.int32)
    batch = expanded([9, 4])
    fill(row, batch, bucket)
    assert row[69:71].tolist() == batch.key_lengths.tolist()
    assert row[71:].tolist() == row[64:69].diff()[2:].tolist()


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXES)
def test_a_session_on_a_gpu_gives_the_rows_of_the_batch_alone(encoder: Encoder, name: str) -> None:
    encoder.to("cuda")
    session = Session(encoder)
    for lengths in ([4, 17, 9], MIXES[name], [200, 3], [9000, 9000], MIXES[name]):
        batch = batch_of(lengths)
        with torch.no_grad():
            wanted = encoder(batch.to("cuda"))
        torch.testing.assert_close(session(batch), wanted, rtol=0, atol=2e-4)


@pytest.mark.gpu
def test_a_gpu_encodes_texts_as_a_cpu_does() -> None:
    """Pinned copies, results fetched one batch later, a thread that tokenises, graphs for what fits."""
    texts = [f"text {n} " + "of some more words, " * (n % 40) for n in range(1500)]
    model = ColBERT.default()
    wanted = model.encode_documents(texts)
    model.to("cuda")
    session = Session(model)
    plain = model.encode_documents(texts, batch_tokens=4000)
    for got in (plain, session.encode_documents(texts, batch_tokens=4000), session.encode_documents(texts)):
        assert torch.equal(got.offsets, wanted.offsets)
        torch.testing.assert_close(got.values, wanted.values, rtol=0, atol=1e-3)
