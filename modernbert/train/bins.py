"""Best-fit packing: pieces of a corpus in bins of the same number of tokens, so that every batch is nearly full.

The pieces of a bin follow one another in the row of a batch and never see each other. Which lengths share a bin is
decided once. In each epoch, pieces of the same length change places at random and the bins come in another order, so
an epoch has the same number of batches as any other, and a resumed run finds its place at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, eq=False)
class Bins:
    """Pieces in bins.

    Attributes:
        lengths: tokens of each piece, int [P].
        capacity: tokens of a bin.
        pieces: int64 [P], the pieces of all bins, one bin after another.
        offsets: int64 [N + 1]: bin i has `pieces[offsets[i]:offsets[i + 1]]`.
    """

    lengths: np.ndarray
    capacity: int
    pieces: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.pieces[self.offsets[i] : self.offsets[i + 1]]

    @property
    def fill(self) -> float:
        """The share of the bins that is taken by tokens."""
        return float(self.lengths.sum() / (len(self) * self.capacity)) if len(self) else 1.0

    def shuffled(self, rng: np.random.Generator) -> Bins:
        """The same bins by lengths, but pieces of one length have changed places at random."""
        slots = np.argsort(self.lengths[self.pieces], kind="stable")
        pieces = np.empty_like(self.pieces)
        pieces[slots] = np.lexsort((rng.random(len(pieces)), self.lengths))
        return replace(self, pieces=pieces)


def best_fit(lengths: np.ndarray, capacity: int, *, seed: int = 0) -> Bins:
    """Put each piece, in random order, into the bin with the smallest space that is large enough.

    Raises:
        ValueError: a piece is longer than a bin, or has no token.
    """
    if len(lengths) and not (lengths.min() > 0 and lengths.max() <= capacity):
        raise ValueError(f"pieces have {lengths.min()} to {lengths.max()} tokens, but must have 1 to {capacity}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    bin_of, bins = np.empty(len(lengths), np.int64), 0
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set where a bin has a space of s tokens
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        large_enough = spaces >> length
        if large_enough:
            space = length + (large_enough & -large_enough).bit_length() - 1
            found = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, found = capacity, bins
            bins += 1
        bin_of[piece] = found
        if left := space - length:
            by_space[left].append(found)
            spaces |= 1 << left
    # The pieces of a bin in the random order.
    pieces = order[np.argsort(bin_of[order], kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=bins))]).astype(np.int64)
    return Bins(lengths, capacity, pieces, offsets)


@dataclass(frozen=True, eq=False)
class BinSampler:
    """Batches of `rows` bins each, epoch after epoch without an end.

    The bins of all epochs are one row. Batch j of all ranks has the bins j * rows to (j + 1) * rows, and a rank has
    every `world_size`-th batch. A step of two ranks therefore sees the bins of one rank with twice the rows, and those
    of one rank that accumulates two batches.

    Attributes:
        bins: from `best_fit`.
        rows: bins of a batch on a rank.
    """

    bins: Bins
    rows: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not len(self.bins):
            raise ValueError("there are no bins: the corpus has no tokens")
        if self.rows < 1:
            raise ValueError(f"rows is {self.rows}, but a batch needs one bin or more")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}, but must be from 0 to less than world_size, {self.world_size}")

    def __call__(self, first: int = 0) -> Iterator[np.ndarray]:
        """The batches of this rank after the `first` ones, without an end: int arrays of pieces."""
        number, epoch = first * self.world_size + self.rank, -1
        bins, order = self.bins, np.zeros(0, np.int64)
        while True:
            pieces = []
            for at in range(number * self.rows, (number + 1) * self.rows):
                if at // len(self.bins) != epoch:
                    epoch = at // len(self.bins)
                    rng = np.random.default_rng((self.seed, epoch))
                    bins, order = self.bins.shuffled(rng), rng.permutation(len(self.bins))
                pieces.append(bins[order[at % len(bins)]])
            yield np.concatenate(pieces)
            number += self.world_size
