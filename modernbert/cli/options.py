"""Options and defaults that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..retrieval.documents.reading import Reading

TOP_RUN = 100
"""Documents of a query in a TREC run."""

ModelOption = Annotated[str | None, typer.Option(help="ColBERT folder or hub id.", show_default="the built-in model")]
EngineOption = Annotated[
    str | None,
    typer.Option(help="Faster on a CPU: onnxruntime, onnxruntime-int8 or openvino.", show_default="PyTorch"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Leave out files like this, as in a .gitignore; repeatable."),
]
GitignoreOption = Annotated[bool, typer.Option(help="Leave out what git ignores.")]
EncodingOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Of text, tables and JSON lines, such as cp1252.", show_default="UTF-8, or as it looks"
    ),
]
TextColumnOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[,NAME]...",
        help="The columns of tables, or fields of JSON lines, that are the text.",
        show_default="text",
    ),
]
IdColumnOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The column or field that is the id.", show_default="_id or id")
]
DelimiterOption = Annotated[
    str | None, typer.Option(metavar="CHARACTER", help="Between cells: a character, or tab.", show_default="as found")
]
SkipBadRowsOption = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave out broken rows and records, with a note.")
]


def reading_of(
    encoding: str | None, text_column: str | None, id_column: str | None, delimiter: str | None, skip_bad_rows: bool
) -> Reading:
    """How these options say that files are read. A tab may be written as `tab`, or as in Python."""
    from ..retrieval.documents.reading import Reading

    delimiter = "\t" if delimiter in ("tab", r"\t") else delimiter
    return Reading(encoding, text_column, id_column, delimiter, skip_bad_rows)
