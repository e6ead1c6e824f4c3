"""Questions and answers on the terminal, or line by line in a pipe."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from .output import output_file
from .show import note, print_hits, print_matches, print_text, printable

if TYPE_CHECKING:
    from ..retrieval.engines import Engine
    from ..retrieval.explain import TokenMatch
    from ..retrieval.queries import EncodedQuery
    from ..retrieval.store.filters import Condition
    from ..retrieval.store.search import Hit, Store

_CONDITION = re.compile(r"([^=!<>]*[^=!<>\s][^=!<>]*)(==|!=|>=|<=|=|>|<)(.*)", re.DOTALL)

COMMANDS = {
    ":top 10": "how many passages to show",
    ":path docs/*.md": "search only files like this; :path alone searches all",
    ":where year>=2024": "search only records like this; :where alone searches all",
    ":why 2": "for each token of the last question, what it found in hit 2",
    ":html page.html": "write a page with the last hits and why they matched",
    ":quit": "or end the input",
}


@dataclass(frozen=True)
class Filter:
    """Which passages of a store are searched: see `Store.search`."""

    path: str | None = None
    where: tuple[Condition, ...] = ()
    prefilter: bool = False


def parse_fields(where: Sequence[str]) -> tuple[Condition, ...]:
    """The conditions in texts like `year>=2020`. Raises ValueError for a text of another form."""
    from ..retrieval.store.filters import condition

    found = []
    for text in where:
        parts = _CONDITION.fullmatch(text)
        if not parts:
            raise ValueError(f"expected FIELD=VALUE, got {printable(text)!r}")
        found.append(condition(parts[1].strip(), parts[2].replace("==", "="), parts[3].strip()))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Answer:
    """A question and its hits. The matches are computed when they are first used, without encoding it again."""

    store: Store | Engine
    query: EncodedQuery
    hits: list[Hit]

    @cached_property
    def matches(self) -> list[list[TokenMatch]]:
        """Why each hit matched."""
        return [self.store.explain(self.query, hit) for hit in self.hits]

    def write_page(self, page: Path) -> None:
        """Write an HTML page that explains the hits."""
        from ..files import replacing
        from ..retrieval.page import explain_page

        with replacing(page) as beside:
            content = explain_page(self.query.text, list(zip(self.hits, self.matches, strict=True)))
            beside.write_text(content, encoding="utf-8")
        note(f"wrote {page}")


class SearchShell:
    """Answers questions from a store or an export.

    Args:
        top: hits for each question. why: whether to explain them.
    """

    def __init__(self, store: Store | Engine, top: int, why: bool = True, chosen: Filter | None = None) -> None:
        self.store, self.top, self.why = store, top, why
        self.console = Console(highlight=False)
        self._last: Answer | None = None
        self._filter = Filter()
        self.set_filter(chosen or Filter())

    def set_filter(self, chosen: Filter) -> None:
        """Search only what matches from now on. Raises ValueError for an engine, which has no `prefilter`."""
        from ..retrieval.store.search import Store

        if chosen.prefilter and not isinstance(self.store, Store):
            raise ValueError("an engine has an index of its own, and no --prefilter")
        self._filter = chosen

    def ask(self, question: str) -> Answer:
        """Encode the question once and search."""
        from ..retrieval.store.search import Store

        (query,) = self.store.encode([question])
        filters = vars(self._filter).copy()
        if not isinstance(self.store, Store):
            del filters["prefilter"]
        hits = self.store.search([query], top_k=self.top, **filters)[0]
        self._last = Answer(self.store, query, hits)
        return self._last

    def answer(self, question: str, as_json: bool = False, html: Path | None = None, indent: int | None = 2) -> None:
        """Search, and print the hits."""
        from ..retrieval.rows import hit_rows

        found = self.ask(question)
        if html:
            found.write_page(html)
        if as_json:
            rows = hit_rows(found.query.text, found.hits, found.matches if self.why else ())
            print(json.dumps({"query": found.query.text, "hits": rows}, indent=indent), flush=True)
        else:
            self.show(found)

    def show(self, found: Answer) -> None:
        """Print hits for a person."""
        print_hits(self.console, found.query.text, found.hits, found.matches if self.why else None)

    def repl(self, title: str, as_json: bool) -> None:
        """Answer every line of the input. A line that starts with a colon is a command."""
        typed = sys.stdin.isatty()
        if typed:
            import readline  # noqa: F401 -- arrow keys and history for input()

            print_text(self.console, Text(f"{title}. Ask, or :help", style="dim"))
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
        last = self._last
        if name == "top" and value.isdigit() and int(value):
            self.top = int(value)
        elif name == "path":
            self.set_filter(replace(self._filter, path=value or None))
        elif name == "where":
            self.set_filter(replace(self._filter, where=parse_fields(shlex.split(value))))
        elif last and name == "why" and value.isdigit() and 0 < int(value) <= len(last.hits):
            hit = int(value) - 1
            print_matches(self.console, last.query.text, last.hits[hit], last.matches[hit])
        elif last and name == "html" and value and last.hits:
            last.write_page(output_file(Path(value), ":html"))
        else:
            for usage, what in COMMANDS.items():
                print_text(self.console, Text(f"{usage:24}{what}"))
