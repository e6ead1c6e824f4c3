"""Queries for search and explanation, so that each query is encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from torch import Tensor

from ..inference.encode import encode_tokens
from ..inference.session import Session
from ..late_interaction import Ragged
from ..packing import Span
from .spelling import Spelling, tokenize


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
    spans: list[Span]


def encode_queries(session: Session, texts: Sequence[str]) -> list[EncodedQuery]:
    """Tokenise and encode queries once, with what `explain` needs."""
    tokens = tokenize(session.model.tokenize_queries, texts)
    vectors = encode_tokens(session, tokens)
    return [EncodedQuery(*query) for query in zip(texts, vectors, tokens.spans, strict=True)]


def query_vectors(session: Session, queries: Sequence[str | EncodedQuery]) -> Ragged:
    """The vectors of queries, in order. Texts are encoded without their spans, which is faster."""
    texts = [Spelling(query).text for query in queries if isinstance(query, str)]
    encoded = iter(session.encode_queries(texts) if texts else ())
    return Ragged.from_list([next(encoded) if isinstance(query, str) else query.vectors for query in queries])


def check_search(queries: Sequence[str | EncodedQuery], top_k: int) -> None:
    """Raise ValueError for arguments that no search takes: no list of queries, or a wrong `top_k`."""
    if isinstance(queries, str):
        raise ValueError(f"queries must be a list of texts, got the text {queries!r}; write [query]")
    for number, query in enumerate(queries):
        if not isinstance(query, (str, EncodedQuery)):
            raise ValueError(f"queries[{number}] is {query!r}; give a text, or what `encode` made of one")
    check_top_k(top_k)


def check_top_k(top_k: int) -> None:
    """Raise ValueError unless `top_k` is a whole number of 1 or more."""
    if not isinstance(top_k, Integral) or isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"top_k is {top_k!r}; ask for a whole number of 1 or more")
