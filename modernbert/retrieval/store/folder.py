"""The folder of a store: how it is recognised, and which of its files are the store's own.

A folder is a store by the content of its manifest or of its request, which is the first file of a new store. Any other
folder that is not empty is refused. Only regular files with the full name of a store's file are ever removed, so what
others put into a store (`.git`, `.DS_Store`, a README) stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..documents.text import file_name
from .format import MANIFEST, SHARDS, read_manifest
from .request import UNFINISHED, read_request

LOCK = "lock"

_HASH = "[0-9a-f]{16}"
_PART = rf"((lists-{_HASH}-)?{_HASH}|centroids|codec)-{_HASH}\.safetensors"
PARTS = re.compile(_PART)
TABLES = re.compile(rf"passages-{_HASH}\.sqlite")
# As `files.replacing` and `draft.open_draft` name them: a run was killed while it wrote such a file.
HALF_MARK = re.compile(rf"\.{re.escape(UNFINISHED)}\.[0-9a-f]{{8}}")
HALF_FILES = re.compile(rf"\.({re.escape(UNFINISHED)}|{re.escape(MANIFEST)}|passages\.sqlite)\.[0-9a-f]{{8}}")
HALF_PARTS = re.compile(rf"\.{_PART}\.[0-9a-f]{{8}}")


def holds_store(folder: Path) -> bool:
    """Whether the folder holds a store, finished or not. False if it does not exist or is empty.

    Raises:
        ValueError: it holds something else or a damaged store, or its name cannot be that of a store.
        NotADirectoryError: it is not a folder.
    """
    check_name(folder)
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise NotADirectoryError(
                f"{folder} is a file or a broken link, not a folder: give the folder of a store, or a new one"
            )
        return False
    if is_store(folder):
        return True
    if (folder / MANIFEST).is_file():
        read_manifest(folder)  # Raises: it is damaged, of another version, or the file of another program.
    if any(not HALF_MARK.fullmatch(name) for name in os.listdir(folder)):
        raise ValueError(f"{folder} is not a store, and not empty: give the folder of a store, or a new one")
    return False


def is_store(folder: Path) -> bool:
    """Whether the folder holds a store, finished or not, that is not damaged."""
    try:
        read = read_manifest if (folder / MANIFEST).is_file() else read_request
        return read(folder) is not None
    except ValueError:
        return False


def check_name(folder: Path) -> None:
    """Raise ValueError if the name is not UTF-8: safetensors and other libraries could not open the files in it."""
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the name {file_name(folder)} is not UTF-8: give the folder another name") from error


def own_files(folder: Path) -> Iterator[Path]:
    """The files that the store has written, finished or not, except its lock."""
    for name in (MANIFEST, UNFINISHED):
        if (folder / name).is_file():
            yield folder / name
    for pattern, place in ((TABLES, folder), (PARTS, folder / SHARDS)):
        yield from files_named(pattern, place)


def remove_store(folder: Path) -> None:
    """Remove a store, finished or not, that no process writes to. What others put into it stays."""
    (folder / SHARDS).mkdir(exist_ok=True)  # a killed run may not have made it
    half = [*files_named(HALF_FILES, folder), *files_named(HALF_PARTS, folder / SHARDS)]
    for file in (*own_files(folder), *half, folder / LOCK):
        file.unlink(missing_ok=True)
    for place in (folder / SHARDS, folder):
        with suppress(OSError):  # not empty
            place.rmdir()


def files_named(pattern: re.Pattern[str], folder: Path) -> list[Path]:
    """The regular files in a folder whose whole names match."""
    with os.scandir(folder) as entries:
        return [
            Path(entry.path)
            for entry in entries
            if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
        ]
