"""The scores of a shard, and the best of them."""

from __future__ import annotations

import numpy as np

from ...late_interaction import Ragged, maxsim, token_blocks
from .format import Shard

TOKENS_AT_ONCE = 1 << 16
"""Document tokens scored together: they stay in the cache."""

QUERIES_AT_ONCE = 32
"""Queries scored together: the similarities of one block stay in the cache as well."""


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
    for first, last in token_blocks(shard.offsets, TOKENS_AT_ONCE):
        vectors = shard.vectors(first, last)
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)
            scores_BN[some, first:last] = maxsim(queries[some], vectors)
    return scores_BN
