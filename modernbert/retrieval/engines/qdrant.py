"""Qdrant: a server or a cluster, or its client's local mode in a folder, which is exact, and slow to write.

Vectors are a multivector with MaxSim by dot product. No graph is built over them (`m=0`): a search compares with every
passage and is exact. That is a matter of the collection, not of the export; to trade exactness for speed, switch HNSW
on with Qdrant's own `update_collection(name, vectors_config={"": VectorParamsDiff(hnsw_config=HnswConfigDiff(m=16))})`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException
from torch import Tensor

from ...late_interaction import Ragged
from ..passages import Passage

if TYPE_CHECKING:
    from ..store.search import Store

COLLECTION = "modernbert"
"""The collection in a folder, and on a server whose address names none; also our key in a collection's metadata."""

FLOATS = 1 << 20
"""A multivector has fewer numbers than this, or a server refuses it."""

REQUEST = 4 << 20
"""Bytes of a request, roughly. A server takes 32 MB unless it is told otherwise; one passage may need 21 of them."""

QUERIES = 16
"""Queries of a request: their vectors and the texts that come back are a few MB."""

TIMEOUT = 300
"""Seconds: comparing with every passage of a large collection takes its time."""


def export(store: Store, place: str, rows: Iterable[tuple[int, Passage, Tensor]]) -> None:
    """Replace the collection by the store's passages. Until it is complete, opening it is refused."""
    manifest = {"model": store.model, "fingerprint": store.fingerprint, "passages": None}
    vectors = models.VectorParams(
        size=store.dim,
        distance=models.Distance.DOT,
        datatype=models.Datatype.FLOAT16 if store.dtype == "fp16" else models.Datatype.FLOAT32,
        multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
        hnsw_config=models.HnswConfigDiff(m=0),
    )
    with _failures(place):
        client, name = _connect(place)
        try:
            if client.collection_exists(name):
                _manifest(client, name)
                client.delete_collection(name)
            client.create_collection(name, vectors_config=vectors, metadata={COLLECTION: manifest})
            for points in _requests(rows):
                client.upsert(name, points)
            if _is_address(place):
                for field in ("path", "id"):
                    client.create_payload_index(name, field, models.PayloadSchemaType.KEYWORD)
            client.update_collection(name, metadata={COLLECTION: {**manifest, "passages": len(store)}})
        finally:
            client.close()


class Index:
    """A collection that `export` has made."""

    def __init__(self, place: str) -> None:
        self._place = place
        if not _is_address(place) and not (Path(place) / "meta.json").is_file():
            raise FileNotFoundError(f"no Qdrant folder: {place}; `modernbert export` makes one")
        with _failures(place):
            self._client, self._name = _connect(place)
            try:
                if not self._client.collection_exists(self._name):
                    raise FileNotFoundError(f"no collection {self._name} at {place}; `modernbert export` makes one")
                self.manifest = _manifest(self._client, self._name)
                if self.manifest["passages"] is None:
                    raise FileNotFoundError(
                        f"the export to {place} has not come to its end: run `modernbert export` again"
                    )
            except BaseException:
                self._client.close()
                raise

    def search(self, vectors: Ragged, top_k: int) -> Iterator[list[tuple[float, Passage, int]]]:
        """For each query `top_k` passages."""
        for start in range(0, len(vectors), QUERIES):
            requests = [
                models.QueryRequest(query=x_QE.tolist(), limit=top_k, with_payload=True)
                for x_QE in vectors[start : start + QUERIES]
            ]
            with _failures(self._place):
                responses = self._client.query_batch_points(self._name, requests)
            for response in responses:
                yield [(hit.score, Passage(**(hit.payload or {})), int(hit.id)) for hit in response.points]

    def close(self) -> None:
        """Unlock the folder, or close the connection."""
        self._client.close()


def _requests(rows: Iterable[tuple[int, Passage, Tensor]]) -> Iterator[list[models.PointStruct]]:
    """Points for one request after the other."""
    points, size = [], 0
    for number, passage, x_NE in rows:
        if x_NE.numel() >= FLOATS:
            raise ValueError(
                f"{passage.path} has a passage of {len(x_NE)} vectors of width {x_NE.shape[1]}; Qdrant takes less than "
                f"{FLOATS:,} numbers: shorten the model's document_length and index again"
            )
        payload = asdict(passage)
        points.append(models.PointStruct(id=number, vector=x_NE.tolist(), payload=payload))
        size += 20 * x_NE.numel() + len(str(payload))  # a number takes up to 20 characters
        if size >= REQUEST:
            yield points
            points, size = [], 0
    if points:
        yield points


def _is_address(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _connect(place: str) -> tuple[QdrantClient, str]:
    """A client, and the name of the collection. A server's key is QDRANT_API_KEY: secrets are no part of a command."""
    if not _is_address(place):
        return QdrantClient(path=place), COLLECTION
    url = urlsplit(place)
    path, _, name = url.path.rpartition("/")
    address = urlunsplit((url.scheme, url.netloc, path, "", ""))
    return QdrantClient(url=address, api_key=os.environ.get("QDRANT_API_KEY"), timeout=TIMEOUT), name or COLLECTION


def _manifest(client: QdrantClient, name: str) -> dict[str, Any]:
    manifest = (client.get_collection(name).config.metadata or {}).get(COLLECTION)
    if manifest is None:
        raise ValueError(f"the collection {name} was not made by `modernbert export`: name another one")
    return manifest


@contextmanager
def _failures(place: str) -> Iterator[None]:
    """What fails in the client is an OSError: a server that is away or says no, a folder that somebody else holds."""
    try:
        yield
    except (ApiException, RuntimeError) as error:
        raise OSError(f"Qdrant at {place}: {error}") from error
