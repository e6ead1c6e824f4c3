"""Which passages of a large store are worth an exact score: centroids of token vectors, and who has a token near them.

The candidate stage of PLAID (arXiv 2205.09707). A token stands for its nearest centroid. Each query token gives the
passages in the lists of its best centroids the similarity of the centroid, and every other passage that of the worst
of these; the sum over the query ranks all passages roughly. The best few hundred are then scored from their vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import modernbert_kernels as ops

from ..packing import Ragged

ROUNDS = 4
"""Rounds of k-means; more cost what a few more centroids cost, and gain less."""

SAMPLE = 8
"""Tokens that k-means sees for each centroid."""

SIMILARITIES = 1 << 20
"""Similarities computed at a time when tokens are assigned: 4 MB of float32."""


class Lists(NamedTuple):
    """The passages of one shard that have a token near each of K centroids.

    Attributes:
        offsets: `[K + 1]` int32; centroid k owns `passages[offsets[k]:offsets[k + 1]]`.
        passages: rows of the shard, ascending and each once for a centroid; int16, or int32 in a shard of over 32,767.
        num_passages: of the shard, those without a token included.
    """

    offsets: Tensor
    passages: Tensor
    num_passages: int


def num_centroids(num_tokens: int) -> int:
    """The power of two nearest to 32 times the root of the number of tokens, but at most one for each token.

    Lists then grow with the root as well, and a quarter of the corpus needs half of the centroids: those of a growing
    store stay good for a while.
    """
    return min(num_tokens, 1 << round(np.log2(32 * max(1, num_tokens) ** 0.5)))


def train_centroids(shards: Sequence[Ragged], *, seed: int = 0) -> Ragged:
    """Centroids of the tokens of some passages, drawn from all shards; the same vectors and seed give the same ones.

    k-means on the sphere in two levels: about the root of K cells first, then the centroids of each cell. A token is
    compared with two roots of K vectors then, and not with K.

    Returns:
        Unit vectors `[K, E]`, cell by cell. None for shards without a token.
    """
    passages, tokens = sum(map(len, shards)), sum(len(shard.values) for shard in shards)
    total = num_centroids(tokens)
    if not total:
        return Ragged(torch.zeros(0, shards[0].values.shape[1] if shards else 0), torch.zeros(1, dtype=torch.int64))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(passages, generator=generator)[: -(-SAMPLE * total * passages // tokens)]
    sample_NE = select(shards, drawn.sort().values).values
    sample_NE = sample_NE[torch.randperm(len(sample_NE), generator=generator)]
    cells = min(total, round(4 * total**0.5))
    owner_N = _nearest(sample_NE, _kmeans(sample_NE[: 64 * cells], cells))
    sizes = torch.bincount(owner_N, minlength=cells).tolist()
    members = sample_NE[owner_N.argsort(stable=True)].split(sizes)
    share = total / len(sample_NE)
    return Ragged.from_list([_kmeans(x_NE, max(1, round(len(x_NE) * share))) for x_NE in members if len(x_NE)])


def invert(vectors: Ragged, centroids: Ragged) -> Lists:
    """The lists of one shard; vectors of any dtype and any positive scale."""
    keys = _assign(vectors.values, centroids) * len(vectors)
    keys += torch.repeat_interleave(torch.arange(len(vectors)), vectors.offsets.diff())
    keys = keys.unique()
    owner, passages = keys // max(1, len(vectors)), keys % max(1, len(vectors))
    offsets = torch.searchsorted(owner, torch.arange(len(centroids.values) + 1))
    small = torch.int16 if len(vectors) <= 1 << 15 else torch.int32
    return Lists(offsets.int(), passages.to(small), len(vectors))


def shortlist(
    queries: Ragged,
    centroids: Ragged,
    lists: Sequence[Lists],
    *,
    candidates: int,
    probes: int = 128,
    alive: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """For each query the passages to score exactly, at most `candidates` of them.

    Args:
        lists: of each shard.
        probes: centroids that a query token looks into.
        alive: `[num_passages]` bool for each shard; a passage that is not is no candidate.

    Returns:
        Positions in ascending order, counted over all shards, `[at most candidates]` int64 for each query.
    """
    living = None if alive is None else torch.cat(list(alive))
    found = []
    for query_QE in queries:
        similarity_QK = ops.linear(query_QE, centroids.values)
        best = similarity_QK.topk(min(probes, similarity_QK.shape[1]), dim=1)
        # From the worst to the best: of all values written to one place the last stays, which is the largest.
        gain_QP = (best.values - best.values[:, -1:]).flip(1).numpy()
        probed_QP = best.indices.flip(1).numpy()
        scores_N = torch.from_numpy(np.concatenate([_score(gain_QP, probed_QP, shard) for shard in lists]))
        if living is not None:
            scores_N = scores_N.where(living, -1.0)
        chosen = scores_N.topk(min(candidates, len(scores_N))).indices
        found.append((chosen if living is None else chosen[living[chosen]]).sort().values)
    return found


def select(shards: Sequence[Ragged], positions: Tensor) -> Ragged:
    """The passages at ascending `positions`, counted over all shards; copies nothing else of a memory map."""
    ends = torch.tensor([len(shard) for shard in shards]).cumsum(0)
    counts = torch.searchsorted(ends, positions, right=True).bincount(minlength=len(shards)).tolist()
    values, lengths = [], []
    for shard, end, part in zip(shards, ends.tolist(), positions.split(counts), strict=True):
        first = shard.offsets[part - (end - len(shard))]
        lengths.append(shard.offsets[part - (end - len(shard)) + 1] - first)
        values.append(shard.values[_ranges(first.numpy(), lengths[-1].numpy())])
    offsets = F.pad(torch.cat(lengths).cumsum(0), (1, 0))
    return Ragged(torch.cat(values), offsets)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`[sum of lengths]`: the integers of all ranges, one range after another."""
    return np.arange(lengths.sum()) + np.repeat(starts - (lengths.cumsum() - lengths), lengths)


def _score(gain_QP: np.ndarray, probed_QP: np.ndarray, lists: Lists) -> np.ndarray:
    """`[num_passages]`: the sum over query tokens of what the best probed centroid of a passage gains, or zero."""
    offsets = lists.offsets.numpy()
    starts = offsets[probed_QP]
    lengths = offsets[probed_QP + 1] - starts
    table_QN = np.zeros((len(gain_QP), lists.num_passages), np.float32)
    rows = np.repeat(np.arange(len(gain_QP)), lengths.sum(1))
    passages = lists.passages.numpy()[_ranges(starts.ravel(), lengths.ravel())]
    table_QN[rows, passages] = np.repeat(gain_QP, lengths.ravel())
    return table_QN.sum(0)


def _kmeans(x_NE: Tensor, count: int) -> Tensor:
    """`[count, E]` unit vectors, or as many as there are tokens; `x_NE` is in random order."""
    centroids_KE = F.normalize(x_NE[:count].float())
    for _ in range(ROUNDS):
        sums_KE = torch.zeros_like(centroids_KE).index_add_(0, _nearest(x_NE, centroids_KE), x_NE.float())
        # A centroid that has lost all its tokens stays where it is.
        centroids_KE = torch.where(sums_KE.any(1, keepdim=True), F.normalize(sums_KE), centroids_KE)
    return centroids_KE


def _assign(x_NE: Tensor, centroids: Ragged) -> Tensor:
    """`[N]`: the nearest centroid of the nearest cell."""
    cell_K = torch.repeat_interleave(torch.arange(len(centroids)), centroids.offsets.diff())
    sums_CE = torch.zeros(len(centroids), x_NE.shape[1]).index_add_(0, cell_K, centroids.values)
    cell_N = _nearest(x_NE, F.normalize(sums_CE))
    nearest_N = torch.empty_like(cell_N)
    members = cell_N.argsort(stable=True).split(torch.bincount(cell_N, minlength=len(centroids)).tolist())
    for rows, centroids_KE, start in zip(members, centroids, centroids.offsets.tolist(), strict=False):
        nearest_N[rows] = start + _nearest(x_NE[rows], centroids_KE)
    return nearest_N


def _nearest(x_NE: Tensor, centroids_KE: Tensor) -> Tensor:
    """`[N]` int64. NumPy's argmax is several times faster than PyTorch's."""
    blocks = x_NE.split(max(1, SIMILARITIES // max(1, len(centroids_KE))))
    nearest = [ops.linear(block_NE.float(), centroids_KE).numpy().argmax(1) for block_NE in blocks if len(block_NE)]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *nearest]))
