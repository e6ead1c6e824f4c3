"""Which passages of a large store are worth an exact score: centroids of token vectors, and who has a token at each.

The candidate stage of PLAID (arXiv 2205.09707). A token of a passage stands for its nearest centroid. A query token
gives the passages in the lists of its best centroids the similarity of the centroid, and all other passages that of
the last centroid it looked at; the sum over the query ranks the passages roughly. The best are scored exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import modernbert_kernels as ops

from ...late_interaction import Ragged

SAMPLE, ROUNDS = 8, 4
"""Tokens that k-means sees for each centroid, and how often. More of either costs what more centroids cost."""

SIMILARITIES = 1 << 20
"""Similarities to centroids computed at a time: 4 MB of float32."""


class Lists(NamedTuple):
    """For each of K centroids the passages of one shard that have a token there.

    Attributes:
        offsets: `[K + 1]` int32; centroid k owns `passages[offsets[k]:offsets[k + 1]]`.
        passages: their places in the shard, ascending for a centroid; int16, or int32 in a shard of more than 32,768.
        num_passages: of the shard, with those that have no token.
    """

    offsets: Tensor
    passages: Tensor
    num_passages: int


def num_centroids(num_tokens: int) -> int:
    """32 times the root of the number of tokens: lists and centroids both grow with the root."""
    return min(num_tokens, round(32 * num_tokens**0.5))


def train_centroids(shards: Sequence[Ragged], *, seed: int = 0) -> Ragged:
    """k-means on the sphere, over passages drawn from all shards; on one machine, same vectors give same centroids.

    There are two levels: about four roots of K cells, then the centroids of each cell, as many as it has a share of
    the tokens. So a token is compared with a little more than four roots of K vectors, and not with K.

    Returns:
        K unit vectors in float32, one matrix for each cell.

    Raises:
        ValueError: there is no token in the shards.
    """
    passages, tokens = sum(map(len, shards)), sum(len(shard.values) for shard in shards)
    if not tokens:
        raise ValueError(f"{passages} passages without a single token give no centroids: search them exactly")
    total = num_centroids(tokens)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(passages, generator=generator)[: -(-SAMPLE * total * passages // tokens)]
    sample_NE = select(shards, drawn.sort().values).values
    sample_NE = sample_NE[torch.randperm(len(sample_NE), generator=generator)]
    cells = round(4 * total**0.5)
    cell_N = _nearest(sample_NE, _kmeans(sample_NE[: 64 * cells], cells))
    members = sample_NE[cell_N.argsort(stable=True)].split(cell_N.bincount().tolist())
    share = total / len(sample_NE)
    return Ragged.from_list([_kmeans(x_NE, max(1, round(share * len(x_NE)))) for x_NE in members if len(x_NE)])


def invert(vectors: Ragged, centroids: Ragged) -> Lists:
    """The lists of one shard; its vectors may have any dtype and any positive scale."""
    many = max(1, len(vectors))
    passage_N = torch.repeat_interleave(torch.arange(len(vectors)), vectors.offsets.diff())
    pairs = (_assign(vectors.values, centroids) * many + passage_N).unique()
    offsets = torch.searchsorted(pairs, torch.arange(len(centroids.values) + 1) * many)
    return Lists(offsets.int(), (pairs % many).to(torch.int16 if many <= 1 << 15 else torch.int32), len(vectors))


def shortlist(
    queries: Ragged,
    centroids: Ragged,
    lists: Sequence[Lists],
    *,
    candidates: int = 2048,
    probes: int = 128,
    alive: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """For each query the passages to score exactly: their positions, counted over all shards, ascending.

    Args:
        lists: of every shard, in order.
        candidates: the most passages for a query.
        probes: the centroids that a query token looks at.
        alive: `[num_passages]` bool for every shard; only passages that are True are candidates.
    """
    alive_N = None if alive is None else torch.cat(list(alive))
    found = []
    for query_QE in queries:
        best = ops.linear(query_QE, centroids.values).topk(min(probes, len(centroids.values)), dim=1)
        gain_QP, probed_QP = (best.values - best.values[:, -1:]).numpy(), best.indices.numpy()
        scores = [_score(gain_QP, probed_QP, shard) for shard in lists]
        scores_N = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *scores]))
        if alive_N is not None:
            scores_N = scores_N.where(alive_N, -1.0)
        chosen = scores_N.topk(min(candidates, len(scores_N))).indices
        found.append((chosen if alive_N is None else chosen[alive_N[chosen]]).sort().values)
    return found


def select(shards: Sequence[Ragged], positions: Tensor) -> Ragged:
    """The passages at ascending `positions`, counted over all shards; nothing else of a memory map is touched."""
    ends = np.cumsum([len(shard) for shard in shards])
    cuts = pairwise([0, *np.searchsorted(positions.numpy(), ends).tolist()])
    values, lengths = [shards[0].values[:0]], [torch.zeros(1, dtype=torch.int64)]
    for shard, end, (start, stop) in zip(shards, ends.tolist(), cuts, strict=True):
        if start < stop:
            inside = positions[start:stop] - (end - len(shard))
            first = shard.offsets[inside]
            lengths.append(shard.offsets[inside + 1] - first)
            rows = _ranges(first.numpy(), lengths[-1].numpy())
            values.append(shard.values.index_select(0, torch.from_numpy(rows)))
    return Ragged(torch.cat(values), torch.cat(lengths).cumsum(0))


def _score(gain_QP: np.ndarray, probed_QP: np.ndarray, lists: Lists) -> np.ndarray:
    """`[num_passages]`: the sum over query tokens of the most that a probed centroid of the passage gives, or 0."""
    offsets, passages = lists.offsets.numpy(), lists.passages.numpy()
    starts = offsets[probed_QP].ravel()
    lengths = offsets[probed_QP + 1].ravel() - starts
    rows = np.repeat(np.arange(len(gain_QP)) * lists.num_passages, gain_QP.shape[1])
    table = np.zeros(len(gain_QP) * lists.num_passages, np.float32)
    places = passages[_ranges(starts, lengths)] + np.repeat(rows, lengths)
    np.maximum.at(table, places, np.repeat(gain_QP.ravel(), lengths))
    return table.reshape(len(gain_QP), lists.num_passages).sum(0)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`[sum of lengths]` int64: the numbers of the ranges, one range after another."""
    ends = lengths.cumsum(dtype=np.int64)
    return np.arange(lengths.sum()) + np.repeat(starts - (ends - lengths), lengths)


def _kmeans(x_NE: Tensor, count: int) -> Tensor:
    """`[count, E]` unit vectors, at most one for each token; the tokens come in random order."""
    centroids_KE = F.normalize(x_NE[:count].float())
    for _ in range(ROUNDS):
        sums_KE = torch.zeros_like(centroids_KE).index_add_(0, _nearest(x_NE, centroids_KE), x_NE.float())
        # A centroid that has lost all of its tokens stays where it is.
        centroids_KE = torch.where(sums_KE.any(1, keepdim=True), F.normalize(sums_KE), centroids_KE)
    return centroids_KE


def _assign(x_NE: Tensor, centroids: Ragged) -> Tensor:
    """`[N]`: for each token the nearest centroid in the nearest cell."""
    cells_CE = torch.stack([F.normalize(cell_KE.sum(0), dim=0) for cell_KE in centroids])
    cell_N = _nearest(x_NE, cells_CE)
    nearest_N = torch.empty_like(cell_N)
    members = cell_N.argsort(stable=True).split(cell_N.bincount(minlength=len(cells_CE)).tolist())
    for rows, cell_KE, start in zip(members, centroids, centroids.offsets.tolist(), strict=False):
        nearest_N[rows] = start + _nearest(x_NE[rows], cell_KE)
    return nearest_N


def _nearest(x_NE: Tensor, centroids_KE: Tensor) -> Tensor:
    """`[N]` int64. The argmax is NumPy's, which is several times as fast as PyTorch's."""
    size = 1 << max(1, SIMILARITIES // len(centroids_KE)).bit_length() - 1
    nearest_N = np.empty(len(x_NE), np.int64)
    for start, block_NE in zip(range(0, len(x_NE), size), x_NE.split(size), strict=False):
        ops.linear(block_NE.float(), centroids_KE).numpy().argmax(1, out=nearest_N[start : start + size])
    return torch.from_numpy(nearest_N)
