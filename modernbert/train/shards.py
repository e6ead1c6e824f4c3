"""A corpus as token ids on disk: written once, by several processes, and mapped into memory by every reader.

A folder has `manifest.json` and, for each shard, two .npy files: the ids of its documents, one after another and
without special tokens, and the length of each document. A document is never cut off: a model reads a long one in
several pieces.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from ..files import output_folder, replacing
from ..json_files import read_json
from ..packing import Packed
from ..tokenizer import Tokenizer
from .examples import read_texts
from .options import check_same
from .ragged import RaggedBuilder, chunks, packed_row
from .reading import Source, files

MANIFEST = "manifest.json"
CHARACTERS = 1 << 26
"""Characters of a shard: about 16 million tokens."""


def write_shards(
    source: Source,
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    *,
    names: Mapping[str, str] | None = None,
    processes: int = 1,
    characters: int = CHARACTERS,
) -> Shards:
    """Tokenise the "text" of every row of a source. The files are the same for any number of processes.

    A run that was stopped, even by `kill -9` or by a full disk, goes on where it was when it is started again. If all is
    there, nothing is read.

    Args:
        names: as in `read_rows`.
        processes: how many tokenise. With more than one, a script must do this below `if __name__ == "__main__":`.
        characters: of a shard; it ends with the document that reaches them.

    Raises:
        ValueError: as `read_texts`; shards of another source or tokenizer are in `folder`; the source has no text.
        FileExistsError: `folder` holds files that are not shards.
        RuntimeError: a process has died.
    """
    folder = output_folder(folder)
    front, back = _frame(tokenizer)
    request = {
        "source": _fingerprint(files(source)) if isinstance(source, (str, os.PathLike)) else None,
        "names": dict(names or {}),
        "characters": characters,
        "tokenizer": tokenizer_hash(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "front": front,
        "back": back,
    }
    if (folder / MANIFEST).exists():
        there = read_json(folder, MANIFEST)
        finished = there.pop("shards", None) is not None
        check_same(folder / MANIFEST, there, request)
        if finished:
            return Shards(folder, tokenizer)
    elif folder.exists() and os.listdir(folder):
        raise FileExistsError(f"{folder} holds files, but no {MANIFEST}: choose a new folder for shards")
    folder.mkdir(parents=True, exist_ok=True)
    _write_manifest(folder, {**request, "shards": None})
    shards = enumerate(_cut(read_texts(source, names=names), characters))
    jobs = ((number, texts) for number, texts in shards if not _ids_file(folder, number).exists())
    if processes == 1:
        for number, texts in jobs:
            _write_shard(folder, number, texts, tokenizer)
    else:
        _write_in_processes(folder, jobs, tokenizer, processes)
    sizes = []
    while _ids_file(folder, len(sizes)).exists():
        lengths = np.load(_lengths_file(folder, len(sizes)))
        sizes.append([len(lengths), int(lengths.sum())])
    if not sum(tokens for _, tokens in sizes):
        raise ValueError(f"{source if isinstance(source, (str, os.PathLike)) else 'the source'} has no text")
    _write_manifest(folder, {**request, "shards": sizes})
    return Shards(folder, tokenizer)


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
        lengths, self._ids = [], []
        for number, (documents, tokens) in enumerate(self.about["shards"]):
            lengths.append(_load(_lengths_file(self.folder, number), documents))
            self._ids.append(np.asarray(_load(_ids_file(self.folder, number), tokens)))
        self.lengths = np.concatenate(lengths)
        self._starts = np.array([0, *accumulate(tokens for _, tokens in self.about["shards"])])

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
        special = len(self.about["front"]) + len(self.about["back"])
        room = max_length - special
        if room < 1:
            raise ValueError(f"max_length is {max_length}, but the {special} special tokens of a piece leave no room")
        lengths = self.lengths.astype(np.int64)
        counts = -(-lengths // room)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        before = (np.arange(len(first)) - first) * room  # tokens of the document in front of each piece
        starts = np.repeat(np.cumsum(lengths) - lengths, counts) + before
        sizes = np.minimum(room, np.repeat(lengths, counts) - before).astype(np.int32)
        return Pieces(self, starts, sizes + np.int32(special))

    def fill(self, target: np.ndarray, places: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> None:
        """Copy the ids from `starts[i]`, `sizes[i]` of them and all of one document, to `places[i]` of `target`."""
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
        front, back = self.shards.about["front"], self.shards.about["back"]
        lengths = self.lengths[indices].astype(np.int64)
        ends = np.cumsum(lengths)
        ids = np.empty(lengths.sum(), np.int64)
        for place, token in enumerate(front):
            ids[ends - lengths + place] = token
        for place, token in enumerate(back):
            ids[ends - len(back) + place] = token
        sizes = lengths - len(front) - len(back)
        self.shards.fill(ids, ends - lengths + len(front), self.starts[indices], sizes)
        return packed_row(torch.from_numpy(ids), lengths)


def _cut(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= characters:
            yield part
            part, size = [], 0
    if part:
        yield part


def _write_in_processes(
    folder: Path, jobs: Iterable[tuple[int, list[str]]], tokenizer: Tokenizer, processes: int
) -> None:
    running: deque[Future[None]] = deque()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        try:
            for number, texts in jobs:
                running.append(pool.submit(_write_shard, folder, number, texts, tokenizer))
                if len(running) > processes:  # the texts of one more wait in memory
                    running.popleft().result()
            while running:
                running.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a process that wrote to {folder} has died, with its reason on stderr: out of memory, or a script that "
                'does not call write_shards below `if __name__ == "__main__":`. The same call goes on from here'
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # an error is raised now, not after all other shards
            raise


def _write_shard(folder: Path, number: int, texts: list[str], tokenizer: Tokenizer) -> None:
    """The lengths first: a shard whose ids are there is whole."""
    built = RaggedBuilder()
    front, back = map(len, _frame(tokenizer))
    for chunk in chunks(texts, 512):
        found = tokenizer.encode_batch(chunk, max_length=sys.maxsize, offsets=False, warn=False)
        built.add([each.ids[front : len(each.ids) - back] for each in found])
    ids = built.build()
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    for file, array in ((_lengths_file, ids.lengths.astype(np.uint32)), (_ids_file, ids.values.astype(dtype))):
        with replacing(file(folder, number)) as beside, beside.open("wb") as part:
            np.save(part, array)


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens in front of a text and behind it."""
    empty, short = (each.ids for each in tokenizer.encode_batch(["", "a"], offsets=False, warn=False))
    front = len(os.path.commonprefix([empty, short]))  # pyright: ignore[reportArgumentType]
    return empty[:front], empty[front:]


def _fingerprint(paths: Iterable[Path]) -> str:
    """A hash of names, sizes, and the first and last megabyte of files: quick for a large corpus, which may be moved."""
    total = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            size = path.stat().st_size
            total.update(f"{path.name} {size}\n".encode() + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            total.update(file.read())
    return total.hexdigest()


def _write_manifest(folder: Path, content: Mapping[str, object]) -> None:
    with replacing(folder / MANIFEST) as beside:
        beside.write_text(json.dumps(content))


def _ids_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.ids.npy"


def _lengths_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.lengths.npy"


def _load(file: Path, size: int) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r") if size else np.load(file)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} is damaged or missing; delete it and manifest.json, and call write_shards: {error}") from error
    if array.shape != (size,):
        raise ValueError(f"{file} has {array.shape} numbers, but its manifest {size}: it belongs to other shards")
    return array
