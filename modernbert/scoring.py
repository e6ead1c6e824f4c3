"""Exact late-interaction scores of ragged queries and documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

import modernbert_kernels as ops

from .packing import Ragged

TOKENS = 1 << 20
"""Document tokens scored before the running top-k is merged: memory of `top_k` grows with this, not the corpus."""


@overload
def maxsim(
    queries: Ragged | Sequence[Tensor],
    documents: Ragged | Sequence[Tensor],
    *,
    paired: bool = ...,
    top_k: None = None,
) -> Tensor: ...
@overload
def maxsim(
    queries: Ragged | Sequence[Tensor],
    documents: Ragged | Sequence[Tensor],
    *,
    paired: Literal[False] = ...,
    top_k: int,
) -> tuple[Tensor, Tensor]: ...


def maxsim(
    queries: Ragged | Sequence[Tensor],
    documents: Ragged | Sequence[Tensor],
    *,
    paired: bool = False,
    top_k: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum over query tokens of the largest dot product with a document token (ColBERT, section 3.3).

    Exact and without padding; differentiable in both arguments unless `top_k` is given. Scores are float32, or
    float64 for float64 vectors. An empty document scores -inf, so it ranks last; an empty query scores 0.

    Args:
        queries, documents: `Ragged`, or lists of `[n_i, E]` tensors, of B queries and N documents.
        paired: score query i with document i only.
        top_k: return the best k documents of each query, in memory that does not grow with N times B.

    Returns:
        `[B, N]`; `[B]` if `paired`; `(scores [B, k], indices [B, k])` if `top_k`, best first, ties by lower index,
        k at most N.

    Raises:
        ValueError: widths that disagree, a different number of queries and documents in `paired`, `top_k` below 1.
    """
    queries, documents = _ragged(queries), _ragged(documents)
    if len(queries) and len(documents) and queries.values.shape[1:] != documents.values.shape[1:]:
        raise ValueError(
            f"queries have width {queries.values.shape[1]}, documents {documents.values.shape[1]}: were they encoded "
            "by the same model?"
        )
    if paired and len(queries) != len(documents):
        raise ValueError(f"paired scores need equal numbers, got {len(queries)} queries, {len(documents)} documents")
    if top_k is not None:
        if paired or top_k < 1:
            raise ValueError(f"top_k must be at least 1 and without paired, got top_k={top_k}, paired={paired}")
        return _top_k(queries, documents, top_k)
    if not len(queries) or not len(documents):
        return queries.values.new_zeros(0 if paired else (len(queries), len(documents)), dtype=torch.float32)
    return ops.maxsim(queries.values, queries.offsets, documents.values, documents.offsets, paired=paired)


@torch.no_grad()
def _top_k(queries: Ragged, documents: Ragged, k: int) -> tuple[Tensor, Tensor]:
    best = torch.zeros(len(queries), 0, device=queries.values.device)
    index = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.values.device)
    first = 0
    while first < len(documents):
        budget = documents.offsets[first] + TOKENS
        last = max(first + 1, int(torch.searchsorted(documents.offsets, budget, right=True)) - 1)
        scores = maxsim(queries, documents[first:last])
        places = torch.arange(first, last, device=scores.device).expand_as(scores)
        best, index = torch.cat([best, scores], dim=1), torch.cat([index, places], dim=1)
        # A stable sort keeps the lower index first among equal scores; topk promises no order.
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, index = best[:, :k], index.gather(1, order[:, :k])
        first = last
    return best, index


def _ragged(vectors: Ragged | Sequence[Tensor]) -> Ragged:
    return vectors if isinstance(vectors, Ragged) else Ragged.from_list(vectors)
