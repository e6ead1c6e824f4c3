"""Qdrant's engine in this process, qdrant-edge: a collection in a folder, without a server. One process has it open."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from qdrant_edge import (
    Distance,
    EdgeConfig,
    EdgeShard,
    EdgeVectorParams,
    FieldCondition,
    Filter,
    HnswIndexConfig,
    KeywordIndexParams,
    MatchAny,
    MultiVectorComparator,
    MultiVectorConfig,
    PayloadSelector,
    Point,
    Query,
    QueryRequest,
    ScrollRequest,
    UpdateOperation,
    VectorStorageDatatype,
)

from ...late_interaction import Ragged
from ..store.request import write_json
from .folder import claim, read_mark

MARK, SHARD, LOCK = "modernbert.json", "qdrant-edge", "lock"
PAGE = 1000
"""Points of a scroll."""


class Folder:
    """Points in a folder, locked as long as it is open."""

    def __init__(self, address: str, write: bool) -> None:
        self._address, self._folder = address, Path(os.path.abspath(address))
        if write:
            claim(address, _is_ours, MARK, {"engine": "qdrant"})
        elif not _is_ours(self._folder):
            raise FileNotFoundError(f"no Qdrant folder: {address}; `modernbert export` makes one")
        self._lock, self._shard = FileLock(self._folder / LOCK), None
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise BlockingIOError(f"Qdrant at {address}: another process has this folder open") from error
        mark = read_mark(self._folder / MARK)
        self.manifest: dict[str, Any] | None = mark.get("manifest")
        try:
            if self.manifest is not None:
                with self._failures():
                    self._shard = EdgeShard.load(str(self._folder / SHARD))
        except BaseException:
            self._lock.release()
            raise

    def create(self, manifest: dict[str, Any], dim: int, dtype: str) -> None:
        vectors = EdgeVectorParams(
            dim,
            Distance.Dot,
            multivector_config=MultiVectorConfig(MultiVectorComparator.MaxSim),
            datatype=VectorStorageDatatype.Float16 if dtype == "fp16" else VectorStorageDatatype.Float32,
            hnsw_config=HnswIndexConfig(m=0, ef_construct=100, full_scan_threshold=10_000),
        )
        with self._failures():
            if self._shard:
                self._shard.close()
            # Until there is a manifest, the folder holds no collection.
            write_json(self._folder / MARK, {"engine": "qdrant"})
            shutil.rmtree(self._folder / SHARD, ignore_errors=True)
            self._shard = EdgeShard.create(str(self._folder / SHARD), EdgeConfig(vectors))
            self._shard.update(UpdateOperation.create_field_index("document", KeywordIndexParams()))
        self._write(manifest)

    def complete(self, passages: int) -> None:
        with self._failures():
            self._open.optimize()
            self._open.flush()
        self._write({**(self.manifest or {}), "passages": passages})

    def upsert(self, points: Sequence[tuple[int, list[list[float]], dict[str, Any]]]) -> None:
        request = [Point(number, vector, payload) for number, vector, payload in points]
        with self._failures():
            self._open.update(UpdateOperation.upsert_points(request))

    def remove(self, documents: Sequence[str]) -> None:
        with self._failures():
            self._open.update(UpdateOperation.delete_points_by_filter(_among(documents)))

    def move(self, document: str, line: int) -> None:
        with self._failures():
            self._open.update(UpdateOperation.set_payload_by_filter(_among([document]), {"line": line}))

    def scroll(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        offset = None
        while True:
            with self._failures():
                request = ScrollRequest(offset, PAGE, with_payload=PayloadSelector.Include(list(names)))
                records, offset = self._open.scroll(request)
            yield from (record.payload or {} for record in records)
            if offset is None:
                return

    def query(self, vectors: Ragged, top_k: int, among: Sequence[str] | None) -> Iterator[Sequence[Any]]:
        chosen = None if among is None else _among(among)
        for x_QE in vectors:
            request = QueryRequest(top_k, query=Query.Nearest(x_QE.tolist()), with_payload=True, filter=chosen)
            with self._failures():
                found = self._open.query(request)
            yield found

    def count(self) -> int:
        with self._failures():
            return self._open.info().points_count

    def close(self) -> None:
        if self._shard:
            with self._failures():
                self._shard.close()
        self._shard = None
        self._lock.release()

    @property
    def _open(self) -> EdgeShard:
        assert self._shard is not None
        return self._shard

    def _write(self, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        write_json(self._folder / MARK, {"engine": "qdrant", "manifest": manifest})

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn errors of the engine into OSError with the address."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise OSError(f"Qdrant at {self._address}: {error}") from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "qdrant_edge":
                raise
            raise OSError(f"Qdrant at {self._address}: {error}") from error


def _among(documents: Sequence[str]) -> Filter:
    return Filter(must=[FieldCondition("document", match=MatchAny(list(documents)))])


def _is_ours(folder: Path) -> bool:
    mark = read_mark(folder / MARK)
    return mark.get("engine") == "qdrant" and mark.keys() <= {"engine", "manifest"}
