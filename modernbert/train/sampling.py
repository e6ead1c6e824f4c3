"""Which rows share a batch, in what order, on which rank: a function of the rows and a seed.

Rows are indices: of pairs, of labelled texts, of the pieces of a corpus. A plan gives the batches of one epoch for all
ranks together. `endless` runs through the epochs, finds the place of a resumed run, and takes the part of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

import numpy as np

Plan: TypeAlias = Callable[[int], Sequence[np.ndarray]]
"""The batches of an epoch, counted from 1: each an int array of rows. The same for the same epoch on every rank."""


def endless(
    plan: Plan, lengths: np.ndarray, first: int = 0, *, rank: int = 0, world_size: int = 1
) -> Iterator[np.ndarray]:
    """The parts of a rank in the batches of a plan, epoch after epoch.

    `endless(plan, lengths, n)` goes on exactly where a run stopped after n batches. The parts of all ranks, in their
    order, are the batch of one rank.

    Args:
        lengths: tokens of each row, int [N], by which a batch is divided among the ranks.
        first: batches that the run has had already.

    Raises:
        ValueError: an epoch without a batch in which every rank has a row; a rank that does not exist.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, but must be from 0 to less than world_size, {world_size}")
    if first < 0:
        raise ValueError(f"first is {first}, but counts the batches that a run has had")
    for epoch in count(1):
        batches = [batch for batch in plan(epoch) if len(batch) >= world_size]
        if not batches:
            raise ValueError(f"no batch has a row for each of {world_size} ranks: there are {len(lengths):,} rows")
        for batch in batches[first:]:
            yield part_of(batch, lengths, rank, world_size)
        first = max(0, first - len(batches))


def part_of(batch: np.ndarray, lengths: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The consecutive rows of a batch that a rank gets, at least one: as many tokens as for any other rank, nearly."""
    if world_size == 1:
        return batch
    ends = np.cumsum(lengths[batch], dtype=np.int64)
    # A row belongs to the rank in whose share of all tokens its middle is.
    owners = (2 * ends - lengths[batch]) * world_size // (2 * max(1, ends[-1]))
    if len(np.unique(owners)) < world_size:
        owners = np.arange(len(batch)) * world_size // len(batch)
    return batch[owners == rank]


@dataclass(frozen=True, eq=False)
class Sampler:
    """Batches of shuffled rows, by tokens, by rows, or by both.

    The batch of two ranks is the batch of one rank with limits twice as large. The last batch of an epoch (with
    `sources`, the last one of a source) may be small. If it has fewer rows than there are ranks, it is left out; its
    rows come in other epochs.

    Attributes:
        lengths: tokens of each row, int [N].
        max_tokens, max_rows: the most that a rank gets of a batch on average, at least one of them.
        sources: int [N], for batches of one source each; None mixes the sources.
        seed: of the shuffle. Each epoch has another one.
    """

    lengths: np.ndarray
    max_tokens: int | None = None
    max_rows: int | None = None
    sources: np.ndarray | None = None
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.max_tokens is None and self.max_rows is None:
            raise ValueError("give max_tokens, max_rows, or both: a batch has no limit without them")
        for name in ("max_tokens", "max_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}, but must be 1 or more")
        if self.sources is not None and self.sources.shape != self.lengths.shape:
            raise ValueError(f"sources has shape {self.sources.shape}, but lengths {self.lengths.shape}")
        if self.max_tokens is not None and (longest := int(self.lengths.max(initial=0))) > self.max_tokens:
            row = int(self.lengths.argmax())
            raise ValueError(
                f"row {row} has {longest:,} tokens, max_tokens is {self.max_tokens:,}: cut the texts or raise it"
            )

    def __call__(self, first: int = 0) -> Iterator[np.ndarray]:
        """The batches of this rank after the `first` ones, without an end: int arrays of rows."""
        return endless(self.plan, self.lengths, first, rank=self.rank, world_size=self.world_size)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The batches of all ranks in an epoch. Each row is in one of them."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.lengths))
        if self.sources is None:
            return self._cut(order)
        batches = [b for source in np.unique(self.sources) for b in self._cut(order[self.sources[order] == source])]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        """Consecutive rows, as many as fit into a batch of all ranks."""
        ends = np.cumsum(self.lengths[order], dtype=np.int64)
        batches, start = [], 0
        while start < len(order):
            stop = len(order)
            if self.max_tokens is not None:
                had = ends[start] - self.lengths[order[start]]
                stop = int(np.searchsorted(ends, had + self.max_tokens * self.world_size, side="right"))
            if self.max_rows is not None:
                stop = min(stop, start + self.max_rows * self.world_size)
            batches.append(order[start:stop])
            start = stop
        return batches
