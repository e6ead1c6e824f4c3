"""Qdrant: a server or a cluster, or its client's local mode in a folder, which is exact, and slow to write.

The vectors of a passage are a multivector with MaxSim by dot product. There is no graph over them (`m=0`), so a search
compares with every passage and is exact. To trade exactness for speed, enable HNSW for the collection with Qdrant's
`update_collection(name, vectors_config={"": VectorParamsDiff(hnsw_config=HnswConfigDiff(m=16))})`.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException

from ...files import DISK_FULL
from ...late_interaction import Ragged
from ..passages import Passage
from ..store.format import ModelIdentity
from ..store.search import Store
from . import Found, Row
from .folder import claim, read_mark

COLLECTION = "modernbert"
"""The collection in a folder, or on a server if its address names none; also the key of our metadata."""

MARK, EMPTY = "meta.json", {"collections": {}, "aliases": {}}
"""The file by which Qdrant's client knows a folder, and its content without a collection."""

FLOATS = 1 << 20
"""A server refuses a multivector with this many numbers or more."""

REQUEST = 4 << 20
"""Bytes of a request, approximately. By default a server accepts 32 MB; one passage may need 21 MB."""

QUERIES_A_REQUEST = 16
"""Their vectors and the texts that come back are a few MB."""

TIMEOUT = 300
"""Seconds. Comparing with every passage of a large collection takes long."""


def export(store: Store, address: str, rows: Iterable[Row]) -> None:
    """Replace the collection by the passages of the store. It cannot be opened until it is complete."""
    manifest = {"model": store.model, "fingerprint": store.fingerprint, "passages": None}
    vectors = models.VectorParams(
        size=store.dim,
        distance=models.Distance.DOT,
        datatype=models.Datatype.FLOAT16 if store.dtype == "fp16" else models.Datatype.FLOAT32,
        multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
        hnsw_config=models.HnswConfigDiff(m=0),
    )
    if not _is_address(address):
        claim(address, _is_database, MARK, EMPTY)
    with _failures(address):
        client, name = _connect(address)
        try:
            if client.collection_exists(name):
                _manifest(client, name)
                client.delete_collection(name)
            client.create_collection(name, vectors_config=vectors, metadata={COLLECTION: manifest})
            for points in _requests(rows):
                client.upsert(name, points)
            if _is_address(address):
                for field in ("path", "id"):
                    client.create_payload_index(name, field, models.PayloadSchemaType.KEYWORD)
            client.update_collection(name, metadata={COLLECTION: {**manifest, "passages": len(store)}})
        finally:
            client.close()


class Index:
    """A collection made by `export`."""

    def __init__(self, address: str) -> None:
        self._address = address
        if not _is_address(address) and not _is_database(Path(address)):
            raise FileNotFoundError(f"no Qdrant folder: {address}; `modernbert export` makes one")
        with _failures(address):
            self._client, self._name = _connect(address)
            try:
                if not self._client.collection_exists(self._name):
                    raise FileNotFoundError(f"no collection {self._name} at {address}; `modernbert export` makes one")
                manifest = _manifest(self._client, self._name)
                if manifest["passages"] is None:
                    raise FileNotFoundError(f"the export to {address} is unfinished: run `modernbert export` again")
                self.identity = ModelIdentity(manifest["model"], manifest["fingerprint"])
            except BaseException:
                self._client.close()
                raise

    def search(self, vectors: Ragged, top_k: int) -> Iterator[list[Found]]:
        """For each query `top_k` passages."""
        for start in range(0, len(vectors), QUERIES_A_REQUEST):
            requests = [
                models.QueryRequest(query=x_QE.tolist(), limit=top_k, with_payload=True)
                for x_QE in vectors[start : start + QUERIES_A_REQUEST]
            ]
            with _failures(self._address):
                responses = self._client.query_batch_points(self._name, requests)
            for response in responses:
                yield [Found(hit.score, Passage(**(hit.payload or {})), int(hit.id)) for hit in response.points]

    def close(self) -> None:
        """Unlock the folder, or close the connection."""
        self._client.close()


def _requests(rows: Iterable[Row]) -> Iterator[list[models.PointStruct]]:
    """The points of one request after another."""
    points, size = [], 0
    for passage_id, passage, x_NE in rows:
        if x_NE.numel() >= FLOATS:
            raise ValueError(
                f"{passage.path} has a passage of {len(x_NE)} vectors of width {x_NE.shape[1]}; Qdrant accepts "
                f"less than {FLOATS:,} numbers: shorten the model's document_length and index again"
            )
        payload = asdict(passage)
        points.append(models.PointStruct(id=passage_id, vector=x_NE.tolist(), payload=payload))
        size += 20 * x_NE.numel() + len(str(payload))  # a number takes up to 20 characters
        if size >= REQUEST:
            yield points
            points, size = [], 0
    if points:
        yield points


def _is_address(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def _is_database(folder: Path) -> bool:
    meta = read_mark(folder / MARK)
    return all(isinstance(meta.get(key), dict) for key in EMPTY)


def _connect(address: str) -> tuple[QdrantClient, str]:
    """A client, and the name of the collection. A server's key comes from QDRANT_API_KEY, not from the command line."""
    if not _is_address(address):
        # An absolute path, because SQLite takes a relative one that begins with "file:" for a URI.
        return QdrantClient(path=os.path.abspath(address)), COLLECTION
    url = urlsplit(address)
    path, _, name = url.path.rpartition("/")
    address = urlunsplit((url.scheme, url.netloc, path, "", ""))
    return QdrantClient(url=address, api_key=os.environ.get("QDRANT_API_KEY"), timeout=TIMEOUT), name or COLLECTION


def _manifest(client: QdrantClient, name: str) -> dict[str, Any]:
    manifest = (client.get_collection(name).config.metadata or {}).get(COLLECTION)
    if manifest is None:
        raise ValueError(f"the collection {name} was not made by `modernbert export`: name another one")
    return manifest


@contextmanager
def _failures(address: str) -> Iterator[None]:
    """Turn errors of the client into OSError with the address.

    The server is unreachable or refuses, the folder is in use, or its disk is full.
    """
    try:
        yield
    except (ApiException, RuntimeError, sqlite3.OperationalError) as error:
        raise OSError(f"Qdrant at {address}: {error}") from error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise OSError(error.errno, f"Qdrant at {address}: {error.strerror}") from error
