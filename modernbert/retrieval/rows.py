"""Hits as JSON, with the reasons for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .explain import TokenMatch, strongest_words

if TYPE_CHECKING:
    from .store.search import Hit


def hit_rows(query: str, hits: Sequence[Hit], explained: Sequence[Sequence[TokenMatch]] = ()) -> list[dict[str, Any]]:
    """Each hit with its passage; with the matches of each, also its strongest words (`why`) and all `matches`."""
    rows = [
        {"rank": hit.rank, "score": hit.score, **asdict(hit.passage)}
        | ({"copies": list(hit.copies)} if hit.copies else {})
        for hit in hits
    ]
    for row, hit, matches in zip(rows, hits, explained, strict=False):
        words = strongest_words(matches, query, hit.passage.content)
        row |= {"why": [asdict(word) for word in words], "matches": [asdict(match) for match in matches]}
    return rows
