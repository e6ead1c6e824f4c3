"""`modernbert evaluate`."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .options import TOP_RUN, EngineOption, JsonOption, ModelOption
from .output import output_file
from .show import note
from .temporary import temporary_store

if TYPE_CHECKING:
    from ..retrieval.store.search import Store


def evaluate(
    dataset: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="In BEIR's layout: corpus, queries, qrels/SPLIT.tsv.")
    ],
    model: ModelOption = None,
    engine: EngineOption = None,
    split: Annotated[
        str | None, typer.Option(help="The judgements to use.", show_default="test, or the only one")
    ] = None,
    index: Annotated[Path | None, typer.Option(metavar="STORE", help="Keep the store of the corpus here.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the TREC run.")] = None,
    per_query: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the metrics of each query as JSON lines.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how well a model finds the relevant documents of a BEIR data set, with 95 % intervals."""
    from ..files import replacing
    from ..retrieval.documents.text import file_name
    from ..retrieval.evaluate import evaluate as evaluate_run
    from ..retrieval.evaluate import find_dataset, read_qrels, read_queries, write_run

    run, per_query = run and output_file(run, "--run"), per_query and output_file(per_query, "--per-query")
    corpus, queries, qrels = find_dataset(dataset, split)
    judged = read_qrels(qrels)
    judged_queries = {name: text for name, text in read_queries(queries).items() if name in judged}
    with _corpus_store(corpus, index, model, engine) as store:
        # The store may also hold other documents.
        found = store.run(judged_queries, top_k=TOP_RUN, path=glob.escape(file_name(os.path.abspath(corpus))))
    metrics = evaluate_run(found, judged, on_note=note)
    if run:
        write_run(run, found)
    if per_query:
        with replacing(per_query) as beside, beside.open("w", encoding="utf-8") as file:
            for name in judged:
                print(json.dumps({"query": name, **{m.name: m.per_query[name] for m in metrics}}), file=file)
    if as_json:
        rows = {m.name: {"mean": m.mean, "low": m.low, "high": m.high} for m in metrics}
        print(json.dumps({"dataset": dataset.name, "queries": len(judged), **rows}, indent=2))
        return
    table = Table("", "mean", "95 % interval", box=None, header_style="dim")
    for m in metrics:
        table.add_row(m.name, f"{m.mean:.4f}", f"{m.low:.4f} to {m.high:.4f}")
    Console(highlight=False).print(table)


@contextmanager
def _corpus_store(corpus: Path, folder: Path | None, model: str | None, engine: str | None) -> Iterator[Store]:
    """A store that holds the corpus: in `folder`, or a temporary one."""
    from ..retrieval import Store
    from ..retrieval import index as update
    from ..retrieval.store.folder import holds_store
    from ..retrieval.store.format import find_manifest
    from ..retrieval.store.identity import load_model

    if folder is None:
        with temporary_store([corpus], load_model(model, engine=engine), note) as store:
            yield store
        return
    manifest = find_manifest(folder) if holds_store(folder) else None  # refuses a folder before the model is loaded
    loaded = load_model(model, manifest.identity if manifest else None, engine)
    update([corpus], folder, loaded, note=note)
    with Store(folder, loaded) as store:
        yield store
