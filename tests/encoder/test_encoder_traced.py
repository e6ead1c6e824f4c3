"""The encoder under torch.compile (whole graph, few compilations) and torch.export (the padded entrance)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hf_twin import BIASES, TINY, pad, random_ids, twins
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from modernbert import Encoder, pack
from modernbert.config import FULL, SLIDING

SMALL = replace(TINY, num_hidden_layers=2, layer_pattern=(FULL, SLIDING))
MIXES = [[3, 40], [7, 9, 30], [64, 65, 2], [129], [5, 5, 5, 5], [200, 0, 1], [17], [90, 31]]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rows_and_gradients(run: Any, encoder: Encoder, batch: Any) -> tuple[Tensor, ...]:
    rows = run(batch)
    return rows.detach(), *torch.autograd.grad(rows.square().sum(), list(encoder.parameters()))


def assert_same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for mine, yours in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=1e-5 * (1 + yours.abs().max().item()))


def test_one_graph_for_all_lengths() -> None:
    """Forward and backward of eight mixes equal eager; after two compilations, sizes are open."""
    encoder, counter = twins(SMALL)[1], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(encoder, fullgraph=True, backend=counter)
    for lengths in MIXES:
        batch = pack(random_ids(lengths, 100))
        assert_same(rows_and_gradients(compiled, encoder, batch), rows_and_gradients(encoder, encoder, batch))
    assert counter.frame_count <= 2
    for graph in counter.graphs:
        calls = [str(node.target) for node in graph.graph.nodes]
        assert sum("attention_cpu" in call for call in calls) == SMALL.num_hidden_layers
    counter.frame_count = 0
    with torch.no_grad():  # also where eager would cut the batch into parts
        for lengths in [*MIXES, [900, 800, 700]]:
            batch = pack(random_ids(lengths, 100))
            assert_same((compiled(batch),), (encoder(batch),))
    assert counter.frame_count <= 2
    batch = pack([[7]])  # torch always makes sizes of one a case of their own
    assert_same((compiled(batch),), (encoder(batch),))


def test_one_graph_with_query_rows_dropout_and_autocast() -> None:
    encoder = twins(replace(SMALL, attention_dropout=0.2, mlp_dropout=0.2, **BIASES))[1]
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    keys = torch.tensor([[1] * 20 + [0] * 12, [1] * 3 + [0] * 29])
    batch = pack(torch.tensor(random_ids([32, 32], 100)), keys, query_mask=1 - keys)
    assert_same(rows_and_gradients(compiled, encoder, batch), rows_and_gradients(encoder, encoder, batch))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(batch), encoder(batch), rtol=0, atol=0.1)
    encoder.train()
    first, second = compiled(batch), compiled(batch)
    assert first.isfinite().all()
    assert (first - second).abs().max() > 0.1


@pytest.mark.sweep
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    """The slow one: one layer of each kind, made into machine code."""
    encoder = twins(SMALL)[1]
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True)
    for lengths in MIXES[:3]:
        batch = pack(random_ids(lengths, 100))
        assert_same(rows_and_gradients(compiled, encoder, batch), rows_and_gradients(encoder, encoder, batch))


def padded_batches(counts: range, length: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of so many texts, padded on either side, of one length or of many."""
    for count in counts:
        longest = length or 5 + count * 7 % 40
        lengths = [longest, *(1 + i * 5 % longest for i in range(1, count))]
        yield pad(random_ids(lengths, 100, seed=count), "left" if count % 2 else "right", extra=count % 3)


@pytest.mark.parametrize("length", [12, None])
@pytest.mark.parametrize("dynamic", [None, True])
def test_the_padded_entrance_is_two_graphs_at_most(length: int | None, dynamic: bool | None) -> None:
    """Every number of texts was compiled anew, in about eight graphs each."""
    encoder, counter = twins(SMALL)[1], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(encoder, backend=counter, dynamic=dynamic)
    with torch.no_grad():
        for ids, mask in padded_batches(range(2, 65, 3), length):
            assert_same((compiled(ids, mask)[0],), (encoder(ids, mask)[0],))
    assert counter.frame_count <= 2


def test_the_padded_entrance_compiled_is_checked_and_differentiable() -> None:
    encoder = twins(SMALL)[1]
    compiled = torch.compile(encoder, backend="aot_eager")
    ids, mask = pad(random_ids([3, 40, 17], 100), "left")

    def padded(run: Any) -> Any:
        return lambda batch: run(*batch)[0]

    runs = (
        rows_and_gradients(padded(compiled), encoder, (ids, mask)),
        rows_and_gradients(padded(encoder), encoder, (ids, mask)),
    )
    assert_same(*runs)
    with pytest.raises(ValueError, match="token id 100 is out of range"):
        compiled(ids.masked_fill(mask == 1, 100), mask)
    with pytest.raises(ValueError, match="has holes"):
        compiled(ids, mask.index_fill(1, torch.tensor([38]), 0))
