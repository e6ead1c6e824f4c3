"""Documents are cut into passages, short enough for a model to read at once and for a person to read at a glance.

A document is first cut at its headings. Sections of a few words are merged with their neighbours, and sections that are
too long are cut at paragraphs, list items and sentences. The title of each passage is made of the headings above it, so
that it can be found and understood on its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from .headings import HTML, MARKED, NOTEBOOK, OFFICE, SHEETS, SLIDES, Heading, headings, without_targets
from .headings import MARKDOWN as MARKDOWN

PDF = frozenset({".pdf"})
CONVERTED = HTML | NOTEBOOK | PDF | OFFICE
"""Files whose text is not made of their lines."""

PAGE_BREAK = "\f"
"""Between the pages of a text."""

PAGES = {**dict.fromkeys(PDF, "page"), **dict.fromkeys(SLIDES, "slide"), **dict.fromkeys(SHEETS, "sheet")}
"""Suffixes of files with pages to what a page is called."""


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
    """Characters `start` to `end` of a document, with a title.

    Attributes:
        line: where it begins in the file, from 1; None if its text is not made of the lines of the file.
        page: where it begins in a file with `PAGES`, from 1; None for other files.
    """

    path: str
    id: str
    title: str
    text: str
    start: int
    end: int
    line: int | None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    page: int | None = None

    @property
    def content(self) -> str:
        """The text that a model reads, as for a document."""
        return f"{self.title} {self.text}" if self.title else self.text

    @property
    def place(self) -> str:
        """Where it begins, as a person reads it after the path: `:12`, `, page 3`, `, slide 3`, or nothing."""
        name = PAGES.get(Path(self.path).suffix.lower(), "page")
        return f":{self.line}" if self.line else f", {name} {self.page}" if self.page else ""


class Section(NamedTuple):
    """Characters `start` to `end` of a document, between two headings, and its title."""

    title: str
    start: int
    end: int


class _Part(NamedTuple):
    """A section: the name of the document and the headings above its text.

    Attributes:
        headings: where the headings begin.
    """

    names: tuple[str, ...]
    headings: tuple[int, ...]
    start: int
    end: int

    @property
    def title(self) -> str:
        name, *above = self.names
        return f"{name}: {' > '.join(above)}" if above else name


TITLE = 1000
"""Characters of the longest title that passages carry. A longer one becomes text."""

SECTION = 64
"""Characters that a section counts for in addition to its title, because the model reads each as a passage."""

WORD = 16
"""Characters that count as a word if no space is between them."""

_FRONT_MATTER = re.compile(r"---\s*\n(?=[\w-]+:\s)(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
_FRONT_TITLE = re.compile(r"^title:(.*\S)", re.MULTILINE)


def sections(document: Document) -> Iterator[Section]:
    """The text between headings, titled "document: heading > heading", without white space around it.

    Every word is in a section, a heading, the front matter, or a link target at the end of a section. A record is one
    section, even if it has only a title. If the titles would be much longer than the text, the document is one section
    in spite of its headings.
    """
    for part in _parts(document):
        yield Section(part.title, part.start, part.end)


def merged_sections(document: Document, fewest: int) -> Iterator[Section]:
    """Like `sections`, but one of fewer than `fewest` words becomes the beginning of the next, or the end of the last.

    The section keeps its title. If all that are merged are so small, it has the title that they share. The sections of
    a document that has fewer words stay as they are.
    """
    text, group, done = document.text, list[_Part](), None
    for part in _parts(document):
        group.append(part)
        if _has_words(text[group[0].start : part.end], fewest):
            if done:
                yield Section(done.title, done.start, done.end)
            done, group = _merge(group, text, fewest, done.end if done else 0), []
    if done:
        yield Section(done.title, done.start, group[-1].end if group else done.end)
    else:
        yield from (Section(part.title, part.start, part.end) for part in group)


def _has_words(text: str, fewest: int) -> bool:
    """Whether a text has as many words, where long runs without a space count as several."""
    return len(text) >= WORD * fewest or len(text.split()) >= fewest


def _merge(parts: Sequence[_Part], text: str, fewest: int, after: int) -> _Part:
    """One part of several, all of it `after` the one before. Headings that are not in its title are in its text."""
    first, last = parts[0], parts[-1]
    names, start = last.names, first.start
    if not _has_words(text[last.start : last.end], fewest):
        names = _shared([part.names for part in parts]) or names[:1]
    named = len(_shared([first.names[1:], names[1:]]))
    if named < len(first.headings):
        start = max(after, first.headings[named])
        start += len(text[start : first.end]) - len(text[start : first.end].lstrip())
    return _Part(names, first.headings, start, last.end)


def _shared(names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The first entries that all have in common."""
    ranks = takewhile(lambda rank: len(set(rank)) == 1, zip(*names, strict=False))
    return tuple(rank[0] for rank in ranks)


def _parts(document: Document) -> Iterator[_Part]:
    """The sections, without white space and link targets around them."""
    text, suffix = document.text, Path(document.path).suffix.lower()
    found, room = [], 10_000 + 3 * len(text)
    for part in _between_headings(document, suffix):
        found.append(part)
        room -= SECTION + len(part.title)
        if room < 0:
            found = [_Part((document.title or _stem(document),), (), 0, len(text))]
            break
    for names, above, start, end in found:
        if document.line is None:
            end = without_targets(text, start, end, suffix)
        inner = text[start:end]
        start, end = start + len(inner) - len(inner.lstrip()), start + len(inner.rstrip())
        if start < end:
            yield _Part(names, above, start, end)
        elif document.line is not None and names[0]:
            yield _Part(names, above, 0, 0)


def _between_headings(document: Document, suffix: str) -> Iterator[_Part]:
    text = document.text
    if document.line is not None:
        yield _Part((document.title,), (), 0, len(text))
        return
    found = [*headings(text, suffix), Heading(len(text), len(text), 0, "")]
    front = _FRONT_MATTER.match(text) if suffix in MARKED else None
    titled = _FRONT_TITLE.search(front[1]) if front else None
    named = titled[1].strip().strip("\"'") if titled else ""
    top = [heading.title for heading in found if heading.level == 1]
    name = named or (top[0] if len(top) == 1 else document.title or _stem(document))
    yield _Part((name,), (), front.end() if front else 0, found[0].start)
    trail: list[Heading] = []
    for heading, following in pairwise(found):
        trail = [above for above in trail if above.level < heading.level] + [heading]
        inner = [above for above in trail if above.title != name]
        names = (name, *(above.title for above in inner))
        part = _Part(names, tuple(above.start for above in inner), heading.end, following.start)
        if not text[part.start : part.end].strip() and following.level <= heading.level:
            # A heading with no text below it becomes the text.
            named = part[:2] if len(part.title) <= TITLE else (("",), ())
            part = _Part(*named, heading.start, part.end)
        yield part


def _stem(document: Document) -> str:
    return Path(document.path).stem.replace("_", " ").replace("-", " ")


UNSPACED = "\u2e80-\u2fdf\u3001-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Characters of scripts that are written without spaces between words."""

GAP = 64
"""Characters of white space that are looked at on either side of a border."""

CLOSED = 8
"""Characters before a border that are looked at for the end of a sentence."""

SENTENCE_ENDS = "。！？｡"
"""No space follows them."""

_CLOSING = "\"')\\]”’»›）」』】*_"
_PLACE = re.compile(rf"\s+|(?:[{SENTENCE_ENDS}]|．(?!\d))[{_CLOSING}]*(?![{_CLOSING}\s])")
_ROMAN = "[ivxlcIVXLC]{2,6}"
_LIST_ITEM = re.compile(rf"(?:[-*+•‣◦–]|\(?(?:[0-9]{{1,3}}|[A-Za-z]|{_ROMAN})[.)]|#\.)[ \t]")
_APART = re.compile(r"[»›](?!\S)")  # French has a space before the end of a quotation, German none after its beginning.
_SENTENCE_END = re.compile(rf"[.!?:…؟۔।॥։።．{SENTENCE_ENDS}][{_CLOSING}]*(?:\s[»›])?$")
# An initial, a common abbreviation, or the number of a list item.
_NO_SENTENCE_END = re.compile(
    r"(?:(?<!\w)(?:[^\W\d_]|[MD]r|Mrs|Ms|Mme|Prof|Gov|Sen|Gen|Col|Capt|Lt|Rev|St|Mt|Fig|No|vs|cf|al)"
    rf"|(?<![^\n])[ \t]*\(?(?:\d{{1,3}}|{_ROMAN}))[.)]$"
)


class Border(NamedTuple):
    """A place between two tokens.

    Attributes:
        quality: 6 paragraph, 5 list item, 4 sentence, 3 perhaps a sentence, 2 line, 1 space, 0 inside a word,
            -1 inside a character.
        at: the character that the text after it begins with.
    """

    quality: int
    at: int


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
                key=lambda i: (border(text, tokens[i - 1][1], tokens[i][0]).quality, -abs(i - first - target)),
            )
        yield first, last
        first = last


def border(text: str, before: int, after: int) -> Border:
    """The best place to cut between a token that ends at `before` and one that starts at `after`."""
    if after < before:
        return Border(-1, before)
    first, last = max(0, before - GAP), min(len(text), after + GAP)
    before = first + len(text[first:before].rstrip())  # the token may end in white space
    after = last - len(text[after:last].lstrip())
    best = Border(0, after)
    for place in _PLACE.finditer(text, max(0, before - CLOSED), min(len(text), after + CLOSED)):
        found = _judge(text, *place.span())
        if before <= found.at <= after and found.quality > best.quality:
            best = found
    return best


def _judge(text: str, start: int, end: int) -> Border:
    """A border at white space, or after a mark that ends a sentence without white space."""
    blank = text[start:end]
    if not blank.isspace():
        return Border(4, end)
    if blank.count("\n") > 1:
        return Border(6, start)
    if "\n" in blank and _LIST_ITEM.match(text, end):
        return Border(5, start)
    begin, after = max(0, start - CLOSED), text[end : end + 1]
    is_end = _SENTENCE_END.search(text, begin, start) and not _APART.match(text, end)
    if is_end and not _NO_SENTENCE_END.search(text, begin, start):
        # An abbreviation may be before a small letter or a number, but some texts have small letters only.
        return Border(3 if after.islower() or after.isdigit() else 4, start)
    return Border(2 if "\n" in blank else 1, start)
