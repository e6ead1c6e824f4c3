"""`modernbert search` and `modernbert demo`."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from .show import line, note, print_hits, print_matches, print_text

if TYPE_CHECKING:
    from ..retrieval.engines import Engine
    from ..retrieval.explain import TokenMatch
    from ..retrieval.store.search import Hit, Store

DEMO = Path(__file__).parents[1] / "assets" / "demo" / "corpus.jsonl.gz"
QUESTIONS = (
    "which foods protect the heart?",
    "how does hail form inside a storm?",
    "how do buildings survive an earthquake?",
)
NOTES_SHOWN = 5
TOP, TOP_RUN = 5, 100

Model = Annotated[str | None, typer.Option(help="ColBERT folder or hub id; if not given, the built-in model.")]


def search(
    query: Annotated[str | None, typer.Argument(help="What to look for. Without it, questions are asked for.")] = None,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PATH]...", help="Files and folders to search once, without a store."),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="A store made by `modernbert index`, or what `export` has made of it."),
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help=f"How many to print. [{TOP}, in a run {TOP_RUN}]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
    why: Annotated[bool, typer.Option(help="Say which words matched.")] = True,
    html: Annotated[Path | None, typer.Option(help="Write the hits and why they matched to this page.")] = None,
    path: Annotated[str | None, typer.Option(metavar="PATTERN", help="Only files like 'docs/*.md'.")] = None,
    where: Annotated[list[str] | None, typer.Option(metavar="FIELD=VALUE", help="Only records like this.")] = None,
    prefilter: Annotated[
        bool, typer.Option("--prefilter", help="Look at likely passages only: faster, not exact.")
    ] = False,
    queries: Annotated[Path | None, typer.Option(help="BEIR queries.jsonl[.gz] to run, with --run.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a TREC run of the --queries.")] = None,
    model: Model = None,
) -> None:
    """Rank passages by how well they answer a question: in a store, or in files that are read for it."""
    if (index is None) == (not paths):
        raise ValueError("say where to search: files and folders behind the query, or a store: --index STORE")
    if (queries is None) != (run is None) or (queries and (query or index is None)):
        raise ValueError("a run needs --index STORE, --queries FILE and --run FILE, and no query")
    if paths:
        with _read(paths, model) as (store, seconds):
            asking = Asking(store, f"{_size(store)}, read and encoded in {seconds:.1f} s", top or TOP, why)
            asking.filter(path, where, prefilter)
            asking.answer(query or "", as_json, html)
            if not as_json:
                print_text(asking.console, Text(asking.title, style="dim"))
        return
    with _open(index or "", model) as (store, title):
        if queries and run:
            from ..retrieval.evaluate import read_queries, write_run
            from ..retrieval.store.search import Store

            if not isinstance(store, Store):
                raise ValueError(f"{index} gives no run: --index a store, which does")
            asked = read_queries(queries)
            write_run(run, store.run(asked, top_k=top or TOP_RUN))
            note(f"wrote the best {top or TOP_RUN} documents for each of {len(asked):,} queries to {run}")
            return
        asking = Asking(store, title, top or TOP, why)
        asking.filter(path, where, prefilter)
        if query is not None:
            asking.answer(query, as_json, html)
        else:
            asking.converse(as_json)


def demo(
    questions: Annotated[list[str] | None, typer.Argument(help="What to ask instead of the usual three.")] = None,
) -> None:
    """Search 1,581 paragraphs of Wikipedia, which ship with the package, using the built-in model."""
    with _read([DEMO], None) as (store, seconds):
        asking = Asking(store, f"{_size(store)} (Wikipedia), read and encoded in {seconds:.1f} s\n", top=3)
        print_text(asking.console, Text(asking.title, style="dim"))
        for question in questions or QUESTIONS:
            started = time.perf_counter()
            store.search([question], top_k=3)
            milliseconds = 1000 * (time.perf_counter() - started)
            took = Text(f"  {milliseconds:.0f} ms\n", style="dim not bold")
            print_text(asking.console, Text(question, style="bold") + took)
            asking.answer(question)


class Asking:
    """How questions are answered: from what, how many hits, of which documents, with reasons or without."""

    def __init__(self, store: Store | Engine, title: str, top: int, why: bool = True) -> None:
        self.store, self.title, self.top, self.why = store, title, top, why
        self.console = Console(highlight=False)
        self._filters: dict[str, Any] = {}
        self._asked: tuple[str | None, Sequence[str] | None, bool] = None, None, False
        self._last: tuple[str, list[Hit], list[list[TokenMatch]]] = ("", [], [])

    def filter(self, path: str | None, where: Sequence[str] | None, prefilter: bool) -> None:
        """Search only files like `path`, records like each FIELD=VALUE of `where`, and likely passages."""
        from ..retrieval.store.search import Store

        chosen = {"path": path, "where": _fields(where or ()), "prefilter": prefilter}
        filters = {name: value for name, value in chosen.items() if value}
        if filters and not isinstance(self.store, Store):
            raise ValueError("an export has no --path, --where and --prefilter: search the store, or in the engine")
        self._filters, self._asked = filters, (path, where, prefilter)

    def answer(self, query: str, as_json: bool = False, html: Path | None = None, indent: int | None = 2) -> None:
        """Search, and print what was found."""
        hits = self.store.search([query], top_k=self.top, **self._filters)[0]
        explained = [self.store.explain(query, hit) for hit in hits]
        self._last = query, hits, explained
        if html:
            _write_page(html, *self._last)
        if as_json:
            found = [self._as_dict(query, *pair) for pair in zip(hits, explained, strict=True)]
            print(json.dumps({"query": query, "hits": found}, indent=indent), flush=True)
        else:
            print_hits(self.console, query, hits, explained if self.why else [None] * len(hits))

    def converse(self, as_json: bool) -> None:
        """Answer every line that is typed or piped in; a line that begins with a colon changes how."""
        typed = sys.stdin.isatty()
        if typed:
            import readline  # noqa: F401 -- arrow keys and history for input()

            print_text(self.console, Text(f"{self.title}. Ask, or :help", style="dim"))
        while True:
            try:
                entered = input("? " if typed else "").strip()
            except EOFError:
                return
            if entered in (":q", ":quit"):
                return
            try:
                if entered.startswith(":"):
                    self._command(*entered[1:].split(maxsplit=1))
                elif entered:
                    self.answer(entered, as_json, indent=None)
            except (ValueError, OSError) as error:
                note(str(error))

    def _command(self, name: str = "help", value: str = "") -> None:
        query, hits, explained = self._last
        if name == "top" and value.isdigit() and int(value):
            self.top = int(value)
        elif name == "path":
            self.filter(value, *self._asked[1:])
        elif name == "where":
            self.filter(self._asked[0], value.split(), self._asked[2])
        elif name == "why" and value.isdigit() and 0 < int(value) <= len(hits):
            print_matches(self.console, query, hits[int(value) - 1], explained[int(value) - 1])
        elif name == "html" and value and hits:
            _write_page(Path(value), *self._last)
        else:
            for usage, what in COMMANDS.items():
                print_text(self.console, Text(f"{usage:24}{what}"))

    def _as_dict(self, query: str, hit: Hit, matches: Sequence[TokenMatch]) -> dict[str, Any]:
        from ..retrieval.explain import strongest_words

        found = {"rank": hit.rank, "score": hit.score, **asdict(hit.passage)}
        if self.why:
            words = strongest_words(matches, query, hit.passage.content)
            found |= {"why": [asdict(word) for word in words], "matches": [asdict(match) for match in matches]}
        return found


COMMANDS = {
    ":top 10": "how many passages to show",
    ":path docs/*.md": "search only files like this; :path alone searches all",
    ":where year=2024": "search only records like this; :where alone searches all",
    ":why 2": "what each token of the last question found in hit 2",
    ":html page.html": "write the last hits, and why they matched, to a page",
    ":quit": "as does the end of the input",
}


@contextmanager
def _open(index: str, model: str | None) -> Iterator[tuple[Store | Engine, str]]:
    """A store or an export, and what it is in words."""
    from ..retrieval.engines import Engine, is_target
    from ..retrieval.store.format import command, read_unfinished
    from ..retrieval.store.search import Store

    if is_target(index):
        with Engine(index, model) as engine:
            yield engine, index
        return
    with Store(index, model) as store:
        if asked := read_unfinished(store.folder):
            note(f"this is the old state of {index}: an update has not ended ({command(asked, store.folder)})")
        yield store, _size(store)


@contextmanager
def _read(paths: Sequence[Path], model: str | None) -> Iterator[tuple[Store, float]]:
    """A store of files and folders that is gone afterwards, and the seconds that reading and encoding took."""
    from ..heads.colbert import ColBERT
    from ..retrieval.indexing import index
    from ..retrieval.store.search import Store

    colbert = ColBERT.default() if model is None else ColBERT.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        started, notes = time.perf_counter(), []
        try:
            index(list(paths), folder, colbert, dtype="fp32", note=notes.append)
        finally:  # The notes say why there is nothing to search, so they come before that error.
            show_notes(notes)
        seconds = time.perf_counter() - started
        with Store(folder, colbert) as store:
            yield store, seconds


def show_notes(notes: Sequence[str]) -> None:
    for message in notes[:NOTES_SHOWN]:
        note(message)
    if len(notes) > NOTES_SHOWN:
        note(f"and {len(notes) - NOTES_SHOWN} more like these")


def _write_page(page: Path, query: str, hits: Sequence[Hit], explained: Sequence[list[TokenMatch]]) -> None:
    from ..retrieval.page import explain_page
    from ..retrieval.store.format import replacing

    with replacing(page) as beside:
        beside.write_text(explain_page(query, list(zip(hits, explained, strict=True))), encoding="utf-8")
    note(f"wrote {page}")


def _fields(where: Sequence[str]) -> dict[str, str]:
    fields = {}
    for pair in where:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"expected FIELD=VALUE, got {line(pair)!r}")
        fields[name] = value
    return fields


def _size(store: Store) -> str:
    return f"{len(store):,} passages of {store.documents:,} documents"
