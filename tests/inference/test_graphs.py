"""A batch in a graph's bucket gives the rows that it has alone; where no graph fits, that is said.

Without a GPU a stand-in takes the place of the graph: it runs the captured function again on the same memory, which is
all that a replay does. Captures of real graphs are marked `gpu`.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hf_twin import TINY, random_ids, twins
from torch import Tensor

from modernbert import ColBERT, Encoder, Packed, pack
from modernbert.inference.graphs import LONG, Bucket, Graphed, bucket_sizes, fill

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
    captures: list[Any] = []
    graphed = Graphed(encoder, 512, capture=stand_in(captures))
    # What another batch left in the bucket must not be seen.
    graphed(batch_of([4, 17, 9]))
    batch = batch_of(MIXES[name])
    with torch.no_grad():
        wanted = encoder(batch)
    got = graphed(batch)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    rows = torch.arange(0, batch.num_tokens, 3)
    torch.testing.assert_close(graphed(batch, rows=rows), wanted[rows], rtol=0, atol=2e-5)


def test_query_rows_have_graphs_of_their_own(encoder: Encoder) -> None:
    captures: list[Any] = []
    graphed = Graphed(encoder, 512, capture=stand_in(captures))
    for lengths in ([5, 30, 80], [9], [64, 2]):
        batch = expanded(lengths)
        with torch.no_grad():
            wanted = encoder(batch)
        torch.testing.assert_close(graphed(batch), wanted, rtol=0, atol=2e-5)
    assert graphed(batch_of([9])).shape == (9, TINY.hidden_size)
    assert {bucket.keys for bucket in graphed._graphs} == {True, False}


def test_a_bucket_is_captured_once_and_nothing_is_allocated(encoder: Encoder) -> None:
    captures: list[Any] = []
    graphed = Graphed(encoder, 512, capture=stand_in(captures))
    addresses = {graphed(batch_of([length])).data_ptr() for length in (3, 20, 32)}
    assert len(captures) == len(addresses) == 1
    graphed(batch_of([33]))
    assert len(captures) == 2


def test_the_result_is_overwritten_by_the_next_call(encoder: Encoder) -> None:
    graphed = Graphed(encoder, 512, capture=stand_in([]))
    first = graphed(batch_of([20]))
    kept = first.clone()
    graphed(batch_of([21]))
    assert not torch.equal(first, kept)


def test_a_graph_made_in_inference_mode_serves_outside_of_it(encoder: Encoder) -> None:
    graphed = Graphed(encoder, 64, capture=stand_in([]))
    with torch.inference_mode():
        wanted = graphed(batch_of([9])).clone()
    got = graphed(batch_of([9]))
    assert not got.is_inference()
    assert not got.requires_grad
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_a_bucket_longer_than_the_model_warns_nobody() -> None:
    encoder = twins(replace(TINY, max_position_embeddings=1100))[1].eval()
    graphed = Graphed(encoder, 2048, capture=stand_in([]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graphed(batch_of([1099])).shape[0] == 1099


def test_what_no_graph_holds_runs_without_one_and_says_so_once(encoder: Encoder) -> None:
    captures: list[Any] = []
    graphed = Graphed(encoder, 64, capture=stand_in(captures))
    for lengths in ([65], [1] * 9):
        with torch.no_grad():
            wanted = encoder(batch_of(lengths))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.testing.assert_close(graphed(batch_of(lengths)), wanted, rtol=0, atol=2e-5)
        assert len(said) == (lengths == [65])
        if said:
            assert "65 tokens in 1 sequences" in str(said[0].message)
            assert said[0].filename == __file__
    assert not captures


def test_what_cannot_be_replayed_is_refused(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="need the model on a GPU"):
        encoder.graphed()
    with pytest.raises(ValueError, match="smallest graph has 32"):
        Graphed(encoder, 31, capture=stand_in([]))
    graphed = Graphed(encoder, capture=stand_in([]))
    with pytest.raises(ValueError, match="leave it on the CPU"):
        graphed(batch_of([5]).to("meta"))
    with pytest.raises(ValueError, match="leave autocast"), torch.autocast("cpu", torch.bfloat16):
        graphed(batch_of([5]))
    with pytest.raises(ValueError, match="less than the 5 tokens"):
        graphed(batch_of([5]), rows=torch.tensor([5]))
    encoder.train()
    with pytest.raises(ValueError, match=r"training mode: eval\(\)"):
        graphed(batch_of([5]))
    encoder.eval().double()
    with pytest.raises(RuntimeError, match="weights have moved"):
        graphed(batch_of([5]))


def test_bucket_sizes() -> None:
    sizes = bucket_sizes(1000)
    assert sizes[:9] == [32, 40, 48, 56, 64, 80, 96, 112, 128]
    assert sizes[-2:] == [896, 1000]
    assert bucket_sizes(64)[-2:] == [56, 64]
    for smaller, larger in pairwise(sizes):
        assert smaller < larger <= 1.25 * smaller


def test_a_bucket_has_room_for_tokens_and_texts_and_knows_long_ones(encoder: Encoder) -> None:
    graphed = Graphed(encoder, 8192, capture=stand_in([]))
    assert graphed.bucket(batch_of([32])) == Bucket(32, 32, False)
    assert graphed.bucket(batch_of([8] * 4)) == Bucket(32, 32, False)
    assert graphed.bucket(batch_of([1] * 4)) == Bucket(40, 40, False)  # what is left over needs a place
    assert graphed.bucket(batch_of([500] * 4)) == Bucket(2048, LONG, False)
    assert graphed.bucket(batch_of([LONG, LONG])) == Bucket(2048, LONG, False)
    assert graphed.bucket(batch_of([LONG + 1, 5000])) == Bucket(6144, 6144, False)
    assert graphed.bucket(batch_of([LONG + 1] * 5)) == Bucket(6144, 2048, False)
    assert graphed.bucket(batch_of([8193])) is None
    # One free place of 5,120 // 8 would have to take 3,203 tokens.
    assert graphed.bucket(batch_of([3] * 639)) == Bucket(6144, LONG, False)


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


def test_a_colbert_encodes_texts_through_its_graphs() -> None:
    model = ColBERT.default()
    model.graphs = Graphed(model, 256, capture=stand_in([]))
    tokens = model.tokenize_documents(["one, two.", "three"])
    with torch.no_grad():
        wanted = model(tokens.batch, rows=tokens.rows)
    torch.testing.assert_close(model.graphs(tokens.batch, rows=tokens.rows), wanted, rtol=0, atol=2e-5)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.graphs is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXES)
def test_a_real_graph_gives_the_rows_of_the_batch_alone(encoder: Encoder, name: str) -> None:
    encoder.to("cuda")
    graphed = encoder.graphed(512)
    for lengths in ([4, 17, 9], MIXES[name], [200, 3], MIXES[name]):
        batch = batch_of(lengths)
        with torch.no_grad():
            wanted = encoder(batch.to("cuda"))
        torch.testing.assert_close(graphed(batch), wanted, rtol=0, atol=2e-4)


@pytest.mark.gpu
def test_a_gpu_encodes_texts_as_a_cpu_does() -> None:
    """Pinned copies, results fetched one batch later, a thread that tokenises, graphs for what fits."""
    texts = [f"text {n} " + "of some more words, " * (n % 40) for n in range(1500)]
    model = ColBERT.default()
    wanted = model.encode_documents(texts)
    model.to("cuda")
    plain = model.encode_documents(texts, batch_tokens=4000)
    model.graphs = model.graphed()
    for got in (plain, model.encode_documents(texts, batch_tokens=4000), model.encode_documents(texts)):
        assert torch.equal(got.offsets, wanted.offsets)
        torch.testing.assert_close(got.values, wanted.values, rtol=0, atol=1e-3)
