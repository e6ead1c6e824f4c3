"""A corpus in units: shares that are read, encoded and written as a whole, by whichever process takes them.

The units depend on the files alone, not on how many processes there are. A unit is some files, or a part of a large
one: lines of JSON lines in UTF-8, or row groups of parquet. Any other file is one unit, whatever its size.
"""

from __future__ import annotations

import codecs
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .documents.find import Key, find_files, read_file
from .documents.parquet import PARQUET
from .documents.reading import Reading
from .documents.records import LARGEST, is_records
from .documents.text import OnNote, file_name
from .passages import Document
from .remote import copied, find_remote, is_remote, opened

UNIT = 2 << 20
"""Bytes of the files of a unit: about 4,000 passages of 100 tokens."""


class Piece(NamedTuple):
    """A file, or a part of one.

    Attributes:
        path: absolute, or a URL.
        first: the number of its first record; 0: the whole file.
        start, stop: its bytes, or of parquet its row groups.
    """

    path: str
    first: int = 0
    start: int = 0
    stop: int = 0


Unit = tuple[Piece, ...]


def find_units(
    paths: Sequence[str | os.PathLike[str]],
    reading: Reading,
    *,
    exclude: Sequence[str] = (),
    gitignore: bool = True,
    on_unread: Callable[[str], None],
    on_note: OnNote,
) -> Iterator[Unit]:
    """The units of the files under `paths`, in the order in which `index` reads them. Raises as `find_files`."""
    here = [path for path in paths if not is_remote(path)]
    found = find_files(here, exclude=exclude, gitignore=gitignore, on_unread=on_unread, on_note=on_note)
    unit: list[Piece] = []
    size = 0
    for path, bytes_ in _sized(found, [os.fspath(path) for path in paths if is_remote(path)], exclude):
        parts = _parts(path, reading) if bytes_ > UNIT else []
        if len(parts) > 1 or size + bytes_ > UNIT:
            if unit:
                yield tuple(unit)
            unit, size = [], 0
        if len(parts) > 1:
            yield from ((part,) for part in parts)
        else:
            unit.append(Piece(path))
            size += bytes_
    if unit:
        yield tuple(unit)


def read_unit(
    unit: Unit,
    reading: Reading,
    *,
    is_current: Callable[[Key], bool],
    on_current: Callable[[Key], None],
    on_unread: Callable[[str], None],
    on_note: OnNote,
) -> Iterator[Document]:
    """The documents of a unit, as by `read_file`. A file that cannot be read is noted, unless it holds records."""
    for piece in unit:
        name = piece.path if is_remote(piece.path) else file_name(piece.path)
        try:
            with _file(piece) as path:
                yield from read_file(
                    path,
                    reading,
                    name=name,
                    first=piece.first or 1,
                    is_current=is_current,
                    on_current=on_current,
                    on_note=on_note,
                )
        except (OSError, ValueError) as error:
            if is_records(Path(piece.path)):
                raise
            on_note(f"skipped a file: {error}")
            on_unread(name)


@contextmanager
def _file(piece: Piece) -> Iterator[Path]:
    """A file on this machine with what a piece holds."""
    if not piece.first and not is_remote(piece.path):
        yield Path(piece.path)
    elif not piece.first:
        with copied(piece.path) as copy:
            yield copy
    elif not piece.path.lower().endswith(PARQUET):
        with copied(piece.path, piece.start, piece.stop) as copy:
            yield copy
    else:
        from pyarrow.parquet import ParquetFile, write_table

        with tempfile.TemporaryDirectory(prefix="modernbert-") as folder, opened(piece.path) as source:
            copy = Path(folder, f"copy{PARQUET}")
            write_table(ParquetFile(source).read_row_groups(list(range(piece.start, piece.stop))), copy)
            yield copy


def _sized(here: Iterator[Path], urls: Sequence[str], exclude: Sequence[str]) -> Iterator[tuple[str, int]]:
    for path in here:
        try:
            size = path.stat().st_size
        except OSError:  # reading it will raise the same error, which is then noted
            size = 0
        yield os.fspath(path), size
    for url in urls:
        yield from find_remote(url, exclude)


def _parts(path: str, reading: Reading) -> list[Piece]:
    """The parts of a large file of records; one or none if it cannot be cut."""
    lower = path.lower()
    if lower.endswith(PARQUET):
        return _row_groups(path)
    is_utf8 = reading.codec in (None, "utf-8")
    return _lines(path) if lower.endswith((".jsonl", ".ndjson")) and is_utf8 else []


def _lines(path: str) -> list[Piece]:
    """About `UNIT` bytes of whole lines each."""
    parts, first, start = [], 1, 0
    decoder = codecs.getincrementaldecoder("utf-8")()
    with opened(path) as file:
        while block := file.read(UNIT):
            block += file.readline(LARGEST)
            try:
                decoder.decode(block)
            except UnicodeDecodeError:
                return []  # its encoding is found from the whole file
            if b"\0" in block:
                return []  # perhaps UTF-16
            parts.append(Piece(path, first, start, start + len(block)))
            start += len(block)
            first += block.count(b"\n")
    return parts


def _row_groups(path: str) -> list[Piece]:
    """At least `UNIT` bytes of row groups each."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        return []  # reading it raises the error that names the package
    parts, first, start, rows, size = [], 1, 0, 0, 0
    try:
        with opened(path) as source, ParquetFile(source) as file:
            for group in range(file.metadata.num_row_groups):
                found = file.metadata.row_group(group)
                rows, size = rows + found.num_rows, size + found.total_byte_size
                if size >= UNIT or group + 1 == file.metadata.num_row_groups:
                    parts.append(Piece(path, first, start, group + 1))
                    first, start, rows, size = first + rows, group + 1, 0, 0
    except ArrowException:
        return []  # reading it raises the error with the path
    return parts
