"""Which pairs share a batch: a function of the pairs and a seed, so that a stopped run finds its place again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .ragged import RaggedIds
from .sampling import endless


def epochs(
    lengths: np.ndarray,
    strata: np.ndarray,
    topics: np.ndarray,
    *,
    max_pairs: int,
    max_tokens: int,
    seed: int,
    first: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[np.ndarray]:
    """The batches of `plan_batches`, epoch after epoch without an end, each epoch with a seed of its own.

    Args:
        max_pairs, max_tokens: what a rank gets of a batch on average.
        first, rank, world_size: as in `endless`.
    """

    def plan(epoch: int) -> list[np.ndarray]:
        limits = {"max_pairs": max_pairs * world_size, "max_tokens": max_tokens * world_size}
        return plan_batches(lengths, strata, topics, **limits, seed=seed + epoch)

    return endless(plan, lengths, first, rank=rank, world_size=world_size)


def plan_batches(
    lengths: np.ndarray, strata: np.ndarray, topics: np.ndarray, *, max_pairs: int, max_tokens: int, seed: int
) -> list[np.ndarray]:
    """Index arrays that cover every pair once: the same list for the same arguments.

    A batch holds pairs of one stratum whose documents are alike, because such documents are harder negatives:
    a stratum is shuffled, cut into windows of about 64 batches, and a window is halved along the line between
    two of its own topic vectors until a part fits a batch. The order of the batches is random.

    Args:
        lengths: tokens of each pair, int [N]. strata: int [N]. topics: float [N, k].
        max_pairs, max_tokens: what a batch holds. A pair longer than `max_tokens` is a batch of its own.
    """
    rng = np.random.default_rng(seed)
    # What a pair takes of a batch: of its tokens or of its places, whichever is scarcer.
    cost = np.minimum(np.maximum(lengths / max_tokens, 1 / max_pairs), 1)
    plan: list[np.ndarray] = []
    parts = []
    for stratum in np.unique(strata):
        members = rng.permutation(np.flatnonzero(strata == stratum))
        parts += np.array_split(members, max(1, round(cost[members].sum() / 64)))
    while parts:
        part = parts.pop()
        if cost[part].sum() <= 1 + 1e-9:
            plan.append(part)
            continue
        first, second = rng.choice(part, 2, replace=False)
        part = part[np.argsort(topics[part] @ (topics[first] - topics[second]), kind="stable")]
        filled, batches = np.cumsum(cost[part]), np.ceil(cost[part].sum())
        cut = int(np.searchsorted(filled, filled[-1] * (batches // 2) / batches + 1e-9, side="right"))
        parts += np.split(part, [min(max(cut, 1), len(part) - 1)])
    return [plan[i] for i in rng.permutation(len(plan))]


def topic_vectors(rows: RaggedIds, table: np.ndarray) -> np.ndarray:
    """The mean of each text's token vectors `table [V, k]`, weighted by -log(frequency): float32 [N, k]."""
    counts = np.bincount(rows.values, minlength=len(table))
    weighted = (table * np.log(counts.sum() / np.maximum(counts, 1))[:, None]).astype(np.float32)
    topics = np.zeros((len(rows.lengths), table.shape[1]), np.float32)
    for i in np.flatnonzero(rows.lengths).tolist():
        topics[i] = weighted[rows[i]].mean(0)
    return topics
