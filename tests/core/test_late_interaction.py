"""`modernbert.maxsim`: all pairs, paired, top-k over ragged vectors, against a loop over pairs in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from torch import Tensor

from modernbert import late_interaction as scoring
from modernbert import maxsim
from modernbert.late_interaction import Ragged

QUERY_LENGTHS, DOCUMENT_LENGTHS = [3, 1, 0, 9], [5, 64, 0, 1, 129, 2, 0]


def vectors(lengths: list[int], width: int = 24, seed: int = 0) -> Ragged:
    generator = torch.Generator().manual_seed(seed)
    return Ragged.from_list([F.normalize(torch.randn(n, width, generator=generator), dim=-1) for n in lengths])


def by_definition(queries: Ragged, documents: Ragged) -> Tensor:
    scores = torch.zeros(len(queries), len(documents), dtype=torch.float64)
    for i, query in enumerate(queries):
        for j, document in enumerate(documents):
            for token in query.double():
                scores[i, j] += max([float(token @ other) for other in document.double()], default=float("-inf"))
    return scores


def test_all_pairs_and_paired() -> None:
    queries, documents = vectors(QUERY_LENGTHS), vectors(DOCUMENT_LENGTHS, seed=1)
    wanted = by_definition(queries, documents)
    assert wanted[:2, [2, 6]].isinf().all()  # an empty document ranks last ...
    assert wanted[2].eq(0).all()  # ... and an empty query does not care
    got = maxsim(queries, documents)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(maxsim(list(queries), list(documents)), got)
    torch.testing.assert_close(maxsim(queries, documents[:4], paired=True), got[:, :4].diagonal())
    wide = maxsim(*(Ragged(x.values.double(), x.offsets) for x in (queries, documents)))
    torch.testing.assert_close(wide, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("paired", [False, True])
def test_gradients(paired: bool) -> None:
    queries, documents = vectors([3, 1, 9]), vectors([5, 64, 7], seed=1)

    def dense(q: Tensor, d: Tensor) -> Tensor:
        pairs = [[(x @ y.T).amax(1).sum() for y in d.split([5, 64, 7])] for x in q.split([3, 1, 9])]
        scores = torch.stack([torch.stack(row) for row in pairs])
        return scores.diagonal() if paired else scores

    def ours(q: Tensor, d: Tensor) -> Tensor:
        return maxsim(Ragged(q, queries.offsets), Ragged(d, documents.offsets), paired=paired)

    assert_as_accurate(ours, dense, queries.values, documents.values)


@pytest.mark.parametrize("k", [1, 3, 7, 100])
@pytest.mark.parametrize("tokens", [1, 70, 1 << 20])
def test_top_k_is_a_full_sort(k: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the parts are. Equal scores go by the lower index, empty documents come last."""
    monkeypatch.setattr(scoring, "TOKENS", tokens)
    queries, documents = vectors(QUERY_LENGTHS), vectors(DOCUMENT_LENGTHS, seed=1)
    # Copies tie to the last bit only if they are multiplied alike, so a tie is made of whole numbers.
    matrices = [*documents, documents[1], documents[0], documents[1]]
    corpus = Ragged.from_list([(x * 8).round() for x in matrices])
    queries = Ragged((queries.values * 8).round(), queries.offsets)
    wanted, order = maxsim(queries, corpus).sort(dim=1, descending=True, stable=True)
    scores, indices = maxsim(queries, corpus, top_k=k)
    assert torch.equal(scores, wanted[:, :k])
    assert torch.equal(indices, order[:, :k])
    assert indices.dtype == torch.int64
    queries.values.requires_grad_()
    assert not maxsim(queries, corpus, top_k=k)[0].requires_grad


def test_nothing_to_score() -> None:
    none, some = Ragged.from_list([]), vectors([3, 2])
    assert maxsim(none, some).shape == (0, 2)
    assert maxsim(some, none).shape == (2, 0)
    assert maxsim(none, none, paired=True).shape == (0,)
    scores, indices = maxsim(some, none, top_k=3)
    assert scores.shape == indices.shape == (2, 0)
    assert maxsim(none, some, top_k=1)[0].shape == (0, 1)


def test_wrong_calls() -> None:
    queries, documents = vectors([3, 2]), vectors([3, 2, 1])
    with pytest.raises(ValueError, match="width 24, documents 16: were they encoded by the same model"):
        maxsim(queries, vectors([3], width=16))
    with pytest.raises(ValueError, match="2 queries, 3 documents"):
        maxsim(queries, documents, paired=True)
    for options in ({"top_k": 0}, {"top_k": 2, "paired": True}):
        with pytest.raises(ValueError, match="top_k must be at least 1 and without paired"):
            maxsim(queries, documents[:2], **options)


@pytest.mark.parametrize("top_k", [-1, 1.5, 2.0, True, "2", float("nan")])
def test_top_k_is_a_whole_number(top_k: Any) -> None:
    with pytest.raises(ValueError, match="top_k must be at least 1 and without paired, and a whole number"):
        maxsim(vectors([3]), vectors([3, 2]), top_k=top_k)


def test_any_top_k() -> None:
    queries, documents = vectors([3, 4]), vectors([3, 2, 5])
    wanted = maxsim(queries, documents, top_k=3)
    for top_k in (10**30, 4, np.int64(3)):
        got = maxsim(queries, documents, top_k=top_k)  # pyright: ignore
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    scores, places = maxsim(queries, Ragged.from_list([]), top_k=3)
    assert scores.shape == places.shape == (2, 0)


@pytest.mark.parametrize("tokens", [1, 1000])
@pytest.mark.parametrize("place", [0, 2])
def test_nan_does_not_rank(place: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It came first."""
    monkeypatch.setattr(scoring, "TOKENS", tokens)
    matrices = list(vectors([3, 2, 5]))
    matrices[place][1, 2] = float("nan")
    with pytest.raises(ValueError, match=f"query 0 and document {place} score NaN"):
        maxsim(vectors([4, 1]), matrices, top_k=1)
    with pytest.raises(ValueError, match=f"query {place} and document 0 score NaN"):
        maxsim(matrices, vectors([4, 1]), top_k=2)


def test_one_device() -> None:
    with pytest.raises(ValueError, match="queries are on cpu, documents on meta: move one"):
        maxsim(vectors([3]), [torch.zeros(2, 24, device="meta")])
