"""`modernbert convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .show import note


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder or hub id of a model, or a checkpoint of Composer.")
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A new folder; a new file for composer.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="Whose: transformers, sentence-transformers, pylate, stanford (ColBERT) or composer (FlexBERT).",
        ),
    ],
) -> None:
    """Write a checkpoint in the format of another library, with the same weights."""
    from ..heads.convert import convert

    kind = convert(source, target, to=to)
    note(f"{target} holds the {kind} for {to}")
