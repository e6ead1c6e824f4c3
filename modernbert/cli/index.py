"""`modernbert index`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    DelimiterOption,
    EncodingOption,
    EngineOption,
    ExcludeOption,
    GitignoreOption,
    IdColumnOption,
    SkipBadRowsOption,
    TextColumnOption,
    reading_of,
)
from .show import note, show_notes


def index(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Text, markdown, notebooks, HTML, PDF, Office files, code, folders of these; JSON lines, CSV or a "
            "BEIR corpus.",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="STORE", help="The folder of the store.")],
    model: Annotated[
        str | None,
        typer.Option(help="ColBERT folder or hub id.", show_default="the model of the store, or the built-in one"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="fp16|fp32|int8", help="The dtype of the vectors.", show_default="fp16")
    ] = None,
    prefilter: Annotated[bool, typer.Option("--prefilter", help="Also prepare for `search --prefilter`.")] = False,
    exclude: ExcludeOption = None,
    gitignore: GitignoreOption = True,
    engine: EngineOption = None,
    encoding: EncodingOption = None,
    text_column: TextColumnOption = None,
    id_column: IdColumnOption = None,
    delimiter: DelimiterOption = None,
    skip_bad_rows: SkipBadRowsOption = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Remove the documents from these paths instead of adding them.")
    ] = False,
) -> None:
    """Make or update a store for `modernbert search --index`.

    Afterwards, the store holds what is now under the paths; only new and changed documents are encoded. After an
    interruption, run the same command again to resume. The exit status is 1 if the store keeps documents that could
    not be read again, and 2 after an error, which leaves the store as it was.
    """
    from .. import retrieval
    from ..retrieval.store.folder import own_files

    notes: list[str] = []
    try:
        if forget:
            summary = retrieval.forget(paths, output)
        else:
            summary = retrieval.index(
                paths,
                output,
                model,
                dtype=dtype,
                prefilter=prefilter,
                exclude=exclude or (),
                gitignore=gitignore,
                engine=engine,
                **asdict(reading_of(encoding, text_column, id_column, delimiter, skip_bad_rows)),
                note=notes.append,
            )
    except KeyboardInterrupt:
        raise OSError(f"interrupted; {output} is as it was. Run the same command again to resume") from None
    finally:
        show_notes(notes)
    size = sum(file.stat().st_size for file in own_files(output))
    note(
        f"{summary.added:,} documents added, {summary.changed:,} changed, {summary.removed:,} removed, "
        f"{summary.unchanged:,} unchanged"
    )
    note(f"{output} holds {summary.passages:,} passages of {summary.documents:,} documents in {size / 1e6:,.1f} MB")
    if summary.unread:
        note(f"{summary.unread:,} of them could not be read now, and are kept as they were")
        raise typer.Exit(1)
