"""Queries for search and explanation, so that each query is encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral
from typing import TypeVar

from torch import Tensor

from ..inference.encode import encode_tokens
from ..inference.session import Session
from ..late_interaction import Ragged
from ..packing import Span, Tokens
from ..truncation import warn_if_cut
from . import spelling

T = TypeVar("T")

EXCERPT = 40
"""Characters of a query that a warning about it shows."""


@dataclass(frozen=True, eq=False)
class EncodedQuery:
    """A query and its vectors.

    Attributes:
        text: as given.
        vectors: `[Q, E]` float32 on the CPU.
        spans: for each of the Q rows its characters of `text`; None for a token without text, such as [CLS].
    """

    text: str
    vectors: Tensor
    spans: Sequence[Span]


def encode_queries(session: Session, texts: Iterable[str]) -> list[EncodedQuery]:
    """Tokenise and encode queries once, with what `explain` needs. Warns as `tokenize`."""
    found = _list(texts)
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise ValueError(f"queries[{number}] is {text!r:.80}; give a text")
    tokens = tokenize(session, found, _names(range(len(found))), spans=True)
    vectors = encode_tokens(session, tokens)
    return [EncodedQuery(*query) for query in zip(found, vectors, tokens.spans, strict=True)]


def query_vectors(session: Session, queries: Sequence[str | EncodedQuery]) -> Ragged:
    """The vectors of queries, in order. Texts are encoded without their spans, which is faster. Warns as `tokenize`."""
    texts = {number: query for number, query in enumerate(queries) if isinstance(query, str)}
    tokens = tokenize(session, list(texts.values()), _names(texts))
    vectors = dict(zip(texts, encode_tokens(session, tokens), strict=True))
    vectors |= {number: query.vectors for number, query in enumerate(queries) if isinstance(query, EncodedQuery)}
    return Ragged.from_list([vectors[number] for number in range(len(queries))])


def tokenize(session: Session, texts: Sequence[str], names: Sequence[str], *, spans: bool = False) -> Tokens:
    """The tokens of queries. One TruncationWarning names the first that the model reads only in part."""
    tokens = spelling.tokenize(session.model.tokenize_queries, texts, spans=spans)
    warn_if_cut(tokens, lambda index: f"{names[index]} ({texts[index][:EXCERPT]!r} ...)")
    return tokens


def check_search(queries: Iterable[str | EncodedQuery], top_k: int) -> list[str | EncodedQuery]:
    """The queries as a list. Raises ValueError for what no search takes: no list of queries, or a wrong `top_k`."""
    found = _list(queries)
    for number, query in enumerate(found):
        if not isinstance(query, (str, EncodedQuery)):
            raise ValueError(f"queries[{number}] is {query!r:.80}; give a text, or what `encode` made of one")
    check_top_k(top_k)
    return found


def check_run(queries: Mapping[str, str], top_k: int) -> None:
    """Raise ValueError for what no run takes: no dict of ids and texts, or a wrong `top_k`."""
    if not isinstance(queries, Mapping):
        raise ValueError(f"queries must be a dict of ids and texts, got one {type(queries).__name__}")
    for name, text in queries.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f"queries[{name!r:.80}] is {text!r:.80}; give an id and a text, both as texts")
    check_top_k(top_k)


def check_top_k(top_k: int) -> None:
    """Raise ValueError unless `top_k` is a whole number of 1 or more."""
    if not isinstance(top_k, Integral) or isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"top_k is {top_k!r}; ask for a whole number of 1 or more")


def _names(numbers: Iterable[int]) -> list[str]:
    return [f"queries[{number}]" for number in numbers]


def _list(queries: Iterable[T]) -> list[T]:
    if isinstance(queries, str):
        raise ValueError(f"queries must be a list of texts, got the text {queries!r:.80}; write [query]")
    if isinstance(queries, (bytes, Mapping, Set)) or not isinstance(queries, Iterable):
        raise ValueError(f"queries must be a list of texts, got one {type(queries).__name__}")
    return list(queries)
