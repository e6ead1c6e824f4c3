"""The models of a server. The class of a model decides which routes it serves."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from ..checkpoint import locate
from ..heads.colbert import ColBERT
from ..heads.embedder import Embedder
from ..heads.folders import class_of
from ..heads.reranker import Reranker
from ..late_interaction import Ragged
from ..packing import Tokenized
from .batcher import Batcher, QueueFull, RequestTooLarge
from .refused import Refused

Model: TypeAlias = ColBERT | Embedder | Reranker

BUILT_IN = "modernbert"
"""The name of the built-in model."""

ROUTES: dict[str, tuple[type[Model], ...]] = {
    "/v1/embeddings": (Embedder,),
    "/v1/multi-vector": (ColBERT,),
    "/v1/rerank": (Reranker, ColBERT),
    "/v2/rerank": (Reranker, ColBERT),
}
"""The classes that serve a route; without a name, the first model of the first class answers."""


@dataclass(frozen=True, eq=False)
class Served:
    """A model under a name, and what encodes its texts."""

    name: str
    model: Model
    batcher: Batcher
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def kind(self) -> str:
        return type(self.model).__name__

    async def encode(self, tokens: Tokenized) -> Ragged:
        """The rows of each text. A caller that is cancelled leaves the queue."""
        try:
            return await asyncio.wrap_future(self.batcher.submit(tokens))
        except QueueFull as full:
            raise Refused(429, str(full), code="rate_limit", headers={"Retry-After": str(full.retry_after)}) from full
        except RequestTooLarge as error:
            raise Refused(413, str(error)) from error


def served_name(name: str | None) -> str:
    """The name by which requests choose a model: that of its folder, or its hub id; None: the built-in one."""
    if name is None:
        return BUILT_IN
    return Path(os.path.abspath(name)).name if os.path.isdir(name) else name


def load(name: str | None) -> Model:
    """The model in a folder or on the hub; None: the built-in one. Raises ValueError for a folder of another class."""
    if name is None:
        return ColBERT.default()
    # A Reranker is saved as a classifier with one label. What is of no class here is refused by ColBERT, with its name.
    kinds: dict[str | None, type[Model]] = {"Embedder": Embedder, "SequenceClassifier": Reranker}
    return kinds.get(class_of(locate(name)), ColBERT).from_pretrained(name)


def pick(models: Sequence[Served], route: str, name: str | None) -> Served:
    """The model that answers a request. Raises Refused if there is none, or if it is of a class without this route."""
    classes = ROUTES[route]
    needed = " or ".join(f"a {kind.__name__}" if kind is not Embedder else "an Embedder" for kind in classes)
    if name is None:
        for kind in classes:
            for served in models:
                if isinstance(served.model, kind):
                    return served
        have = ", ".join(f"{served.name} ({served.kind})" for served in models)
        raise Refused(400, f"{route} needs {needed}, and the models of this server are {have}", "model")
    found = next((served for served in models if served.name == name), None)
    if found is None:
        have = ", ".join(served.name for served in models)
        raise Refused(404, f"there is no model {name!r:.80}: this server has {have}", "model", "model_not_found")
    if not isinstance(found.model, classes):
        own = ", ".join(path for path, kinds in ROUTES.items() if isinstance(found.model, kinds))
        article = "an" if found.kind == "Embedder" else "a"
        message = f"{found.name} is {article} {found.kind}, which serves {own}; {route} needs {needed}"
        raise Refused(400, message, "model", "model_not_supported")
    return found
