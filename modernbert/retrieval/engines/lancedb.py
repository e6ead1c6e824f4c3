"""LanceDB: a folder or a bucket, no server, and no copy of the vectors in memory.

Its vectors are compared by cosine, and without an index with every passage. What it finds is scored again here, by the
dot product of the vectors as they were stored: scores are those of the store. For more passages than a scan can do,
make an index with LanceDB itself; it is approximate (README.md has its recall), and is used as soon as it is there:

    import lancedb; from lancedb.index import IvfPq
    lancedb.connect(FOLDER).open_table("passages").create_index("vectors", config=IvfPq(distance_type="cosine"))
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lancedb
import pyarrow as pa
import torch
from torch import Tensor

from ...late_interaction import Ragged, maxsim
from ..passages import Passage

if TYPE_CHECKING:
    from ..store.search import Store

TABLE = "passages"
KEY = b"modernbert"
"""Where the manifest is, in the metadata of the table's schema."""

ROWS = 256
"""Passages of a batch: about 10 MB of vectors."""

CANDIDATES = 4
"""Passages scored again for each that is asked for: cosine of rounded vectors differs a little from dot product."""

REFINED = 4
"""Passages that LanceDB itself compares in full for each of these, where an index has found them by their codes."""

KEPT = timedelta(hours=1)
"""Older versions of a table are deleted by an export; whoever has the last one open can go on reading."""

FIELDS = {"path": pa.string(), "id": pa.string(), "title": pa.string(), "text": pa.string(), "metadata": pa.string()}
FIELDS |= dict.fromkeys(("number", "start", "end", "line"), pa.int64())


def export(store: Store, place: str, rows: Iterable[tuple[int, Passage, Tensor]]) -> None:
    """Replace the table by the store's passages: at once, when the last of them is written."""
    manifest = {"model": store.model, "fingerprint": store.fingerprint}
    # Float16 would halve the folder, but LanceDB compares it three times as slowly.
    vectors = pa.list_(pa.list_(pa.float32(), store.dim))
    schema = pa.schema({**FIELDS, "vectors": vectors}, metadata={KEY: json.dumps(manifest)})
    failures: list[Exception] = []
    batches = pa.RecordBatchReader.from_batches(schema, _batches(iter(rows), schema, failures))
    try:
        database = lancedb.connect(place)
        is_there = TABLE in database.list_tables().tables
        if is_there:
            _manifest(database.open_table(TABLE), place)
        table = database.create_table(TABLE, batches, mode="overwrite" if is_there else "create")
        table.optimize(cleanup_older_than=KEPT)
    except RuntimeError as error:
        # On its way through LanceDB an error of ours has become text in one of theirs.
        raise failures[0] if failures else OSError(f"LanceDB at {place}: {error}") from error


class Index:
    """A table that `export` has made."""

    def __init__(self, place: str) -> None:
        if "://" not in place and not Path(place).is_dir():
            raise FileNotFoundError(f"no such folder: {place}; `modernbert export` makes one")
        database = lancedb.connect(place)
        if TABLE not in database.list_tables().tables:
            raise FileNotFoundError(f"no table {TABLE} in {place}; `modernbert export` makes one")
        self._place = place
        self._table: Any = database.open_table(TABLE)  # its type does not know what a search by vector can do
        self.manifest = _manifest(self._table, place)

    def search(self, vectors: Ragged, top_k: int) -> Iterator[list[tuple[float, Passage, int]]]:
        """For each query more than `top_k` passages, with their exact scores."""
        for x_QE in vectors:
            search = self._table.search(x_QE.numpy(), vector_column_name="vectors").distance_type("cosine")
            try:
                found = search.limit(CANDIDATES * top_k).refine_factor(REFINED).to_arrow()
            except RuntimeError as error:
                raise OSError(f"LanceDB at {self._place}: {error}") from error
            column = found["vectors"].combine_chunks()
            values = torch.tensor(column.flatten().flatten().to_numpy()).view(-1, vectors.values.shape[1])
            offsets = torch.tensor(column.offsets.to_numpy(), dtype=torch.int64)
            scores = maxsim([x_QE], Ragged(values, offsets - offsets[0]))[0].tolist()
            hits = found.select([*FIELDS]).to_pylist()
            yield [(score, _passage(hit), hit["number"]) for score, hit in zip(scores, hits, strict=True)]

    def close(self) -> None:
        """LanceDB holds nothing open between calls."""


def _batches(
    rows: Iterator[tuple[int, Passage, Tensor]], schema: pa.Schema, failures: list[Exception]
) -> Iterator[pa.RecordBatch]:
    try:
        while batch := list(islice(rows, ROWS)):
            records = [
                {**asdict(passage), "metadata": json.dumps(dict(passage.metadata)), "number": number}
                for number, passage, _ in batch
            ]
            columns = {name: pa.array([record[name] for record in records], kind) for name, kind in FIELDS.items()}
            vectors = Ragged.from_list([x_NE for *_, x_NE in batch])
            inner = pa.FixedSizeListArray.from_arrays(vectors.values.flatten().numpy(), vectors.values.shape[1])
            columns["vectors"] = pa.ListArray.from_arrays(vectors.offsets.int().numpy(), inner)
            yield pa.RecordBatch.from_pydict(columns, schema)
    except Exception as error:
        failures.append(error)
        raise


def _passage(hit: dict[str, Any]) -> Passage:
    return Passage(
        **{**{name: hit[name] for name in FIELDS if name != "number"}, "metadata": json.loads(hit["metadata"])}
    )


def _manifest(table: Any, place: str) -> dict[str, Any]:
    metadata = table.schema.metadata or {}
    if KEY not in metadata:
        raise ValueError(f"the table {TABLE} in {place} was not made by `modernbert export`: name another folder")
    return json.loads(metadata[KEY])
