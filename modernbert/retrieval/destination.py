"""What the driver of a run over units writes to: the draft of a store, or an engine and a note of what it holds."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ..late_interaction import check_pool_factor
from .documents.find import Key
from .documents.text import OnNote
from .engines import Table, identity_at, is_target, open_table
from .passages import Document
from .queries import query_vectors
from .store.codec import BITS, check_width
from .store.draft import SCHEMA, Draft, open_draft
from .store.format import CODED, DTYPES, VERSION, Manifest, ModelIdentity
from .store.identity import LoadedModel, ModelSource, load_model
from .store.request import IndexRequest
from .store.writer import StoreWriter, Summary, below
from .targets import EngineTarget, StoreTarget, parts_folder
from .worker import Report

ROWS = 1000
"""Documents that are removed from an engine together."""


class StoreDestination:
    """The draft of a store. `target` is where its parts are, and `compress` is called before the commit."""

    def __init__(self, output: str, writer: StoreWriter, manifest: Manifest, compress: Callable[[], None]) -> None:
        self.writer, self._compress, self._parts = writer, compress, parts_folder(output)
        self.target = StoreTarget(output, manifest)

    def take(self, report: Report) -> None:
        """Take what a worker has done into the draft."""
        _check_keys(self.writer, report.keys)
        new = [key for key in report.keys if not self.writer.is_current(key)]
        for key in report.keys:
            if self.writer.is_current(key):
                self.writer.mark_seen(key)
        if self.target.is_finished(report.part):
            self.writer.add_store(self._parts / report.part)
        else:  # none of them has text
            _add(self.writer, new)

    def commit(self, roots: Sequence[str]) -> Summary:
        """Make the draft the store, and delete the parts."""
        self._compress()
        self.writer.merge_shards()
        summary = self.writer.commit()
        self.target.close()
        self.target.remove_parts()
        return summary


class EngineDestination:
    """An engine, and the documents that it held before and holds now."""

    def __init__(self, writer: StoreWriter, table: Table, target: EngineTarget, documents: sqlite3.Connection) -> None:
        self.writer, self.target = writer, target
        self._table, self._held, self._documents = table, target.held, documents

    def take(self, report: Report) -> None:
        """Note what a worker has written."""
        _check_keys(self.writer, report.keys)
        for key in report.keys:
            if self.writer.is_current(key):
                self.writer.mark_seen(key)
            else:
                _add(self.writer, [key])

    def commit(self, roots: Sequence[str]) -> Summary:
        """Remove from the engine what is not in the documents any more."""
        stale: list[str] = []
        moved: list[tuple[str, int, int]] = []
        rows = self._held.table.execute("SELECT document, path, id, digest, line FROM held")
        for document, path, id_, digest, line in rows:
            select = "SELECT digest, line FROM documents WHERE path = ? AND id = ?"
            found = self._documents.execute(select, (path, id_)).fetchone()
            if found is None or found[0] != digest:
                stale += [document] if any(_is_below(path, root) for root in roots) else []
            elif found[1] != line and line is not None and found[1] is not None:
                moved.append((document, line, found[1]))
            if len(stale) >= ROWS:
                self._table.remove(stale)
                stale = []
            if len(moved) >= ROWS:
                self._table.move(moved)
                moved = []
        self._table.remove(stale)
        self._table.move(moved)
        summary = self.writer.summary()
        summary.passages = self._table.finish()
        return summary


Destination = StoreDestination | EngineDestination


@contextmanager
def open_destination(
    output: str,
    request: IndexRequest,
    model: ModelSource | LoadedModel | None,
    engine: str | None,
    note: OnNote,
) -> Iterator[tuple[Destination, Manifest, LoadedModel]]:
    """Open a store or an engine for a run, with its model. Raises as `index` and `open_table`."""
    dtype, pool, prefilter = request["dtype"], request.get("pool"), request["prefilter"]
    if is_target(output):
        if prefilter:
            raise ValueError(f"{output} has an index of its own: --prefilter is for stores")
        if dtype in BITS or pool is not None:
            raise ValueError(f"{output} keeps vectors as they are: {'--pool' if pool else dtype} is for stores")
        manifest, loaded = manifest_and_model(output, None, model, dtype, None, engine, identity_at(output))
        with _engine(output, manifest) as destination:
            yield destination, manifest, loaded
        return
    with open_draft(Path(output), request) as draft:
        manifest, loaded = manifest_and_model(output, draft.manifest, model, dtype, pool, engine)
        writer = StoreWriter(draft, manifest, prefilter=prefilter)
        if damaged := writer.find_damage():
            raise ValueError(
                f"{damaged[0]} is damaged or missing: repair the store first, with an `index` of one process"
            )
        compress = partial(writer.compress, partial(query_vectors, loaded.session), note)
        yield StoreDestination(output, writer, manifest, compress), manifest, loaded


@contextmanager
def open_engine(output: str) -> Iterator[EngineDestination]:
    """Open an engine, to remove from it. FileNotFoundError if nothing is there."""
    identity = identity_at(output)
    if identity is None:
        raise FileNotFoundError(f"nothing was indexed into {output}")
    with _engine(output, Manifest(VERSION, *identity, dtype="fp16", width=0)) as destination:
        yield destination


@contextmanager
def _engine(output: str, manifest: Manifest) -> Iterator[EngineDestination]:
    table = open_table(output, manifest)
    try:
        with tempfile.TemporaryDirectory(prefix="modernbert-") as folder:
            file = Path(folder, "documents.sqlite")
            documents = sqlite3.connect(file, isolation_level=None)
            target = EngineTarget(output, manifest, table)
            try:
                documents.execute("PRAGMA synchronous = OFF")
                documents.executescript(SCHEMA)
                documents.execute("BEGIN")
                rows = "SELECT path, id, line, digest, metadata FROM held WHERE rows = parts"
                insert = "INSERT OR IGNORE INTO documents VALUES (NULL, ?, ?, ?, ?, ?)"
                documents.executemany(insert, target.held.table.execute(rows))
                writer = StoreWriter(Draft(Path(folder), manifest, documents, file), manifest)
                yield EngineDestination(writer, table, target, documents)
            finally:
                target.close()
                documents.close()
    finally:
        table.close()


def manifest_and_model(
    output: str | os.PathLike[str],
    old: Manifest | None,
    model: ModelSource | LoadedModel | None,
    dtype: str | None,
    pool: int | None,
    engine: str | None,
    identity: ModelIdentity | None = None,
) -> tuple[Manifest, LoadedModel]:
    """The manifest to start from and the model that encodes. What is there already determines both.

    Args:
        old: of the store at `output`, if there is one. identity: of the model of the engine there, if there is one.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype is {dtype!r}; it can be {', '.join(DTYPES)}")
    if old and dtype not in (None, old.dtype):
        raise ValueError(f"the store {output} holds {old.dtype}, not {dtype}: leave out the dtype")
    check_pool_factor(1 if pool is None else pool)
    if old and pool not in (None, old.pool):
        raise ValueError(f"the store {output} pools {old.pool} tokens, not {pool}: leave out the pool")
    loaded = load_model(model, old.identity if old else identity, engine)
    dtype, pool, width = dtype or "fp16", pool or 1, loaded.session.model.dim
    if dtype in BITS:
        check_width(width, BITS[dtype])
    version = CODED if dtype in BITS or pool > 1 else VERSION
    return old or Manifest(version, *loaded.identity, dtype=dtype, width=width, pool=pool), loaded


def _check_keys(writer: StoreWriter, keys: Sequence[Key]) -> None:
    for key in keys:
        if writer.is_seen(key):
            raise ValueError(f'{key.path}, line {key.line}: the "_id" {key.id!r} comes twice; give each record its own')


def _add(writer: StoreWriter, keys: Sequence[Key]) -> None:
    """Note documents of which only the keys are known here."""
    for key in keys:
        writer.add_document(Document(key.path, key.id, "", "", key.line, {}, key.digest))


def _is_below(path: str, root: str) -> bool:
    name, first, last = below(root)
    return path == name or first <= path < last
