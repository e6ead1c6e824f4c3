"""The rows of tables: CSV as RFC 4180 defines it, and tab-separated text, in which a quote may be only a character.

Spreadsheets and pandas put cells with line ends and quotes in quotes, with tabs between the cells too. Others, such as
the files of MS MARCO, never do, and have cells that begin with a quote. In tab-separated text, quotes therefore count
only where they give a row as many cells as the header has, and they never join lines that are rows already.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

LONGEST_CELL = 1 << 28  # characters; `read_lines` limits a line to as many bytes

TAB = "\t"
DELIMITERS = ",;\t|"
"""Those that are tried on the first row."""

_EXCEL = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
_CLOSING = re.compile(r'(?:[^"]|"")*"(?:\t|\r?\n?\Z)')


class Row(NamedTuple):
    """The cells of a row and the number of its first line; or a problem, and no cells."""

    line: int
    cells: list[str]
    problem: str = ""


def read_rows(lines: Iterable[str], delimiters: str, is_header: Callable[[list[str]], bool]) -> Iterator[Row]:
    """The rows of a table that are not empty.

    Args:
        lines: with their line ends.
        delimiters: the first is taken unless the first row is a header with another one. Excel names the delimiter in
            a line `sep=;` above the table, which counts unless there is only one.
    """
    lines, number = iter(lines), 1
    for first in lines:
        named = _EXCEL.fullmatch(first)
        if named:
            delimiters = named[1] if len(delimiters) > 1 else delimiters
        elif first.strip():
            break
        number += 1
    else:
        return
    fitting = (one for one in delimiters if is_header(_cells_of(first, one).cells))
    delimiter = next(fitting, delimiters[0])
    source = _Source(first, lines, delimiter)
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    while True:
        cells, problem = _next(reader)
        taken, is_row = source.taken, source.fits(cells)
        source.taken = []
        if not taken:
            return
        if problem or not is_row:
            for line in taken:
                yield from _filled(_cells_of(line, delimiter, number, source.width))
                number += 1
            continue
        first_line, number = number, number + len(taken)
        del taken  # A long line is not held while its row is in use.
        yield from _filled(Row(first_line, cells))


class _Source:
    """The lines of a table for csv.reader, which asks for as many as a row has.

    Attributes:
        taken: the lines of the row that is being read. width: cells of the first line, if tabs are between them.
    """

    def __init__(self, first: str, lines: Iterator[str], delimiter: str) -> None:
        self._held: str | None = first
        self._lines, self._has_tabs = lines, delimiter == TAB
        self.taken: list[str] = []
        self.width = _count(first)

    def __iter__(self) -> _Source:
        return self

    def __next__(self) -> str:
        """The next line. In the middle of a row, an end means that the next line is a row of its own."""
        line = next(self._lines) if self._held is None else self._held
        self._held = line
        if self.taken and self._is_row(line):
            raise StopIteration
        self._held = None
        self.taken.append(line)
        return line

    def fits(self, cells: list[str]) -> bool:
        """Whether the lines that were taken are one row, with these cells."""
        if not (self._has_tabs and cells):
            return True
        ends = (self.taken[0], self.taken[-1])
        is_cut = len(self.taken) == 1 or any(_count(line) < self.width for line in ends)
        return is_cut and len(cells) == self.width

    def _is_row(self, line: str) -> bool:
        if not self._has_tabs or _count(line) != self.width:
            return False
        return _count(self.taken[0]) >= self.width or not _CLOSING.match(line)


def _count(line: str) -> int:
    return line.count(TAB) + 1


def _cells_of(line: str, delimiter: str, number: int = 1, width: int = 0) -> Row:
    """A line as a row. In tab-separated text, quotes are only characters if that gives the row its `width`."""
    cells, problem = _next(csv.reader([line], delimiter=delimiter, strict=True))
    if delimiter == TAB and len(cells) != width:
        plain = line.rstrip("\r\n").split(TAB)
        if problem or len(plain) == width:
            return Row(number, plain)
    return Row(number, cells, problem)


def _filled(row: Row) -> Iterator[Row]:
    """The row, unless all its cells are empty: spreadsheets write such rows below a table."""
    if row.problem or any(row.cells):
        yield row


def _next(reader: Iterator[list[str]]) -> tuple[list[str], str]:
    """The cells of the next row, or none and what is wrong with it."""
    try:
        with _long_cells():
            return next(reader, []), ""
    except csv.Error as error:
        return [], f"broken table ({error})"


@contextmanager
def _long_cells() -> Iterator[None]:
    """Allow long cells. The limit belongs to the whole process, so it is raised only while a row is read."""
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
