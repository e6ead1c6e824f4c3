"""Which documents an engine holds, in a temporary database that is read from the engine once.

The rows of a document carry its key, a hash of its path, id and content, and how many rows it has. A document whose
rows are not all there was left by a process that was killed: it does not count.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from ..documents.find import Key
from ..store.fields import Fields, nfc
from ..store.filters import Condition, numbers_at, numbers_where


class HeldRow(NamedTuple):
    """A row of an engine, without its passage: of which document it is, and how many rows that has."""

    document: str
    path: str
    id: str
    digest: str
    line: int | None
    metadata: str
    parts: int


class Scanned(Protocol):
    """What can list its rows."""

    def scan(self) -> Iterator[HeldRow]:
        """All rows, in any order."""
        ...


def document_key(key: Key) -> str:
    """The key of a document: 32 hexadecimal digits. Another content is another document."""
    return hashlib.sha256(f"{key.path}\0{key.id}\0{key.digest}".encode()).hexdigest()[:32]


def passage_number(document: str, part: int) -> int:
    """The number of a passage in an engine, from 0 to 2^63 - 1, from the key of its document.

    Of a hundred million passages, two have the same one with a probability of 0.0005.
    """
    digest = hashlib.sha256(f"{document} {part}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Held:
    """The documents of an engine as they were when this was made."""

    def __init__(self, scanned: Scanned) -> None:
        # A temporary database moves from memory to disk as it grows.
        self.table = sqlite3.connect("", check_same_thread=False)
        self.table.execute("""CREATE TABLE held (document TEXT PRIMARY KEY, path TEXT, id TEXT, digest TEXT,
            line INTEGER, metadata TEXT, parts INTEGER, rows INTEGER) WITHOUT ROWID""")
        insert = """INSERT INTO held VALUES (?, ?, ?, ?, ?, ?, ?, 1)
            ON CONFLICT (document) DO UPDATE SET rows = rows + 1"""
        self.table.executemany(insert, scanned.scan())

    def holds(self, document: str) -> bool:
        """Whether there is a row of the document with this key."""
        return self._rows(document) is not None

    def is_complete(self, document: str) -> bool:
        """Whether the document with this key has all of its rows."""
        found = self._rows(document)
        return found is not None and found[0] == found[1]

    def close(self) -> None:
        self.table.close()

    def _rows(self, document: str) -> tuple[int, int] | None:
        return self.table.execute("SELECT parts, rows FROM held WHERE document = ?", (document,)).fetchone()


class Documents:
    """The paths and the metadata of the documents in an engine, to be filtered as those of a store are."""

    def __init__(self, scanned: Scanned) -> None:
        self._table = sqlite3.connect("", check_same_thread=False)
        self._table.create_function("nfc", 1, nfc, deterministic=True)
        self._table.execute("CREATE TABLE documents (number INTEGER PRIMARY KEY, document TEXT UNIQUE, path, metadata)")
        rows = ((row.document, row.path, row.metadata) for row in scanned.scan())
        self._table.executemany("INSERT OR IGNORE INTO documents VALUES (NULL, ?, ?, ?)", rows)
        self._fields = Fields(self._table)

    def matching(self, path: str | None, wanted: Sequence[Condition]) -> list[str]:
        """The keys of the documents at paths like `path` that fulfil all conditions. ValueError as `numbers_where`."""
        chosen: set[int] | None = None if path is None else set(numbers_at(self._table, path).tolist())
        if wanted:
            found = set(numbers_where(self._table, self._fields, wanted).tolist())
            chosen = found if chosen is None else chosen & found
        rows = self._table.execute("SELECT number, document FROM documents ORDER BY number")
        return [document for number, document in rows if chosen is None or number in chosen]

    def close(self) -> None:
        self._table.close()
