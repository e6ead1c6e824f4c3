"""`modernbert export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .show import note


def export(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store made by `modernbert index`.")],
    target: Annotated[
        str, typer.Argument(help="qdrant:FOLDER, qdrant:URL/COLLECTION, lancedb:FOLDER or fast-plaid:FOLDER.")
    ],
) -> None:
    """Export a store to another search engine. `modernbert search --index TARGET` then searches it there."""
    from ..retrieval import engines
    from ..retrieval.store.search import Store

    with Store(store) as opened:
        count = engines.export(opened, target)
    note(f"{target} holds {count:,} passages; search it with: modernbert search QUERY --index {target}")
