"""LanceDB: a folder or a bucket, no server, and no copy of the vectors in memory.

LanceDB compares vectors by cosine, and without an index with every passage. The passages that it finds are scored
again here, by the dot product of the stored vectors, so their scores are those of the store. If there are too many
passages for a scan, make an index with LanceDB; it is approximate, and is used as soon as it exists:

    import lancedb; from lancedb.index import IvfPq
    lancedb.connect(FOLDER).open_table("passages").create_index("vectors", config=IvfPq(distance_type="cosine"))
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import torch

from ...late_interaction import Ragged, maxsim
from ..passages import Passage
from ..store.format import Manifest, ModelIdentity
from ..store.search import Store
from . import Found, Row
from .folder import claim, read_mark
from .held import HeldRow

TABLE = "passages"
KEY = b"modernbert"
"""The key of the manifest in the metadata of the table's schema."""

MARK, EXPORT = "modernbert.json", {"engine": "lancedb"}
"""The first file of an export, and its content."""

ROWS = 256
"""Passages of a batch: about 10 MB of vectors."""

RESCORED = 4
"""Passages scored again for each requested one: cosine of rounded vectors differs a little from their dot product."""

REFINED = 4
"""Passages that LanceDB compares in full for each rescored one, if an index has found them by their codes."""

KEPT = timedelta(hours=1)
"""An export deletes versions of the table that are older than this. A reader can finish with the last one."""

FIELDS = {"path": pa.string(), "id": pa.string(), "title": pa.string(), "text": pa.string(), "metadata": pa.string()}
FIELDS |= dict.fromkeys(("number", "start", "end", "line", "page"), pa.int64())
PASSAGE = [name for name in FIELDS if name != "number"]
OF_DOCUMENT = {"document": pa.string(), "digest": pa.string(), "parts": pa.int64()}

DOCUMENTS = 1000
"""Documents that one condition names."""


def export(store: Store, address: str, rows: Iterable[Row]) -> None:
    """Replace the table by the passages of the store, in one step after the last of them is written."""
    schema = _schema(store.model, store.fingerprint, store.dim)
    _claim(address)
    failures: list[Exception] = []
    batches = pa.RecordBatchReader.from_batches(schema, _batches(iter(rows), schema, failures))
    with _failures(address, failures):
        database = _connect(address)
        is_there = _is_there(database, address)
        if is_there:
            _manifest(database.open_table(TABLE), address)
        table = database.create_table(TABLE, batches, mode="overwrite" if is_there else "create")
        table.optimize(cleanup_older_than=KEPT)


class Table:
    """A table that `index` adds to and removes from. Every call is one new version, or none."""

    def __init__(self, address: str, manifest: Manifest) -> None:
        self._address = address
        _claim(address)
        with _failures(address):
            database = _connect(address)
            if not _is_there(database, address):
                schema = _schema(manifest.model, manifest.fingerprint, manifest.width)
                database.create_table(TABLE, schema=schema, exist_ok=True)
            self._table: Any = database.open_table(TABLE)
        found = _manifest(self._table, address)
        self.identity = ModelIdentity(found["model"], found["fingerprint"])
        _check_documents(self._table, address)

    def scan(self) -> Iterator[HeldRow]:
        """All rows, as they are now."""
        with _failures(self._address):
            self._table.checkout_latest()
            yield from _scan(self._table)

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows as one version."""
        with _failures(self._address):
            for batch in _batches(iter(rows), self._table.schema, [], len(rows)):
                self._table.add(batch)

    def remove(self, documents: Sequence[str]) -> None:
        """Remove the rows of these documents."""
        with _failures(self._address):
            for start in range(0, len(documents), DOCUMENTS):
                self._table.delete(_among(documents[start : start + DOCUMENTS]))

    def move(self, lines: Sequence[tuple[str, int, int]]) -> None:
        """Change the lines of documents, those together that move by the same number of lines."""
        by: dict[int, list[str]] = {}
        for document, before, now in lines:
            by.setdefault(now - before, []).append(document)
        with _failures(self._address):
            for difference, documents in by.items():
                for start in range(0, len(documents), DOCUMENTS):
                    where = _among(documents[start : start + DOCUMENTS])
                    self._table.update(where=where, values_sql={"line": f"line + {difference}"})

    def finish(self) -> int:
        """Join small files, and delete old versions."""
        with _failures(self._address):
            self._table.checkout_latest()
            self._table.optimize(cleanup_older_than=KEPT)
            return self._table.count_rows()

    def close(self) -> None:
        """Nothing to do: LanceDB keeps no file open between calls."""


class Index:
    """A table made by `export`."""

    def __init__(self, address: str) -> None:
        if not _is_remote(address) and not Path(address).is_dir():
            raise FileNotFoundError(f"no such folder: {address}; `modernbert export` makes one")
        database = _connect(address)
        if TABLE not in database.list_tables().tables:
            raise FileNotFoundError(f"no table {TABLE} in {address}; `modernbert export` makes one")
        self._address = address
        self._table: Any = database.open_table(TABLE)  # its type lacks the methods of a vector search
        manifest = _manifest(self._table, address)
        self.identity = ModelIdentity(manifest["model"], manifest["fingerprint"])

    def search(self, vectors: Ragged, top_k: int, among: Sequence[str] | None) -> Iterator[list[Found]]:
        """For each query more than `top_k` passages, with their exact scores."""
        for x_QE in vectors:
            search = self._table.search(x_QE.numpy(), vector_column_name="vectors").distance_type("cosine")
            if among is not None:
                search = search.where(_among(among), prefilter=True)
            with _failures(self._address):
                found = search.limit(RESCORED * top_k).refine_factor(REFINED).to_arrow()
            column = found["vectors"].combine_chunks()
            values = torch.tensor(column.flatten().flatten().to_numpy(), device="cpu").view(-1, vectors.values.shape[1])
            offsets = torch.tensor(column.offsets.to_numpy(), dtype=torch.int64, device="cpu")
            scores = maxsim([x_QE], Ragged(values, offsets - offsets[0]))[0].tolist()
            hits = found.select([name for name in FIELDS if name in found.column_names]).to_pylist()
            yield [Found(score, _passage(hit), hit["number"]) for score, hit in zip(scores, hits, strict=True)]

    def scan(self) -> Iterator[HeldRow]:
        """All rows, as they were when this was opened."""
        _check_documents(self._table, self._address)
        with _failures(self._address):
            yield from _scan(self._table)

    def close(self) -> None:
        """Nothing to do: LanceDB keeps no file open between calls."""


def _schema(model: str | None, fingerprint: str, dim: int) -> pa.Schema:
    # Float16 would halve the folder, but LanceDB compares it three times as slowly.
    vectors = pa.list_(pa.list_(pa.float32(), dim))
    manifest = {"model": model, "fingerprint": fingerprint}
    return pa.schema({**FIELDS, **OF_DOCUMENT, "vectors": vectors}, metadata={KEY: json.dumps(manifest)})


def _batches(
    rows: Iterator[Row], schema: pa.Schema, failures: list[Exception], size: int | None = None
) -> Iterator[pa.RecordBatch]:
    try:
        while batch := list(islice(rows, size or ROWS)):
            records = [
                {
                    **asdict(row.passage),
                    "metadata": json.dumps(dict(row.passage.metadata)),
                    "number": row.passage_id,
                    **{name: getattr(row, name) for name in OF_DOCUMENT},
                }
                for row in batch
            ]
            kinds = {**FIELDS, **OF_DOCUMENT}
            columns = {name: pa.array([record[name] for record in records], kind) for name, kind in kinds.items()}
            vectors = Ragged.from_list([row.vectors for row in batch])
            inner = pa.FixedSizeListArray.from_arrays(vectors.values.flatten().numpy(), vectors.values.shape[1])
            columns["vectors"] = pa.ListArray.from_arrays(vectors.offsets.int().numpy(), inner)
            yield pa.RecordBatch.from_pydict(columns, schema)
    except Exception as error:
        failures.append(error)
        raise


def _scan(table: Any) -> Iterator[HeldRow]:
    for batch in table.search().select(list(HeldRow._fields)).to_batches(batch_size=4096):
        for row in batch.select(HeldRow._fields).to_pylist():
            yield HeldRow(**row)


def _among(documents: Sequence[str]) -> str:
    names = ", ".join(f"'{document}'" for document in documents)
    return f"document IN ({names})"


def _check_documents(table: Any, address: str) -> None:
    if "document" not in table.schema.names:
        raise ValueError(
            f"{address} was exported by an older version, which cannot be filtered or updated: export again"
        )


def _claim(address: str) -> None:
    if _is_remote(address):
        return
    if re.search(r"[\x00-\x1f\x7f]", os.path.abspath(address)):
        raise ValueError(f"{address} has a control character, which LanceDB cannot open: give another folder")
    claim(address, _is_database, MARK, EXPORT)


def _is_there(database: lancedb.DBConnection, address: str) -> bool:
    """Whether there is a table. One without a version was left by a process that was killed before its first."""
    found = TABLE in database.list_tables().tables
    return found and (_is_remote(address) or _is_table(Path(address, f"{TABLE}.lance")))


@contextmanager
def _failures(address: str, failures: Sequence[Exception] = ()) -> Iterator[None]:
    """Turn errors of LanceDB into OSError with the address.

    LanceDB turns an error of ours into one of its own, with only the text left: `failures` has it.
    """
    try:
        yield
    except RuntimeError as error:
        raise failures[0] if failures else OSError(f"LanceDB at {address}: {error}") from error


def _is_remote(address: str) -> bool:
    return "://" in address


def _connect(address: str) -> lancedb.DBConnection:
    # An absolute path, because a relative one that begins with "file:" is also an address.
    return lancedb.connect(address if _is_remote(address) else os.path.abspath(address))


def _is_database(folder: Path) -> bool:
    return read_mark(folder / MARK) == EXPORT or any(map(_is_table, folder.glob("*.lance")))


def _is_table(folder: Path) -> bool:
    return (folder / "_versions").is_dir()


def _passage(hit: dict[str, Any]) -> Passage:
    return Passage(**{**{name: hit[name] for name in PASSAGE if name in hit}, "metadata": json.loads(hit["metadata"])})


def _manifest(table: Any, address: str) -> dict[str, Any]:
    metadata = table.schema.metadata or {}
    if KEY not in metadata:
        raise ValueError(f"the table {TABLE} in {address} was not made by `modernbert export`: name another folder")
    return json.loads(metadata[KEY])
