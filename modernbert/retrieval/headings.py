"""Headings of markdown and reStructuredText, and the lines there that are marks for a program and not text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

MARKDOWN = frozenset({".md", ".markdown", ".mdx"})
HTML = frozenset({".html", ".htm", ".xhtml"})  # converted to markdown when it is read
NOTEBOOK = frozenset({".ipynb"})  # so are notebooks and the files of Office programs
WORD = frozenset({".docx", ".docm"})
SLIDES = frozenset({".pptx", ".pptm", ".ppsx", ".odp"})
SHEETS = frozenset({".xlsx", ".xlsm", ".ods"})
OFFICE = WORD | {".odt"} | SLIDES | SHEETS
MARKED = MARKDOWN | HTML | NOTEBOOK | OFFICE
"""Files whose text is markdown when it has been read."""


class Heading(NamedTuple):
    start: int
    end: int
    level: int
    title: str


_ATX = re.compile(r" {0,3}(#{1,6})[ \t](.*)$", re.DOTALL)
_UNDERLINE = re.compile(r"([-=~^\"'*+#])\1{2,}\s*$")
_TEXT = re.compile(rf"(?!{_UNDERLINE.pattern})\s*\S")
_FENCE = re.compile(r"\s*(```+|~~~+)(.*)$", re.DOTALL)
_TARGET = {
    **dict.fromkeys(MARKDOWN, re.compile(r"\[[^\]^][^\]]*\]:\s+\S+(?:\s+[\"'(].*)?")),  # [name]: address "title"
    ".rst": re.compile(r"\.\. _.+|\.\. \|.+|__ \S+"),  # .. _name: address, .. |name| image:: address, __ address
}


def headings(text: str, suffix: str) -> Iterator[Heading]:
    """`# heading` and underlined headings in markdown; in reStructuredText, levels follow the order of appearance."""
    markdown = suffix in MARKED
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


def without_targets(text: str, start: int, end: int, suffix: str) -> int:
    """Where characters `start` to `end` end without the link targets at their end, which readers do not see."""
    target = _TARGET.get(suffix)
    while target and start < end:
        line = max(start, text.rfind("\n", start, end) + 1)
        last = text[line:end].strip()
        if last and not target.fullmatch(last):
            break
        end = max(start, line - 1)
    return end


def _without_hashes(title: str) -> str:
    """Remove closing hashes, as in `Birds ##`, but not the hash of `C#`."""
    title = title.strip()
    bare = title.rstrip("#")
    return title if bare[-1:].strip() else bare.rstrip()
