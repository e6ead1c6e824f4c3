"""The next state of a store: what may happen to documents and shards, until it is published or dropped."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ...heads.colbert import ColBERT
from ...inference.encode import encode_tokens
from ...late_interaction import Ragged
from ..documents.find import Key
from ..passages import Document
from ..windows import Window, batch
from . import format as files
from .candidates import update_lists
from .format import PASSAGES, Shard
from .identity import Model, fingerprint, load

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
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class Summary:
    """What a run did to documents, and what the store holds after it."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    documents: int = 0
    passages: int = 0


@contextmanager
def updating(folder: Path, asked: dict[str, Any]) -> Iterator[Update]:
    """An update of the store in `folder`, which nobody else can update meanwhile; after an error all is as before.

    `asked` is kept in the folder until the update is published, so that an interrupted one can be finished.
    """
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    if there and not there & {files.MANIFEST, files.UNFINISHED, files.SHARDS, files.LOCK}:
        raise ValueError(f"{folder} is no store, and not empty: give the folder of a store, or a new one")
    (folder / files.SHARDS).mkdir(parents=True, exist_ok=True)
    as_before = f"the store is as it was; make room, then go on with: {files.command(asked, folder)}"
    with _locked(folder):
        unfinished, beside = folder / files.UNFINISHED, folder / f".passages.{os.getpid()}"
        if (before := files.read_unfinished(folder)) not in (None, asked):
            on = f"go on with: {files.command(before, folder)}; or, to give that up, delete {unfinished}"
            raise ValueError(f"the store {folder} is unfinished; {on}")
        for left in [*folder.glob(".*"), *(folder / files.SHARDS).glob(".*")]:
            left.unlink()  # by a run that was killed while it wrote
        manifest = files.read_manifest(folder) if (folder / files.MANIFEST).is_file() else {}
        table = None
        try:
            files.write_json(unfinished, asked)
            if manifest:
                shutil.copyfile(folder / manifest["table"], beside)
                if files.file_sha256(beside) != manifest["sha256"]:
                    raise ValueError(f"{folder / manifest['table']} is damaged: {files.REPAIR}")
            table = sqlite3.connect(beside, isolation_level=None)
            table.execute("PRAGMA journal_mode = OFF")
            table.execute("PRAGMA synchronous = OFF")
            if not manifest:
                table.executescript(TABLES)
            table.execute("BEGIN")
            yield Update(folder, manifest, table)
        except ValueError:
            unfinished.unlink(missing_ok=True)  # What was asked for cannot be done: there is nothing to go on with.
            raise
        except sqlite3.Error as error:
            raise OSError(f"cannot write to {folder} ({error}): {as_before}") from error
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise OSError(error.errno, f"no room left for {folder}: {as_before}") from error
        finally:
            if table:
                table.close()
            beside.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / files.LOCK).acquire(timeout=0):
            yield
    except Timeout as error:
        raise BlockingIOError(f"another process is writing to {folder}: try again when it is done") from error


class Update:
    """The next state of a store: a copy of its table, which is being changed, and new shards beside the old.

    Attributes:
        colbert: what encodes, once `use` has said so.
        advance: is told the bytes of input that are done with.
        unread: files that are there and could not be read; what the store holds of them stays.
    """

    colbert: ColBERT

    def __init__(self, folder: Path, manifest: dict[str, Any], table: sqlite3.Connection) -> None:
        self.folder, self.table, self._manifest = folder, table, manifest
        self.advance: Callable[[float], None] = lambda size: None
        self.unread: set[str] = set()
        self._summary, self._bytes = Summary(), 0
        self._waiting: list[Window] = []
        table.execute("CREATE TEMP TABLE seen (number INTEGER PRIMARY KEY)")

    def use(self, model: Model | None, dtype: str | None, prefilter: bool) -> None:
        """Encode with this model into this dtype; a store that is there already has settled both.

        With `prefilter`, lists are kept from now on for searches that look at likely passages only.
        """
        old = self._manifest
        if dtype not in (None, *files.DTYPES):
            raise ValueError(f"dtype is {dtype!r}; it can be {', '.join(files.DTYPES)}")
        if old and dtype not in (None, old["dtype"]):
            raise ValueError(f"the store {self.folder} holds {old['dtype']}, not {dtype}: leave out the dtype")
        self.colbert, name = load(model, old or None)
        if not old:
            self._manifest = {"version": files.VERSION, "model": name, "fingerprint": fingerprint(self.colbert)}
            self._manifest |= {"dtype": dtype or "fp16", "width": self.colbert.dim}
        if prefilter:
            self._manifest.setdefault("prefilter", {})

    def known(self, key: Key) -> bool:
        """Whether the store holds this document as it is. Asked or put, it counts as seen."""
        found = self.table.execute(
            "SELECT number, digest, line FROM documents WHERE path = ? AND id = ?", (key.path, key.id)
        ).fetchone()
        if found is None or found[1] != key.digest:
            return False
        if found[2] != key.line:
            self.table.execute("UPDATE documents SET line = ? WHERE number = ?", (key.line, found[0]))
        self.table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (found[0],))
        self._summary.unchanged += 1
        return True

    def read(self, size: int) -> None:
        """Note that `size` bytes of input were read: they are done with when the passages before them are."""
        self._bytes += size
        if not self._waiting:
            self._done(self._bytes)

    def add(self, document: Document) -> None:
        """Take a document in, as yet without passages, in place of the one with the same path and id."""
        place = (document.path, document.id)
        old = self.table.execute("SELECT number FROM documents WHERE path = ? AND id = ?", place).fetchone()
        if old:
            self._remove("SELECT ?", old)
        self._summary.changed += bool(old)
        self._summary.added += not old
        metadata = json.dumps(dict(document.metadata), ensure_ascii=False)
        row = (*place, document.line, document.digest, metadata)
        number = self._insert("INSERT INTO documents VALUES (NULL, ?, ?, ?, ?, ?)", row)
        self.table.execute("INSERT INTO seen VALUES (?)", (number,))

    def put(self, window: Window) -> None:
        """Take a passage of an added document in; a full shard is encoded and written at once."""
        self._waiting.append(window)
        if len(self._waiting) == PASSAGES:
            self.flush()

    def flush(self) -> None:
        """Encode what is waiting into one shard, unless an interrupted run has done so."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            name = self._name(array for window in waiting for array in window[1:])
            shard = files.finished_part(self.folder, name)
            shard = shard or files.write_part(self.folder, name, self._encode(waiting))
            number = self._add_shard(*shard, len(waiting))
            owner = "(SELECT number FROM documents WHERE path = ? AND id = ?)"
            self.table.executemany(
                f"INSERT INTO passages VALUES (NULL, {owner}, {number}, ?, ?, ?, ?, ?, ?)",
                ((p.path, p.id, row, p.title, p.text, p.start, p.end, p.line) for row, (p, *_) in enumerate(waiting)),
            )
        self._done(self._bytes)

    def remove_unseen(self, roots: Sequence[str]) -> None:
        """Drop what the store holds from under `roots` and has not seen in this run."""
        self.table.execute("CREATE TEMP TABLE gone (number INTEGER PRIMARY KEY)")
        for root in roots:
            below = root.rstrip(os.sep) + os.sep
            self.table.execute(
                "INSERT OR IGNORE INTO gone SELECT number FROM documents WHERE path = ? OR (path >= ? AND path < ?)",
                (root, below, below[:-1] + chr(ord(os.sep) + 1)),
            )
        self.table.execute("DELETE FROM gone WHERE number IN (SELECT number FROM seen)")
        for path in self.unread:
            self.table.execute(
                "DELETE FROM gone WHERE number IN (SELECT number FROM documents WHERE path = ?)", (path,)
            )
        self._summary.removed += self.table.execute("SELECT count(*) FROM gone").fetchone()[0]
        self._remove("SELECT number FROM gone")

    def merge(self) -> None:
        """Join shards that are half empty or less: space is given back, and many small runs leave no crumbs."""
        counts = """SELECT s.number, s.file, s.sha256, s.passages, count(p.number) FROM shards s
            LEFT JOIN passages p ON p.shard = s.number GROUP BY s.number ORDER BY s.number"""
        group: list[tuple[Any, ...]] = []
        for shard in self.table.execute(counts).fetchall():
            if shard[4] > PASSAGES // 2:
                continue
            if sum(live for *_, live in group) + shard[4] > PASSAGES:
                self._join(group)
                group = []
            group.append(shard)
        self._join(group)

    def publish(self) -> Summary:
        """Make this the store, and clear away what only the old one needed."""
        count = "SELECT (SELECT count(*) FROM documents), (SELECT count(*) FROM passages)"
        summary = self._summary
        summary.documents, summary.passages = self.table.execute(count).fetchone()
        if not summary.passages and "table" not in self._manifest:
            raise ValueError("there is no text to index in the files and folders given")
        kept = set()
        if "prefilter" in self._manifest:
            self._manifest["prefilter"] = update_lists(self.folder, self.table, self._manifest["prefilter"])
            kept.add(self._manifest["prefilter"]["file"])
        kept |= {file for (file,) in self.table.execute("SELECT file FROM shards UNION SELECT file FROM lists")}
        beside = Path(self.table.execute("PRAGMA database_list").fetchone()[2])
        self.table.execute("COMMIT")
        self.table.close()
        files.flush(beside)
        sha256 = files.file_sha256(beside)
        name = f"passages-{sha256[:16]}.sqlite"
        beside.replace(self.folder / name)
        files.flush(self.folder)
        counts = {"documents": summary.documents, "passages": summary.passages}
        files.write_manifest(self.folder, {**self._manifest, **counts, "table": name, "sha256": sha256})
        (self.folder / files.UNFINISHED).unlink()
        for path in (self.folder / files.SHARDS).iterdir():
            if path.name not in kept:
                path.unlink()
        for path in self.folder.glob("passages-*.sqlite"):
            if path.name != name:
                path.unlink()
        return summary

    def _name(self, arrays: Iterable[np.ndarray]) -> str:
        """What a shard is made of: equal names, equal content."""
        digest = hashlib.sha256(f"{self._manifest['fingerprint']} {self._manifest['dtype']}".encode())
        for array in arrays:
            digest.update(f"{array.shape}".encode() + array.tobytes())
        return digest.hexdigest()[:16]

    def _encode(self, found: Sequence[Window]) -> dict[str, Tensor]:
        share = self._bytes / len(found)
        matrices = encode_tokens(self.colbert, batch(found), advance=lambda count: self._done(count * share))
        vectors = Ragged.from_list(matrices)
        if not vectors.values.isfinite().all():
            raise ValueError("the model gives vectors that are no finite numbers: are its weights whole?")
        spans = torch.from_numpy(np.concatenate([window.spans[window.keep] for window in found]))
        return {
            **files.quantize(vectors.values, self._manifest["dtype"]),
            "offsets": vectors.offsets,
            "spans": spans.int(),
        }

    def _done(self, size: float) -> None:
        self._bytes -= size
        self.advance(size)

    def _add_shard(self, file: str, sha256: str, count: int) -> int:
        return self._insert("INSERT INTO shards VALUES (NULL, ?, ?, ?)", (file, sha256, count))

    def _insert(self, statement: str, row: Sequence[Any]) -> int:
        """The number that the table gave to a new row."""
        return self.table.execute(statement, row).lastrowid or 0

    def _remove(self, documents: str, values: Sequence[Any] = ()) -> None:
        """Drop the documents whose numbers a query selects."""
        self.table.execute(f"DELETE FROM passages WHERE document IN ({documents})", values)
        self.table.execute(f"DELETE FROM documents WHERE number IN ({documents})", values)

    def _join(self, group: Sequence[tuple[int, str, str, int, int]]) -> None:
        """Put the living passages of a group of shards into one; a shard that would gain nothing stays."""
        living = sum(live for *_, live in group)
        if len(group) == 1 and 2 * living > group[0][3]:
            return
        parts: dict[str, list[Tensor]] = {}
        lengths, numbers, origin = [0], [], []
        for shard_number, file, sha256, *_ in group:
            shard = Shard(self.folder / files.SHARDS / file, sha256)
            shard.verify()
            found = "SELECT number, row FROM passages WHERE shard = ? ORDER BY row"
            for number, row in self.table.execute(found, (shard_number,)):
                numbers.append(number)
                origin.append(np.array([file, row]))
                first, last = int(shard.offsets[row]), int(shard.offsets[row + 1])
                lengths.append(last - first)
                for name in shard.tensors.keys() - {"offsets"}:
                    parts.setdefault(name, []).append(shard.tensors[name][first:last])
        if living:
            tensors = {name: torch.cat(rows) for name, rows in parts.items()}
            tensors["offsets"] = torch.tensor(lengths).cumsum(0)
            new = self._add_shard(*files.write_part(self.folder, self._name(origin), tensors), living)
            places = [(new, row, number) for row, number in enumerate(numbers)]
            self.table.executemany("UPDATE passages SET shard = ?, row = ? WHERE number = ?", places)
        self.table.executemany("DELETE FROM shards WHERE number = ?", [(number,) for number, *_ in group])
