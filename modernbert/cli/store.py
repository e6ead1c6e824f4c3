"""`modernbert index`, `evaluate` and `export`."""

from __future__ import annotations

import glob
import json
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .search import TOP_RUN, Model, show_notes
from .show import note


def index(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Text, markdown, HTML, PDF, source code, folders of these; JSON lines, CSV or a BEIR corpus.",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="STORE", help="The folder of the store.")],
    model: Annotated[str | None, typer.Option(help="ColBERT folder or hub id. [the store's, or the built-in]")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="fp16|fp32|int8", help="Of the vectors. [fp16]")] = None,
    prefilter: Annotated[bool, typer.Option("--prefilter", help="Also prepare for search --prefilter.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Drop what was read from these paths instead.")] = False,
) -> None:
    """Make or update a store that `modernbert search --index` reads.

    Of what lies under the paths the store then holds what is there now; only what is new or changed is encoded.
    After an interruption the same command goes on where it stopped.
    """
    from .. import retrieval

    notes: list[str] = []
    try:
        if forget:
            summary = retrieval.forget(paths, output)
        else:
            summary = retrieval.index(paths, output, model, dtype=dtype, prefilter=prefilter, note=notes.append)
    except KeyboardInterrupt:
        raise OSError(f"interrupted; {output} is as it was. The same command goes on where this one stopped") from None
    finally:
        show_notes(notes)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    note(
        f"{summary.added:,} documents added, {summary.changed:,} changed, {summary.removed:,} removed, "
        f"{summary.unchanged:,} unchanged"
    )
    note(f"{output} holds {summary.passages:,} passages of {summary.documents:,} documents in {size / 1e6:,.1f} MB")


def evaluate(
    dataset: Annotated[Path, typer.Argument(metavar="FOLDER", help="BEIR layout: corpus, queries, qrels/SPLIT.tsv.")],
    model: Model = None,
    split: Annotated[str | None, typer.Option(help="Which judgements. [test, or the only one]")] = None,
    index: Annotated[Path | None, typer.Option(metavar="STORE", help="Keep the store of the corpus here.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the TREC run.")] = None,
    per_query: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write each query's measures, JSON lines.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
) -> None:
    """Measure how well a model finds the relevant documents of a BEIR data set, with 95 % intervals."""
    from .. import retrieval
    from ..retrieval.documents.text import file_name
    from ..retrieval.evaluate import find_dataset, measure, read_qrels, read_queries, write_run
    from ..retrieval.store.format import replacing

    corpus, queries, qrels = find_dataset(dataset, split)
    judged = read_qrels(qrels)
    asked = {name: text for name, text in read_queries(queries).items() if name in judged}
    with tempfile.TemporaryDirectory() as folder:
        folder = index or Path(folder)
        retrieval.index([corpus], folder, model, note=note)
        with retrieval.Store(folder, model) as store:
            # The store may hold other documents as well.
            found = store.run(asked, top_k=TOP_RUN, path=glob.escape(file_name(os.path.abspath(corpus))))
    measures = measure(found, judged, note=note)
    if run:
        write_run(run, found)
    if per_query:
        with replacing(per_query) as beside, beside.open("w", encoding="utf-8") as file:
            for name in judged:
                print(json.dumps({"query": name, **{m.name: m.per_query[name] for m in measures}}), file=file)
    if as_json:
        rows = {m.name: {"mean": m.mean, "low": m.low, "high": m.high} for m in measures}
        print(json.dumps({"dataset": dataset.name, "queries": len(judged), **rows}, indent=2))
        return
    table = Table("", "mean", "95 % interval", box=None, header_style="dim")
    for m in measures:
        table.add_row(m.name, f"{m.mean:.4f}", f"{m.low:.4f} to {m.high:.4f}")
    Console(highlight=False).print(table)


def export(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store made by `modernbert index`.")],
    target: Annotated[
        str, typer.Argument(help="qdrant:FOLDER, qdrant:URL/COLLECTION, lancedb:FOLDER, fast-plaid:FOLDER")
    ],
) -> None:
    """Take a store to another engine, which `modernbert search --index TARGET` then searches."""
    from ..retrieval import engines
    from ..retrieval.store.search import Store

    with Store(store) as opened:
        count = engines.export(opened, target)
    note(f"{target} holds {count:,} passages; search it with: modernbert search QUERY --index {target}")
