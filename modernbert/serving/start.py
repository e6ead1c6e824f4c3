"""From what `modernbert serve` is given to models that answer."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from ..heads.colbert import ColBERT
from ..inference.session import Session
from ..retrieval.store.identity import load_model
from ..retrieval.store.search import Store
from .batcher import Batcher
from .models import Model, Served, load, served_name
from .search import Searcher


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises OSError with the address."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}, port {port}: {error.strerror}: choose with --host and --port"
        ) from error


def serve_models(
    names: Sequence[str], index: Path | None = None, engine: str | None = None
) -> tuple[list[Served], Searcher | None]:
    """Load models, and open a store with the first ColBERT among them, or with its own model, which is then served too.

    Without names and without a store it is the built-in model.

    Raises:
        ValueError: two models of one name, or a store that was made with another model.
    """
    models: dict[str, Model] = {}
    for name in names if names or index else [None]:
        if (shown := served_name(name)) in models:
            raise ValueError(f"two models are called {shown}, by which requests choose one: rename a folder")
        models[shown] = load(name)
    store = own = None
    if index is not None:
        own, colbert = next(((name, model) for name, model in models.items() if isinstance(model, ColBERT)), ("", None))
        store = Store(index, colbert and load_model(colbert, engine=engine), engine=engine)
        own = own or served_name(store.model)
        models[own] = store.colbert
    served = []
    for name, model in models.items():
        session = store.session if store is not None and name == own else Session(model, engine=engine)
        served.append(Served(name, model, Batcher(session)))
    if store is None:
        return served, None
    return served, Searcher(store, next(each for each in served if each.name == own))
