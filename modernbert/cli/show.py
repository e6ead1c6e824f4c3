"""What the commands print: hits for a person, facts in two columns, notes on stderr."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..retrieval.explain import TokenMatch
    from ..retrieval.passages import Passage
    from ..retrieval.store.search import Hit

WORDS = 80
"""Words of a passage that are shown: those around what matched."""


def print_hits(
    console: Console, query: str, hits: Sequence[Hit], explained: Sequence[Sequence[TokenMatch] | None]
) -> None:
    """Place, title and text of every hit; where it is explained, with its matched words marked and named."""
    if not hits:
        console.print("no passage was found")
    for hit, matches in zip(hits, explained, strict=True):
        head = Text(f"{hit.rank}. {hit.score:.3f}  ", style="bold")
        print_text(console, head + Text(line(place(hit.passage)), style="cyan not bold"))
        print_text(console, Text(line(hit.passage.title), style="italic"), indent=3)
        print_text(console, _text(hit.passage, matches or []), indent=3)
        if matches:
            print_text(console, _why(query, hit, matches), indent=3)
        console.print()


def place(passage: Passage) -> str:
    """`path:line`, or `id in path:line` for a record; the path from here on, where it lies below."""
    path, here = Path(passage.path), Path.cwd()
    where = f"{path.relative_to(here) if path.is_relative_to(here) else path}:{passage.line}"
    return where if passage.id == passage.path else f"{passage.id} in {where}"


def _text(passage: Passage, matches: Sequence[TokenMatch]) -> Text:
    from ..retrieval.explain import excerpt, highlight

    content, header = passage.content, len(passage.content) - len(passage.text)
    first, last = excerpt(content, matches, words=WORDS)
    first = max(first, header)
    shown = highlight(content, matches)[first:last]
    return Text("… " if first > header else "") + shown + Text(" …" if last < len(content) else "")


def _why(query: str, hit: Hit, matches: Sequence[TokenMatch]) -> Text:
    from ..retrieval.explain import strongest_words

    words = strongest_words(matches, query, hit.passage.content)
    found = [f"{word.query} → {word.document or '(passage)'} {word.contribution:.2f}" for word in words]
    rest = hit.score - sum(word.contribution for word in words)
    return Text(f"why: {', '.join(found)}, other tokens {rest:.2f}", style="green")


def print_matches(console: Console, query: str, hit: Hit, matches: Sequence[TokenMatch]) -> None:
    """Every query token with what it found: the parts that sum to the score."""
    table = Table("query token", "found", "gave", box=None, header_style="dim")
    for match in matches:
        asked = query[slice(*match.query)] if match.query else "(no text)"
        found = hit.passage.content[slice(*match.document)] if match.document else "(no text)"
        table.add_row(Text(line(asked)), Text(line(found)), f"{match.contribution:.3f}")
    table.add_row("", "score", f"{hit.score:.3f}", style="bold")
    console.print(table)


def print_text(console: Console, text: Text, indent: int = 0) -> None:
    """Wrapped and indented for a person; one line for a pipe, as `grep` wants it."""
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, indent)))
    else:
        console.print(Text(" " * indent) + text, soft_wrap=True)


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(Text(name, style="dim"), Text(line(value)))
    console.print(table)


def line(text: str) -> str:
    """One line, without control characters that would drive the terminal."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text)


def note(message: str) -> None:
    print(f"note: {line(message)}", file=sys.stderr)
