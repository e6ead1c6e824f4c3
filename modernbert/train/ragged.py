"""The token ids of many texts as two arrays: numbers without a Python object for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..packing import Packed
from ..texts import Text
from ..tokenizer import Tokenizer

CHUNK = 4096  # rows that are tokenised together

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class RaggedIds:
    """The token ids of many texts: `values` uint16 or int32 [n], of text i from `offsets[i]` to `offsets[i + 1]`."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def select(self, indices: Iterable[int]) -> list[list[int]]:
        """Lists of ids, as `ColBERT.query_tokens` takes them."""
        return [self[i].tolist() for i in indices]

    def packed(self, indices: Iterable[int]) -> Packed:
        """The texts as a batch, whose ids are those that the model reads."""
        rows = [self[i] for i in indices]
        ids = np.concatenate([np.zeros(0, np.int64), *rows], dtype=np.int64)
        return packed_row(torch.from_numpy(ids), np.fromiter(map(len, rows), np.int64, len(rows)))


class RaggedBuilder:
    """`RaggedIds` of texts that come a few at a time."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = [np.zeros(0, np.int32)]
        self.lengths: list[np.ndarray] = [np.zeros(1, np.int64)]

    def add(self, ids: Sequence[Sequence[int]]) -> None:
        self.parts.append(np.fromiter(chain.from_iterable(ids), np.int32))
        self.lengths.append(np.fromiter(map(len, ids), np.int64, len(ids)))

    def build(self) -> RaggedIds:
        values = np.concatenate(self.parts)
        small = values.max(initial=0) < 1 << 16
        return RaggedIds(values.astype(np.uint16) if small else values, np.cumsum(np.concatenate(self.lengths)))


def tokenize_texts(texts: Iterable[Text], tokenizer: Tokenizer, *, max_length: int) -> RaggedIds:
    """Texts and pairs of texts as ids with special tokens, cut to `max_length` tokens."""
    built = RaggedBuilder()
    for chunk in chunks(texts, CHUNK):
        built.add([each.ids for each in tokenizer.encode_batch(chunk, max_length=max_length, offsets=False)])
    return built.build()


def chunks(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """`size` rows at a time."""
    rows = iter(rows)
    while chunk := list(islice(rows, size)):
        yield chunk


def packed_row(input_ids: Tensor, lengths: np.ndarray) -> Packed:
    """As `pack` of lists of ids, without a look at each id: `[T]` int64 ids, of sequences of `lengths` int64 [B]."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(len(input_ids)) - np.repeat(ends[:-1], lengths)
    return Packed(
        input_ids=input_ids,
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        lengths=tuple(lengths.tolist()),
        max_seqlen=int(lengths.max(initial=0)),
    )
