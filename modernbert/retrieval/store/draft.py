"""A draft: the next state of a store while it is written. One process at a time has one."""

from __future__ import annotations

import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from ...files import DISK_FULL
from .folder import HALF_FILES, HALF_PARTS, LOCK, files_named, holds_store
from .format import REPAIR, SHARDS, Manifest, file_sha256, find_manifest
from .request import NOTHING, UNFINISHED, Request, read_unfinished, resume_command, write_request

# The `line` of a passage is 0 if it has none, and negative if it is a page.
SCHEMA = """
CREATE TABLE documents (
    number INTEGER PRIMARY KEY, path TEXT NOT NULL, id TEXT NOT NULL, line INTEGER,
    digest TEXT NOT NULL, metadata TEXT NOT NULL, UNIQUE (path, id)
);
CREATE TABLE passages (
    number INTEGER PRIMARY KEY AUTOINCREMENT, document INTEGER NOT NULL, shard INTEGER NOT NULL, row INTEGER NOT NULL,
    title TEXT NOT NULL, text TEXT NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL, line INTEGER NOT NULL,
    UNIQUE (shard, row)
);
CREATE INDEX passages_of_documents ON passages (document);
CREATE TABLE shards (
    number INTEGER PRIMARY KEY AUTOINCREMENT, file TEXT NOT NULL, sha256 TEXT NOT NULL, passages INTEGER NOT NULL
);
CREATE TABLE lists (shard INTEGER PRIMARY KEY, file TEXT NOT NULL, sha256 TEXT NOT NULL);
"""


class Draft(NamedTuple):
    """The next state of a store.

    Attributes:
        folder: the store. manifest: that of its present state; None for a new store.
        table, table_file: a copy of the table, in an open transaction.
    """

    folder: Path
    manifest: Manifest | None
    table: sqlite3.Connection
    table_file: Path


@contextmanager
def open_draft(folder: Path, request: Request) -> Iterator[Draft]:
    """Lock the store in `folder` and yield its draft. Unless the draft is committed, the store stays as it was.

    `request` is kept in the folder until the commit, so that an interrupted run can be finished.

    Raises:
        ValueError: the folder holds something else, or an unfinished run with another request.
        BlockingIOError: another process is writing to the store.
        OSError: the disk is full, or the folder cannot be written to.
    """
    is_new = not holds_store(folder)
    with _explained(folder, request):
        folder.mkdir(parents=True, exist_ok=True)
        if is_new:
            write_request(folder, request)  # First of all: whenever the run is killed, the folder is known as a store.
        with _locked(folder):
            _check_unfinished(folder, request)
            (folder / SHARDS).mkdir(exist_ok=True)
            for left_over in [*files_named(HALF_FILES, folder), *files_named(HALF_PARTS, folder / SHARDS)]:
                left_over.unlink()
            write_request(folder, request)
            with _open_table(folder) as draft:
                yield draft


@contextmanager
def _explained(folder: Path, request: Request) -> Iterator[None]:
    """Name the store, and the command that resumes, in errors that are about the disk."""
    unchanged = f"the store is as it was; make room, then resume with: {resume_command(request, folder)}"
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(f"cannot write to {folder} ({error}): {unchanged}") from error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise OSError(error.errno, f"no room left for {folder}: {unchanged}") from error


@contextmanager
def _open_table(folder: Path) -> Iterator[Draft]:
    # An absolute path, because SQLite takes a relative one that begins with "file:" for a URI.
    table_file, table = Path(os.path.abspath(folder / f".passages.sqlite.{uuid.uuid4().hex[:8]}")), None
    manifest = find_manifest(folder)
    try:
        if manifest:
            _copy_table(folder, manifest, table_file)
        table = sqlite3.connect(table_file, isolation_level=None)
        table.execute("PRAGMA journal_mode = OFF")
        table.execute("PRAGMA synchronous = OFF")
        if not manifest:
            table.executescript(SCHEMA)
        table.execute("BEGIN")
        yield Draft(folder, manifest, table, table_file)
    except ValueError:  # The request is impossible, so it cannot be resumed.
        if manifest:
            (folder / UNFINISHED).unlink(missing_ok=True)
        else:
            write_request(folder, NOTHING)
        raise
    finally:
        if table:
            table.close()
        table_file.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / LOCK).acquire(timeout=0):
            yield
    except Timeout as error:
        raise BlockingIOError(f"another process is writing to {folder}: try again when it has finished") from error


def _check_unfinished(folder: Path, request: Request) -> None:
    """Raise ValueError if there is an unfinished run with another request."""
    before = read_unfinished(folder)
    if before is not None and before != request:
        resume = f"resume with: {resume_command(before, folder)}"
        useless = folder / UNFINISHED if find_manifest(folder) else folder
        raise ValueError(f"the store {folder} is unfinished; {resume}; or, to give that up, delete {useless}")


def _copy_table(folder: Path, manifest: Manifest, target: Path) -> None:
    if not (folder / manifest.table).is_file():
        raise FileNotFoundError(f"{folder / manifest.table} is missing: {REPAIR}")
    shutil.copyfile(folder / manifest.table, target)
    if file_sha256(target) != manifest.sha256:
        raise ValueError(f"{folder / manifest.table} is damaged: {REPAIR}")
