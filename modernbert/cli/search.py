"""`modernbert search` and `modernbert demo`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from .converse import Filter, SearchShell, parse_fields
from .options import (
    TOP_RUN,
    DelimiterOption,
    EncodingOption,
    EngineOption,
    ExcludeOption,
    GitignoreOption,
    IdColumnOption,
    JsonOption,
    ModelOption,
    SkipBadRowsOption,
    TextColumnOption,
    reading_of,
)
from .output import output_file
from .show import note, print_text, show_notes
from .temporary import temporary_store

if TYPE_CHECKING:
    from ..retrieval.documents.reading import Reading
    from ..retrieval.engines import Engine
    from ..retrieval.store.search import Store

DEMO = Path(__file__).parents[1] / "assets" / "demo" / "corpus.jsonl.gz"
QUESTIONS = (
    "which foods protect the heart?",
    "how does hail form inside a storm?",
    "how do buildings survive an earthquake?",
)
TOP = 5


def search(
    query: Annotated[
        str | None, typer.Argument(help="The question.", show_default="ask for questions on the terminal or stdin")
    ] = None,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PATH]...", help="Files and folders to search once, without a store."),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="A store made by `modernbert index`, or a target of `modernbert export`."),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="How many hits to print.", show_default=f"{TOP}, or {TOP_RUN} in a run")
    ] = None,
    as_json: JsonOption = False,
    why: Annotated[bool, typer.Option(help="Show which words matched.")] = True,
    html: Annotated[Path | None, typer.Option(help="Write a page with the hits and why they matched.")] = None,
    path: Annotated[str | None, typer.Option(metavar="PATTERN", help="Search only files like 'docs/*.md'.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=VALUE", help="Search only records like this; also `year>=2020`, `author.name=Ann`"),
    ] = None,
    prefilter: Annotated[
        bool, typer.Option("--prefilter", help="Search only likely passages: faster, but not exact.")
    ] = False,
    queries: Annotated[Path | None, typer.Option(help="BEIR queries.jsonl[.gz] to run; needs --run.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a TREC run of the --queries.")] = None,
    model: ModelOption = None,
    engine: EngineOption = None,
    exclude: ExcludeOption = None,
    gitignore: GitignoreOption = True,
    encoding: EncodingOption = None,
    text_column: TextColumnOption = None,
    id_column: IdColumnOption = None,
    delimiter: DelimiterOption = None,
    skip_bad_rows: SkipBadRowsOption = False,
) -> None:
    """Rank passages by how well they answer a question: in a store, or in files that are read for this question."""
    reading = reading_of(encoding, text_column, id_column, delimiter, skip_bad_rows)
    if index is not None and (exclude, gitignore, reading) != (None, True, reading_of(None, None, None, None, False)):
        raise ValueError(
            "--exclude, --no-gitignore, --encoding, --text-column, --id-column, --delimiter and --skip-bad-rows say how"
            " files are read: give them to `modernbert index`, or search files and folders without --index"
        )
    if (index is None) == (not paths):
        raise ValueError("say where to search: files and folders after the query, or a store: --index STORE")
    if query is not None and not query.strip():
        raise ValueError("the query is empty: give a question in quotes")
    if (queries is None) != (run is None) or (queries and (query or index is None)):
        raise ValueError("a run needs --index STORE, --queries FILE and --run FILE, and no query")
    if queries and run:
        _write_run(index or "", model, engine, queries, output_file(run, "--run"), top or TOP_RUN)
        return
    page = output_file(html, "--html") if html else None
    chosen = Filter(path or None, parse_fields(where or ()), prefilter)
    if paths:
        with _read(paths, model, engine, exclude or (), gitignore, reading) as (store, took):
            shell = SearchShell(store, top or TOP, why, chosen)
            shell.answer(query or "", as_json, page)
            if not as_json:
                print_text(shell.console, Text(f"{_size(store)}, {took}", style="dim"))
        return
    with _open(index or "", model, engine) as (store, title):
        shell = SearchShell(store, top or TOP, why, chosen)
        if query is None:
            shell.repl(title, as_json)
        else:
            shell.answer(query, as_json, page)


def demo(
    questions: Annotated[list[str] | None, typer.Argument(help="Questions.", show_default="three examples")] = None,
) -> None:
    """Search 1,581 paragraphs of Wikipedia, which ship with the package, using the built-in model."""
    with _read([DEMO], None, None) as (store, took):
        shell = SearchShell(store, top=3)
        print_text(shell.console, Text(f"{_size(store)} (Wikipedia), {took}\n", style="dim"))
        for question in questions or QUESTIONS:
            started = time.perf_counter()
            found = shell.ask(question)
            milliseconds = Text(f"  {1000 * (time.perf_counter() - started):.0f} ms\n", style="dim not bold")
            print_text(shell.console, Text(question, style="bold") + milliseconds)
            shell.show(found)


def _write_run(index: str, model: str | None, engine: str | None, queries: Path, run: Path, top: int) -> None:
    from ..retrieval.dataset import read_queries
    from ..retrieval.evaluate import run_problem, write_run
    from ..retrieval.store.search import Store

    with _open(index, model, engine) as (store, _):
        texts = read_queries(queries)
        names = store.document_ids() if isinstance(store, Store) else ()
        if problem := next(filter(None, map(run_problem, chain(texts, names))), None):
            raise ValueError(problem)
        write_run(run, store.run(texts, top_k=top))
    note(f"wrote the best {top} documents for each of {len(texts):,} queries to {run}")


@contextmanager
def _open(index: str, model: str | None, engine: str | None) -> Iterator[tuple[Store | Engine, str]]:
    """A store or an export, and its description."""
    from ..retrieval.engines import Engine, is_target
    from ..retrieval.store.request import read_unfinished, resume_command
    from ..retrieval.store.search import Store

    if is_target(index):
        with Engine(index, model, engine=engine) as export:
            yield export, index
        return
    with Store(index, model, engine=engine) as store:
        if request := read_unfinished(store.folder):
            resume = resume_command(request, store.folder)
            note(f"this is the old state of {index}: an update is unfinished; resume with: {resume}")
        yield store, _size(store)


@contextmanager
def _read(
    paths: Sequence[Path],
    model: str | None,
    engine: str | None,
    exclude: Sequence[str] = (),
    gitignore: bool = True,
    reading: Reading | None = None,
) -> Iterator[tuple[Store, str]]:
    """A store of files and folders, and how long reading and encoding took."""
    from ..retrieval.store.identity import load_model

    loaded, notes = load_model(model, engine=engine), []
    started = time.perf_counter()
    with ExitStack() as stack:
        try:
            made = temporary_store(
                paths, loaded, notes.append, "fp32", exclude=exclude, gitignore=gitignore, reading=reading
            )
            store = stack.enter_context(made)
        finally:  # The notes explain why there may be nothing to search, so they come before that error.
            show_notes(notes)
        yield store, f"read and encoded in {time.perf_counter() - started:.1f} s"


def _size(store: Store) -> str:
    return f"{len(store):,} passages of {store.documents:,} documents"
