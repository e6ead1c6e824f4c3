"""A collection of a Qdrant server or cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException

from ...late_interaction import Ragged

COLLECTION = "modernbert"
"""The collection if the address names none; also the key of our metadata."""

QUERIES_A_REQUEST = 16
"""Their vectors and the texts that come back are a few MB."""

DOCUMENTS = 1000
"""Documents that one condition names."""

PAGE = 1000
"""Points of a scroll."""

TIMEOUT = 300
"""Seconds. Comparing with every passage of a large collection takes long."""


class Server:
    """Points on a server. Its key comes from QDRANT_API_KEY, not from the command line."""

    def __init__(self, address: str) -> None:
        url = urlsplit(address)
        path, _, name = url.path.rpartition("/")
        server = urlunsplit((url.scheme, url.netloc, path, "", ""))
        self._address, self._name = address, name or COLLECTION
        with self._failures():
            self._client = QdrantClient(url=server, api_key=os.environ.get("QDRANT_API_KEY"), timeout=TIMEOUT)
            try:
                self.manifest: dict[str, Any] | None = self._read()
            except BaseException:
                self._client.close()
                raise

    def create(self, manifest: dict[str, Any], dim: int, dtype: str) -> None:
        vectors = models.VectorParams(
            size=dim,
            distance=models.Distance.DOT,
            datatype=models.Datatype.FLOAT16 if dtype == "fp16" else models.Datatype.FLOAT32,
            multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
            hnsw_config=models.HnswConfigDiff(m=0),
        )
        with self._failures():
            if self.manifest is not None:
                self._client.delete_collection(self._name)
            self._client.create_collection(self._name, vectors_config=vectors, metadata={COLLECTION: manifest})
            for field in ("path", "id", "document"):
                self._client.create_payload_index(self._name, field, models.PayloadSchemaType.KEYWORD)
        self.manifest = manifest

    def complete(self, passages: int) -> None:
        self.manifest = {**(self.manifest or {}), "passages": passages}
        with self._failures():
            self._client.update_collection(self._name, metadata={COLLECTION: self.manifest})

    def upsert(self, points: Sequence[tuple[int, list[list[float]], dict[str, Any]]]) -> None:
        request = [models.PointStruct(id=number, vector=vector, payload=payload) for number, vector, payload in points]
        with self._failures():
            self._client.upsert(self._name, request, wait=True)

    def remove(self, documents: Sequence[str]) -> None:
        for start in range(0, len(documents), DOCUMENTS):
            selector = models.FilterSelector(filter=_among(documents[start : start + DOCUMENTS]))
            with self._failures():
                self._client.delete(self._name, selector, wait=True)

    def move(self, document: str, line: int) -> None:
        with self._failures():
            self._client.set_payload(self._name, {"line": line}, _among([document]), wait=True)

    def scroll(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        offset = None
        while True:
            with self._failures():
                points, offset = self._client.scroll(
                    self._name, limit=PAGE, offset=offset, with_payload=list(names), with_vectors=False
                )
            yield from (point.payload or {} for point in points)
            if offset is None:
                return

    def query(self, vectors: Ragged, top_k: int, among: Sequence[str] | None) -> Iterator[Sequence[Any]]:
        chosen = None if among is None else _among(among)
        step = QUERIES_A_REQUEST if among is None else 1
        for start in range(0, len(vectors), step):
            requests = [
                models.QueryRequest(query=x_QE.tolist(), limit=top_k, with_payload=True, filter=chosen)
                for x_QE in vectors[start : start + step]
            ]
            with self._failures():
                responses = self._client.query_batch_points(self._name, requests)
            yield from (response.points for response in responses)

    def count(self) -> int:
        with self._failures():
            return self._client.count(self._name).count

    def close(self) -> None:
        self._client.close()

    def _read(self) -> dict[str, Any] | None:
        if not self._client.collection_exists(self._name):
            return None
        manifest = (self._client.get_collection(self._name).config.metadata or {}).get(COLLECTION)
        if manifest is None:
            raise ValueError(f"the collection {self._name} was not made by `modernbert export`: name another one")
        return manifest

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn errors of the client into OSError with the address: the server is unreachable, refuses, or is full."""
        try:
            yield
        except (ApiException, RuntimeError) as error:
            raise OSError(f"Qdrant at {self._address}: {error}") from error


def _among(documents: Sequence[str]) -> models.Filter:
    match = models.MatchAny(any=list(documents))
    return models.Filter(must=[models.FieldCondition(key="document", match=match)])
