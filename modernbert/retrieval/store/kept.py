"""What codes keep of the vectors of a corpus: measured on the corpus itself, before they are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ...late_interaction import Ragged, maxsim
from .codec import Codec
from .format import Shard
from .prefilter import select
from .ranking import score_codes

PASSAGES, QUERIES = 4096, 64
"""Passages that are ranked, and texts of the corpus that rank them, at most."""

WORDS = 12
"""Words of a passage that make a query."""

BEST = 10

FEWEST = 0.75
"""Codes are refused if they keep less than this share of the best."""


class Kept(NamedTuple):
    """How rankings with codes differ from those with the vectors.

    Attributes:
        queries: texts of the corpus that were searched for.
        best: the share of their ten best passages that are still among the ten best.
        error: the mean difference of a score. score: the mean score.
    """

    queries: int
    best: float
    error: float
    score: float

    def __str__(self) -> str:
        return (
            f"{self.best:.1%} of the ten best passages for {self.queries} texts of this corpus stay among them; "
            f"a score of {self.score:.2f} moves by {self.error:.3f} in the mean"
        )


def as_query(text: str) -> str:
    """Some words from the middle of a passage."""
    words = text.split()
    start = max(0, len(words) - WORDS) // 2
    return " ".join(words[start : start + WORDS])


def kept(codec: Codec, shards: Sequence[Shard], queries: Ragged) -> Kept:
    """Rank a sample of passages by their vectors, in `shards` without a codec, and by their codes."""
    total = sum(map(len, shards))
    positions = np.unique(np.linspace(0, total - 1, min(total, PASSAGES)).astype(np.int64))
    exact = select(shards, torch.from_numpy(positions))
    exact = Ragged(exact.values.float(), exact.offsets)
    scores_BN = maxsim(queries, exact)
    coded_BN = score_codes(queries, codec, codec.encode(exact.values), exact.offsets)
    best, found = (each_BN.topk(min(BEST, len(positions))).indices for each_BN in (scores_BN, coded_BN))
    same = [
        len(set(some) & set(others)) / len(some) for some, others in zip(best.tolist(), found.tolist(), strict=True)
    ]
    finite_BN = scores_BN.isfinite()  # An empty passage scores -inf.
    error = (scores_BN - coded_BN)[finite_BN].abs().mean()
    return Kept(len(queries), float(np.mean(same)), float(error), float(scores_BN[finite_BN].mean()))


def check_kept(found: Kept, dtype: str, width: int) -> None:
    """Raise ValueError if the codes keep too little."""
    if found.best < FEWEST:
        raise ValueError(
            f"{dtype} keeps too little of these vectors of width {width}: {found}, and {FEWEST:.0%} must. "
            "Index again with more bits; with 4bit or fp16 nothing is encoded twice"
        )
