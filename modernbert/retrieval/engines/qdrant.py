"""Qdrant: a server or a cluster, or its engine in this process with its files in a folder.

The vectors of a passage are a multivector with MaxSim by dot product. There is no graph over them (`m=0`), so a search
compares with every passage and is exact. To trade exactness for speed, enable HNSW for the collection of a server with
`update_collection(name, vectors_config={"": VectorParamsDiff(hnsw_config=HnswConfigDiff(m=16))})`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any, Protocol

from ...late_interaction import Ragged
from ..passages import Passage
from ..store.format import Manifest, ModelIdentity
from ..store.search import Store
from . import Found, Row
from .held import HeldRow

FLOATS = 1 << 20
"""A server refuses a multivector with this many numbers or more."""

REQUEST = 4 << 20
"""Bytes of a request, approximately. By default a server accepts 32 MB; one passage may need 21 MB."""

PASSAGE = [field.name for field in fields(Passage)]


class Point(Protocol):
    """A point that was found."""

    id: Any
    score: float
    payload: Any


class Points(Protocol):
    """A collection. The folder and the server each have one; their errors are OSErrors with the address.

    Attributes:
        manifest: {"model", "fingerprint", "passages"}; `passages` is None until an export is complete. None: there is
            no collection yet.
    """

    manifest: dict[str, Any] | None

    def create(self, manifest: dict[str, Any], dim: int, dtype: str) -> None:
        """Make an empty collection, in place of one that is there."""
        ...

    def complete(self, passages: int) -> None:
        """Set the `passages` of the manifest."""
        ...

    def upsert(self, points: Sequence[tuple[int, list[list[float]], dict[str, Any]]]) -> None:
        """Add or replace points: id, vectors, payload."""
        ...

    def remove(self, documents: Sequence[str]) -> None:
        """Remove the points of these documents."""
        ...

    def move(self, document: str, line: int) -> None:
        """Set the line of the points of a document."""
        ...

    def scroll(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """These fields of the payload of all points."""
        ...

    def query(self, vectors: Ragged, top_k: int, among: Sequence[str] | None) -> Iterator[Sequence[Point]]:
        """For each query its `top_k` points."""
        ...

    def count(self) -> int:
        """How many points there are."""
        ...

    def close(self) -> None:
        """Unlock the folder, or close the connection."""
        ...


def export(store: Store, address: str, rows: Iterable[Row]) -> None:
    """Replace the collection by the passages of the store. It cannot be opened until it is complete."""
    points = _open(address, write=True)
    try:
        manifest = {"model": store.model, "fingerprint": store.fingerprint, "passages": None}
        points.create(manifest, store.dim, store.dtype)
        for request in _requests(rows):
            points.upsert(request)
        points.complete(len(store))
    finally:
        points.close()


class Table:
    """A collection that `index` adds to and removes from."""

    def __init__(self, address: str, manifest: Manifest) -> None:
        self._points = _open(address, write=True)
        try:
            if self._points.manifest is None:
                new = {"model": manifest.model, "fingerprint": manifest.fingerprint, "passages": 0}
                self._points.create(new, manifest.width, manifest.dtype)
            found = _complete(self._points, address)
        except BaseException:
            self._points.close()
            raise
        self.identity = ModelIdentity(found["model"], found["fingerprint"])

    def scan(self) -> Iterator[HeldRow]:
        """All rows, as they are now."""
        return _scan(self._points)

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows, or replace those with the same number."""
        for request in _requests(rows):
            self._points.upsert(request)

    def remove(self, documents: Sequence[str]) -> None:
        """Remove the rows of these documents."""
        if documents:
            self._points.remove(documents)

    def move(self, lines: Sequence[tuple[str, int, int]]) -> None:
        """Change the lines of documents."""
        for document, _, now in lines:
            self._points.move(document, now)

    def finish(self) -> int:
        """Note how many there are."""
        count = self._points.count()
        self._points.complete(count)
        return count

    def close(self) -> None:
        """Unlock the folder, or close the connection."""
        self._points.close()


class Index:
    """A collection made by `export` or `index`."""

    def __init__(self, address: str) -> None:
        self._points = _open(address)
        try:
            if self._points.manifest is None:
                raise FileNotFoundError(f"no collection at {address}; `modernbert export` makes one")
            found = _complete(self._points, address)
        except BaseException:
            self._points.close()
            raise
        self.identity = ModelIdentity(found["model"], found["fingerprint"])

    def search(self, vectors: Ragged, top_k: int, among: Sequence[str] | None) -> Iterator[list[Found]]:
        """For each query `top_k` passages."""
        for found in self._points.query(vectors, top_k, among):
            yield [Found(hit.score, _passage(hit.payload), int(hit.id)) for hit in found]

    def scan(self) -> Iterator[HeldRow]:
        """All rows, as they are now."""
        return _scan(self._points)

    def close(self) -> None:
        """Unlock the folder, or close the connection."""
        self._points.close()


def _open(address: str, *, write: bool = False) -> Points:
    """The points of a server or a folder, which is made if they are to be written and it is not there."""
    try:
        if address.startswith(("http://", "https://")):
            from .qdrant_server import Server

            return Server(address)
        from .qdrant_folder import Folder
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"qdrant needs {error.name}: pip install 'modernbert[qdrant]'") from error
    return Folder(address, write)


def _complete(points: Points, address: str) -> dict[str, Any]:
    """The manifest. FileNotFoundError if the export was interrupted."""
    manifest = points.manifest
    if manifest is None or manifest["passages"] is None:
        raise FileNotFoundError(f"the export to {address} is unfinished: run `modernbert export` again")
    return manifest


def _requests(rows: Iterable[Row]) -> Iterator[list[tuple[int, list[list[float]], dict[str, Any]]]]:
    """The points of one request after another."""
    points, size = [], 0
    for row in rows:
        numbers = row.vectors.numel()
        if numbers >= FLOATS:
            raise ValueError(
                f"{row.passage.path} has a passage of {len(row.vectors)} vectors of width {row.vectors.shape[1]}; "
                f"Qdrant accepts less than {FLOATS:,} numbers: shorten the model's document_length and index again"
            )
        payload = asdict(row.passage) | {"document": row.document, "digest": row.digest, "parts": row.parts}
        points.append((row.passage_id, row.vectors.tolist(), payload))
        size += 20 * numbers + len(str(payload))  # a number takes up to 20 characters
        if size >= REQUEST:
            yield points
            points, size = [], 0
    if points:
        yield points


def _scan(points: Points) -> Iterator[HeldRow]:
    for payload in points.scroll(HeldRow._fields):
        if "document" not in payload:
            raise ValueError("exported by an older version, which cannot be filtered or updated: export again")
        yield HeldRow(**{**payload, "line": payload.get("line"), "metadata": json.dumps(payload["metadata"])})


def _passage(payload: dict[str, Any]) -> Passage:
    return Passage(**{name: payload[name] for name in PASSAGE if name in payload})
