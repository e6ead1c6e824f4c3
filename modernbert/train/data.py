"""Query-passage pairs: from files to token ids."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import replacing
from ..heads.colbert import ColBERT
from ..packing import Tokens
from .options import check_same
from .teacher import Teacher

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
FILE = "file."  # in front of the names of files in an .npz file
FIELDS = {"query", "positive", "source", "group"}
# Fields from which other trainers learn. All others (a title, an id) may be there and are not read.
SIGNAL = re.compile(
    r"(?i)(.*[_-]|hard)?(neg|negative|pos|positives|documents|passages|score|label|logit|margin|weight|similarity|relevance|"
    r"rating|instruction|prompt)s?([_-]?\d+)?([_-].*)?"
)


class Pair(NamedTuple):
    query: str
    positive: str
    source: str
    group: str | int


def read_pairs(folder: str | os.PathLike, *, exclude_sources: Collection[str] = ()) -> Iterator[Pair]:
    """The pairs of a folder's files (`ENDINGS`) in name order, except those of excluded sources.

    A line is a JSON object with "query" and "positive" and, optionally, "source" (default: the file's name)
    and "group" (default: the positive itself). Pairs of one group never serve as each other's negatives. Other fields
    are ignored, but not those that would change the training if they were read, such as "negatives".

    Raises:
        ValueError: no such file, a damaged file, or a line that is not a pair, with its file and number.
    """
    for path in pair_files(folder):
        for number, line in enumerate(_lines(path), start=1):
            try:
                pair = _pair(json.loads(line), path.name.split(".")[0])
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: {error}") from error
            if pair.source not in exclude_sources:
                yield pair


def pair_files(folder: str | os.PathLike) -> list[Path]:
    files = sorted(path for path in Path(folder).iterdir() if path.name.endswith(ENDINGS))
    if not files:
        names = ", ".join(f"*{ending}" for ending in ENDINGS)
        raise ValueError(f"no {names} in {folder}: --pairs wants a folder of such files")
    return files


def versions(folder: str | os.PathLike) -> list[tuple[str, int, int]]:
    """The name, size and time of each file of pairs: something differs after a file was changed."""
    return [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in pair_files(folder)]


def _pair(row: object, source: str) -> Pair:
    if not isinstance(row, dict) or not {"query", "positive"} <= row.keys():
        got = f"keys {sorted(row)}" if isinstance(row, dict) else f"{row!r:.60}"
        raise ValueError(f'a pair needs "query" and "positive", got {got}')
    if ignored := [name for name in row.keys() - FIELDS if SIGNAL.fullmatch(name)]:
        raise ValueError(
            f'"{min(ignored)}" would be ignored, because the positives of other pairs are the negatives here, and all '
            "pairs count alike: remove the field"
        )
    pair = Pair(row["query"], row["positive"], row.get("source", source), row.get("group", row["positive"]))
    for name, value in zip(Pair._fields, pair, strict=True):
        if not isinstance(value, str) and not (name == "group" and type(value) is int):
            raise ValueError(f'"{name}" must be a string, got {value!r:.60}')
        str(value).encode()  # half a surrogate pair raises here, and not hours later in a tokenizer
    return pair


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed. Raises a ValueError for a compressed one that is damaged or ends too early."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield from _split(_zstandard(file)) if path.suffix == ".zst" else file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def _zstandard(file: io.BufferedIOBase) -> Iterator[bytes]:
    """The content of all frames. The library's own reader takes a file that was cut for a whole one."""
    import zstandard

    frame = None
    while block := file.read(1 << 14):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(block)
            except zstandard.ZstdError as error:
                raise EOFError(error) from error
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")


def _split(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


def digest(paths: Iterable[Path]) -> str:
    """A hash of the names and the content of files."""
    total = hashlib.blake2b(digest_size=16)
    for path in paths:
        total.update(path.name.encode())
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                total.update(block)
    return total.hexdigest()


def choose_pairs(
    folder: str | os.PathLike, *, exclude_sources: Collection[str], decontaminate_against: Iterable[str]
) -> list[Pair]:
    """`read_pairs` without empty texts and without overlap with the corpora of BEIR folders."""
    pairs = read_pairs(folder, exclude_sources=exclude_sources)
    if decontaminate_against:
        pairs = without_overlap(pairs, (text for corpus in decontaminate_against for text in read_corpus(corpus)))
    chosen = [pair for pair in pairs if pair.query.strip() and pair.positive.strip()]
    if not chosen:
        raise ValueError(f"no pair of {folder} is left: all are empty, excluded or overlap")
    print(f"{len(chosen):,} pairs", flush=True)
    return chosen


def without_overlap(pairs: Iterable[Pair], held_out: Iterable[str], *, n: int = 8) -> Iterator[Pair]:
    """The pairs whose positive shares no sequence of `n` words with any of the held-out texts."""
    seen = {gram for text in held_out for gram in _word_ngrams(text, n)}
    return (pair for pair in pairs if seen.isdisjoint(_word_ngrams(pair.positive, n)))


def _word_ngrams(text: str, n: int) -> Iterator[str]:
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


def corpus_file(folder: str | os.PathLike) -> Path:
    return Path(folder) / "corpus.jsonl.gz"


def read_corpus(folder: str | os.PathLike) -> Iterator[str]:
    """The texts of a BEIR folder's `corpus.jsonl.gz`."""
    with gzip.open(corpus_file(folder), "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def first_per_source(pairs: Iterable[Pair], limit: int, *, seed: int = 0) -> list[Pair]:
    """At most `limit` pairs of every source, drawn at random by the seed."""
    by_source: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_source.setdefault(pair.source, []).append(pair)
    draw = random.Random(seed)
    return [pair for source in by_source.values() for pair in draw.sample(source, min(limit, len(source)))]


@dataclass(frozen=True, eq=False)
class RaggedIds:
    """The token ids of many texts: `values` uint16 or int32 [n], of text i from `offsets[i]` to `offsets[i + 1]`."""

    values: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def select(self, indices: Iterable[int]) -> list[list[int]]:
        """Lists of ids, as `ColBERT.query_tokens` takes them."""
        return [self[i].tolist() for i in indices]


@dataclass(frozen=True, eq=False)
class TokenizedPairs:
    """Pairs as token ids, and what a batch needs to know about them.

    Attributes:
        queries, positives: ids without special tokens.
        lengths: int [N], the tokens that a pair takes of a batch, special tokens included.
        sources, positive_groups: int [N].
        teacher_index: int [N, 2], the rows of query and positive in the teacher's vectors, or -1.
    """

    queries: RaggedIds
    positives: RaggedIds
    lengths: np.ndarray
    sources: np.ndarray
    positive_groups: np.ndarray
    teacher_index: np.ndarray

    @classmethod
    def from_pairs(cls, pairs: Sequence[Pair], model: ColBERT, teacher: Teacher | None) -> TokenizedPairs:
        """Tokenise as `model` does, to the lengths of its config."""
        texts = [pair.query for pair in pairs], [pair.positive for pair in pairs]
        c, sources, groups = model.config, {}, {}
        queries, query_lengths = _tokenize(texts[0], model.query_ids, model.query_tokens, c.query_length)
        positives, lengths = _tokenize(texts[1], model.document_ids, model.document_tokens, c.document_length)
        return cls(
            queries=queries,
            positives=positives,
            lengths=query_lengths + lengths,
            sources=np.array([sources.setdefault(pair.source, len(sources)) for pair in pairs]),
            positive_groups=np.array([groups.setdefault((pair.source, pair.group), len(groups)) for pair in pairs]),
            teacher_index=np.stack(
                [teacher.index(side) if teacher else np.full(len(pairs), -1) for side in texts], axis=1
            ),
        )

    def save(self, file: Path, inputs: dict[str, object], files: Mapping[str, bytes] | None = None) -> None:
        """Write an .npz file that remembers what the pairs were made of, with the `files` of the tokenizer."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        for side in ("queries", "positives"):
            arrays |= {f"{side}.{name}": value for name, value in vars(getattr(self, side)).items()}
        with replacing(file) as beside, beside.open("wb") as part:
            arrays |= {FILE + name: np.frombuffer(content, np.uint8) for name, content in (files or {}).items()}
            np.savez(part, allow_pickle=False, inputs=np.array(json.dumps(inputs)), **arrays)

    @classmethod
    def load(cls, file: Path, inputs: dict[str, object]) -> TokenizedPairs:
        """Read what `save` has written. ValueError: it was made of something else than `inputs`, or is damaged."""
        arrays = _arrays(file)
        check_same(file, json.loads(str(arrays.pop("inputs", "{}"))), inputs)
        queries, positives = (
            RaggedIds(arrays[f"{side}.values"], arrays[f"{side}.offsets"]) for side in ("queries", "positives")
        )
        return cls(queries, positives, **{name: array for name, array in arrays.items() if "." not in name})


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
    tokens_of: Callable[[Sequence[Sequence[int]]], Tokens],
    longest: int,
) -> tuple[RaggedIds, np.ndarray]:
    """The ids of texts, and the tokens that the model reads of each."""
    parts: list[np.ndarray] = [np.zeros(0, np.int32)]
    lengths, read = [0], []
    for start in range(0, len(texts), 4096):
        # Tokens of ordinary text are far shorter than 32 characters; the cut saves most of the work.
        ids = ids_of([text[: 32 * longest] for text in texts[start : start + 4096]])
        parts.append(np.fromiter(chain.from_iterable(ids), np.int32))
        lengths += map(len, ids)
        read += tokens_of(ids).batch.lengths
    values = np.concatenate(parts)
    small = values.max(initial=0) < 1 << 16
    return RaggedIds(values.astype(np.uint16) if small else values, np.cumsum(lengths)), np.array(read)
