"""Different passages on a disk, found by number and by text, so that millions of them take little memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..files import replacing
from .teacher_folder import text_key

TEXTS, OFFSETS, KEYS = "passages.txt", "passages.offsets.npy", "passages.keys.npy"


class PassageFile:
    """N different passages in one file of UTF-8, mapped into memory. 24 bytes of memory for each.

    Two texts that differ only in case and white space are one passage, of which the first is kept.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        self._offsets = np.load(folder / OFFSETS)
        self._bytes = np.memmap(folder / TEXTS, np.uint8, "r") if self._offsets[-1] else np.zeros(0, np.uint8)
        keys = np.load(folder / KEYS)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, number: int) -> str:
        return bytes(self._bytes[self._offsets[number] : self._offsets[number + 1]]).decode()

    def select(self, numbers: Iterable[int]) -> list[str]:
        return [self[number] for number in numbers]

    def find(self, texts: Iterable[str]) -> np.ndarray:
        """The number of the passage of each text, int64 [n]; -1 if it is not there."""
        return self.find_keys(np.fromiter(map(passage_key, texts), np.uint64))

    def find_keys(self, keys: np.ndarray) -> np.ndarray:
        """As `find`, of `passage_key` of each text."""
        places = np.minimum(np.searchsorted(self._keys, keys), len(self) - 1)
        return np.where(self._keys[places] == keys, self._order[places], -1)


def passage_key(text: str) -> int:
    """A hash of a text that does not see case and white space."""
    return text_key(" ".join(text.casefold().split()))


def write_passages(texts: Callable[[], Iterable[str]], folder: Path) -> PassageFile:
    """The different ones of the texts, in the order in which they come first; nothing is written if all is there.

    Args:
        texts: gives the same texts on each call; it is called twice.

    Raises:
        ValueError: there are no texts.
    """
    if not (folder / KEYS).exists():  # the last of the files
        keys = as_array(map(passage_key, texts()))
        if not len(keys):
            raise ValueError("there are no passages")
        first = np.sort(np.unique(keys, return_index=True)[1])
        lengths = array("q")
        with replacing(folder / TEXTS) as beside, beside.open("wb") as file:
            for text in texts_at(texts(), first):
                content = text.encode()
                lengths.append(len(content))
                file.write(content)
        _save(folder / OFFSETS, np.concatenate([[0], np.cumsum(np.frombuffer(lengths, np.int64))]))
        _save(folder / KEYS, keys[first])
    return PassageFile(folder)


def as_array(keys: Iterable[int]) -> np.ndarray:
    """Keys as uint64 [n], 8 bytes for each."""
    return np.frombuffer(array("Q", keys), np.uint64)


def texts_at(texts: Iterable[str], rows: Sequence[int] | np.ndarray) -> Iterator[str]:
    """The texts in these rows, which ascend."""
    wanted = iter(rows)
    coming = next(wanted, None)
    for row, text in enumerate(texts):
        if row == coming:
            yield text
            coming = next(wanted, None)


def _save(file: Path, values: np.ndarray) -> None:
    with replacing(file) as beside, beside.open("wb") as part:
        np.save(part, values)
