"""Files of an object store, named by a URL such as `s3://bucket/docs`, through fsspec and its package for that store.

Addresses and credentials come from where that package looks for them: for S3 `AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`
and the files in `~/.aws`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from .documents.find import is_wanted
from .documents.ignore import Excluded

BLOCK = 8 << 20
"""Bytes copied at a time."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL."""
    return "://" in os.fspath(path)


def find_remote(url: str, exclude: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """The files to read at or below a URL, in sorted order, each with its size. As `find_files`, but for git's rules.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: the store cannot be reached, or refuses.
        ModuleNotFoundError: fsspec, or its package for this kind of store, is not installed.
    """
    excluded = Excluded(exclude)
    with _explained(url):
        system, root = _system(url)
        is_file = system.isfile(root)
        found = {root: system.info(root)} if is_file else system.find(root, detail=True)
    if not found:
        raise FileNotFoundError(f"nothing is at {url}")
    for path, entry in sorted(found.items()):
        inside = PurePosixPath(path).relative_to(root) if not is_file else PurePosixPath()
        folders = [f"{root}/{folder}" for folder in inside.parents if folder.parts]
        hidden = any(part.startswith(".") or part == "node_modules" for part in inside.parts)
        left_out = any(excluded.decide(root, folder, True) for folder in folders) or excluded.decide(root, path, False)
        if not left_out and (is_file or (not hidden and is_wanted(inside.name))):
            yield system.unstrip_protocol(path), entry["size"]


@contextmanager
def opened(path: str) -> Iterator[Any]:
    """A file for reading bytes, on this machine or at a URL. OSError as for `find_remote`."""
    if not is_remote(path):
        with open(path, "rb") as file:
            yield file
        return
    with _explained(path):
        system, inner = _system(path)
        file = system.open(inner, "rb", block_size=BLOCK)
    try:
        yield file
    finally:
        file.close()


@contextmanager
def copied(path: str, start: int = 0, stop: int | None = None) -> Iterator[Path]:
    """A temporary copy of the bytes `start` to `stop` of a file, with a name that ends as that of the file."""
    with tempfile.TemporaryDirectory(prefix="modernbert-") as folder:
        copy = Path(folder, f"copy{''.join(PurePosixPath(path).suffixes[-2:])}")
        with opened(path) as source, copy.open("wb") as target, _explained(path):
            source.seek(start)
            while block := source.read(BLOCK if stop is None else min(BLOCK, stop - source.tell())):
                target.write(block)
        yield copy


def _system(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{url} needs {error.name}: pip install fsspec") from error
    return url_to_fs(url)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Name the URL in errors. The packages of object stores raise the exceptions of their clients."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"nothing is at {url}: {error}") from error
    except ImportError:
        raise
    except Exception as error:
        raise OSError(f"cannot read {url}: {type(error).__name__}: {error}") from error
