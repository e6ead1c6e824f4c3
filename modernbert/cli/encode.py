"""`modernbert encode`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import EngineOption, ModelOption
from .output import output_file
from .show import note

if TYPE_CHECKING:
    from ..late_interaction import Ragged


def encode(
    texts: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="JSON lines with a text field (BEIR), or lines of text."),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="A name ending in .npz or .safetensors.")],
    queries: Annotated[bool, typer.Option("--queries", help="Encode as queries, not as documents.")] = False,
    model: ModelOption = None,
    engine: EngineOption = None,
) -> None:
    """Encode texts to token vectors.

    The file holds the rows of all texts in `values`, their `ids`, and `offsets`: text i owns the rows from
    offset i to offset i + 1. In a safetensors file the ids are a JSON list in the metadata.
    """
    from ..inference.session import Session
    from ..retrieval.documents.find import read_texts
    from ..retrieval.store.identity import load_colbert

    if output.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"--output is {output}, but its name must end in .npz or .safetensors")
    file = output_file(output, "--output")
    documents = list(read_texts(texts, on_note=note))
    if not documents:
        raise ValueError(f"{texts} holds no text to encode")
    session = Session(load_colbert(model), engine=engine)
    contents = [document.content for document in documents]
    vectors = session.encode_queries(contents) if queries else session.encode_documents(contents)
    _write(file, vectors, [document.id for document in documents])
    rows, width = vectors.values.shape
    note(f"wrote {len(vectors):,} texts, {rows:,} vectors of width {width}, to {output}")


def _write(output: Path, vectors: Ragged, ids: list[str]) -> None:
    import numpy as np
    from safetensors.numpy import save

    from ..files import replacing

    values, offsets = vectors.values.numpy(), vectors.offsets.numpy()
    with replacing(output) as beside:
        if output.suffix == ".npz":
            with beside.open("wb") as file:
                np.savez(file, values=values, offsets=offsets, ids=np.array(ids))
        else:
            beside.write_bytes(save({"values": values, "offsets": offsets}, metadata={"ids": json.dumps(ids)}))
