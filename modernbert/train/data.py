"""Query-passage pairs: from files to token ids, which are arrays of numbers, so that millions take little memory."""

from __future__ import annotations

import json
import os
import random
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..files import replacing
from ..packing import Texts, Tokens
from .examples import Pair as Pair
from .examples import read_pairs as read_pairs
from .examples import read_texts
from .options import check_same
from .passages import passage_key
from .ragged import CHUNK, RaggedBuilder, chunks
from .ragged import RaggedIds as RaggedIds
from .reading import digest as digest
from .reading import files as pair_files  # noqa: F401  (a recipe asks for the files of its pairs)
from .reading import versions as versions
from .teacher import Teacher, text_key

FILE = "file."  # in front of the names of files in an .npz file


class Lengths(Protocol):
    """The most tokens of a query and of a document."""

    @property
    def query_length(self) -> int: ...
    @property
    def document_length(self) -> int: ...


class PairModel(Protocol):
    """How queries and documents become ids, and what a model reads of these: a `ColBERT`, or `dense.DenseTexts`."""

    @property
    def config(self) -> Lengths: ...
    def query_ids(self, texts: Sequence[str]) -> list[list[int]]: ...
    def document_ids(self, texts: Sequence[str]) -> list[list[int]]: ...
    def query_tokens(self, ids: Sequence[Sequence[int]]) -> Tokens | Texts: ...
    def document_tokens(self, ids: Sequence[Sequence[int]]) -> Tokens | Texts: ...


@dataclass(frozen=True)
class ChosenPairs:
    """The pairs of `choose_pairs`. Each iteration reads their files again, so that they are never all in memory."""

    read: Callable[[], Iterator[Pair]]
    count: int

    def __iter__(self) -> Iterator[Pair]:
        return self.read()

    def __len__(self) -> int:
        return self.count


def choose_pairs(
    folder: str | os.PathLike[str],
    *,
    exclude_sources: Collection[str],
    decontaminate_against: Collection[str],
    read: Callable[..., Iterator[Pair]] = read_pairs,
) -> ChosenPairs:
    """The pairs of a folder without empty texts and without overlap with the corpora of BEIR folders.

    Args:
        read: the reader of `examples.py` for the kind of pairs.
    """
    seen = _all_ngrams(text for corpus in decontaminate_against for text in read_corpus(corpus))

    def chosen() -> Iterator[Pair]:
        return _disjoint(read(folder, exclude_sources=exclude_sources, skip_empty=True), seen)

    count = sum(1 for _ in chosen())
    if not count:
        raise ValueError(f"no pair of {folder} is left: all are empty, excluded or overlap")
    print(f"{count:,} pairs", flush=True)
    return ChosenPairs(chosen, count)


def without_overlap(pairs: Iterable[Pair], held_out: Iterable[str], *, n: int = 8) -> Iterator[Pair]:
    """The pairs whose positive shares no sequence of `n` words with any of the held-out texts."""
    return _disjoint(pairs, _all_ngrams(held_out, n), n)


def _disjoint(pairs: Iterable[Pair], seen: set[str], n: int = 8) -> Iterator[Pair]:
    return (pair for pair in pairs if not seen or seen.isdisjoint(_word_ngrams(pair.positive, n)))


def _all_ngrams(texts: Iterable[str], n: int = 8) -> set[str]:
    return {gram for text in texts for gram in _word_ngrams(text, n)}


def _word_ngrams(text: str, n: int) -> Iterator[str]:
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


def corpus_file(folder: str | os.PathLike[str]) -> Path:
    return Path(folder) / "corpus.jsonl.gz"


def read_corpus(folder: str | os.PathLike[str]) -> Iterator[str]:
    """The texts of a BEIR folder's `corpus.jsonl.gz`."""
    return read_texts(corpus_file(folder), skip_empty=True)


def first_per_source(pairs: Collection[Pair] | ChosenPairs, limit: int, *, seed: int = 0) -> list[Pair]:
    """At most `limit` pairs of every source, drawn at random by the seed. The pairs are read twice."""
    rows: dict[str, list[int]] = {}
    for row, pair in enumerate(pairs):
        rows.setdefault(pair.source, []).append(row)
    draw = random.Random(seed)
    wanted = [row for found in rows.values() for row in draw.sample(found, min(limit, len(found)))]
    chosen = dict.fromkeys(wanted)
    found = {row: pair for row, pair in enumerate(pairs) if row in chosen}
    return [found[row] for row in wanted]


@dataclass(frozen=True, eq=False)
class TokenizedPairs:
    """Pairs as token ids, and what a batch needs to know about them.

    Attributes:
        queries, positives: ids without special tokens.
        lengths: int [N], the tokens that a pair takes of a batch, negatives and special tokens included.
        sources, positive_groups: int [N].
        teacher_index: int [N, 2], the rows of query and positive in the teacher's vectors, or -1.
        negatives: ids of the negatives of all pairs; None: no pair has any.
        negative_offsets: int [N + 1]: pair i has the negatives from `negative_offsets[i]` to `negative_offsets[i + 1]`.
        negative_groups: int, of each negative the group of a pair of the same source whose positive it is, but for case
            and white space; -1: it is not one. A mined negative of one pair is often the positive of another.
        scores: float32, of each pair the teacher's score of the positive and of the negatives; None: no teacher's.
    """

    queries: RaggedIds
    positives: RaggedIds
    lengths: np.ndarray
    sources: np.ndarray
    positive_groups: np.ndarray
    teacher_index: np.ndarray
    negatives: RaggedIds | None = None
    negative_offsets: np.ndarray | None = None
    negative_groups: np.ndarray | None = None
    scores: np.ndarray | None = None

    @classmethod
    def from_pairs(cls, pairs: Iterable[Pair], model: PairModel, teacher: Teacher | None) -> TokenizedPairs:
        """Tokenise as `model` does, to the lengths of its config.

        Raises:
            ValueError: some pairs have a teacher's scores and others have none.
        """
        c, built = model.config, [RaggedBuilder() for _ in range(3)]
        sources: dict[str, int] = {}
        numbers: dict[str, list[np.ndarray]] = {}
        for chunk in chunks(pairs, CHUNK):
            texts = [pair.query for pair in chunk], [pair.positive for pair in chunk]
            negatives = [text for pair in chunk for text in pair.negatives]
            counts = np.array([len(pair.negatives) for pair in chunk])
            lengths = _tokenize(texts[0], model.query_ids, model.query_tokens, c.query_length, built[0])
            lengths += _tokenize(texts[1], model.document_ids, model.document_tokens, c.document_length, built[1])
            more = _tokenize(negatives, model.document_ids, model.document_tokens, c.document_length, built[2])
            of = np.repeat(np.arange(len(chunk)), counts)
            known = [teacher.index(side) if teacher else np.full(len(chunk), -1) for side in texts]
            for name, found in {
                "lengths": lengths + np.bincount(of, more, len(chunk)).astype(lengths.dtype),
                "sources": np.array([sources.setdefault(pair.source, len(sources)) for pair in chunk]),
                "groups": np.array([text_key(repr((pair.source, pair.group))) for pair in chunk], np.uint64),
                "teacher_index": np.stack(known, axis=1),
                "positive_keys": np.array([_key_in(pair.source, pair.positive) for pair in chunk], np.uint64),
                "negative_keys": np.array(
                    [_key_in(pair.source, n) for pair in chunk for n in pair.negatives], np.uint64
                ),
                "counts": counts,
                "scored": np.array([len(pair.scores) for pair in chunk]),
                "scores": np.array([score for pair in chunk for score in pair.scores], np.float32),
            }.items():
                numbers.setdefault(name, []).append(found)
        if not numbers:
            raise ValueError("there are no pairs")
        arrays = {name: np.concatenate(parts) for name, parts in numbers.items()}
        counts, scored = arrays["counts"], arrays["scored"]
        if scored.any() and not (scored == counts + 1).all():
            row = int((scored != counts + 1).argmax())
            raise ValueError(f"pair {row} has {scored[row]} scores for {counts[row] + 1} documents, others have all")
        groups = _in_order(arrays["groups"])
        return cls(
            queries=built[0].build(),
            positives=built[1].build(),
            lengths=arrays["lengths"],
            sources=arrays["sources"],
            positive_groups=groups,
            teacher_index=arrays["teacher_index"],
            negatives=built[2].build() if counts.any() else None,
            negative_offsets=np.concatenate([[0], np.cumsum(counts)]) if counts.any() else None,
            negative_groups=_groups_of(arrays["negative_keys"], arrays["positive_keys"], groups)
            if counts.any()
            else None,
            scores=arrays["scores"] if scored.any() else None,
        )

    def documents(self, batch: Iterable[int]) -> tuple[list[list[int]], np.ndarray]:
        """The ids of the documents of each pair, the positive before its negatives; and int [B + 1]: pair i of the
        batch has the documents from `offsets[i]` to `offsets[i + 1]`.
        """
        found: list[list[int]] = []
        offsets = [0]
        for i in batch:
            found.append(self.positives[i].tolist())
            if self.negatives is not None and self.negative_offsets is not None:
                found += self.negatives.select(range(*self.negative_offsets[i : i + 2]))
            offsets.append(len(found))
        return found, np.array(offsets)

    def groups(self, batch: Sequence[int] | np.ndarray) -> np.ndarray:
        """int, the group of each positive, then of each negative of these pairs, for `in_batch_info_nce`."""
        parts = [self.positive_groups[batch]]
        if self.negative_groups is not None and self.negative_offsets is not None:
            parts += [self.negative_groups[slice(*self.negative_offsets[i : i + 2])] for i in batch]
        return np.concatenate(parts)

    def teacher_scores(self, batch: Iterable[int]) -> np.ndarray:
        """float32, the teacher's scores of `documents(batch)`. ValueError: the pairs have none."""
        if self.scores is None or self.negative_offsets is None:
            raise ValueError("these pairs have no scores of a teacher; read them with read_scored")
        parts = [
            self.scores[first + i : last + i + 1] for i in batch for first, last in [self.negative_offsets[i : i + 2]]
        ]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    def save(self, file: Path, inputs: dict[str, object], files: Mapping[str, bytes] | None = None) -> None:
        """Write an .npz file that remembers what the pairs were made of, with the `files` of the tokenizer."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        for side, ids in vars(self).items():
            if isinstance(ids, RaggedIds):
                arrays |= {f"{side}.{name}": value for name, value in vars(ids).items()}
        with replacing(file) as beside, beside.open("wb") as part:
            arrays |= {FILE + name: np.frombuffer(content, np.uint8) for name, content in (files or {}).items()}
            np.savez(part, allow_pickle=False, inputs=np.array(json.dumps(inputs)), **arrays)

    @classmethod
    def load(cls, file: Path, inputs: dict[str, object]) -> TokenizedPairs:
        """Read what `save` has written. ValueError: it was made of something else than `inputs`, or is damaged."""
        arrays = _arrays(file)
        check_same(file, json.loads(str(arrays.pop("inputs", "{}"))), inputs)
        sides = {
            side: RaggedIds(arrays[f"{side}.values"], arrays[f"{side}.offsets"])
            for side in ("queries", "positives", "negatives")
            if f"{side}.values" in arrays
        }
        return cls(
            queries=sides["queries"],
            positives=sides["positives"],
            lengths=arrays["lengths"],
            sources=arrays["sources"],
            positive_groups=arrays["positive_groups"],
            teacher_index=arrays["teacher_index"],
            negatives=sides.get("negatives"),
            negative_offsets=arrays.get("negative_offsets"),
            negative_groups=arrays.get("negative_groups"),
            scores=arrays.get("scores"),
        )


def kept(file: Path, inputs: dict[str, object], make: Callable[[], TokenizedPairs]) -> TokenizedPairs:
    """The pairs of a file that was made of `inputs`; they are made and written first if it is not there."""
    if not file.exists():
        make().save(file, inputs)
    return TokenizedPairs.load(file, inputs)


def at_most(pairs: Iterable[Pair], negatives: int) -> Iterator[Pair]:
    """The pairs, each with its first negatives, or fewer if it has not so many."""
    return (pair._replace(negatives=pair.negatives[:negatives]) for pair in pairs)


def tokenizer_files(file: Path) -> dict[str, bytes]:
    """The `files` that `TokenizedPairs.save` was given."""
    arrays = _arrays(file)
    return {name.removeprefix(FILE): array.tobytes() for name, array in arrays.items() if name.startswith(FILE)}


def _arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file) as arrays:
            return dict(arrays)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} is damaged; delete it, and the pairs are tokenised again: {error}") from error


def _tokenize(
    texts: Sequence[str],
    ids_of: Callable[[Sequence[str]], list[list[int]]],
    tokens_of: Callable[[Sequence[Sequence[int]]], Tokens | Texts],
    longest: int,
    built: RaggedBuilder,
) -> np.ndarray:
    """Add the ids of texts to `built`; the tokens that the model reads of each."""
    # Tokens of ordinary text are far shorter than 32 characters; the cut saves most of the work.
    ids = ids_of([text[: 32 * longest] for text in texts])
    built.add(ids)
    return np.array(tokens_of(ids).batch.lengths, np.int64)


def _key_in(source: str, text: str) -> int:
    return text_key(f"{passage_key(text)} {source}")


def _groups_of(keys: np.ndarray, positive_keys: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The group of the first positive with each key; -1 if there is none."""
    known, first = np.unique(positive_keys, return_index=True)
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[places] == keys, groups[first[places]], -1)


def _in_order(keys: np.ndarray) -> np.ndarray:
    """Equal keys to equal numbers, counted from 0 in the order of their first place."""
    _, first, number = np.unique(keys, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]
