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
from collections.abc import Iterable, Iterator
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
from ..store.format import ModelIdentity
from ..store.search import Store
from . import Found, Row
from .folder import claim, read_mark

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


def export(store: Store, address: str, rows: Iterable[Row]) -> None:
    """Replace the table by the passages of the store, in one step after the last of them is written."""
    manifest = {"model": store.model, "fingerprint": store.fingerprint}
    # Float16 would halve the folder, but LanceDB compares it three times as slowly.
    vectors = pa.list_(pa.list_(pa.float32(), store.dim))
    schema = pa.schema({**FIELDS, "vectors": vectors}, metadata={KEY: json.dumps(manifest)})
    if not _is_remote(address):
        if re.search(r"[\x00-\x1f\x7f]", os.path.abspath(address)):
            raise ValueError(f"{address} has a control character, which LanceDB cannot open: give another folder")
        claim(address, _is_database, MARK, EXPORT)
    failures: list[Exception] = []
    batches = pa.RecordBatchReader.from_batches(schema, _batches(iter(rows), schema, failures))
    try:
        database = _connect(address)
        is_there = TABLE in database.list_tables().tables
        if is_there and not _is_remote(address):
            is_there = _is_table(Path(address, f"{TABLE}.lance"))  # else an export was killed before its first version
        if is_there:
            _manifest(database.open_table(TABLE), address)
        table = database.create_table(TABLE, batches, mode="overwrite" if is_there else "create")
        table.optimize(cleanup_older_than=KEPT)
    except RuntimeError as error:
        # LanceDB turns an error of ours into one of its own, with only the text left.
        raise failures[0] if failures else OSError(f"LanceDB at {address}: {error}") from error


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

    def search(self, vectors: Ragged, top_k: int) -> Iterator[list[Found]]:
        """For each query more than `top_k` passages, with their exact scores."""
        for x_QE in vectors:
            search = self._table.search(x_QE.numpy(), vector_column_name="vectors").distance_type("cosine")
            try:
                found = search.limit(RESCORED * top_k).refine_factor(REFINED).to_arrow()
            except RuntimeError as error:
                raise OSError(f"LanceDB at {self._address}: {error}") from error
            column = found["vectors"].combine_chunks()
            values = torch.tensor(column.flatten().flatten().to_numpy(), device="cpu").view(-1, vectors.values.shape[1])
            offsets = torch.tensor(column.offsets.to_numpy(), dtype=torch.int64, device="cpu")
            scores = maxsim([x_QE], Ragged(values, offsets - offsets[0]))[0].tolist()
            hits = found.select([name for name in FIELDS if name in found.column_names]).to_pylist()
            yield [Found(score, _passage(hit), hit["number"]) for score, hit in zip(scores, hits, strict=True)]

    def close(self) -> None:
        """Nothing to do: LanceDB keeps no file open between calls."""


def _batches(rows: Iterator[Row], schema: pa.Schema, failures: list[Exception]) -> Iterator[pa.RecordBatch]:
    try:
        while batch := list(islice(rows, ROWS)):
            records = [
                {**asdict(passage), "metadata": json.dumps(dict(passage.metadata)), "number": passage_id}
                for passage_id, passage, _ in batch
            ]
            columns = {name: pa.array([record[name] for record in records], kind) for name, kind in FIELDS.items()}
            vectors = Ragged.from_list([x_NE for *_, x_NE in batch])
            inner = pa.FixedSizeListArray.from_arrays(vectors.values.flatten().numpy(), vectors.values.shape[1])
            columns["vectors"] = pa.ListArray.from_arrays(vectors.offsets.int().numpy(), inner)
            yield pa.RecordBatch.from_pydict(columns, schema)
    except Exception as error:
        failures.append(error)
        raise


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
    fields = {name: value for name, value in hit.items() if name != "number"}
    return Passage(**{**fields, "metadata": json.loads(hit["metadata"])})


def _manifest(table: Any, address: str) -> dict[str, Any]:
    metadata = table.schema.metadata or {}
    if KEY not in metadata:
        raise ValueError(f"the table {TABLE} in {address} was not made by `modernbert export`: name another folder")
    return json.loads(metadata[KEY])
