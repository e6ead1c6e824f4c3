"""A store in other people's engines: `export` takes it there, `Engine` searches it there, without the store.

A target is `ENGINE:PLACE`: `qdrant:FOLDER`, `qdrant:http://HOST:6333/COLLECTION`, `lancedb:FOLDER`,
`fast-plaid:FOLDER`. An engine is a file in this folder with two names:

    export(store, place, rows)  takes the vectors there; `rows` are (number, passage, vectors), once, in order
    Index(place)                what lies there: its `manifest` (the model's name and fingerprint),
                                `search(vectors, top_k)` to (score, passage, number) for each query, and `close()`

What a hit shows travels with the vectors, and so does the model's fingerprint: another model is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..explain import TokenMatch, explain
from ..store.identity import Model, load
from ..store.search import Hit

if TYPE_CHECKING:
    from ..store.search import Store

ENGINES = {"qdrant": ".qdrant", "lancedb": ".lancedb", "fast-plaid": ".fast_plaid"}


def is_target(name: str) -> bool:
    """Whether `name` is an engine's target; anything else is the folder of a store."""
    return name.partition(":")[0] in ENGINES


def export(store: Store, target: str, *, progress: bool | None = None) -> int:
    """Take all of a store to an engine and return how many passages that were. What an earlier export left is replaced.

    Args:
        progress: show a bar on stderr; None: on a terminal.

    Raises:
        ValueError: no such engine, or a place that holds something else.
        OSError: the engine cannot be reached, or fails.
        ModuleNotFoundError: the engine's package is not installed; the message names the extra.
    """
    from rich.console import Console
    from rich.progress import track

    engine, place = _engine(target)
    rows = (row for batch in store.batches() for row in zip(*batch, strict=True))
    quiet = progress is False or (progress is None and not sys.stderr.isatty())
    console = Console(stderr=True)
    shown = track(rows, "exporting", total=len(store), console=console, transient=True, disable=quiet)
    engine.export(store, place, shown)
    return len(store)


class Engine:
    """An export, searched where it lies; a `Store` to whoever only searches.

    Attributes:
        colbert: the model that queries are encoded with.
    """

    def __init__(self, target: str, model: Model | None = None) -> None:
        """Open the export at `target` with the model that it was made with, or with `model`, which must be the same.

        Raises:
            FileNotFoundError: there is no export, or none that came to its end.
            ValueError: no such engine, or another model. OSError and ModuleNotFoundError as of `export`.
        """
        engine, place = _engine(target)
        self._index = engine.Index(place)
        try:
            self.colbert, _ = load(model, self._index.manifest)
        except BaseException:
            self._index.close()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of files and connections."""
        self._index.close()

    def search(self, queries: Sequence[str], *, top_k: int = 10) -> list[list[Hit]]:
        """For each query its `top_k` passages, best first, as the engine finds them."""
        if isinstance(queries, str):
            raise ValueError(f"queries must be a list of texts, got the text {queries!r}; write [query]")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; ask for 1 or more")
        results = []
        for found in self._index.search(self.colbert.encode_queries(queries), top_k) if queries else []:
            ranked = sorted(found, key=lambda hit: (-hit[0], hit[2]))[:top_k]
            results.append([Hit(rank, *hit) for rank, hit in enumerate(ranked, start=1)])
        return results

    def explain(self, query: str, hit: Hit) -> list[TokenMatch]:
        """For each query token the most similar token of a hit, which is encoded anew: without its context."""
        return explain(self.colbert, query, [hit.passage.content])[0]


def _engine(target: str) -> tuple[Any, str]:
    """The engine's module, and the place."""
    name, _, place = target.partition(":")
    if name not in ENGINES or not place:
        known = ", ".join(f"{engine}:PLACE" for engine in ENGINES)
        raise ValueError(f"{target!r} is no target; a target is one of {known}")
    try:
        return import_module(ENGINES[name], __name__), place
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} needs {error.name}: pip install 'modernbert[{name}]'") from error
