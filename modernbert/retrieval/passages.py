"""Documents are cut into passages, short enough for a model to read at once and for a person to read at a glance.

A document is first cut at its headings. Sections that are too long are cut at paragraphs, list items and sentences.
The title of each passage is made of the headings above it, so that it can be found and understood on its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

MARKDOWN = frozenset({".md", ".markdown", ".mdx"})
HTML = frozenset({".html", ".htm", ".xhtml"})  # converted to markdown when it is read
NOTEBOOK = frozenset({".ipynb"})  # so are notebooks


@dataclass(frozen=True)
class Document:
    """A text file, or a record in a file.

    Attributes:
        path: the file. id: the path again, or the `_id` of a record.
        line: of a record, from 1; None for a text file.
        metadata: the other fields of a record. digest: the SHA-256 of the content that the document was read from.
    """

    path: str
    id: str
    title: str
    text: str
    line: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""

    @property
    def content(self) -> str:
        """The text that a model reads: title, space, text, as BEIR defines it."""
        return f"{self.title} {self.text}" if self.title else self.text


@dataclass(frozen=True)
class Passage:
    """Characters `start` to `end` of a document, with a title. It begins in `line` of `path`, from 1."""

    path: str
    id: str
    title: str
    text: str
    start: int
    end: int
    line: int
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """The text that a model reads, as for a document."""
        return f"{self.title} {self.text}" if self.title else self.text


class Section(NamedTuple):
    """Characters `start` to `end` of a document, between two headings, and its title."""

    title: str
    start: int
    end: int


class Heading(NamedTuple):
    start: int
    end: int
    level: int
    title: str


TITLE = 1000
"""Characters of the longest title that passages carry. A longer one becomes text."""

SECTION = 64
"""Characters that a section counts for in addition to its title, because the model reads each as a passage."""

_ATX = re.compile(r" {0,3}(#{1,6})[ \t](.*)$", re.DOTALL)
_UNDERLINE = re.compile(r"([-=~^\"'*+#])\1{2,}\s*$")
_TEXT = re.compile(rf"(?!{_UNDERLINE.pattern})\s*\S")
_FENCE = re.compile(r"\s*(```+|~~~+)(.*)$", re.DOTALL)
_FRONT_MATTER = re.compile(r"---\s*\n(?=[\w-]+:\s)(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
_FRONT_TITLE = re.compile(r"^title:(.*\S)", re.MULTILINE)


def sections(document: Document) -> Iterator[Section]:
    """The text between headings, titled "document: heading > heading", without white space around it.

    Every word is in a section, a heading or the front matter. A record is one section, even if it has only a title.
    If the titles would be much longer than the text, the document is one section in spite of its headings.
    """
    found, room = [], 10_000 + 3 * len(document.text)
    for section in _between_headings(document):
        found.append(section)
        room -= SECTION + len(section.title)
        if room < 0:
            found = [Section(document.title or _stem(document), 0, len(document.text))]
            break
    for title, start, end in found:
        text = document.text[start:end]
        start, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
        if start < end:
            yield Section(title, start, end)
        elif document.line is not None and title:
            yield Section(title, 0, 0)


def _between_headings(document: Document) -> Iterator[Section]:
    text, path = document.text, Path(document.path)
    if document.line is not None:
        yield Section(document.title, 0, len(text))
        return
    kind = path.suffix.lower()
    headings = [*_headings(text, kind), Heading(len(text), len(text), 0, "")]
    front = _FRONT_MATTER.match(text) if kind in MARKDOWN | HTML | NOTEBOOK else None
    titled = _FRONT_TITLE.search(front[1]) if front else None
    named = titled[1].strip().strip("\"'") if titled else ""
    top = [heading.title for heading in headings if heading.level == 1]
    name = named or (top[0] if len(top) == 1 else document.title or _stem(document))
    yield Section(name, front.end() if front else 0, headings[0].start)
    trail: list[Heading] = []
    for heading, following in pairwise(headings):
        trail = [above for above in trail if above.level < heading.level] + [heading]
        inner = " > ".join(above.title for above in trail if above.title != name)
        title = f"{name}: {inner}" if inner else name
        start, end = heading.end, following.start
        if not text[start:end].strip() and following.level <= heading.level:
            start = heading.start  # a heading with no text below it becomes the text
            title = title if len(title) <= TITLE else ""
        yield Section(title, start, end)


def _stem(document: Document) -> str:
    return Path(document.path).stem.replace("_", " ").replace("-", " ")


def _headings(text: str, suffix: str) -> Iterator[Heading]:
    """`# heading` and underlined headings in markdown; in reStructuredText, levels follow the order of appearance."""
    markdown = suffix in MARKDOWN | HTML | NOTEBOOK
    if not markdown and suffix != ".rst":
        return
    styles = ["=", "-"] if markdown else []
    fence, at = "", 0
    before, previous = "", ""  # the two lines above
    for line in text.splitlines(keepends=True):
        heading = None
        mark = _FENCE.match(line) if markdown else None
        if mark and not fence and "`" not in mark[2]:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not mark[2].strip():
            fence = ""
        elif not fence and markdown and (hashes := _ATX.match(line)) and (title := _without_hashes(hashes[2])):
            heading = Heading(at, at + len(line), len(hashes[1]), title)
        elif not fence and (under := _UNDERLINE.match(line)) and _TEXT.match(previous):
            over = None if markdown else _UNDERLINE.match(before)
            overlined = bool(over and over[1] == under[1])
            style = under[1] * (1 + overlined)
            if style not in styles and not markdown:
                styles.append(style)
            if style in styles and (overlined or not before.strip()):
                start = at - len(previous) - (len(before) if overlined else 0)
                heading = Heading(start, at + len(line), styles.index(style) + 1, previous.strip())
        if heading:
            yield heading
        # A line cannot be in two headings.
        before, previous, at = previous, "" if heading else line, at + len(line)


def _without_hashes(title: str) -> str:
    """Remove closing hashes, as in `Birds ##`, but not the hash of `C#`."""
    title = title.strip()
    bare = title.rstrip("#")
    return title if bare[-1:].strip() else bare.rstrip()


UNSPACED = "\u2e80-\u2fdf\u3001-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Characters of scripts that are written without spaces between words."""

GAP = 64
"""Characters of white space that are looked at on either side of a border."""

_LIST_ITEM = re.compile(r"(?:[-*+]|\d{1,3}[.)])[ \t]")
_SENTENCE_END = re.compile(r"[.!?:][\"')\]”’»]*$")
SENTENCE_ENDS = frozenset("。！？")  # no space follows them


def cut(text: str, tokens: Sequence[tuple[int, int]], limit: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `limit` tokens that cover all tokens, cut at the best borders of `text`.

    `tokens` are spans of characters of `text`, in order. A run `first, last` is the tokens `first` to `last - 1`.
    """
    first = 0
    while first < len(tokens):
        left = len(tokens) - first
        last = first + left
        if left > limit:
            target = ceil(left / ceil(left / limit))  # equal shares, so that the last run is not tiny
            last = max(
                range(first + max(1, limit // 4), first + limit + 1),
                key=lambda i: (_border(text, tokens[i - 1][1], tokens[i][0]), -abs(i - first - target)),
            )
        yield first, last
        first = last


def _border(text: str, before: int, after: int) -> int:
    """The quality of a cut between two tokens: 4 paragraph, 3 list item, 2 sentence, 1 space, 0 word, -1 character."""
    if after < before:
        return -1
    first, last = max(0, before - GAP), min(len(text), after + GAP)
    before = first + len(text[first:before].rstrip())  # the token may end in white space
    after = last - len(text[after:last].lstrip())
    gap = text[before:after]
    if gap.count("\n") > 1:
        return 4
    if "\n" in gap and _LIST_ITEM.match(text, after):
        return 3
    if text[before - 1 : before] in SENTENCE_ENDS or (gap and _SENTENCE_END.search(text, max(0, before - 4), before)):
        return 2
    return 1 if gap else 0
