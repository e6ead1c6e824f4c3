"""The pages of a PDF as text: with their comments and filled-in forms, and without the lines around the text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pypdf import PageObject
    from pypdf.generic import DictionaryObject

EDGE = 2
"""Lines at the top and at the bottom of a page that may be running heads."""

LONGEST = 200
"""Characters of a line that may be a running head."""

PAGES = 3
"""Pages that have a running head in common."""

ANCESTORS = 8
"""Levels of form fields above a field of a page, from which it inherits."""

_NOT_COMMENTS = frozenset({"/Link", "/Popup"})  # They repeat the address of a link, and the text of a comment.
_NUMBER = re.compile(r"\d+")
_SYMBOLS = re.compile(r"(?:^|\+)(?:CMSY|CMBSY|LMMathSymbols|MSYM|TeX-cmsy)", re.IGNORECASE)


class MinusSigns:
    """Finds which NULs of a page are minus signs: their code is 0 in the symbol fonts of TeX, and pypdf keeps it."""

    def __init__(self) -> None:
        self._are_minus: list[bool] = []

    def visit(self, text: str, matrix: object, at: object, font: Mapping[str, object] | None, size: object) -> None:
        """Note the NULs of a piece of text and its font, as pypdf calls it in the order of the text."""
        is_minus = bool(_SYMBOLS.search(str((font or {}).get("/BaseFont", "")).lstrip("/")))
        self._are_minus += [is_minus] * text.count("\0")

    def put(self, text: str) -> str:
        """The text of the page with these signs."""
        if not any(self._are_minus) or text.count("\0") != len(self._are_minus):
            return text
        parts = text.split("\0")
        signs = ["\u2212" if is_minus else "\0" for is_minus in self._are_minus]
        return "".join(part + sign for part, sign in zip(parts, [*signs, ""], strict=True))


def filled_in(page: PageObject, on_work: Callable[[int], None]) -> Iterator[str]:
    """What was added to a page: comments, and what is filled into its form fields, as `label: value`.

    `on_work` is called with operators of work.
    """
    from pypdf.generic import ArrayObject, NullObject

    annotations = page.get("/Annots", NullObject()).get_object()
    for annotation in annotations if isinstance(annotations, ArrayObject) else ():
        on_work(20)
        found = annotation.get_object()
        if isinstance(found, NullObject) or (kind := found.get("/Subtype")) in _NOT_COMMENTS:
            continue
        text = _field(found, on_work) if kind == "/Widget" else found.get("/Contents")
        if isinstance(text, str) and text.strip():
            on_work(len(text) // 16)
            yield "\n".join(text.strip().splitlines())


def _field(field: DictionaryObject, on_work: Callable[[int], None]) -> str:
    """The label and value of a form field; "" if it is empty."""
    from pypdf.generic import ArrayObject, NameObject, StreamObject, create_string_object

    found = dict[str, object]()
    for _ in range(ANCESTORS):
        found = {key: field[key] for key in ("/TU", "/T", "/V", "/Opt") if key in field} | found
        field = _inner(field, "/Parent")
    value, shown = found.get("/V"), dict[str, object]()
    # A list has the names of options as its value, and buttons have their numbers, where they are shown as other texts.
    listed = found.get("/Opt")
    options = [option.get_object() for option in listed] if isinstance(listed, ArrayObject) else []
    on_work(len(options))
    for number, option in enumerate(options):
        is_pair = isinstance(option, list) and len(option) == 2
        shown[str(option[0]) if is_pair else f"/{number}"] = option[1] if is_pair else option
    if isinstance(value, StreamObject):
        value = create_string_object(value.get_data())
    values = [shown.get(one, one) for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
    texts = (one[1:] if isinstance(one, NameObject) else one for one in values if isinstance(one, str))
    chosen = ", ".join(one for one in texts if one not in ("", "Off"))
    label = found.get("/TU") or found.get("/T")
    return f"{label}: {chosen}" if label and chosen.strip() else chosen


def name_glyphs(page: PageObject, on_work: Callable[[int], None]) -> None:
    """Give glyphs of the page's fonts the names of their letters: `f_f_i` becomes ffi, and `a.sc` (small capital) a.

    pypdf writes the name of a glyph into the text if it does not know it.
    """
    from pypdf.generic import ArrayObject, NameObject

    fonts = _inner(_inner(page, "/Resources"), "/Font")
    for key in fonts:
        on_work(1)
        differences = _inner(_inner(fonts, key), "/Encoding").get("/Differences")
        if not isinstance(differences, ArrayObject):
            continue
        on_work(len(differences) // 16)
        for at, name in enumerate(differences):
            stem = str(name).partition(".")[0]
            letters = stem[1:].split("_")
            if len(letters) > 1 and all(len(letter) == 1 for letter in letters):
                differences[at] = NameObject("".join(letters))
            elif 1 < len(stem) < len(str(name)):
                differences[at] = NameObject(stem)


def _inner(above: DictionaryObject, key: str) -> DictionaryObject:
    """The dictionary at a key; an empty one if there is none."""
    from pypdf.generic import DictionaryObject, NullObject

    found = above.get(key, NullObject()).get_object()
    return found if isinstance(found, DictionaryObject) else DictionaryObject()


def without_running_heads(pages: Sequence[str]) -> list[str]:
    """Pages without the lines at their edges that repeat on several pages. A number in them may be the page's.

    The first page that has such a line keeps it, and a page of nothing else keeps all its lines.
    """
    lines_of = [page.split("\n") for page in pages]
    edges = [_edge(lines) for lines in lines_of]
    counts = Counter(
        key for at, (lines, edge) in enumerate(zip(lines_of, edges, strict=True)) for key in _edge_keys(lines, edge, at)
    )
    seen: set[str] = set()
    shorter = []
    for at, (lines, edge) in enumerate(zip(lines_of, edges, strict=True)):
        repeated = set[int]()
        for number in edge:
            keys = {key for key in _keys(lines[number], at) if counts[key] >= PAGES}
            if keys & seen or (keys and not re.search(r"[^\W\d]", lines[number])):
                repeated.add(number)
            seen |= keys
        kept = "\n".join(line for number, line in enumerate(lines) if number not in repeated).strip()
        shorter.append(kept or pages[at])
    return shorter


def _edge(lines: Sequence[str]) -> list[int]:
    """The numbers of the first and last lines with text that are short enough."""
    filled = [number for number, line in enumerate(lines) if line.strip()]
    edge = sorted({*filled[:EDGE], *filled[-EDGE:]})
    return [number for number in edge if len(lines[number]) <= LONGEST]


def _edge_keys(lines: Sequence[str], edge: Sequence[int], at: int) -> set[str]:
    return {key for number in edge for key in _keys(lines[number], at)}


def _keys(line: str, at: int) -> set[str]:
    """The line, and the line with its first or last number given relative to the page `at`: equal for running heads."""
    line = " ".join(line.split())
    numbers = list(_NUMBER.finditer(line))
    relative = {f"{line[: one.start()]}\0{int(one[0]) - at}\0{line[one.end() :]}" for one in numbers[:1] + numbers[-1:]}
    return {line} | relative
