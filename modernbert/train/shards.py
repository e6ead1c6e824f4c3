"""Tokenise a corpus once, in several processes, to a folder of shards that every run maps into memory (`corpus.py`)."""

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
from pathlib import Path

import numpy as np
from filelock import FileLock

from ..files import half_written, output_folder, replacing
from ..json_files import read_json
from ..tokenizer import Tokenizer
from .claim import LOCK, foreign_names
from .corpus import MANIFEST, ids_file, lengths_file, tokenizer_hash
from .corpus import Shards as Shards
from .examples import read_texts
from .ragged import RaggedBuilder, chunks
from .reading import Source, files

HALF = half_written(r"\d{6}\.(ids|lengths)\.npy|manifest\.json")
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

    A run that was stopped, even by `kill -9` or by a full disk, goes on where it was when it is started again. If all
    is there, nothing is read. Of several callers, such as the ranks of a run, the first one writes and the others wait.

    A source is known by the names, the sizes, and the first and last megabyte of its files. An iterable has none of
    these: for another one give another folder.

    Args:
        names: as in `read_rows`.
        processes: how many tokenise. With more than one, a script must do this below `if __name__ == "__main__":`.
        characters: of a shard; it ends with the document that reaches them.

    Raises:
        ValueError: as `read_texts`; `folder` has shards of another source or tokenizer; the source has no text.
        FileExistsError: `folder` holds files that are not shards.
        RuntimeError: a process has died.
    """
    folder = output_folder(folder)
    request = _request(source, tokenizer, names, characters)
    if others := foreign_names(folder, HALF, (folder / MANIFEST).exists):
        raise FileExistsError(f"{folder} holds {others[0]} and no shards: choose a new folder for shards")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        if not _is_finished(folder, request):
            for path in filter(lambda path: HALF.fullmatch(path.name), folder.iterdir()):
                path.unlink()
            _write_manifest(folder, {**request, "shards": None})
            parts = enumerate(_cut(read_texts(source, names=names), characters))
            jobs = ((number, texts) for number, texts in parts if not ids_file(folder, number).exists())
            if processes == 1:
                for number, texts in jobs:
                    _write_shard(folder, number, texts, tokenizer)
            else:
                _write_in_processes(folder, jobs, tokenizer, processes)
            _write_manifest(folder, {**request, "shards": _sizes(folder)})
    return Shards(folder, tokenizer)


def _request(
    source: Source, tokenizer: Tokenizer, names: Mapping[str, str] | None, characters: int
) -> dict[str, object]:
    """What the shards depend on: the part of the manifest that is there from the beginning."""
    front, back = _around(tokenizer)
    return {
        "source": _fingerprint(files(source)) if isinstance(source, (str, os.PathLike)) else None,
        "names": dict(names or {}),
        "characters": characters,
        "tokenizer": tokenizer_hash(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "front": front,
        "back": back,
    }


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens in front of a text and behind it."""
    empty, short = (each.ids for each in tokenizer.encode_batch(["", "a"], offsets=False, warn=False))
    front = next((i for i, token in enumerate(empty) if token != short[i]), len(empty))
    return empty[:front], empty[front:]


def _fingerprint(paths: Iterable[Path]) -> str:
    """A hash of names, sizes, and the first and last megabyte of files: quick for a large corpus."""
    total = hashlib.blake2b(digest_size=16)
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            total.update(f"{path.name} {size}\n".encode() + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            total.update(file.read())
    return total.hexdigest()


def _is_finished(folder: Path, request: Mapping[str, object]) -> bool:
    """ValueError: the shards there, finished or not, are of another request."""
    if not (folder / MANIFEST).exists():
        return False
    there = read_json(folder, MANIFEST)
    if differs := [name for name in request if there.get(name) != request[name]]:
        what = "; ".join(f"{name} is {there.get(name)!r}, now {request[name]!r}" for name in differs)
        raise ValueError(f"{folder} has other shards: {what}. Choose another folder, or delete this one")
    return there.get("shards") is not None


def _cut(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """The texts of each shard."""
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
                if len(running) > processes:  # one shard of texts waits in memory, so that no process does
                    running.popleft().result()
            while running:
                running.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a process that wrote to {folder} has died, with its reason on stderr: out of memory, or a script "
                'that does not call write_shards below `if __name__ == "__main__":`. The same call goes on from here'
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # an error is raised now, not after all other shards
            raise


def _write_shard(folder: Path, number: int, texts: list[str], tokenizer: Tokenizer) -> None:
    built = RaggedBuilder()
    front, back = map(len, _around(tokenizer))
    for chunk in chunks(texts, 512):
        found = tokenizer.encode_batch(chunk, max_length=sys.maxsize, offsets=False, warn=False)
        built.add([each.ids[front : len(each.ids) - back] for each in found])
    ids = built.build()
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    # The lengths first: a shard whose ids are there is whole.
    arrays = {lengths_file: ids.lengths.astype(np.uint32), ids_file: ids.values.astype(dtype)}
    for file, array in arrays.items():
        with replacing(file(folder, number)) as beside, beside.open("wb") as part:
            np.save(part, array)


def _sizes(folder: Path) -> list[tuple[int, int]]:
    """Documents and tokens of each shard."""
    sizes = []
    while ids_file(folder, len(sizes)).exists():
        lengths = np.load(lengths_file(folder, len(sizes)))
        sizes.append((len(lengths), int(lengths.sum())))
    if not sum(tokens for _, tokens in sizes):
        raise ValueError(f"the source of {folder} has no text: there is nothing to learn from")
    return sizes


def _write_manifest(folder: Path, content: Mapping[str, object]) -> None:
    with replacing(folder / MANIFEST) as beside:
        beside.write_text(json.dumps(content))
