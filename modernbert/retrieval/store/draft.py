"""A draft: the next state of a store while it is written. One process at a time has one."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from .format import (
    LOCK,
    MANIFEST,
    REPAIR,
    SHARDS,
    UNFINISHED,
    Manifest,
    Request,
    file_sha256,
    find_manifest,
    read_unfinished,
    resume_command,
    write_json,
)

TABLES = """
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

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    if names and not names & {MANIFEST, UNFINISHED, SHARDS, LOCK}:
        raise ValueError(f"{folder} is not a store, and not empty: give the folder of a store, or a new one")
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _check_unfinished(folder, request)
        for left_over in [*folder.glob(".*"), *(folder / SHARDS).glob(".*")]:
            left_over.unlink()  # A run was killed while it wrote this file.
        manifest, table_file, table = find_manifest(folder), folder / f".passages.{os.getpid()}", None
        unchanged = f"the store is as it was; make room, then resume with: {resume_command(request, folder)}"
        try:
            write_json(folder / UNFINISHED, request)
            if manifest:
                _copy_table(folder, manifest, table_file)
            table = sqlite3.connect(table_file, isolation_level=None)
            table.execute("PRAGMA journal_mode = OFF")
            table.execute("PRAGMA synchronous = OFF")
            if not manifest:
                table.executescript(TABLES)
            table.execute("BEGIN")
            yield Draft(folder, manifest, table, table_file)
        except ValueError:
            (folder / UNFINISHED).unlink(missing_ok=True)  # The request is impossible, so it cannot be resumed.
            raise
        except sqlite3.Error as error:
            raise OSError(f"cannot write to {folder} ({error}): {unchanged}") from error
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise OSError(error.errno, f"no room left for {folder}: {unchanged}") from error
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
        raise ValueError(
            f"the store {folder} is unfinished; {resume}; or, to give that up, delete {folder / UNFINISHED}"
        )


def _copy_table(folder: Path, manifest: Manifest, target: Path) -> None:
    shutil.copyfile(folder / manifest.table, target)
    if file_sha256(target) != manifest.sha256:
        raise ValueError(f"{folder / manifest.table} is damaged: {REPAIR}")
