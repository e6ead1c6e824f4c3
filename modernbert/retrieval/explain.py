"""Why a passage matched: the token that each query token found in it, and its contribution to the score."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from typing import TYPE_CHECKING

from ..truncation import warn_if_cut
from .passages import UNSPACED
from .spelling import INSIDE_WORDS, Spelling, tokenize

if TYPE_CHECKING:
    from rich.text import Text
    from torch import Tensor

    from ..inference.session import Session
    from ..packing import Span
    from .queries import EncodedQuery


@dataclass(frozen=True)
class TokenMatch:
    """A query token, the most similar document token, and their similarity, which is a summand of the score.

    Spans are characters of the query and of the document; None for a token without text, such as [CLS].
    """

    query: Span
    document: Span
    contribution: float


@dataclass(frozen=True)
class WordMatch:
    """A query word, the document word with most of its contribution (None: tokens without text), and its sum."""

    query: str
    document: str | None
    contribution: float


@dataclass(frozen=True)
class Place:
    """A word of a document that query tokens found: characters `start` to `end`.

    Attributes:
        matches: their indices in the list of matches, strongest first.
        contribution: the sum over those with text. Tokens such as [CLS] also find words, but are not counted: they are
            not part of the question.
    """

    start: int
    end: int
    matches: tuple[int, ...]
    contribution: float


def explain(session: Session, query: EncodedQuery, documents: Sequence[str]) -> list[list[TokenMatch]]:
    """For each document one match per query token, in query order; contributions sum to the MaxSim score.

    A TruncationWarning names the first document that the model reads only in part.
    """
    tokens = tokenize(session.model.tokenize_documents, documents)
    warn_if_cut(tokens, "documents[{}]".format)
    kept = tokens.keep.split(tokens.batch.lengths)
    explanations = []
    for document_SE, spans, keep in zip(session.encode_tokens(tokens), tokens.spans, kept, strict=True):
        rows = keep.nonzero().flatten().tolist()
        explanations.append(match(query.vectors, query.spans, document_SE, [spans[row] for row in rows]))
    return explanations


def match(
    query_QE: Tensor, query_spans: Sequence[Span], document_SE: Tensor, document_spans: Sequence[Span]
) -> list[TokenMatch]:
    """One match per query row, with the first of its best document rows. Contributions sum to the MaxSim score."""
    best = (query_QE @ document_SE.T).max(dim=1)
    found = [document_spans[row] for row in best.indices.tolist()]
    return [TokenMatch(*row) for row in zip(query_spans, found, best.values.tolist(), strict=True)]


def strongest_words(matches: Sequence[TokenMatch], query: str, document: str, *, limit: int = 6) -> list[WordMatch]:
    """The `limit` query words with the largest contributions, strongest first. Punctuation is not a word."""
    tokens_of: dict[tuple[int, int], list[TokenMatch]] = {}
    asked = _words(query, [match.query for match in matches])
    found_words = _words(document, [match.document for match in matches])
    for match in matches:
        word = asked.get(match.query)
        if word:
            tokens_of.setdefault(word, []).append(match)
    words = []
    for (start, end), tokens in tokens_of.items():
        shares: dict[Span, float] = {}
        for token in tokens:
            place = found_words.get(token.document) or token.document
            shares[place] = shares.get(place, 0.0) + token.contribution
        best = max(shares, key=lambda place: shares[place])
        found = brief(Spelling(document[best[0] : best[1]]).text.strip()) if best else None
        words.append(WordMatch(query[start:end], found, sum(shares.values())))
    return sorted(words, key=lambda word: -word.contribution)[:limit]


def places(content: str, matches: Sequence[TokenMatch]) -> list[Place]:
    """The words of a document that matched, in the order of the text. Matches that overlap share a place.

    A token inside a word counts for the whole word; any other token (punctuation, an emoji) for itself.
    Raises ValueError if a span is outside of `content`.
    """
    words = [word.span() for word in _WORD.finditer(content)]
    starts, ends = [start for start, _ in words], [end for _, end in words]
    spans = []
    for index, match in enumerate(matches):
        if match.document is None:
            continue
        start, end = match.document
        if not 0 <= start < end <= len(content):
            raise ValueError(
                f"a match covers characters {start} to {end}, but the text has {len(content)}: it is of another text"
            )
        touched = words[bisect_right(ends, start) : bisect_left(starts, end)]
        token = content[start:end].strip()
        if touched:
            start, end = touched[0][0], touched[-1][1]
        elif token:
            start = content.index(token, start)
            end = start + len(token)
        spans.append((start, end, index))
    joined: list[tuple[int, int, list[int]]] = []
    for start, end, index in sorted(spans):
        if joined and start < joined[-1][1]:
            first, last, indices = joined.pop()
            joined.append((first, max(last, end), [*indices, index]))
        else:
            joined.append((start, end, [index]))
    found = []
    for start, end, indices in joined:
        indices.sort(key=lambda index: -matches[index].contribution)
        share = sum(matches[index].contribution for index in indices if matches[index].query)
        found.append(Place(start, end, tuple(indices), share))
    return found


def level(contribution: float, strongest: float, levels: int) -> int:
    """A contribution as one of `levels` equal steps, the last of which ends at `strongest`; 0 if it is not positive."""
    return min(levels, ceil(levels * contribution / strongest)) if contribution > 0 else 0


# Weak to strong. Without colour, three strengths remain: underlined, bold, reversed.
STYLES = ("underline green", "bold underline green", "bold reverse green")


def highlight(content: str, matches: Sequence[TokenMatch]) -> Text:
    """The document for a terminal, with its matched words in three strengths relative to the strongest.

    Every newline, tab or control character becomes one space, so a span of `content` is also a span of the result.
    """
    from rich.text import Text

    shown, found = Text(re.sub(r"[\s\x00-\x1f\x7f-\x9f]", " ", content)), places(content, matches)
    strongest = max((place.contribution for place in found), default=0.0)
    for place in found:
        if strength := level(place.contribution, strongest, len(STYLES)):
            shown.stylize(STYLES[strength - 1], place.start, place.end)
    return shown


def excerpt(content: str, matches: Sequence[TokenMatch], *, words: int = 60) -> tuple[int, int]:
    """The span of the `words` consecutive words with the largest contribution, with even margins around the matches.

    All of `content` if it is not longer than that; its beginning if nothing matched.
    """
    if words < 1:
        raise ValueError(f"words is {words}; an excerpt needs 1 or more")
    spans = [word.span() for word in _WORD.finditer(content)]
    if len(spans) <= words:
        return 0, len(content)
    found = [place for place in places(content, matches) if place.contribution > 0]
    ends = [end for _, end in spans]
    at = [min(bisect_right(ends, place.start), len(spans) - 1) for place in found]
    total = [0.0, *accumulate(place.contribution for place in found)]
    ranges = [(i, j) for i in range(len(at)) for j in range(i, len(at)) if at[j] - at[i] < words]
    first = 0
    if ranges:
        i, j = max(ranges, key=lambda pair: total[pair[1] + 1] - total[pair[0]])
        margin = (words - 1 - at[j] + at[i]) // 2
        first = min(max(0, at[i] - margin), len(spans) - words)
    last = first + words - 1
    return spans[first][0] if first else 0, spans[last][1] if last + 1 < len(spans) else len(content)


LONGEST = 100
"""Characters of the longest word. What goes on without a space, such as base64, is taken for several words."""

# Letters and digits with inner apostrophes, hyphens and what is invisible; in scripts without spaces, one character.
_WORD = re.compile(rf"[{UNSPACED}]|(?:[^\W{UNSPACED}]|(?<=\w)['’{INSIDE_WORDS}-](?=\w)){{1,{LONGEST}}}")


def _words(text: str, spans: Sequence[Span]) -> dict[Span, tuple[int, int]]:
    """The words of `text` that tokens belong to, by the spans of the tokens. Others have none."""
    named = [span for span in spans if span]
    last = max((end for _, end in named), default=0)
    words = [word.span() for word in _WORD.finditer(text, 0, last + LONGEST)]
    starts, ends = [start for start, _ in words], [end for _, end in words]
    found = {}
    for first, last in named:
        touched = words[bisect_right(ends, first) : bisect_left(starts, last)]  # two if a line ends within the word
        if touched:
            found[first, last] = touched[0][0], touched[-1][1]
    return found


def brief(text: str) -> str:
    """The text of a token as it is shown: a token for what is unknown may be of any length."""
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
