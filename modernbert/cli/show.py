"""How the commands print: hits for a person, facts in two columns, notes on stderr."""

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
"""Words of a passage that are shown, around its matches."""

NOTES_SHOWN = 5


def print_hits(
    console: Console, query: str, hits: Sequence[Hit], explained: Sequence[Sequence[TokenMatch]] | None
) -> None:
    """Print location, title and text of every hit. With `explained`, its matched words are marked and named."""
    if not hits:
        console.print("no passage was found")
    for hit, matches in zip(hits, explained or [()] * len(hits), strict=True):
        head = Text(f"{hit.rank}. {hit.score:.3f}  ", style="bold")
        print_text(console, head + Text(printable(location(hit.passage)), style="cyan not bold"))
        print_text(console, Text(printable(hit.passage.title), style="italic"), indent=3)
        print_text(console, _text(hit.passage, matches), indent=3)
        if hit.copies:
            also = f"also in {', '.join(map(short_path, hit.copies))}"
            print_text(console, Text(printable(also), style="dim"), indent=3)
        if matches:
            print_text(console, _why(query, hit, matches), indent=3)
        console.print()


def location(passage: Passage) -> str:
    """`path:line`, `path, page 3` or the path; for a record after `id in`. Relative inside the working directory."""
    where = f"{short_path(passage.path)}{passage.place}"
    return where if passage.id == passage.path else f"{passage.id} in {where}"


def short_path(name: str) -> str:
    """The path of a file, relative if it is inside the working directory. A URL is as it was."""
    path, here = Path(name), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else name


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
    """Print for every query token what it found; the contributions sum to the score."""
    from ..retrieval.explain import brief

    table = Table("query token", "found", "gave", box=None, header_style="dim")
    for match in matches:
        asked = query[slice(*match.query)] if match.query else "(no text)"
        found = hit.passage.content[slice(*match.document)] if match.document else "(no text)"
        table.add_row(Text(printable(brief(asked))), Text(printable(brief(found))), f"{match.contribution:.3f}")
    table.add_row("", "score", f"{hit.score:.3f}", style="bold")
    console.print(table)


def print_text(console: Console, text: Text, indent: int = 0) -> None:
    """Print text wrapped and indented on a terminal, and on one line into a pipe, where `grep` expects it."""
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, indent)))
    else:
        console.print(Text(" " * indent) + text, soft_wrap=True)


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(Text(name, style="dim"), Text(printable(value)))
    console.print(table)


def printable(text: str) -> str:
    """The text on one line, without control characters, which could control the terminal."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text)


def note(message: str) -> None:
    """Print a note on stderr."""
    print(f"note: {printable(message)}", file=sys.stderr)


def show_notes(notes: Sequence[str]) -> None:
    """Print the first few of many notes."""
    for message in notes[:NOTES_SHOWN]:
        note(message)
    if len(notes) > NOTES_SHOWN:
        note(f"and {len(notes) - NOTES_SHOWN} more like these")
