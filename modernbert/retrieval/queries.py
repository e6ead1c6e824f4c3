"""Queries for search and explanation, so that each query is encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..inference.encode import encode_tokens
from ..inference.session import Session
from ..late_interaction import Ragged
from ..packing import Span


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
    tokens = session.model.tokenize_queries(texts)
    vectors = encode_tokens(session, tokens)
    return [EncodedQuery(*query) for query in zip(texts, vectors, tokens.spans, strict=True)]


def query_vectors(session: Session, queries: Sequence[str | EncodedQuery]) -> Ragged:
    """The vectors of queries, in order. Texts are encoded without their spans, which is faster."""
    texts = [query for query in queries if isinstance(query, str)]
    encoded = iter(session.encode_queries(texts) if texts else ())
    return Ragged.from_list([next(encoded) if isinstance(query, str) else query.vectors for query in queries])


def check_search(queries: Sequence[str | EncodedQuery], top_k: int) -> None:
    """Raise ValueError for arguments that no search takes: one text in place of a list, or `top_k` below 1."""
    if isinstance(queries, str):
        raise ValueError(f"queries must be a list of texts, got the text {queries!r}; write [query]")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; ask for 1 or more")
