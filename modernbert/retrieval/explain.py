"""Why a passage matched: the token that each query token found in it, and what that gave to the score."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .passages import UNSPACED

if TYPE_CHECKING:
    from ..heads.colbert import ColBERT

Span = tuple[int, int]


@dataclass(frozen=True)
class TokenMatch:
    """A query token, the most similar document token, and their similarity, which is a summand of the score.

    Spans are characters of the query and of the document; None for a token without text, such as [CLS].
    """

    query: Span | None
    document: Span | None
    contribution: float


@dataclass(frozen=True)
class WordMatch:
    """A query word, the document word most of it was found in (None: tokens without text), and its share."""

    query: str
    document: str | None
    contribution: float


def explain(colbert: ColBERT, query: str, documents: Sequence[str]) -> list[list[TokenMatch]]:
    """For each document a match per query token, in query order; contributions sum to the MaxSim score."""
    query_QE = colbert.encode_queries([query]).values
    query_spans = colbert.tokenize_queries([query]).spans[0]
    document_spans = colbert.tokenize_documents(documents).spans
    explanations = []
    for document_SE, spans in zip(colbert.encode_documents(documents), document_spans, strict=True):
        best = (query_QE @ document_SE.T).max(dim=1)
        found = [spans[i] for i in best.indices.tolist()]
        matches = zip(query_spans, found, best.values.tolist(), strict=True)
        explanations.append([TokenMatch(*match) for match in matches])
    return explanations


def strongest_words(matches: Sequence[TokenMatch], query: str, document: str, *, limit: int = 6) -> list[WordMatch]:
    """The `limit` query words that gave most to the score, strongest first. Punctuation is no word."""
    tokens_of: dict[Span, list[TokenMatch]] = {}
    for match in matches:
        word = _word(query, match.query)
        if word:
            tokens_of.setdefault(word, []).append(match)
    words = []
    for (start, end), tokens in tokens_of.items():
        shares: dict[Span | None, float] = {}
        for token in tokens:
            place = _word(document, token.document) or token.document
            shares[place] = shares.get(place, 0.0) + token.contribution
        best = max(shares, key=lambda place: shares[place])
        found = document[best[0] : best[1]].strip() if best else None
        words.append(WordMatch(query[start:end], found, sum(shares.values())))
    return sorted(words, key=lambda word: -word.contribution)[:limit]


# A run of letters and digits with inner apostrophes and hyphens; in scripts without spaces a character.
_WORD = re.compile(rf"[{UNSPACED}]|(?:[^\W{UNSPACED}]|(?<=\w)['’-](?=\w))+")


def _word(text: str, span: Span | None) -> Span | None:
    """The word of `text` that a token belongs to, or None."""
    if span is None:
        return None
    for word in _WORD.finditer(text):
        if word.end() > span[0]:
            return word.span() if word.start() < span[1] else None
    return None
