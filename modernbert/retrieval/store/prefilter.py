"""The pre-filter: which passages of a large store deserve an exact score.

The candidate stage of PLAID (arXiv 2205.09707). Each token of a passage is assigned to its nearest centroid, and each
centroid lists the passages with a token there. Each query token scores a passage with the similarity of the nearest
probed centroid that lists it, or of the last probed centroid if none does. The sum over the query ranks the passages
approximately; the best ones are then scored exactly.

A store keeps one set of centroids, and one set of lists for each shard.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import modernbert_kernels as ops

from ...late_interaction import Ragged
from .codec import Codec
from .format import SHARDS, CentroidsEntry, Shard, finished_part, is_intact, read_part, write_part
from .kmeans import kmeans, nearest

CANDIDATES = 2048
"""Passages scored exactly, at least. This finds 99 of 100 of the ten best, among 10,000 passages and among 100,000."""

LARGE = 10_000
"""Passages of which a search uses the pre-filter, at least. There it is twice as fast as scoring all of them."""

OUTGROWN = 2
"""Centroids are trained again when a store needs this many times as many as it has."""

SAMPLE = 8
"""Tokens that k-means sees for each centroid. More of them cost as much as more centroids."""


class InvertedLists(NamedTuple):
    """For each of K centroids, the passages of one shard that have a token there.

    Attributes:
        offsets: `[K + 1]` int32; centroid k owns `passages[offsets[k]:offsets[k + 1]]`.
        passages: rows in the shard, ascending for each centroid; int16, or int32 in shards of more than 32,768.
        num_passages: passages of the shard, including those without a token.
    """

    offsets: Tensor
    passages: Tensor
    num_passages: int


class Prefilter:
    """The centroids and lists of a store, read and verified."""

    def __init__(
        self, folder: Path, table: sqlite3.Connection, entry: CentroidsEntry, shards: Mapping[int, Shard]
    ) -> None:
        self._shards = list(shards.values())
        self._centroids = Ragged(**read_part(folder, entry.file, entry.sha256))
        self._lists: list[InvertedLists] = []
        for number, shard in shards.items():
            row = table.execute("SELECT file, sha256 FROM lists WHERE shard = ?", (number,)).fetchone()
            shard.verify()
            self._lists.append(InvertedLists(**read_part(folder, *row), num_passages=len(shard)))

    def candidates(self, queries: Ragged, count: int, allowed: Sequence[Tensor]) -> list[Tensor]:
        """For each query, the candidates for its `count` best passages: see `shortlist`."""
        count = max(CANDIDATES, 2 * count)
        return shortlist(queries, self._centroids, self._lists, candidates=count, allowed=allowed)

    def vectors(self, positions: Tensor) -> Ragged:
        """The passages at ascending `positions`, as `Shard.vectors` gives them."""
        return select(self._shards, positions)


def update_lists(
    folder: Path, table: sqlite3.Connection, entry: CentroidsEntry | None, codec: Codec | None
) -> CentroidsEntry:
    """Give every shard its lists. `entry` is the manifest's entry so far; returns the new one."""
    rows = table.execute("SELECT number, file, sha256 FROM shards ORDER BY number").fetchall()
    shards = {number: Shard(folder / SHARDS / file, sha256, codec) for number, file, sha256 in rows}
    if entry and not shards:
        table.execute("DELETE FROM lists")
        return entry  # Damaged centroids are trained again when there is something to train on.
    wanted = num_centroids(sum(len(shard.spans) for shard in shards.values()))
    if entry is None or wanted > OUTGROWN * entry.count or not is_intact(folder / SHARDS / entry.file, entry.sha256):
        centroids = train_centroids(list(shards.values()))
        parts = {"values": centroids.values, "offsets": centroids.offsets}
        entry = CentroidsEntry(*write_part(folder, "centroids", parts), count=len(centroids.values))
        table.execute("DELETE FROM lists")
    table.execute("DELETE FROM lists WHERE shard NOT IN (SELECT number FROM shards)")
    centroids = Ragged(**read_part(folder, entry.file, entry.sha256))
    lists_of = table.execute("SELECT shard, file, sha256 FROM lists").fetchall()
    listed = {number for number, file, sha256 in lists_of if is_intact(folder / SHARDS / file, sha256)}
    for number, _, sha256 in rows:
        if number not in listed:
            name = f"lists-{sha256[:16]}-{entry.sha256[:16]}"
            part = finished_part(folder, name)
            if part is None:
                lists = build_lists(shards[number].vectors(0, len(shards[number])), centroids)
                part = write_part(folder, name, {"offsets": lists.offsets, "passages": lists.passages})
            table.execute("INSERT OR REPLACE INTO lists VALUES (?, ?, ?)", (number, *part))
    return entry


def num_centroids(num_tokens: int) -> int:
    """32 times the square root of the number of tokens: the centroids and the lists then both grow with the root."""
    return min(num_tokens, round(32 * num_tokens**0.5))


def train_centroids(shards: Sequence[Ragged | Shard], *, seed: int = 0) -> Ragged:
    """Spherical k-means over a sample of the passages of all shards. On one machine, deterministic.

    There are two levels: about 4 sqrt(K) cells, then the centroids of each cell, in proportion to its share of the
    tokens. So a token is compared with a little more than 4 sqrt(K) vectors instead of with K.

    Returns:
        K unit vectors in float32, one matrix for each cell.

    Raises:
        ValueError: the shards have no token.
    """
    tokens = sum(int(shard.offsets[-1]) for shard in shards)
    if not tokens:
        passages = sum(map(len, shards))
        raise ValueError(f"{passages} passages without a single token give no centroids: search them exactly")
    total = num_centroids(tokens)
    sample_NE = sample_tokens(shards, SAMPLE * total, seed=seed)
    cells = round(4 * total**0.5)
    cell_N = nearest(sample_NE, kmeans(sample_NE[: 64 * cells], cells))
    members = sample_NE[cell_N.argsort(stable=True)].split(cell_N.bincount().tolist())
    share = total / len(sample_NE)
    return Ragged.from_list([kmeans(x_NE, max(1, round(share * len(x_NE)))) for x_NE in members if len(x_NE)])


def sample_tokens(shards: Sequence[Ragged | Shard], count: int, *, seed: int = 0) -> Tensor:
    """`[n, E]` in random order: the tokens of random passages, about `count` of them, or all."""
    passages, tokens = sum(map(len, shards)), sum(int(shard.offsets[-1]) for shard in shards)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(passages, generator=generator, device="cpu")[: -(-count * passages // max(1, tokens))]
    sample_NE = select(shards, drawn.sort().values).values
    return sample_NE[torch.randperm(len(sample_NE), generator=generator, device="cpu")]


def build_lists(vectors: Ragged, centroids: Ragged) -> InvertedLists:
    """The lists of one shard. Its vectors may have any dtype and any positive scale."""
    many = max(1, len(vectors))
    passage_N = torch.repeat_interleave(torch.arange(len(vectors), device="cpu"), vectors.offsets.diff())
    pairs = (_assign(vectors.values, centroids) * many + passage_N).unique()
    offsets = torch.searchsorted(pairs, torch.arange(len(centroids.values) + 1, device="cpu") * many)
    passages = (pairs % many).to(torch.int16 if many <= 1 << 15 else torch.int32)
    return InvertedLists(offsets.int(), passages, len(vectors))


def shortlist(
    queries: Ragged,
    centroids: Ragged,
    lists: Sequence[InvertedLists],
    *,
    candidates: int = CANDIDATES,
    nprobe: int = 128,
    allowed: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """For each query the passages to score exactly: ascending positions, counted over all shards.

    Args:
        lists: of every shard, in order.
        candidates: at most this many passages for each query.
        nprobe: centroids that each query token probes.
        allowed: for every shard `[num_passages]` bool; only passages that are True are candidates.
    """
    allowed_N = None if allowed is None else torch.cat(list(allowed))
    found = []
    for query_QE in queries:
        best = ops.linear(query_QE, centroids.values).topk(min(nprobe, len(centroids.values)), dim=1)
        # Above that of the last probed centroid, which every passage gets.
        similarity_QP, probed_QP = (best.values - best.values[:, -1:]).numpy(), best.indices.numpy()
        scores = [_score(similarity_QP, probed_QP, shard) for shard in lists]
        scores_N = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *scores]))
        if allowed_N is not None:
            scores_N = scores_N.where(allowed_N, -1.0)
        positions = scores_N.topk(min(candidates, len(scores_N))).indices
        found.append((positions if allowed_N is None else positions[allowed_N[positions]]).sort().values)
    return found


def select(shards: Sequence[Ragged | Shard], positions: Tensor) -> Ragged:
    """The passages at ascending `positions`, counted over all shards; of a `Shard` as of `Shard.vectors`.

    Reads nothing else of a memory map.
    """
    ends = np.cumsum([len(shard) for shard in shards])
    cuts = pairwise([0, *np.searchsorted(positions.numpy(), ends).tolist()])
    lengths = [torch.zeros(1, dtype=torch.int64, device="cpu")]
    values = [_rows(shards[0], lengths[0][:0])]
    for shard, end, (start, stop) in zip(shards, ends.tolist(), cuts, strict=True):
        if start < stop:
            inside = positions[start:stop] - (end - len(shard))
            first = shard.offsets[inside]
            lengths.append(shard.offsets[inside + 1] - first)
            values.append(_rows(shard, torch.from_numpy(_ranges(first.numpy(), lengths[-1].numpy()))))
    return Ragged(torch.cat(values), torch.cat(lengths).cumsum(0))


def _rows(shard: Ragged | Shard, rows: Tensor) -> Tensor:
    return shard.values.index_select(0, rows) if isinstance(shard, Ragged) else shard.take(rows)


def _score(similarity_QP: np.ndarray, probed_QP: np.ndarray, lists: InvertedLists) -> np.ndarray:
    """`[num_passages]`: summed over query tokens, the largest similarity of a probed centroid that lists it, or 0."""
    offsets, passages = lists.offsets.numpy(), lists.passages.numpy()
    starts = offsets[probed_QP].ravel()
    lengths = offsets[probed_QP + 1].ravel() - starts
    rows = np.repeat(np.arange(len(similarity_QP)) * lists.num_passages, similarity_QP.shape[1])
    table = np.zeros(len(similarity_QP) * lists.num_passages, np.float32)
    entries = passages[_ranges(starts, lengths)] + np.repeat(rows, lengths)
    np.maximum.at(table, entries, np.repeat(similarity_QP.ravel(), lengths))
    return table.reshape(len(similarity_QP), lists.num_passages).sum(0)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`[sum of lengths]` int64: the integers of all ranges, one range after another."""
    ends = lengths.cumsum(dtype=np.int64)
    return np.arange(lengths.sum()) + np.repeat(starts - (ends - lengths), lengths)


def _assign(x_NE: Tensor, centroids: Ragged) -> Tensor:
    """`[N]`: for each token the nearest centroid in the nearest cell."""
    cells_CE = torch.stack([F.normalize(cell_KE.sum(0), dim=0) for cell_KE in centroids])
    cell_N = nearest(x_NE, cells_CE)
    nearest_N = torch.empty_like(cell_N)
    members = cell_N.argsort(stable=True).split(cell_N.bincount(minlength=len(cells_CE)).tolist())
    for rows, cell_KE, start in zip(members, centroids, centroids.offsets.tolist(), strict=False):
        nearest_N[rows] = start + nearest(x_NE[rows], cell_KE)
    return nearest_N
