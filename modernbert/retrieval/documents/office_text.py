"""The XML of Office texts to markdown: the formats of Microsoft and OASIS name paragraphs, rows and cells alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .archive import attribute
from .html import alternative, escaped

_PARAGRAPHS = frozenset({"p", "h", "comment"})  # a comment of a workbook has no paragraphs
_ROWS = frozenset({"tr", "table-row"})
_CELLS = frozenset({"tc", "table-cell"})
_SHAPES = frozenset({"sp", "graphicFrame", "frame"})
_PICTURES = frozenset({"docPr", "cNvPr", "shape"})  # They have the alternative text as an attribute.
_SPACES = {"tab": " ", "ptab": " ", "s": " ", "noBreakHyphen": "-", "br": "\n", "cr": "\n", "line-break": "\n"}
# A second form of the same shape, text that was deleted or moved away, contents, marks of footnotes, the names and
# dates of comments, the pronunciation of a text, and how a paragraph was before a change.
_NOT_READ = """
    Fallback creator date date-string del moveFrom note-citation pPrChange page-number rPh rt ruby-text sender-initials
    table-of-content tracked-changes
"""
_SKIPPED = frozenset(_NOT_READ.split())
_MARGINS = frozenset({"sldNum", "dt", "ftr", "hdr", "header", "footer", "date-time", "page-number"})
_TITLES = frozenset({"title", "ctrTitle"})

ROW, ITEM, OTHER = "row", "item", ""

LONGEST_HEADING = 200
"""Characters of a heading. Longer paragraphs are text, whatever their style."""


class Style(NamedTuple):
    """What the style of a paragraph says.

    Attributes:
        level: of a heading, from 1 to 6; 0 for other paragraphs.
        is_title: whether it is the title of the document. is_item: whether it is in a list.
        is_contents: whether it is in a table of contents, which is left out.
    """

    level: int = 0
    is_title: bool = False
    is_item: bool = False
    is_contents: bool = False


class Block(NamedTuple):
    """A paragraph, a list item or a row. Rows are lines that follow each other, and so are list items."""

    kind: str
    prefix: str
    text: str


@dataclass
class _Paragraph:
    style: Style
    depth: int = 0
    words: list[str] = field(default_factory=list)


class TextWriter:
    """Writes the markdown of the XML that it is called for.

    Attributes:
        title: the first one that the text has.
    """

    def __init__(
        self,
        count: Callable[[int], None],
        styles: Mapping[str, Style] | None = None,
        *,
        is_opendocument: bool = False,
    ) -> None:
        """`count` is called with the characters that are copied. Only OpenDocument has text outside of runs."""
        self._count, self._styles = count, dict(styles or {})
        self._is_opendocument = is_opendocument
        self._pages: list[list[Block]] = [[]]
        self._cells: list[list[Block]] = []  # for each open cell its blocks
        self._rows: list[list[list[Block]]] = []  # for each open row its cells
        self._open: list[_Paragraph] = []
        self._runs = self._skipped = self._lists = self._frames = 0
        self._is_item = self._is_workbook = self._has_page = False
        self._shape = ""  # the kind of the shape that is being read
        self._described = ""  # the last alternative text: files repeat it
        self.title = ""
        if is_opendocument:
            self._styles["Title"] = Style(1, is_title=True)

    def turn(self) -> None:
        """Begin the next page."""
        self._pages.append([])

    @property
    def pages(self) -> list[str]:
        """The text of each page."""
        return [_joined(blocks) for blocks in self._pages]

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        if self._skipped or name in _SKIPPED or (name in ("txBody", "fld", "text-box") and self._is_margin(attributes)):
            self._skipped += 1
        elif name == "t":
            self._runs += 1
        elif self._is_paragraph(name):
            self._open.append(self._begin(name, attributes))
        elif name in _SPACES:
            self._write(_SPACES[name])
        elif name in _ROWS:
            self._rows.append([])
        elif name in _CELLS:
            self._cells.append([])
        elif self._is_opendocument:
            self._start_opendocument(name, attributes)
        elif name in ("pStyle", "outlineLvl", "numPr", "numId", "ilvl") and self._open:
            self._mark(self._open[-1], name, attribute(attributes, "val"))
        elif name == "ph":
            self._shape = attributes.get("type", "body")
        elif name in _PICTURES:
            self._describe(alternative(attributes.get("descr") or attributes.get("alt") or ""))

    def end(self, name: str) -> None:
        if self._skipped:
            self._skipped -= 1
        elif name == "t":
            self._runs -= 1
        elif self._is_paragraph(name):
            self._end_paragraph(self._open.pop())
        elif name in _CELLS:
            blocks = self._cells.pop()
            if self._rows:
                self._rows[-1].append(blocks)
            else:
                self._add(blocks)
        elif name in _ROWS:
            self._end_row([blocks for blocks in self._rows.pop() if blocks])
        elif name in _SHAPES:
            self._shape = ""
            self._frames -= self._is_opendocument
        elif name == "list" and self._is_opendocument:
            self._lists -= 1

    def data(self, text: str) -> None:
        if not self._skipped and (self._runs or self._is_opendocument):
            self._write(text)

    def _start_opendocument(self, name: str, attributes: Mapping[str, str]) -> None:
        if name == "style" and (above := self._styles.get(attribute(attributes, "parent-style-name"))):
            self._styles[attribute(attributes, "name")] = above
        elif name == "list":
            self._lists += 1
        elif name == "list-item":
            self._is_item = True
        elif name == "frame":
            self._shape = attribute(attributes, "class")
            self._frames += 1
        elif name == "spreadsheet":
            self._is_workbook = True
        elif name == "page" or (name == "table" and self._is_workbook and not self._rows):
            if self._has_page:
                self.turn()
            self._has_page = True
            if name == "table":
                self._add([Block(OTHER, "## ", " ".join(attribute(attributes, "name").split()))])

    def _is_paragraph(self, name: str) -> bool:
        """Also the two alternative texts of a picture of OpenDocument."""
        return name in _PARAGRAPHS or (self._frames > 0 and name in ("title", "desc"))

    def _describe(self, text: str) -> None:
        """Take the alternative text of a picture, in a paragraph or beside all."""
        if text == self._described:
            return
        self._described = text
        if self._open:
            self._write(f" {text} ")
        elif text:
            self._add([Block(OTHER, "", escaped(text))])

    def _is_margin(self, attributes: Mapping[str, str]) -> bool:
        """Whether a shape or field repeats what is around all slides, such as their numbers."""
        return self._shape in _MARGINS or attributes.get("type", "").startswith(("slidenum", "datetime"))

    def _begin(self, name: str, attributes: Mapping[str, str]) -> _Paragraph:
        paragraph = _Paragraph(self._styles.get(attribute(attributes, "style-name"), Style()))
        if self._shape in _TITLES:
            paragraph.style = Style(1, is_title=True)
        elif name == "h" and self._is_opendocument:
            paragraph.style = Style(heading_level(attribute(attributes, "outline-level"), first=1))
        elif self._is_item:
            paragraph.style, paragraph.depth = paragraph.style._replace(is_item=True), self._lists - 1
        self._is_item = False
        return paragraph

    def _mark(self, paragraph: _Paragraph, name: str, value: str) -> None:
        """Take a property of a paragraph of Word."""
        style = paragraph.style
        if name == "pStyle":
            paragraph.style = self._styles.get(value, style)
        elif name == "outlineLvl":
            paragraph.style = style._replace(level=style.level or heading_level(value))
        elif name == "ilvl":
            paragraph.depth = int(value) if value.isdecimal() else 0
        else:
            paragraph.style = style._replace(is_item=value != "0")

    def _write(self, text: str) -> None:
        if self._open:
            self._open[-1].words.append(text)

    def _end_paragraph(self, paragraph: _Paragraph) -> None:
        lines = [" ".join(line.split()) for line in "".join(paragraph.words).split("\n")]
        lines = [line for line in lines if line]
        style, text = paragraph.style, " ".join(lines)
        if not text or style.is_contents:
            return
        if style.level and len(text) <= LONGEST_HEADING:
            self.title = self.title or (text if style.is_title else "")
            block = Block(OTHER, "#" * style.level + " ", text + " #" * text.endswith("#"))
        elif style.is_item:
            block = Block(ITEM, "  " * min(max(0, paragraph.depth), 8) + "- ", text)
        else:
            block = Block(OTHER, "", "\n".join(map(escaped, lines)))
        self._add([block])

    def _end_row(self, cells: Sequence[list[Block]]) -> None:
        """A row of one cell is only a frame around its text."""
        if len(cells) == 1:
            self._add(cells[0])
        elif cells:
            texts = (" ".join(block.text for block in blocks).replace("\n", " ") for blocks in cells)
            self._add([Block(ROW, "", escaped(" | ".join(texts)))])

    def _add(self, blocks: Sequence[Block]) -> None:
        """Add blocks to the open cell or the page. In nested tables, they are copied once for each level."""
        self._count(sum(1 + len(block.text) for block in blocks))
        (self._cells[-1] if self._cells else self._pages[-1]).extend(blocks)


def heading_level(value: str, first: int = 0) -> int:
    """The level of a heading, from 1 to 6, that a file numbers from `first`; 0 for none."""
    level = int(value) + 1 - first if value.isdecimal() and len(value) < 3 else 0
    return min(level, 6) if level < 10 - first else 0


def _joined(blocks: Sequence[Block]) -> str:
    text: list[str] = []
    before = OTHER
    for block in blocks:
        gap = "\n" if block.kind == before != OTHER else "\n\n"
        text += [gap * bool(text), block.prefix, block.text]
        before = block.kind
    return "".join(text)
