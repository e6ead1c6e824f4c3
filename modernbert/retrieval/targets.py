"""Where units are written: a store of ours, in parts that are merged at the end, or an engine."""

from __future__ import annotations

import os
import re
import sqlite3
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import quote

from ..late_interaction import Ragged
from .documents.find import Key
from .engines import Row, Table, open_table
from .engines.held import Held, document_key, passage_number
from .passages import Document
from .store.draft import open_draft
from .store.folder import is_store, remove_store
from .store.format import MANIFEST, PASSAGES, Manifest, find_manifest
from .store.request import IndexRequest
from .store.writer import StoreWriter
from .windows import Window

PART: IndexRequest = {"paths": [], "model": None, "dtype": None, "prefilter": False}
"""The request of every part: its name says what it holds."""

PART_NAME = re.compile("[0-9a-f]{32}")


class Share(NamedTuple):
    """A unit as it was read.

    Attributes:
        name: a hash of the new documents, and of what encodes them.
        keys: of all documents, in order. unread: the files that could not be read. notes: what was repaired.
        documents: the new ones. windows: their passages; none if the part `name` is finished.
    """

    name: str
    keys: list[Key]
    unread: list[str]
    notes: list[str]
    documents: list[Document]
    windows: list[Window]


class Target(Protocol):
    """What a worker asks about, and writes to."""

    def is_current(self, key: Key) -> bool:
        """Whether this document is there already."""
        ...

    def is_finished(self, name: str) -> bool:
        """Whether the part `name` has been written."""
        ...

    def clear(self, share: Share) -> None:
        """Remove what a process that was lost may have written of the new documents of a share."""
        ...

    def write(self, share: Share, vectors: Ragged) -> None:
        """Write the new documents of a share."""
        ...

    def close(self) -> None:
        """Release files and connections."""
        ...


class StoreTarget:
    """The parts of a store: a folder beside it that all workers see, with a small store for each unit."""

    def __init__(self, output: str, manifest: Manifest) -> None:
        # Parts are in float16, and the driver gives them the codec and the pre-filter of the store.
        self.parts, self._manifest = parts_folder(output), replace(manifest, prefilter=None, codec=None)
        folder, before = Path(output), find_manifest(Path(output))
        self._table = sqlite3.connect(":memory:")
        if before:
            # A published table never changes.
            address = f"file:{quote(os.path.abspath(folder / before.table))}?mode=ro&immutable=1"
            self._table = sqlite3.connect(address, uri=True, check_same_thread=False)
        self._is_new = before is None

    def is_current(self, key: Key) -> bool:
        if self._is_new:
            return False
        found = self._table.execute("SELECT digest FROM documents WHERE path = ? AND id = ?", (key.path, key.id))
        return found.fetchone() == (key.digest,)

    def is_finished(self, name: str) -> bool:
        return (self.parts / name / MANIFEST).is_file()

    def clear(self, share: Share) -> None:
        """Nothing to do: a part is finished or does not count."""

    def write(self, share: Share, vectors: Ragged) -> None:
        """A part without passages is not written: it would be no store."""
        folder = self.parts / share.name
        if self.is_finished(share.name) or not share.windows:
            return
        with open_draft(folder, PART) as draft:
            writer = StoreWriter(draft, self._manifest)
            for document in share.documents:
                writer.add_document(document)
            for start in range(0, len(share.windows), PASSAGES):
                group = slice(start, start + PASSAGES)
                rows = vectors[group]
                writer.add_windows(share.windows[group], lambda rows=rows: rows)
            writer.commit()

    def remove_parts(self) -> None:
        """Remove all parts, and their folder if nothing is left in it."""
        if self.parts.is_dir():
            for name in filter(PART_NAME.fullmatch, os.listdir(self.parts)):
                if is_store(self.parts / name):
                    remove_store(self.parts / name)
            with suppress(OSError):  # not empty
                self.parts.rmdir()

    def close(self) -> None:
        self._table.close()


class EngineTarget:
    """A table or a collection of an engine. Rows are added; a document counts when all of its rows are there."""

    def __init__(self, output: str, manifest: Manifest, table: Table | None = None) -> None:
        self._table, self._shares = table or open_table(output, manifest), table is not None
        self.held = Held(self._table)

    def is_current(self, key: Key) -> bool:
        return self.held.is_complete(document_key(key))

    def is_finished(self, name: str) -> bool:
        return False

    def clear(self, share: Share) -> None:
        self._table.remove([document_key(_key(document)) for document in share.documents])

    def write(self, share: Share, vectors: Ragged) -> None:
        """Add the rows of the new documents, after what a killed process has left of them was removed."""
        keys = {(document.path, document.id): _key(document) for document in share.documents}
        names = {place: document_key(key) for place, key in keys.items()}
        if broken := [name for name in names.values() if self.held.holds(name)]:
            self._table.remove(broken)
        counts: dict[tuple[str, str], int] = dict.fromkeys(keys, 0)
        for window in share.windows:
            counts[window.passage.path, window.passage.id] += 1
        rows, done = [], dict.fromkeys(keys, 0)
        for window, x_NE in zip(share.windows, vectors, strict=True):
            place = window.passage.path, window.passage.id
            number = passage_number(names[place], done[place])
            done[place] += 1
            rows.append(Row(number, window.passage, x_NE, names[place], keys[place].digest, counts[place]))
        for start in range(0, len(rows), PASSAGES):
            self._table.add(rows[start : start + PASSAGES])

    def close(self) -> None:
        self.held.close()
        if not self._shares:
            self._table.close()


def parts_folder(output: str) -> Path:
    """Where the parts of a store are: beside it, so that they move into it without a copy."""
    return Path(f"{os.path.abspath(output)}.parts")


def _key(document: Document) -> Key:
    return Key(document.path, document.id, document.digest, document.line)
