"""The cells of Excel's workbooks as text: rows of a sheet, the strings they share, and which numbers are dates."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from math import isfinite

from .archive import attribute
from .html import escaped

_DATES = frozenset({*range(14, 23), *range(27, 37), *range(50, 59)})
"""The built-in formats of dates and times."""

_NOT_OF_A_DATE = re.compile(r'"[^"]*"|\\.|_.|\[(?!h+\]|m+\]|s+\])[^\]]*\]', re.IGNORECASE)
_OF_A_DATE = re.compile(r"[dmyhs]", re.IGNORECASE)
_PRECISION = ".15g"  # what Excel computes with; the file may have more digits
_LAST_DAY = 2_958_466  # the first day of the year 10000


class SharedStrings:
    """Collects the strings that the cells of all sheets refer to by number."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._words: list[str] = []
        self._is_text = self._is_hint = False

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        self._is_hint = self._is_hint or name == "rPh"  # the pronunciation
        self._is_text = name == "t"

    def end(self, name: str) -> None:
        self._is_text = False
        if name == "rPh":
            self._is_hint = False
        elif name == "si":
            self.found.append(" ".join("".join(self._words).split()))
            self._words = []

    def data(self, text: str) -> None:
        if self._is_text and not self._is_hint:
            self._words.append(text)


class Formats:
    """Collects which formats of cells are dates, and how a workbook counts days."""

    def __init__(self) -> None:
        self._first = datetime(1899, 12, 30)
        self._dates = set(_DATES)
        self._are_dates: list[bool] = []
        self._is_list = False

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        if name == "numFmt":
            code = _NOT_OF_A_DATE.sub("", attribute(attributes, "formatCode"))
            if "[" not in code and _OF_A_DATE.search(code):  # not a duration, such as [h]:mm
                self._dates.add(_number(attribute(attributes, "numFmtId")))
        elif name == "workbookPr" and attribute(attributes, "date1904") in ("1", "true"):
            self._first = datetime(1904, 1, 1)
        elif name == "cellXfs":
            self._is_list = True
        elif name == "xf" and self._is_list:
            self._are_dates.append(_number(attribute(attributes, "numFmtId")) in self._dates)

    def end(self, name: str) -> None:
        if name == "cellXfs":
            self._is_list = False

    def data(self, text: str) -> None:
        pass

    def shown(self, value: str, style: str) -> str:
        """A number as text: a date if its cell has the format of one."""
        try:
            number = float(value)
        except ValueError:
            return value
        at = _number(style)
        if 0 <= at < len(self._are_dates) and self._are_dates[at] and 0 <= number < _LAST_DAY - 1462:
            moment = self._first + timedelta(seconds=round(number * 86400))
            time = "" if number == int(number) else f"{moment:%H:%M:%S}".removesuffix(":00")
            return " ".join(filter(None, [f"{moment:%Y-%m-%d}" if number >= 1 else "", time]))
        return format(number, _PRECISION) if "." in value and isfinite(number) else value


class SheetWriter:
    """Writes the rows of a sheet.

    Attributes:
        rows: the cells of each row that are not empty, with " | " between them.
    """

    def __init__(self, count: Callable[[int], None], strings: Sequence[str], formats: Formats) -> None:
        """`count` is called with the characters of each cell, because cells share their strings."""
        self._count, self._strings, self._formats = count, strings, formats
        self._cells: list[str] = []
        self._words: list[str] = []
        self._kind = self._style = ""
        self._is_value = False
        self.rows: list[str] = []

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        if name == "c":
            self._kind, self._style, self._words = attributes.get("t", "n"), attributes.get("s", "0"), []
        self._is_value = name in ("v", "t")

    def end(self, name: str) -> None:
        self._is_value = False
        if name == "c" and (text := self._shown("".join(self._words))):
            self._count(len(text))
            self._cells.append(text)
        elif name == "row" and self._cells:
            self.rows.append(escaped(" | ".join(self._cells)))
            self._cells = []

    def data(self, text: str) -> None:
        if self._is_value:
            self._words.append(text)

    def _shown(self, value: str) -> str:
        if self._kind == "s":
            at = _number(value)
            return self._strings[at] if 0 <= at < len(self._strings) else ""
        if self._kind == "b":
            return {"0": "FALSE", "1": "TRUE"}.get(value, value)
        return self._formats.shown(value, self._style) if self._kind == "n" else " ".join(value.split())


def _number(value: str) -> int:
    """A number in an attribute, or -1."""
    return int(value) if value.isdecimal() and len(value) < 10 else -1
