"""`modernbert compare`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .options import JsonOption
from .show import note

if TYPE_CHECKING:
    from ..retrieval.evaluate import Metric, Qrels

NUMBERS = ("first", "second", "difference", "low", "high", "p")


def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="What `modernbert evaluate --per-query` wrote.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="The same for another model, on the same data set.")],
    qrels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Judgements: FIRST and SECOND are TREC runs, taken as they are.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Test whether the second of two evaluations differs from the first by more than chance.

    Shown are both means, their difference with its 95 % interval over the queries, and the p of a paired randomisation
    test: the smaller it is, the less likely is such a difference between two models that are equally good.
    """
    from ..retrieval.compare import compare as compare_metrics
    from ..retrieval.dataset import read_qrels

    judged = read_qrels(qrels) if qrels else None
    found = compare_metrics(_metrics(first, judged), _metrics(second, judged), on_note=note)
    if as_json:
        rows = {d.name: {key: value for key, value in asdict(d).items() if key in NUMBERS} for d in found}
        print(json.dumps({"queries": found[0].queries, **rows}, indent=2))
        return
    columns = (f"{found[0].queries:,} queries", *NUMBERS[:3], "95 % interval", "p")
    table = Table(*columns, box=None, header_style="dim")
    for d in found:
        numbers = f"{d.first:.4f}", f"{d.second:.4f}", f"{d.difference:+.4f}", f"{d.low:+.4f} to {d.high:+.4f}"
        table.add_row(d.name, *numbers, f"{d.p:.4f}")
    Console(highlight=False).print(table)


def _metrics(path: Path, judged: Qrels | None) -> list[Metric]:
    from ..retrieval.compare import read_metrics
    from ..retrieval.evaluate import evaluate, read_run

    if judged is None:
        try:
            return read_metrics(path)
        except ValueError as error:
            raise ValueError(f"{error}; a TREC run needs its judgements: --qrels FILE") from error
    # What `evaluate --run` writes lacks the documents that are to be left out.
    return evaluate(
        read_run(path), judged, ignore_identical_ids=False, on_note=lambda message: note(f"{path}: {message}")
    )
