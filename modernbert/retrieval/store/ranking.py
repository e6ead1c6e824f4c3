"""The scores of a shard, and the best of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...inference.callers import callers, map_callers
from ...late_interaction import Ragged, maxsim, token_blocks
from .codec import Codec
from .format import Shard

TOKENS_AT_ONCE = 1 << 16
"""Document tokens scored together: they stay in the cache."""

QUERIES_AT_ONCE = 32
"""Queries scored together: the similarities of one block stay in the cache as well."""

BLOCK, LANES = 1 << 20, 16
"""Numbers in a block of decoded codes and their similarities; query tokens are padded to a multiple, see `maxsim`."""


class TopK:
    """The best passages of one query so far: `scores_N`, best first, and `ids_N3` (see `add`)."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self.scores_N, self.ids_N3 = np.empty(0, dtype=np.float32), np.empty((0, 3), dtype=np.int64)

    def add(self, scores_N: np.ndarray, ids_N3: np.ndarray) -> None:
        """Rank more passages.

        Args:
            ids_N3: `[N, 3]` int64: what counts once (the id of the passage or of its document), its shard, its row.
        """
        # A score that does not beat the current k-th cannot enter the list; on ties the earlier passage wins.
        floor = self.scores_N[-1] if len(self.scores_N) == self._top_k else -np.inf
        better = scores_N > floor
        scores_N, ids_N3 = np.r_[self.scores_N, scores_N[better]], np.r_[self.ids_N3, ids_N3[better]]
        order = np.argsort(-scores_N, kind="stable")
        first = np.unique(ids_N3[order, 0], return_index=True)[1]  # a document with several passages counts once
        order = order[np.sort(first)[: self._top_k]]
        self.scores_N, self.ids_N3 = scores_N[order], ids_N3[order]


def score_shard(queries: Ragged, shard: Shard) -> np.ndarray:
    """`[B, N]` float32: the score of every query with every passage of a shard."""
    scores_BN = np.empty((len(queries), len(shard)), dtype=np.float32)
    if shard.codec:
        shard.verify()
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)
            scores_BN[some] = score_codes(queries[some], shard.codec, shard.rows(), shard.offsets)
        return scores_BN
    for first, last in token_blocks(shard.offsets, TOKENS_AT_ONCE):
        vectors = shard.vectors(first, last)
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)
            scores_BN[some, first:last] = maxsim(queries[some], vectors)
    return scores_BN


def score_codes(queries: Ragged, codec: Codec, rows: Mapping[str, Tensor], offsets: Tensor) -> Tensor:
    """`[B, N]` float32: the score of every query with passages in codes, `rows` as of `Codec.encode`.

    As `maxsim` of what is decoded. A similarity is that with the centroid, which is computed once for all tokens, plus
    that with the residual. Each thread has its share of the passages: PyTorch looks codes up on one thread.
    """
    num_queries = len(queries.values)
    queries_EQ = F.pad(queries.values.float(), (0, 0, 0, -num_queries % LANES)).T.contiguous()
    centers_KQ, scaled_EQ = codec.centroids_KE @ queries_EQ, codec.scales_E[:, None] * queries_EQ
    threads = callers(queries_EQ.device)
    shares = torch.linspace(0, int(offsets[-1]), threads + 1, device="cpu").long()
    cuts = [0, *torch.searchsorted(offsets, shares[1:-1]).tolist(), len(offsets) - 1]
    best = partial(_best, centers_KQ, scaled_EQ, codec.table(), rows, offsets)
    best_PQ = torch.cat(list(map_callers(best, list(pairwise(cuts)), threads)))[:, :num_queries]
    return torch.stack([part.sum(1) for part in best_PQ.split(queries.offsets.diff().tolist(), dim=1)])


def _best(
    centers_KQ: Tensor,
    scaled_EQ: Tensor,
    table: Tensor,
    rows: Mapping[str, Tensor],
    offsets: Tensor,
    passages: tuple[int, int],
) -> Tensor:
    """`[P, Q]`: for the passages from the first to the last, the best similarity of a token to each query token.

    Blocks are decoded into the same memory, which stays in the cache.

    Args:
        centers_KQ: similarities of the centroids. scaled_EQ: the query tokens times the codec's scales. table: its own.
    """
    first, last = passages
    start, stop = offsets[first], offsets[last]
    width, padded = scaled_EQ.shape
    lengths = offsets[first : last + 1].diff()
    passage_N1 = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), lengths)[:, None]
    best_PQ = torch.full((len(lengths), padded), float("-inf"), device="cpu")
    size = 1 << max(1, BLOCK // (width + padded)).bit_length() - 1
    bytes_ = torch.empty(size, rows["codes"].shape[1], dtype=torch.int32, device="cpu")
    elements = torch.empty(bytes_.numel(), dtype=table.dtype, device="cpu")
    levels_NE = elements.view(torch.float32).view(size, width)
    similarity_NQ, center_NQ = torch.empty(2, size, padded, device="cpu")
    every = (*(rows[name][start:stop] for name in ("codes", "centroids", "gains")), passage_N1)
    for codes, centroids, gains, passage in zip(*(part.split(size) for part in every), strict=True):
        n = len(codes)
        bytes_[:n].copy_(codes)
        torch.index_select(table, 0, bytes_[:n].ravel(), out=elements[: codes.numel()])
        torch.mm(levels_NE[:n], scaled_EQ, out=similarity_NQ[:n])
        torch.index_select(centers_KQ, 0, centroids.int(), out=center_NQ[:n])
        torch.addcmul(center_NQ[:n], similarity_NQ[:n], gains.float()[:, None], out=similarity_NQ[:n])
        best_PQ.scatter_reduce_(0, passage.expand(-1, padded), similarity_NQ[:n], "amax")
    return best_PQ
