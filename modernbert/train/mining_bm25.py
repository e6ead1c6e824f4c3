"""BM25 over millions of passages: an index of `bm25s` for each block of them, all with the statistics of the whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import replacing
from .mining import Candidates, best_first, parts_of
from .passages import PassageFile
from .ragged import RaggedBuilder, RaggedIds

BLOCK = 1 << 17
"""Passages of an index. Building one takes some hundred bytes for each different word of each passage."""

K1, B = 0.9, 0.4
"""As in Anserini's and BEIR's baselines."""


class BM25:
    """A source of candidates by their words: Lucene's BM25, in lower case, without English stop words.

    Scores are those of one index over all passages, whatever the size of a block. The vocabulary is in memory, the
    blocks are on the disk.

    Args:
        folder: for the blocks, which are made anew.

    Raises:
        ModuleNotFoundError: bm25s is not installed.
    """

    def __init__(self, passages: PassageFile, folder: Path, *, block: int = BLOCK) -> None:
        self._bm25s = _bm25s()
        # bm25s' `Tokenizer` keeps one vocabulary over several calls.
        self._tokenizer = self._bm25s.tokenization.Tokenizer()
        self._passages, self._block, self._folder = len(passages), block, folder
        parts = list(parts_of(len(passages), block))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        statistics = [self._count(passages, *part) for part in parts]
        words = len(self._tokenizer.word_to_id)
        counts_V = sum((np.pad(each.counts_V, (0, words - len(each.counts_V))) for each in statistics), np.zeros(words))
        mean_length = sum(each.tokens for each in statistics) / len(passages)
        self._indexes = [self._index(number, words, counts_V, mean_length) for number, _, _ in parts]

    def search(self, rows: np.ndarray, queries: Sequence[str], positives: np.ndarray, depth: int) -> Candidates:
        numbers_BK = np.full((len(queries), depth), -1)
        scores_BK = np.full((len(queries), depth), -np.inf, np.float32)
        positive_B = np.zeros(len(queries), np.float32)
        # Never the empty word, which passages without a word have.
        ids = self._tokenizer.tokenize(list(queries), update_vocab="never", allow_empty=False, show_progress=False)
        for place, (words, positive) in enumerate(zip(ids, positives.tolist(), strict=True)):
            numbers, scores = np.zeros(0, np.int64), np.zeros(0, np.float32)
            for (_, start, stop), index in zip(parts_of(self._passages, self._block), self._indexes, strict=True):
                of_block = index.get_scores_from_ids(words)
                if start <= positive < stop:
                    positive_B[place] = of_block[positive - start]
                hits = np.flatnonzero(of_block > 0)
                both = np.concatenate([numbers, hits + start]), np.concatenate([scores, of_block[hits]])
                numbers, scores = best_first(*both, depth)
            numbers_BK[place, : len(numbers)], scores_BK[place, : len(scores)] = numbers, scores
        return Candidates(numbers_BK, scores_BK, positive_B)

    def _count(self, passages: PassageFile, number: int, start: int, stop: int) -> _Statistics:
        """Write the words of a block as numbers; in how many of its passages each is."""
        built, counts_V = RaggedBuilder(), np.zeros(0, np.int64)
        for first in range(start, stop, 1024):
            texts = passages.select(range(first, min(stop, first + 1024)))
            ids = self._tokenizer.tokenize(texts, update_vocab=True, show_progress=False)
            built.add(ids)
            different = np.fromiter((word for row in ids for word in set(row)), np.int64)
            counts_V = np.pad(counts_V, (0, len(self._tokenizer.word_to_id) - len(counts_V)))
            counts_V += np.bincount(different, minlength=len(counts_V))
        rows = built.build()
        with replacing(self._words(number)) as beside, beside.open("wb") as file:
            np.savez(file, values=rows.values, offsets=rows.offsets)
        return _Statistics(counts_V, len(rows.values))

    def _index(self, number: int, words: int, counts_V: np.ndarray, mean_length: float) -> Any:
        with np.load(self._words(number)) as arrays:
            rows = RaggedIds(arrays["values"], arrays["offsets"])
        # These two make of the mean length of the block, to which bm25s compares a passage, that of all passages.
        constant, growing = K1 * (1 - B), K1 * B * len(rows.values) / len(rows) / mean_length
        index = self._bm25s.BM25(k1=constant + growing, b=growing / (constant + growing))
        vocabulary = {str(word): word for word in range(words)}
        index.index(_Corpus(_Lists(rows), vocabulary), create_empty_token=False, show_progress=False)
        # Not read by `get_scores_from_ids`, and as large as all words for each block.
        index.vocab_dict, index.unique_token_ids_set = {}, set()
        counts_of_block_V = np.diff(index.scores["indptr"])
        weights_V = _idf(counts_V, self._passages) / _idf(counts_of_block_V, len(rows))
        index.scores["data"] *= np.repeat(weights_V, counts_of_block_V).astype(np.float32)
        for name in ("data", "indices", "indptr"):
            file = self._folder / f"{name}-{number:06d}.npy"
            with replacing(file) as beside, beside.open("wb") as part:
                np.save(part, index.scores[name])
            index.scores[name] = np.load(file, mmap_mode="r")
        return index

    def _words(self, number: int) -> Path:
        return self._folder / f"words-{number:06d}.npz"


class _Statistics(NamedTuple):
    counts_V: np.ndarray
    tokens: int


class _Corpus(NamedTuple):
    """What `BM25.index` takes: the words of each passage as numbers, and a vocabulary."""

    ids: _Lists
    vocab: dict[str, int]


class _Lists:
    """The rows as lists, one at a time."""

    def __init__(self, rows: RaggedIds) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[list[int]]:
        return (self._rows[row].tolist() for row in range(len(self._rows)))


def _idf(counts_V: np.ndarray, passages: int) -> np.ndarray:
    """Lucene's inverse document frequency, as bm25s has it."""
    return np.log(1 + (passages - counts_V + 0.5) / (counts_V + 0.5))


def _bm25s() -> Any:
    try:
        import bm25s  # pyright: ignore[reportMissingImports]
        import bm25s.tokenization  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("mining by BM25 needs bm25s: pip install 'modernbert[train]'") from error
    return bm25s
