"""`modernbert evaluate`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeGuard

import typer
from rich.console import Console
from rich.table import Table

from .options import TOP_RUN, EngineOption, JsonOption
from .output import output_file
from .show import note
from .temporary import temporary_store

if TYPE_CHECKING:
    from ..retrieval.evaluate import Qrels, Run
    from ..retrieval.store.search import Store


def evaluate(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="A folder with corpus, queries and qrels/SPLIT, as of BEIR or MTEB; or hf:NAME[:CONFIG] on the hub.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="ColBERT or Embedder, folder or hub id.", show_default="the built-in model"),
    ] = None,
    engine: EngineOption = None,
    split: Annotated[
        str | None, typer.Option(help="The judgements to use.", show_default="test, or the only one")
    ] = None,
    index: Annotated[Path | None, typer.Option(metavar="STORE", help="Keep the store of the corpus here.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the TREC run.")] = None,
    per_query: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the metrics of each query as JSON lines.")
    ] = None,
    keep_identical_ids: Annotated[
        bool, typer.Option("--keep-identical-ids", help="Keep documents with the id of the query; BEIR drops them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how well a model finds the relevant documents of a data set, with 95 % intervals.

    The exit status is 1 if the run could not be written because of an id, and 2 after an error.
    """
    from ..files import replacing
    from ..retrieval.dataset import find_dataset, parts, parts_pattern, read_qrels, read_queries
    from ..retrieval.evaluate import check_measures, without_identical_ids, write_run
    from ..retrieval.evaluate import evaluate as evaluate_run
    from ..retrieval.hub_dataset import PREFIX

    run, per_query = run and output_file(run, "--run"), per_query and output_file(per_query, "--per-query")
    check_measures()
    corpus, queries, qrels = find_dataset(dataset, split)
    judged = read_qrels(qrels)
    texts = read_queries(queries)
    judged_queries = {name: text for name, text in texts.items() if name in judged}
    unfit = _check(corpus, judged, texts)
    if run and unfit:
        note(f"--run is left out: {unfit}")
    # One more than a run has, because one may have the id of the query.
    if _is_embedder(model):
        for option, value in (("--index", index), ("--engine", engine)):
            if value:
                raise ValueError(f"{option} is for a ColBERT, and {model} is an Embedder: leave it out")
        found = _dense_run(parts(corpus), judged_queries, model)
    else:
        with _corpus_store(parts(corpus), index, model, engine) as store:
            # The store may also hold other documents.
            found = store.run(judged_queries, top_k=TOP_RUN + 1, path=parts_pattern(corpus))
    metrics = evaluate_run(found, judged, ignore_identical_ids=not keep_identical_ids, on_note=note)
    if as_json:
        rows = {m.name: {"mean": m.mean, "low": m.low, "high": m.high} for m in metrics}
        name = dataset if dataset.startswith(PREFIX) else Path(dataset).name
        print(json.dumps({"dataset": name, "queries": len(judged), **rows}, indent=2))
    else:
        table = Table("", "mean", "95 % interval", box=None, header_style="dim")
        for m in metrics:
            table.add_row(m.name, f"{m.mean:.4f}", f"{m.low:.4f} to {m.high:.4f}")
        Console(highlight=False).print(table)
    if per_query:
        with replacing(per_query) as beside, beside.open("w", encoding="utf-8") as file:
            for name in judged:
                print(json.dumps({"query": name, **{m.name: m.per_query[name] for m in metrics}}), file=file)
    if run and not unfit:
        kept = found if keep_identical_ids else without_identical_ids(found)
        write_run(run, {query: dict(list(scores.items())[:TOP_RUN]) for query, scores in kept.items()})
    if run and unfit:
        raise typer.Exit(1)


def _check(corpus: Path, judged: Qrels, texts: dict[str, str]) -> str | None:
    """Note what the files of a data set lack of each other. Returns why a TREC run cannot hold its ids, if so.

    Raises ValueError if no query is judged.
    """
    from ..retrieval.dataset import read_ids
    from ..retrieval.evaluate import run_problem

    if not texts.keys() & judged.keys():
        raise ValueError(
            f"none of the {len(judged):,} judged queries is among the {len(texts):,} queries: do they belong together?"
        )
    absent = {document for grades in judged.values() for document in grades}
    problems = map(run_problem, judged.keys() & texts.keys())
    unfit = next(filter(None, problems), None)
    for name in read_ids(corpus):
        absent.discard(name)
        unfit = unfit or run_problem(name)
    lost = sum(name in absent for grades in judged.values() for name, grade in grades.items() if grade > 0)
    for count, what in (
        (len(judged.keys() - texts.keys()), "judged queries that the queries lack, which count as 0"),
        (len(texts.keys() - judged.keys()), "queries without a judgement, which are left out"),
        (len(absent), f"judged documents that the corpus lacks, in {lost:,} judgements as relevant"),
    ):
        if count:
            note(f"{what}: {count:,}")
    return unfit


def _is_embedder(model: str | None) -> TypeGuard[str]:
    from ..checkpoint import locate
    from ..heads.folders import class_of

    return model is not None and class_of(locate(model)) == "Embedder"


def _dense_run(corpus: Sequence[Path], queries: dict[str, str], model: str) -> Run:
    from ..heads.embedder import Embedder
    from ..inference.session import Session
    from ..progress import progress_bar
    from ..retrieval.dense import dense_run
    from ..retrieval.documents.find import read_file

    session = Session(Embedder.from_pretrained(model))
    with progress_bar("encoding", sum(part.stat().st_size for part in corpus), None, unit="bytes") as on_bytes:
        documents = (document for part in corpus for document in read_file(part, on_bytes=on_bytes, on_note=note))
        return dense_run(session, queries, documents, top_k=TOP_RUN + 1, on_note=note)


@contextmanager
def _corpus_store(
    corpus: Sequence[Path], folder: Path | None, model: str | None, engine: str | None
) -> Iterator[Store]:
    """A store that holds the corpus: in `folder`, or a temporary one."""
    from ..retrieval import Store
    from ..retrieval import index as update
    from ..retrieval.engines import is_target
    from ..retrieval.store.folder import holds_store
    from ..retrieval.store.format import find_manifest
    from ..retrieval.store.identity import load_model

    if folder is None:
        with temporary_store(corpus, load_model(model, engine=engine), note) as store:
            yield store
        return
    if is_target(str(folder)):
        raise ValueError(f"{folder} is an engine, and --index of `evaluate` keeps a store: give the name of a folder")
    manifest = find_manifest(folder) if holds_store(folder) else None  # refuses a folder before the model is loaded
    loaded = load_model(model, manifest.identity if manifest else None, engine)
    update(corpus, folder, loaded, note=note)
    with Store(folder, loaded) as store:
        yield store
