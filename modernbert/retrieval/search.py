"""Exact late-interaction search over passages held in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..scoring import maxsim
from .passages import Passage

if TYPE_CHECKING:
    from ..heads.colbert import ColBERT


@dataclass(frozen=True)
class Hit:
    """A passage found: `rank` counts from 1, `score` is its MaxSim with the query."""

    rank: int
    score: float
    passage: Passage


class MemoryIndex:
    """Passages and their token vectors, searched exhaustively.

    One float32 vector per token is kept: 100,000 passages of 150 tokens at width 48 take 2.9 GB.
    """

    def __init__(self, colbert: ColBERT, passages: Iterable[Passage]) -> None:
        self.colbert = colbert
        self.passages = list(passages)
        self.vectors = colbert.encode_documents([passage.content for passage in self.passages])

    def __len__(self) -> int:
        return len(self.passages)

    def search(self, queries: Sequence[str], *, top_k: int = 10) -> list[list[Hit]]:
        """For each query its `top_k` passages (fewer if there are fewer), best first."""
        if isinstance(queries, str):
            raise ValueError(f"queries must be a list of texts, got the text {queries!r}; write [query]")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; ask for 1 passage or more")
        scores_BK, indices_BK = maxsim(self.colbert.encode_queries(queries), self.vectors, top_k=top_k)
        results = []
        for scores, indices in zip(scores_BK.tolist(), indices_BK.tolist(), strict=True):
            found = zip(scores, indices, strict=True)
            results.append([Hit(rank, score, self.passages[i]) for rank, (score, i) in enumerate(found, start=1)])
        return results
