"""InfoNCE block by block equals `info_nce` of the whole score matrix, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from torch import Tensor

from modernbert import Ragged, maxsim
from modernbert.train import in_batch
from modernbert.train.in_batch import in_batch_info_nce
from modernbert.train.losses import info_nce

QUERIES, DOCUMENTS, E = [3, 1, 6, 2, 4], [4, 9, 1, 2, 5, 5, 7, 1, 3], 16
B, N = len(QUERIES), len(DOCUMENTS)


def ragged(rows: Tensor, lengths: list[int]) -> Ragged:
    return Ragged(rows, F.pad(torch.tensor(lengths).cumsum(0), (1, 0)))


def whole(queries: Ragged, documents: Ragged, groups: Tensor | None = None, **options: Any) -> Tensor:
    """The loss of one matrix. A mined negative of the positive's group is left out by its score."""
    scores = maxsim(queries, documents)
    mined = scores[:, B:]
    if groups is not None:
        mined = mined.masked_fill(groups[:B, None] == groups[B:], -torch.inf)
    return info_nce(scores[:, :B], None if groups is None else groups[:B], negatives_BN=mined, **options)


def results(loss: Callable[..., Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, d = (torch.randn(sum(n), E, generator=generator).to(dtype).requires_grad_() for n in (QUERIES, DOCUMENTS))
    value = loss(ragged(q, QUERIES), ragged(d, DOCUMENTS), **options)
    (2.5 * value).backward()
    assert q.grad is not None
    assert d.grad is not None
    return {"loss": value.detach(), "queries": q.grad, "documents": d.grad}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("elements", [1, 40, 1 << 20])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"temperature": 2.0, "both_directions": True},
        {"margin": -0.5, "both_directions": True},
        {"groups": [0, 1, 0, 3, 4, 5, 1, 7, 0], "both_directions": True},
    ],
)
def test_blocks_of_any_size_are_the_whole(dtype: torch.dtype, elements: int, options: dict[str, Any]) -> None:
    """From one query a block to all of them; in float32 no worse than the whole matrix is."""
    groups = options.get("groups")
    options = {name: value for name, value in options.items() if name != "groups"}
    options["groups"] = None if groups is None else torch.tensor(groups)

    def blocks(queries: Ragged, documents: Ragged, groups: Tensor | None, **options: Any) -> Tensor:
        return in_batch_info_nce(queries, documents, groups, elements=elements, **options)

    got, truth = results(blocks, dtype, **options), results(whole, torch.float64, **options)
    plain = results(whole, dtype, **options)
    for name, value in truth.items():
        if dtype is torch.float64:
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)
        else:
            assert_accurate(got[name], plain[name], value, name)


@pytest.mark.parametrize("elements", [1, 7, 30, 1 << 20])
def test_no_block_is_larger_than_asked_for(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Query tokens times documents, unless one query or document alone is more; each is scored once."""
    seen: list[tuple[list[int], list[int]]] = []

    def scored(queries: Ragged, documents: Ragged) -> Tensor:
        seen.append((queries.offsets.diff().tolist(), documents.offsets.diff().tolist()))
        return maxsim(queries, documents)

    monkeypatch.setattr(in_batch, "maxsim", scored)
    results(in_batch_info_nce, torch.float64, elements=elements, both_directions=True)
    for queries, documents in seen:
        assert sum(queries) * len(documents) <= elements or 1 in (len(queries), len(documents))
    assert [n for queries, documents in seen if documents == DOCUMENTS for n in queries] == QUERIES
    assert [n for _, documents in seen if documents != DOCUMENTS for n in documents] == DOCUMENTS[:B]


def test_without_a_graph_nothing_is_kept() -> None:
    """Validation: the same loss, for vectors that need a gradient too."""
    q, d = torch.randn(sum(QUERIES), E, requires_grad=True), torch.randn(sum(DOCUMENTS), E, requires_grad=True)
    wanted = in_batch_info_nce(ragged(q, QUERIES), ragged(d, DOCUMENTS), elements=40)
    with torch.no_grad():
        got = in_batch_info_nce(ragged(q, QUERIES), ragged(d, DOCUMENTS), elements=40)
    assert not got.requires_grad
    torch.testing.assert_close(got, wanted.detach())


def test_one_vector_a_text_is_a_dot_product_in_float32_under_autocast() -> None:
    """At a temperature of 0.02 the rounding of scores to bfloat16 would move logits by 0.2."""
    q, d = (F.normalize(torch.randn(n, 64), dim=1).requires_grad_() for n in (B, N))
    wanted = info_nce((q @ d.T)[:, :B], negatives_BN=(q @ d.T)[:, B:], temperature=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        got = in_batch_info_nce(q, d, temperature=0.02, elements=2 * N)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(torch.autograd.grad(got, [q, d]), torch.autograd.grad(wanted, [q, d]), strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_gradients_of_documents_add_up_in_float32() -> None:
    """A document's gradient sums over blocks; rounding it to bfloat16 after each would lose the small ones."""
    q, d = torch.randn(256, E), torch.randn(256, E)
    grads = []
    for dtype, elements in ((torch.float64, 1 << 20), (torch.bfloat16, 1 << 20), (torch.bfloat16, 256)):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (q, d)]
        in_batch_info_nce(*leaves, temperature=16.0, elements=elements).backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, plain, truth in zip(grads[2], grads[1], grads[0], strict=True):
        assert_accurate(got, plain, truth)


def test_no_queries_are_a_loss_of_zero() -> None:
    """A rank may have had no pairs left."""
    q, d = torch.randn(0, E, requires_grad=True), torch.randn(N, E, requires_grad=True)
    loss = in_batch_info_nce(q, d, both_directions=True)
    loss.backward()
    assert loss == 0
    assert d.grad is not None
    assert not d.grad.any()


def test_wrong_arguments_are_named() -> None:
    q, d = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(TypeError, match="queries are a Tensor, documents a Ragged"):
        in_batch_info_nce(q, Ragged.from_list([d]))
    with pytest.raises(ValueError, match="documents must begin with the positives of 5 queries, got 3 documents"):
        in_batch_info_nce(d, q)
    with pytest.raises(ValueError, match=r"groups_N must have one group for each of 5 documents, got \(3,\)"):
        in_batch_info_nce(q, d, torch.arange(3))
    with pytest.raises(ValueError, match="elements must be at least 1"):
        in_batch_info_nce(q, d, elements=0)
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        in_batch_info_nce(q, d, temperature=0.0)


def test_gathered_rows_are_those_of_all_ranks_in_order() -> None:
    """Rank 1 of 3 with its own pairs in the middle, as one process has them: see `test_grad_cache_ranks`."""
    everything = [torch.randn(n, E, dtype=torch.float64) for n in (4, 3, 5)]
    positives = [2, 2, 3]  # the other documents of a rank are mined negatives
    queries = [torch.randn(n, E, dtype=torch.float64) for n in positives]

    def gather(x: Tensor) -> Tensor:
        if x.is_floating_point():
            return torch.cat([everything[0], x, everything[2]])
        own = [torch.tensor([[1, rank, 0]] * len(d)) for rank, d in enumerate(everything)]
        assert torch.equal(x, own[1])
        return torch.cat(own)

    got = in_batch_info_nce(queries[1], everything[1], gather=gather, rank=1)
    logits, first = queries[1] @ torch.cat(everything).T, len(everything[0])
    wanted = F.cross_entropy(logits, torch.arange(first, first + positives[1]))
    torch.testing.assert_close(got, wanted)
