"""A corpus as token ids on disk, mapped into memory: documents, and the pieces in which a model reads them.

`write_shards` makes such a folder. It has `manifest.json` and, for each shard, two .npy files: the ids of its
documents, one after another and without special tokens, and the length of each document. A document is never cut off:
a model reads a long one in several pieces.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from ..json_files import read_json
from ..packing import Packed
from ..tokenizer import Tokenizer
from .ragged import packed_row

MANIFEST = "manifest.json"


def ids_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.ids.npy"


def lengths_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.lengths.npy"


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """A hash of all that decides about the ids of a text."""
    content = tokenizer.files()["tokenizer.json"] + bytes([tokenizer.do_lower_case])
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class Shards:
    """What `write_shards` has written, mapped into memory.

    Attributes:
        lengths: uint32 [N], tokens of each document.

    Raises:
        ValueError: the shards are of another tokenizer, not finished, or damaged. FileNotFoundError: there are none.
    """

    def __init__(self, folder: str | os.PathLike[str], tokenizer: Tokenizer) -> None:
        self.folder = Path(folder)
        self.about = read_json(self.folder, MANIFEST)
        there, here = self.about.get("tokenizer"), tokenizer_hash(tokenizer)
        if there != here:
            raise ValueError(
                f"{folder} was tokenised with {there} ({self.about.get('vocab_size')} tokens), but this tokenizer is "
                f"{here} ({tokenizer.vocab_size} tokens): the ids would be other texts. Load the tokenizer of the "
                "shards, or write new ones"
            )
        if self.about.get("shards") is None:
            raise ValueError(f"{folder} is not finished: call write_shards again, which goes on where it was stopped")
        self._map()

    def _map(self) -> None:
        try:
            self.front, self.back = list(self.about["front"]), list(self.about["back"])
            sizes = [(documents, tokens) for documents, tokens in self.about["shards"]]
            self._starts = np.array([0, *accumulate(tokens for _, tokens in sizes)], np.int64)
        except (KeyError, TypeError, ValueError) as error:
            file = self.folder / MANIFEST
            raise ValueError(f"{file} is damaged: {error!r}; delete the folder and call write_shards") from error
        lengths = [_load(lengths_file(self.folder, i), n) for i, (n, _) in enumerate(sizes)]
        self.lengths = np.concatenate([np.zeros(0, np.uint32), *lengths])
        # An array, because each look at a part of a `memmap` costs more than the part.
        self._ids = [np.asarray(_load(ids_file(self.folder, i), n)) for i, (_, n) in enumerate(sizes)]
        if self.lengths.sum(dtype=np.int64) != self._starts[-1]:
            raise ValueError(f"{self.folder} is damaged: the lengths of its documents are not those of their tokens")

    def __getstate__(self) -> dict[str, object]:
        """Another process maps the files again, in place of a copy of their content."""
        return {"folder": self.folder, "about": self.about}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._map()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, without special tokens."""
        return int(self._starts[-1])

    def pieces(self, max_length: int) -> Pieces:
        """The documents, a long one in consecutive pieces, each of at most `max_length` tokens with special tokens.

        Raises:
            ValueError: `max_length` leaves no room beside the special tokens.
        """
        special = len(self.front) + len(self.back)
        room = max_length - special
        if room < 1:
            raise ValueError(f"max_length is {max_length}, but the {special} special tokens of a piece leave no room")
        lengths = self.lengths.astype(np.int64)
        counts = -(-lengths // room)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        before = (np.arange(len(first)) - first) * room  # tokens of the document in front of each piece
        starts = np.repeat(np.cumsum(lengths) - lengths, counts) + before
        sizes = np.minimum(room, np.repeat(lengths, counts) - before)
        return Pieces(self, starts, (sizes + special).astype(np.int32))

    def copy_to(self, target: np.ndarray, places: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> None:
        """Copy `sizes[i]` ids of one document, from `starts[i]` among the ids of all, to `places[i]` of `target`."""
        shards = np.searchsorted(self._starts, starts, side="right") - 1
        here = starts - self._starts[shards]
        rows = zip(shards.tolist(), here.tolist(), places.tolist(), sizes.tolist(), strict=True)
        for shard, start, place, size in rows:
            target[place : place + size] = self._ids[shard][start : start + size]


@dataclass(frozen=True, eq=False)
class Pieces:
    """What a model reads at once: a document or a part of one, between the special tokens of a text.

    Attributes:
        starts: int64 [P], the place of the first token of each among the tokens of all documents.
        lengths: int32 [P], tokens of each, with special tokens.
    """

    shards: Shards
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def packed(self, indices: np.ndarray) -> Packed:
        """The pieces named by `indices`, in that order, as a batch."""
        front, back = self.shards.front, self.shards.back
        lengths = self.lengths[indices].astype(np.int64)
        stops = np.cumsum(lengths)
        starts = stops - lengths
        ids = np.empty(lengths.sum(), np.int64)
        for place, token in enumerate(front):
            ids[starts + place] = token
        for place, token in enumerate(back):
            ids[stops - len(back) + place] = token
        sizes = lengths - len(front) - len(back)
        self.shards.copy_to(ids, starts + len(front), self.starts[indices], sizes)
        return packed_row(torch.from_numpy(ids), lengths)


def _load(file: Path, size: int) -> np.ndarray:
    again = f"delete the folder {file.parent} and call write_shards"
    try:
        array = np.load(file, mmap_mode="r" if size else None)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} is missing or damaged; {again}: {error}") from error
    if array.shape != (size,):
        raise ValueError(f"{file} holds {array.shape} numbers, but the manifest has {size}; {again}")
    return array
