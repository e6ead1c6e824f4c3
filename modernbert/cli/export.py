"""`modernbert export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .show import note


def export(
    source: Annotated[str, typer.Argument(help="A store made by `modernbert index`; or a model, a folder or hub id.")],
    target: Annotated[
        str,
        typer.Argument(
            help="Of a store: qdrant:FOLDER, qdrant:URL/COLLECTION, lancedb:FOLDER or fast-plaid:FOLDER. "
            "Of a model: onnx:FOLDER or openvino:FOLDER."
        ),
    ],
) -> None:
    """Export a store to another search engine, or a model as a graph that runs without PyTorch.

    `modernbert search --index TARGET` then searches the store there. `SentenceTransformer(FOLDER, backend="onnx")` runs
    the graph of a model.
    """
    from ..retrieval import engines
    from ..retrieval.store.search import Store

    kind, _, folder = target.partition(":")
    if kind in ("onnx", "openvino"):
        from ..integrations import onnx

        onnx.export(onnx.load(source), folder, kind=kind)
        note(f"{folder} holds the model, and its graph in {Path(folder) / kind}")
        return
    with Store(Path(source)) as opened:
        count = engines.export(opened, target)
    note(f"{target} holds {count:,} passages; search it with: modernbert search QUERY --index {target}")
