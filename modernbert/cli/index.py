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

LONGEST = 7 * 24 * 60.0
"""Minutes that a rank waits for another: for the slowest to finish its share, and for the merge."""


def index(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Text, markdown, notebooks, HTML, PDF, Office files, code, folders of these; JSON lines, CSV or a "
            "BEIR corpus; also URLs of object stores, such as s3://BUCKET/docs.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            metavar="STORE", help="The folder of the store; or lancedb:ADDRESS, qdrant:FOLDER or qdrant:URL/COLLECTION."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="ColBERT folder or hub id.", show_default="the model of the store, or the built-in one"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="fp16|fp32|int8|4bit|2bit", help="How the vectors are kept.", show_default="fp16"),
    ] = None,
    pool: Annotated[
        int | None, typer.Option(metavar="N", help="Average N tokens that are alike to one.", show_default="1: do not")
    ] = None,
    prefilter: Annotated[bool, typer.Option("--prefilter", help="Also prepare for `search --prefilter`.")] = False,
    exclude: ExcludeOption = None,
    gitignore: GitignoreOption = True,
    engine: EngineOption = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Encode on this Ray cluster: HOST:PORT, auto or local.")
    ] = None,
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
    not be read again, and 2 after an error, which leaves the store as it was. Under `torchrun`, each rank encodes its
    share.
    """
    from .. import retrieval
    from ..retrieval.engines import is_target
    from ..retrieval.store.folder import own_files
    from ..train.distributed import ranks

    notes: list[str] = []
    try:
        with ranks(timeout_minutes=LONGEST) as every:
            if forget:
                summary = every.on_first(lambda: retrieval.forget(paths, output))
            else:
                summary = retrieval.index(
                    paths,
                    output,
                    model,
                    dtype=dtype,
                    pool=pool,
                    prefilter=prefilter,
                    exclude=exclude or (),
                    gitignore=gitignore,
                    engine=engine,
                    ranks=every,
                    ray=ray,
                    **asdict(reading_of(encoding, text_column, id_column, delimiter, skip_bad_rows)),
                    note=notes.append,
                )
    except KeyboardInterrupt:
        kept = "what was written stays" if is_target(output) else f"{output} is as it was"
        raise OSError(f"interrupted; {kept}. Run the same command again to resume") from None
    finally:
        show_notes(notes)
    if not every.is_first:
        return
    note(
        f"{summary.added:,} documents added, {summary.changed:,} changed, {summary.removed:,} removed, "
        f"{summary.unchanged:,} unchanged"
    )
    size = (
        "" if is_target(output) else f" in {sum(file.stat().st_size for file in own_files(Path(output))) / 1e6:,.1f} MB"
    )
    note(f"{output} holds {summary.passages:,} passages of {summary.documents:,} documents{size}")
    if summary.unread:
        note(f"{summary.unread:,} of them could not be read now, and are kept as they were")
        raise typer.Exit(1)
