"""Batches made ahead of time, in their order, by worker processes; and those of masked-language modelling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .bins import BinSampler
from .corpus import Pieces
from .masking import Masked, Masking
from .sampling import Sampler

K = TypeVar("K")
B = TypeVar("B")

MASKS = 1
"""In a seed: other random numbers than those with which a sampler shuffles."""


def prefetch(keys: Iterable[K], make: Callable[[K], B], *, workers: int = 0) -> Iterator[B]:
    """`make` of each key, in the order of the keys, whatever the number of workers.

    Args:
        make: a function of its argument alone, that can be pickled.
        workers: processes that make batches while the caller computes; 0: the caller makes them.
    """
    if workers == 0:
        return map(make, keys)
    # A sampler gives the keys, and without a batch size each is an index of the data set.
    options = {"batch_size": None, "sampler": keys, "num_workers": workers, "collate_fn": _same}
    # With a generator of its own, it takes nothing from PyTorch's random state, which a resumed run restores.
    return iter(DataLoader(_Made(make), generator=torch.Generator(), **options))


@dataclass(frozen=True, eq=False)
class _Made(Dataset[B]):
    make: Callable[..., B]

    def __getitem__(self, key: object) -> B:
        return self.make(key)


def _same(batch: B) -> B:
    return batch


@dataclass(frozen=True, eq=False)
class MaskedBatches:
    """The batches of masked-language modelling; `fit` calls it with the number of batches that a run has had.

    Which tokens are hidden is a function of the seed and of the number of the batch among those of all ranks.

    Attributes:
        pieces: of a corpus. sampler: over them; a `BinSampler` packs best, a `Sampler` of whole pieces does not pack.
    """

    pieces: Pieces
    sampler: BinSampler | Sampler
    masking: Masking
    seed: int = 0
    workers: int = 0

    def __call__(self, first: int = 0) -> Iterator[Masked]:
        s = self.sampler
        numbers = count(first * s.world_size + s.rank, s.world_size)
        return prefetch(zip(numbers, s(first)), self.make, workers=self.workers)  # noqa: B905 (both have no end)

    def make(self, key: tuple[int, np.ndarray]) -> Masked:
        """The batch of these pieces with this number."""
        number, pieces = key
        return self.masking(self.pieces.packed(pieces), (self.seed, number, MASKS))
