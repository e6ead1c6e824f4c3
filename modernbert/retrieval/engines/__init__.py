"""Stores in other search engines: `export` writes one there, and `Engine` searches it there, without the store.

A target is `ENGINE:ADDRESS`: `qdrant:FOLDER`, `qdrant:http://HOST:6333/COLLECTION`, `lancedb:FOLDER`,
`fast-plaid:FOLDER`. An engine is a file in this folder with the two names of `Adapter`.

Everything that a hit shows is exported with the vectors, and so is the fingerprint of the model: another model is
refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import NamedTuple, Protocol, cast

from torch import Tensor

from ...late_interaction import Ragged
from ...progress import progress_bar
from ..explain import TokenMatch, explain
from ..passages import Passage
from ..queries import EncodedQuery, check_search, encode_queries, query_vectors
from ..store.format import ModelIdentity
from ..store.identity import LoadedModel, ModelSource, load_model
from ..store.search import Hit, Store

ENGINES = {"qdrant": ".qdrant", "lancedb": ".lancedb", "fast-plaid": ".fast_plaid"}


class Row(NamedTuple):
    """A passage to export, and its vectors `[n, E]` float32."""

    passage_id: int
    passage: Passage
    vectors: Tensor


class Found(NamedTuple):
    """A passage that an engine has found."""

    score: float
    passage: Passage
    passage_id: int


class Index(Protocol):
    """An export, opened for search. `identity` is that of its model."""

    identity: ModelIdentity

    def search(self, vectors: Ragged, top_k: int) -> Iterator[list[Found]]:
        """For each query, `top_k` passages or more."""
        ...

    def close(self) -> None:
        """Release files and connections."""
        ...


class Adapter(Protocol):
    """The module of an engine."""

    def export(self, store: Store, address: str, rows: Iterable[Row]) -> None:
        """Write all rows, each once and in order. They replace an earlier export."""
        ...

    def Index(self, address: str) -> Index:
        """Open an export."""
        ...


def is_target(name: str) -> bool:
    """Whether `name` is a target; anything else is the folder of a store."""
    engine, colon, _ = name.partition(":")
    return bool(colon) and engine in ENGINES


def export(store: Store, target: str, *, progress: bool | None = None) -> int:
    """Export a whole store to an engine, in place of an earlier export. Returns the number of passages.

    Args:
        progress: whether to show a bar on stderr. None: only on a terminal.

    Raises:
        ValueError: the engine does not exist, or there is something else at the address.
        OSError: the engine cannot be reached, or fails.
        ModuleNotFoundError: the engine's package is not installed; the message names the extra.
    """
    adapter, address = _engine(target)
    with progress_bar("exporting", len(store), progress) as on_rows:

        def rows() -> Iterator[Row]:
            for batch in store.batches():
                for row in zip(*batch, strict=True):
                    yield Row(*row)
                    on_rows(1)

        adapter.export(store, address, rows())
    return len(store)


class Engine:
    """An export, searched in its engine. It searches and explains like a `Store`.

    Attributes:
        session: encodes queries. colbert: its model.
    """

    def __init__(
        self, target: str, model: ModelSource | LoadedModel | None = None, *, engine: str | None = None
    ) -> None:
        """Open the export at `target` with its own model, or with `model`, which must be the same one.

        Args:
            engine: of the `Session` that encodes queries.

        Raises:
            FileNotFoundError: there is no export, or an unfinished one.
            ValueError: the engine does not exist, or the export was made with another model.
            OSError, ModuleNotFoundError: as for `export`.
        """
        adapter, address = _engine(target)
        self._index = adapter.Index(address)
        try:
            self.session = load_model(model, self._index.identity, engine).session
        except BaseException:
            self._index.close()
            raise
        self.colbert = self.session.model

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release files and connections."""
        self._index.close()

    def encode(self, queries: Sequence[str]) -> list[EncodedQuery]:
        """Encode queries once, for `search` and `explain`."""
        return encode_queries(self.session, queries)

    def search(self, queries: Sequence[str | EncodedQuery], *, top_k: int = 10) -> list[list[Hit]]:
        """For each query (a text, or what `encode` made of it) its `top_k` passages, best first."""
        queries = check_search(queries, top_k)
        results = []
        for found in self._index.search(query_vectors(self.session, queries), top_k) if queries else []:
            ranked = sorted(found, key=lambda hit: (-hit.score, hit.passage_id))[:top_k]
            results.append([Hit(rank, *hit) for rank, hit in enumerate(ranked, start=1)])
        return results

    def explain(self, query: str | EncodedQuery, hit: Hit) -> list[TokenMatch]:
        """For each token of `query` the most similar token of a hit. The hit is encoded again, without its context."""
        encoded = self.encode([query])[0] if isinstance(query, str) else query
        return explain(self.session, encoded, [hit.passage.content])[0]


def _engine(target: str) -> tuple[Adapter, str]:
    """The engine's module, and the address."""
    name, _, address = target.partition(":")
    if name not in ENGINES or not address:
        known = ", ".join(f"{engine}:ADDRESS" for engine in ENGINES)
        raise ValueError(f"{target!r} is not a target; a target is one of {known}")
    try:
        return cast(Adapter, import_module(ENGINES[name], __name__)), address
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} needs {error.name}: pip install 'modernbert[{name}]'") from error
