"""What an `Embedder` needs to train on pairs and to be measured, where the parts are made for late interaction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..heads.embedder import Embedder
from ..late_interaction import Ragged
from ..packing import Texts, pack


class Lengths(NamedTuple):
    """The most tokens of a query and of a document."""

    query_length: int
    document_length: int


@dataclass(frozen=True, eq=False)
class DenseTexts:
    """How an `Embedder` tokenises queries and documents, for `TokenizedPairs.from_pairs`; ids have special tokens."""

    model: Embedder

    @property
    def config(self) -> Lengths:
        return Lengths(self.model.max_length, self.model.max_length)

    def query_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.model.query_ids(texts)

    def document_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.model.document_ids(texts)

    def query_tokens(self, ids: Sequence[Sequence[int]]) -> Texts:
        return Texts(pack(ids))

    def document_tokens(self, ids: Sequence[Sequence[int]]) -> Texts:
        return Texts(pack(ids))


@dataclass(frozen=True, eq=False)
class OneVector:
    """An `Embedder` as a `beir.Retriever`: MaxSim of texts with one vector each is their dot product."""

    model: Embedder

    def encode_queries(
        self, texts: Iterable[str], *, batch_tokens: int | None = None, progress: bool | None = None
    ) -> Ragged:
        return one_row_each(self.model.encode_queries(texts, batch_tokens=batch_tokens, progress=progress))

    def encode_documents(
        self, texts: Iterable[str], *, batch_tokens: int | None = None, progress: bool | None = None
    ) -> Ragged:
        return one_row_each(self.model.encode_documents(texts, batch_tokens=batch_tokens, progress=progress))


def one_row_each(x_NE: torch.Tensor) -> Ragged:
    """One vector for each text, as a matrix of one row for each."""
    return Ragged(x_NE, torch.arange(len(x_NE) + 1, device="cpu"))
