"""Options and defaults that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

TOP_RUN = 100
"""Documents of a query in a TREC run."""

ModelOption = Annotated[str | None, typer.Option(help="ColBERT folder or hub id.", show_default="the built-in model")]
EngineOption = Annotated[
    str | None,
    typer.Option(help="Faster on a CPU: onnxruntime, onnxruntime-int8 or openvino.", show_default="PyTorch"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
