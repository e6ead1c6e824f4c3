"""Writing a store: documents and passages in, documents out, and the commit that makes a draft the store."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from ...files import flush
from ...late_interaction import Ragged
from ..documents.find import Key
from ..documents.text import OnNote
from ..passages import Document
from ..windows import Window
from .codec import BITS, Codec
from .draft import Draft
from .folder import PARTS, TABLES, files_named
from .format import (
    PASSAGES,
    SHARDS,
    Manifest,
    Part,
    Shard,
    file_sha256,
    finished_part,
    is_intact,
    narrow,
    quantize,
    read_codec,
    read_manifest,
    write_manifest,
    write_part,
)
from .kept import QUERIES, as_query, check_kept, kept
from .pooling import pooled
from .prefilter import sample_tokens, update_lists
from .request import UNFINISHED

SAMPLE = 1 << 16
"""Tokens that a codec is learned from."""

NO_TEXT = "there is no text to index in the files and folders given"

BELOW = "FROM documents WHERE path = ? OR (path >= ? AND path < ?)"
"""The documents of a file, or in a folder and its subfolders; `below` gives the values."""


@dataclass
class Summary:
    """What a run did to documents, and what the store holds after it."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    documents: int = 0
    passages: int = 0
    unread: int = 0  # documents that are kept as they were, because their file or folder cannot be read now


class ShardRow(NamedTuple):
    """A row of the table of shards, and how many of its passages are still in the store."""

    number: int
    file: str
    sha256: str
    passages: int
    live: int


class StoreWriter:
    """Changes a draft and commits it. Until the commit, a reader sees the store as it was.

    Args:
        draft: from `open_draft`.
        manifest: that of the draft, or a new one; `commit` fills in what has changed.
        prefilter: whether to add a pre-filter. One that is there is always kept up to date.
    """

    def __init__(self, draft: Draft, manifest: Manifest, *, prefilter: bool = False) -> None:
        self._draft, self._manifest = draft, manifest
        self._folder, self._table = draft.folder, draft.table
        self._prefilter = prefilter or manifest.prefilter is not None
        self._codec = read_codec(draft.folder, manifest)
        self._summary = Summary()
        self._table.execute("CREATE TEMP TABLE seen (number INTEGER PRIMARY KEY)")

    def is_current(self, key: Key) -> bool:
        """Whether the store holds this document with the same content."""
        found = self._table.execute("SELECT digest FROM documents WHERE path = ? AND id = ?", (key.path, key.id))
        return found.fetchone() == (key.digest,)

    def mark_seen(self, key: Key) -> None:
        """Keep a document that is current, at the line where it is now."""
        (number, line) = self._table.execute(
            "SELECT number, line FROM documents WHERE path = ? AND id = ?", (key.path, key.id)
        ).fetchone()
        if line != key.line:
            self._table.execute("UPDATE documents SET line = ? WHERE number = ?", (key.line, number))
        self._table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (number,))
        self._summary.unchanged += 1

    def keep(self, path: str) -> int:
        """Keep all documents of a file or below a folder that cannot be read now. Returns how many there are."""
        kept = self._table.execute(f"INSERT OR IGNORE INTO seen SELECT number {BELOW}", below(path)).rowcount
        self._summary.unread += kept
        return kept

    def is_emptied(self, root: str) -> int:
        """How many documents the store holds from under `root`, if this run has seen none of them; else 0."""
        counts = f"SELECT count(*), count(seen.number) FROM (SELECT number {BELOW}) LEFT JOIN seen USING (number)"
        held, seen = self._table.execute(counts, below(root)).fetchone()
        return 0 if seen else held

    def find_damage(self) -> list[str]:
        """Find shards that are missing or damaged. Their documents count as changed. Returns the shards' files."""
        damaged = []
        for number, file, sha256 in self._shard_rows():
            if not is_intact(self._folder / SHARDS / file, sha256):
                documents = "SELECT document FROM passages WHERE shard = ?"
                self._table.execute(f"UPDATE documents SET digest = '' WHERE number IN ({documents})", (number,))
                damaged.append(file)
        return damaged

    def unseen_files(self) -> Iterator[tuple[str, int]]:
        """The files of documents that this run has neither added nor seen, with the number of their documents."""
        yield from self._table.execute(
            "SELECT path, count(*) FROM documents WHERE number NOT IN (SELECT number FROM seen) GROUP BY path"
        )

    def lost_files(self) -> list[str]:
        """The files of documents that were in damaged shards and have not been added again."""
        return [path for (path,) in self._table.execute("SELECT DISTINCT path FROM documents WHERE digest = ''")]

    def add_document(self, document: Document) -> int:
        """Add a document, without passages yet. It replaces the one with the same path and id. Returns its number."""
        key = (document.path, document.id)
        old = self._table.execute("SELECT number FROM documents WHERE path = ? AND id = ?", key).fetchone()
        if old:
            self._remove("SELECT ?", old)
        self._summary.changed += bool(old)
        self._summary.added += not old
        metadata = json.dumps(dict(document.metadata), ensure_ascii=False)
        row = (*key, document.line, document.digest, metadata)
        number = self._table.execute("INSERT INTO documents VALUES (NULL, ?, ?, ?, ?, ?)", row).lastrowid or 0
        # A number that was freed just now may have been seen.
        self._table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (number,))
        return number

    def is_seen(self, key: Key) -> bool:
        """Whether this run has added a document of this path and id, or has marked it as seen."""
        select = "SELECT 1 FROM documents JOIN seen USING (number) WHERE path = ? AND id = ?"
        return self._table.execute(select, (key.path, key.id)).fetchone() is not None

    def add_store(self, folder: Path) -> None:
        """Add the documents of another store, whose files are on the same disk. They replace those of the same name.

        Raises ValueError if it has another model, dtype or pool, or two of its documents were added in this run.
        """
        other = read_manifest(folder)
        ours = self._manifest
        if (other.fingerprint, other.dtype, other.pool) != (ours.fingerprint, ours.dtype, ours.pool):
            raise ValueError(f"{folder} has another model, dtype or pool than {self._folder}: delete it; index again")
        with closing(
            sqlite3.connect(f"file:{quote(os.path.abspath(folder / other.table))}?mode=ro", uri=True)
        ) as table:
            shards: dict[int, int] = {}
            for number, file, sha256, passages in table.execute("SELECT * FROM shards ORDER BY number").fetchall():
                target = self._folder / SHARDS / file
                if not target.exists():
                    os.link(folder / SHARDS / file, target)
                shards[number] = self._add_shard(Part(file, sha256), passages)
            documents: dict[int, int] = {}
            columns = "number, path, id, line, digest, metadata"
            for number, path, id_, line, digest, metadata in table.execute(f"SELECT {columns} FROM documents"):
                document = Document(path, id_, "", "", line, json.loads(metadata), digest)
                documents[number] = self.add_document(document)
            rows = table.execute("SELECT document, shard, row, title, text, start, stop, line FROM passages")
            self._table.executemany(
                "INSERT INTO passages VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)",
                ((documents[document], shards[shard], *rest) for document, shard, *rest in rows),
            )

    def add_windows(self, windows: Sequence[Window], encode: Callable[[], Ragged]) -> None:
        """Add passages of added documents as one shard.

        Args:
            encode: gives their vectors. It is not called if an interrupted run has written this shard already.

        Raises:
            ValueError: the vectors are not finite.
        """
        name = self._shard_name(array for window in windows for array in window[1:])
        part = finished_part(self._folder, name)
        if part is None:
            vectors = encode()
            if not vectors.values.isfinite().all():
                raise ValueError("the model gives vectors that are not finite: are its weights complete?")
            spans = torch.from_numpy(np.concatenate([window.spans[window.keep] for window in windows]))
            vectors, spans = pooled(vectors, narrow(spans), self._manifest.pool)
            tensors = {**quantize(vectors.values, self._manifest.dtype), "offsets": vectors.offsets, "spans": spans}
            part = write_part(self._folder, name, tensors)
        shard = self._add_shard(part, len(windows))
        document = "(SELECT number FROM documents WHERE path = ? AND id = ?)"
        self._table.executemany(
            f"INSERT INTO passages VALUES (NULL, {document}, {shard}, ?, ?, ?, ?, ?, ?)",
            (
                (p.path, p.id, row, p.title, p.text, p.start, p.end, p.line or -(p.page or 0))
                for row, (p, *_) in enumerate(windows)
            ),
        )

    def compress(self, encode_queries: Callable[[Sequence[str]], Ragged], note: OnNote) -> None:
        """Give a store of codes its codec, if it has none, and write with it the shards that are in float16.

        New shards are in float16, under the names of those of a store of float16: nothing is encoded again if the codes
        are refused, or after an interruption. `note` is called with what a new codec keeps.

        Raises:
            ValueError: the vectors are too few, or the codes keep too little of them.
        """
        rows, bits = self._shard_rows(), BITS.get(self._manifest.dtype)
        if bits is None or not rows:
            return
        shards, found = {number: self._shard(*part) for number, *part in rows}, None
        if self._codec is None:
            every = list(shards.values())
            self._codec = Codec.train(sample_tokens(every, SAMPLE).float(), bits)
            found = kept(self._codec, every, encode_queries(self._sample_queries()))
            check_kept(found, self._manifest.dtype, self._manifest.width)
            part = write_part(self._folder, "codec", self._codec.tensors())
            self._manifest = replace(self._manifest, codec=part)
        assert self._manifest.codec
        for number, shard in shards.items():
            if "values" in shard.tensors:
                name = hashlib.sha256(f"{shard.path.name} {self._manifest.codec.sha256}".encode()).hexdigest()[:16]
                part = finished_part(self._folder, name)
                if part is None:
                    codes = self._codec.encode(shard.vectors(0, len(shard)).values)
                    part = write_part(self._folder, name, {**codes, "offsets": shard.offsets, "spans": shard.spans})
                self._table.execute("UPDATE shards SET file = ?, sha256 = ? WHERE number = ?", (*part, number))
        if found:
            note(f"{self._manifest.dtype}: {found}")

    def remove_unseen(self, roots: Sequence[str]) -> None:
        """Remove the documents from under `roots` that this run has neither added nor marked as seen."""
        self._table.execute("CREATE TEMP TABLE gone (number INTEGER PRIMARY KEY)")
        for root in roots:
            self._table.execute(f"INSERT OR IGNORE INTO gone SELECT number {BELOW}", below(root))
        self._table.execute("DELETE FROM gone WHERE number IN (SELECT number FROM seen)")
        self._summary.removed += self._table.execute("SELECT count(*) FROM gone").fetchone()[0]
        self._remove("SELECT number FROM gone")

    def merge_shards(self) -> None:
        """Join shards that are at most half full, so that space is freed and many small runs leave few shards."""
        counts = """SELECT s.number, s.file, s.sha256, s.passages, count(p.number) FROM shards s
            LEFT JOIN passages p ON p.shard = s.number GROUP BY s.number ORDER BY s.number"""
        group: list[ShardRow] = []
        for shard in map(ShardRow._make, self._table.execute(counts).fetchall()):
            if shard.live > PASSAGES // 2:
                continue
            if sum(one.live for one in group) + shard.live > PASSAGES:
                self._join(group)
                group = []
            group.append(shard)
        self._join(group)

    def commit(self) -> Summary:
        """Make the draft the store, and delete the files that only the old state needed.

        Raises:
            ValueError: a new store would be empty.
        """
        summary = self.summary()
        if not summary.passages and self._draft.manifest is None:
            raise ValueError(NO_TEXT)
        entry, codec = self._manifest.prefilter, self._manifest.codec
        if self._prefilter:
            entry = update_lists(self._folder, self._table, entry, self._codec)
        needed = {file for (file,) in self._table.execute("SELECT file FROM shards UNION SELECT file FROM lists")}
        needed |= {part.file for part in (entry, codec) if part}
        self._table.execute("COMMIT")
        self._table.close()
        flush(self._draft.table_file)
        sha256 = file_sha256(self._draft.table_file)
        table = f"passages-{sha256[:16]}.sqlite"
        self._draft.table_file.replace(self._folder / table)
        flush(self._folder)
        # Commit point: write_manifest renames store.json into place. Before it, all readers open the old store; after
        # it, the new one. What follows only deletes files that the new store does not use.
        held = {"documents": summary.documents, "passages": summary.passages}
        manifest = replace(self._manifest, **held, prefilter=entry)
        write_manifest(self._folder, replace(manifest, table=table, sha256=sha256))
        (self._folder / UNFINISHED).unlink()
        needed.add(table)
        for path in [*files_named(PARTS, self._folder / SHARDS), *files_named(TABLES, self._folder)]:
            if path.name not in needed:
                path.unlink()
        return summary

    def summary(self) -> Summary:
        """What this run has done so far, and what there is now."""
        counts = "SELECT (SELECT count(*) FROM documents), (SELECT count(*) FROM passages)"
        documents, passages = self._table.execute(counts).fetchone()
        return replace(self._summary, documents=documents, passages=passages)

    def _shard_name(self, arrays: Iterable[np.ndarray]) -> str:
        """A hash of all that a shard is made of: equal names mean equal content."""
        dtype = "fp16" if self._manifest.dtype in BITS else self._manifest.dtype  # Codes are made of float16.
        pool = f" pooled {self._manifest.pool}" if self._manifest.pool > 1 else ""
        digest = hashlib.sha256(f"{self._manifest.fingerprint} {dtype}{pool}".encode())
        for array in arrays:
            digest.update(f"{array.shape}".encode() + array.tobytes())
        return digest.hexdigest()[:16]

    def _sample_queries(self) -> list[str]:
        """Words of passages from the whole store."""
        (passages,) = self._table.execute("SELECT count(*) FROM passages").fetchone()
        found = self._table.execute(
            "SELECT text FROM passages WHERE number % ? = 0 LIMIT ?", (max(1, passages // QUERIES), QUERIES)
        )
        return [as_query(text) for (text,) in found]

    def _shard(self, file: str, sha256: str) -> Shard:
        return Shard(self._folder / SHARDS / file, sha256, self._codec)

    def _shard_rows(self) -> list[tuple[int, str, str]]:
        return self._table.execute("SELECT number, file, sha256 FROM shards ORDER BY number").fetchall()

    def _add_shard(self, part: Part, passages: int) -> int:
        """The number of a new row in the table of shards."""
        row = (*part, passages)
        return self._table.execute("INSERT INTO shards VALUES (NULL, ?, ?, ?)", row).lastrowid or 0

    def _remove(self, numbers: str, values: Sequence[int] = ()) -> None:
        """Remove the documents whose numbers the query `numbers` selects."""
        self._table.execute(f"DELETE FROM passages WHERE document IN ({numbers})", values)
        self._table.execute(f"DELETE FROM documents WHERE number IN ({numbers})", values)

    def _join(self, group: Sequence[ShardRow]) -> None:
        """Move the live passages of a group of shards into one new shard, unless that would free no space."""
        live = sum(shard.live for shard in group)
        if len(group) == 1 and 2 * live > group[0].passages:
            return
        rows_of: dict[str, list[Tensor]] = {}
        lengths, passages, origin = [0], [], []
        for shard_row in group:
            if not shard_row.live:
                continue  # It may be damaged or missing.
            shard = self._shard(shard_row.file, shard_row.sha256)
            shard.verify()
            found = "SELECT number, row FROM passages WHERE shard = ? ORDER BY row"
            for passage, row in self._table.execute(found, (shard_row.number,)):
                passages.append(passage)
                origin.append(np.array([shard_row.file, row]))
                first, last = int(shard.offsets[row]), int(shard.offsets[row + 1])
                lengths.append(last - first)
                for name in shard.tensors.keys() - {"offsets"}:
                    rows_of.setdefault(name, []).append(shard.tensors[name][first:last])
        if live:
            tensors = {name: torch.cat(rows) for name, rows in rows_of.items()}
            tensors["offsets"] = torch.tensor(lengths, device="cpu").cumsum(0)
            new = self._add_shard(write_part(self._folder, self._shard_name(origin), tensors), live)
            moved = [(new, row, passage) for row, passage in enumerate(passages)]
            self._table.executemany("UPDATE passages SET shard = ?, row = ? WHERE number = ?", moved)
        self._table.executemany("DELETE FROM shards WHERE number = ?", [(shard.number,) for shard in group])


def below(root: str) -> tuple[str, str, str]:
    """A path, and between which names all paths below it are: from the first, and before the last."""
    first = root.rstrip(os.sep) + os.sep
    return root, first, first[:-1] + chr(ord(os.sep) + 1)
