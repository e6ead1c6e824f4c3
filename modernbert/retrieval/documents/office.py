"""Documents, presentations and workbooks of Office programs to markdown, in the formats of Microsoft and OASIS.

Paragraphs, headings, list items, rows of tables, text boxes, formulas as their letters, notes and comments are read;
headers, footers and deleted text are not. The pages of the text, with `PAGE_BREAK` between them, are slides or sheets.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence

from ..passages import PAGE_BREAK
from .archive import BROKEN, Archive, Handler, Reference, References, attribute
from .office_text import Style, TextWriter, heading_level
from .sheets import Formats, SharedStrings, SheetWriter
from .text import OnNote

_BESIDE = frozenset({"footnotes", "endnotes", "comments", "notesSlide", "diagramData", "chart", "drawing"})
"""The kinds of parts whose text belongs to the part that refers to them."""


def read_word(raw: bytes, on_note: OnNote) -> tuple[str, str]:
    """The text of the paragraph that is the title, and the whole text."""
    parts = _Parts(raw, on_note)
    main = parts.main("word/document.xml")
    styles = _Styles()
    for reference in parts.references(main):
        if reference.kind == "styles":
            parts.read(reference.part, styles)
    writer = TextWriter(parts.archive.count, styles.resolve())
    parts.read_all(main, writer)
    return writer.title, parts.text(writer.pages)


def read_slides(raw: bytes, on_note: OnNote) -> tuple[str, str]:
    """The title of the first slide that has one, and the text of all."""
    parts = _Parts(raw, on_note)
    writer = TextWriter(parts.archive.count)
    for number, (_, slide) in enumerate(parts.listed("ppt/presentation.xml", "sldId")):
        if number:
            writer.turn()
        parts.read_all(slide, writer)
    return writer.title, parts.text(writer.pages)


def read_sheets(raw: bytes, on_note: OnNote) -> tuple[str, str]:
    """No title, and the rows of all sheets, each sheet under its name as a heading."""
    parts = _Parts(raw, on_note)
    main = parts.main("xl/workbook.xml")
    strings, formats = SharedStrings(), Formats()
    for reference in parts.references(main):
        if reference.kind in ("sharedStrings", "styles"):
            parts.read(reference.part, strings if reference.kind == "sharedStrings" else formats)
    pages = []
    for attributes, sheet in parts.listed("xl/workbook.xml", "sheet", formats):
        rows, beside = SheetWriter(parts.archive.count, strings.found, formats), TextWriter(parts.archive.count)
        parts.read(sheet, rows)
        parts.read_all(sheet, beside, itself=False)
        found = [f"## {' '.join(attributes.get('name', '').split())}", "\n".join(rows.rows), *beside.pages]
        pages.append("\n\n".join(filter(None, found)) if any(found[1:]) else "")
    return "", parts.text(pages)


def read_opendocument(raw: bytes, on_note: OnNote) -> tuple[str, str]:
    """The title, and the text of a document, a presentation or a workbook of LibreOffice."""
    parts = _Parts(raw, on_note)
    writer = TextWriter(parts.archive.count, is_opendocument=True)
    parts.read("content.xml", writer)
    return writer.title, parts.text(writer.pages)


class _Parts:
    """The parts of a file, which are read as far as they are whole."""

    def __init__(self, raw: bytes, on_note: OnNote) -> None:
        self.archive, self._on_note = Archive(raw), on_note
        self._lost: list[str] = []
        self._seen: set[str] = set()

    def main(self, usual: str) -> str:
        """The part that the file begins with."""
        found = [one.part for one in self.references("") if one.kind == "officeDocument"]
        return next(iter(found), usual)

    def references(self, part: str) -> list[Reference]:
        """What a part refers to in this file; of the part "" what the whole file does."""
        folder, name = posixpath.split(part)
        collected = References(folder)
        if (path := posixpath.join(folder, "_rels", f"{name}.rels")) in self.archive:
            self.read(path, collected)
        return [found for found in collected.found if found.part in self.archive]

    def read(self, part: str, handler: Handler) -> None:
        """Read a part, or its beginning if it is broken."""
        try:
            self.archive.parse(part, handler)
        except BROKEN as error:
            self._lost.append(f"{part} ({type(error).__name__}: {error})")

    def read_all(self, part: str, handler: Handler, *, itself: bool = True) -> None:
        """Read a part and those beside it, each once in a file."""
        if itself:
            self.read(part, handler)
        todo = [part]
        while todo:
            for reference in self.references(todo.pop(0)):
                if reference.kind in _BESIDE and reference.part not in self._seen:
                    self._seen.add(reference.part)
                    self.read(reference.part, handler)
                    todo.append(reference.part)

    def listed(self, usual: str, name: str, also: Handler | None = None) -> Iterator[tuple[Mapping[str, str], str]]:
        """The parts that the main part lists in elements of this `name`, in order and once, with their attributes."""
        main = self.main(usual)
        targets = {reference.key: reference.part for reference in self.references(main)}
        elements = _Elements(name)
        self.read(main, elements)
        if also:
            self.read(main, also)
        for attributes in elements.found:
            part = next((targets[value] for value in attributes.values() if value in targets), None)
            if part and part not in self._seen:
                self._seen.add(part)
                yield attributes, part

    def text(self, pages: Sequence[str]) -> str:
        """The whole text. Notes what is lost, and that there is none. Raises ValueError if nothing is left."""
        if self._lost:
            if not any(pages):
                raise ValueError(f"a broken Office file: {self._lost[0]}; save it again")
            self._on_note(f"an Office file with {len(self._lost)} broken parts, read up to there: {self._lost[0]}")
        elif not any(pages):
            self._on_note("an Office file without text, or of another kind than its name says")
        return f"\n{PAGE_BREAK}".join(pages).rstrip()


class _Elements:
    """Collects the attributes of the elements of one name."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.found: list[Mapping[str, str]] = []

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        if name == self._name:
            self.found.append(attributes)

    def end(self, name: str) -> None:
        pass

    def data(self, text: str) -> None:
        pass


class _Styles:
    """The styles of paragraphs by their keys. Names are the same in all languages."""

    def __init__(self) -> None:
        self._own: dict[str, Style] = {}
        self._above: dict[str, str] = {}
        self._key = ""

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        value = attribute(attributes, "val")
        if name == "style":
            self._key = attribute(attributes, "styleId")
            self._own[self._key] = Style()
        elif self._key and name == "basedOn":
            self._above[self._key] = value
        elif self._key:
            self._own[self._key] = self._with(self._own[self._key], name, value.lower())

    def end(self, name: str) -> None:
        if name == "style":
            self._key = ""

    def data(self, text: str) -> None:
        pass

    @staticmethod
    def _with(style: Style, name: str, value: str) -> Style:
        if name == "numPr":
            return style._replace(is_item=True)
        if name == "outlineLvl":
            return style._replace(level=style.level or heading_level(value))
        if name != "name":
            return style
        kind, _, number = value.partition(" ")
        level = heading_level(number, first=1) if kind == "heading" else int(value == "title")
        return style._replace(level=level, is_title=value == "title", is_contents=kind == "toc")

    def resolve(self) -> dict[str, Style]:
        """The styles, where one without a level of its own has that of the style it is based on."""
        found = {}
        for key, style in self._own.items():
            above = key
            for _ in range(8):
                if any(style) or (above := self._above.get(above, "")) not in self._own:
                    break
                style = self._own[above]
            found[key] = style
        return found
