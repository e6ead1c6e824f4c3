"""Stores in other search engines: `export` writes one there, and `Engine` searches it there, without the store.

A target is `ENGINE:ADDRESS`: `qdrant:FOLDER`, `qdrant:http://HOST:6333/COLLECTION`, `lancedb:FOLDER`,
`fast-plaid:FOLDER`. An engine is a file in this folder with the two names of `Adapter`, and `Table` if `index` can
write to it.

Everything that a hit shows is exported with the vectors, and so is the fingerprint of the model: another model is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import NamedTuple, Protocol, cast

from torch import Tensor

from ...late_interaction import Ragged
from ...progress import progress_bar
from ..documents.find import Key
from ..explain import TokenMatch, explain
from ..passages import Passage
from ..queries import EncodedQuery, check_run, check_search, encode_queries, query_vectors
from ..store.filters import Where, conditions
from ..store.format import Manifest, ModelIdentity
from ..store.identity import LoadedModel, ModelSource, load_model
from ..store.search import RUN_QUERIES, Hit, Store
from .held import Documents, HeldRow, Scanned, document_key

ENGINES = {"qdrant": ".qdrant", "lancedb": ".lancedb", "fast-plaid": ".fast_plaid"}


class Row(NamedTuple):
    """A passage, its vectors `[n, E]` float32, and its document: see `held.HeldRow`."""

    passage_id: int
    passage: Passage
    vectors: Tensor
    document: str
    digest: str
    parts: int


class Found(NamedTuple):
    """A passage that an engine has found."""

    score: float
    passage: Passage
    passage_id: int


class Index(Protocol):
    """An export, opened for search. `identity` is that of its model."""

    identity: ModelIdentity

    def search(self, vectors: Ragged, top_k: int, among: Sequence[str] | None) -> Iterator[list[Found]]:
        """For each query, `top_k` passages or more; only of the documents with the keys `among`, unless it is None."""
        ...

    def scan(self) -> Iterator[HeldRow]:
        """All rows. ValueError if they were exported without their documents."""
        ...

    def close(self) -> None:
        """Release files and connections."""
        ...


class Table(Scanned, Protocol):
    """A table that `index` writes to. Several processes may have it open."""

    identity: ModelIdentity

    def add(self, rows: Sequence[Row]) -> None:
        """Write rows. What was written is there when this returns."""
        ...

    def remove(self, documents: Sequence[str]) -> None:
        """Remove all rows of the documents with these keys."""
        ...

    def move(self, lines: Sequence[tuple[str, int, int]]) -> None:
        """Documents, by their keys, that were on one line of their file and are on another now."""
        ...

    def finish(self) -> int:
        """Tidy up after all rows are written. Returns how many there are."""
        ...

    def close(self) -> None:
        """Release files and connections."""
        ...


class Adapter(Protocol):
    """The module of an engine."""

    Table: Callable[[str, Manifest], Table]

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
            # The passages of a document follow one another: it is looked up once.
            place, document, digest, parts = None, "", "", 0
            for batch in store.batches():
                for number, passage, x_NE in zip(*batch, strict=True):
                    if place != (passage.path, passage.id):
                        place, (digest, parts) = (passage.path, passage.id), store.origin(number)
                        document = document_key(Key(*place, digest, None))
                    yield Row(number, passage, x_NE, document, digest, parts)
                    on_rows(1)

        adapter.export(store, address, rows())
    return len(store)


def open_table(target: str, manifest: Manifest) -> Table:
    """The table at `target` for writing; a new one if there is none, for the model of `manifest`.

    Raises:
        ValueError: the engine does not exist, cannot be added to, or there is something else at the address.
        OSError, ModuleNotFoundError: as for `export`.
    """
    adapter, address = _engine(target)
    if not hasattr(adapter, "Table"):
        raise ValueError(f"{target} cannot be updated: index into a store, and export it with `modernbert export`")
    return adapter.Table(address, manifest)


def identity_at(target: str) -> ModelIdentity | None:
    """The model of what is at `target`; None if nothing is. Raises as `Engine`."""
    adapter, address = _engine(target)
    try:
        index = adapter.Index(address)
    except FileNotFoundError:
        return None
    index.close()
    return index.identity


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
        self._documents: Documents | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release files and connections."""
        self._index.close()
        if self._documents:
            self._documents.close()

    def encode(self, queries: Sequence[str]) -> list[EncodedQuery]:
        """Encode queries once, for `search` and `explain`."""
        return encode_queries(self.session, queries)

    def search(
        self,
        queries: Sequence[str | EncodedQuery],
        *,
        top_k: int = 10,
        path: str | None = None,
        where: Where | None = None,
    ) -> list[list[Hit]]:
        """For each query (a text, or what `encode` made of it) its `top_k` passages, best first.

        Args:
            path, where: as of `Store.search`. The first search with one reads the paths and the metadata of all
                documents from the engine, into a temporary database.
        """
        queries = check_search(queries, top_k)
        among = self._among(path, where)
        results = []
        for found in self._search(queries, top_k, among):
            results.append([Hit(rank, *hit) for rank, hit in enumerate(found, start=1)])
        return results

    def run(self, queries: Mapping[str, str], *, top_k: int = 100) -> dict[str, dict[str, float]]:
        """As `Store.run`: for each query id its `top_k` documents by their best passages.

        Raises ValueError if documents of several files share an id, as far as they are found.
        """
        check_run(queries, top_k)
        run: dict[str, dict[str, float]] = {}
        paths: dict[str, str] = {}
        names = list(queries)
        for start in range(0, len(names), RUN_QUERIES):
            group = names[start : start + RUN_QUERIES]
            encoded, most = self.encode([queries[name] for name in group]), 2 * top_k
            while group:
                left = []
                for name, query, found in zip(group, encoded, self._search(encoded, most, None), strict=True):
                    scores: dict[str, float] = {}
                    for score, passage, _ in found:
                        if paths.setdefault(passage.id, passage.path) != passage.path:
                            raise ValueError(
                                f"several documents have the id {passage.id!r}: a run could not tell them apart"
                            )
                        scores.setdefault(passage.id, score)
                    if len(scores) < top_k and len(found) == most:  # more passages may be of other documents
                        left.append((name, query))
                    run[name] = dict(list(scores.items())[:top_k])
                group, encoded, most = [name for name, _ in left], [query for _, query in left], 2 * most
        return {name: run[name] for name in names}

    def _search(
        self, queries: Sequence[str | EncodedQuery], top_k: int, among: Sequence[str] | None
    ) -> Iterator[list[Found]]:
        if not queries or among == []:
            yield from ([] for _ in queries)
            return
        for found in self._index.search(query_vectors(self.session, queries), top_k, among):
            yield sorted(found, key=lambda hit: (-hit.score, hit.passage_id))[:top_k]

    def _among(self, path: str | None, where: Where | None) -> list[str] | None:
        """The keys of the documents to search; None: all."""
        wanted = tuple(conditions(() if where is None else where))
        if path is None and not wanted:
            return None
        if self._documents is None:
            self._documents = Documents(self._index)
        return self._documents.matching(path, wanted)

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
