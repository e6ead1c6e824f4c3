"""Files that hold many documents: JSON lines as BEIR defines them, and CSV."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from math import isfinite
from pathlib import Path
from typing import Any

from ..passages import Document
from .parquet import PARQUET, read_rows
from .text import OnNote, decode, file_name, gzip_errors, marked_encoding, replaced, storable

JSON_LINES = (".jsonl", ".jsonl.gz")
TABLES = {".csv": ",", ".tsv": "\t"}  # suffix to delimiter

LARGEST = 1 << 28
"""Bytes of the largest document or record that is read: there are several copies of it in memory."""

DEEPEST = 100
"""The deepest nesting of objects and lists in a record, because code that handles its metadata may be recursive."""


def is_records(path: Path) -> bool:
    """Whether a file holds records, judged by its name."""
    return path.name.lower().endswith((*JSON_LINES, *TABLES, PARQUET))


def read_records(path: Path, *, on_bytes: Callable[[int], None], on_note: OnNote) -> Iterator[Document]:
    """The records of a file, one at a time.

    A record has a `text`, and optionally a `title` and an `_id` or `id` (default: the number of its line). Its other
    fields are metadata, including those of an object `metadata`. In a CSV file the first row names the fields.

    Raises:
        ValueError: a record is broken, or an `_id` comes twice; with the file and the line.
    """
    name, lines = file_name(path), read_lines(path, on_bytes=on_bytes, on_note=on_note)
    delimiter = TABLES.get(path.suffix.lower())
    if path.suffix.lower() == PARQUET:
        documents = _parquet(path, name, on_bytes)
    else:
        documents = _json_lines(lines, name) if delimiter is None else _table(lines, name, delimiter)
    # A temporary database moves from memory to disk as it grows, and is deleted when it is closed.
    with closing(sqlite3.connect("", check_same_thread=False)) as seen:
        seen.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")
        for document in documents:
            try:
                seen.execute("INSERT INTO ids VALUES (?, ?)", (document.id, document.line))
            except sqlite3.IntegrityError:
                (first,) = seen.execute("SELECT line FROM ids WHERE id = ?", (document.id,)).fetchone()
                raise ValueError(
                    f'{name}: lines {first} and {document.line} both have the "_id" {document.id!r}; give each its own'
                ) from None
            except sqlite3.Error as error:
                raise OSError(f"{name}: no room for a temporary list of its records ({error})") from error
            yield document


def read_lines(path: Path, *, on_bytes: Callable[[int], None] = lambda size: None, on_note: OnNote) -> Iterator[str]:
    """The lines of a text file, gzipped if its name ends in .gz, with their line ends. Only a newline ends a line.

    `on_bytes` is called with the number of bytes of the file that were read for each line.
    """
    name, count, done = file_name(path), 0, 0
    is_packed = path.suffix.lower() == ".gz"
    largest = LARGEST // 4 if is_packed else LARGEST  # A small file may unpack to a line of any length.
    with open(path, "rb") as file, gzip_errors(name):
        stream = gzip.GzipFile(fileobj=file) if is_packed else file
        encoding = marked_encoding(stream.peek(4)[:4]) or "utf-8-sig"
        if not encoding.startswith("utf-8"):  # In UTF-16 and UTF-32 a byte 10 is not always a line end.
            stream = io.TextIOWrapper(stream, encoding, errors="replace", newline="\n")
        while raw := stream.readline(largest + 1):
            if len(raw) > largest:
                raise ValueError(f"{name}: a line of more than {largest >> 20} MiB; cut it into several records")
            line, bad = decode(raw) if isinstance(raw, bytes) else (storable(raw), raw.count("\ufffd"))
            del raw  # Free the bytes now: the caller may hold the line for a while.
            count += bad
            position = file.tell()
            on_bytes(position - done)
            done = position
            yield line
        on_bytes(file.tell() - done)
    if count:
        on_note(f"{name}: {replaced(count, encoding)}")


def json_record(line: str, name: str, number: int) -> Document:
    """The document in `line`, which is line `number` of the file `name`."""
    where = f"{name}, line {number}"
    try:
        record = _storable(_JSON.decode(line))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); a corpus has one JSON object a line") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{where}: expected an object with a string "text", got {line.strip()[:80]}')
    return _document(record, name, number)


def _finite(number: str) -> float | None:
    return value if isfinite(value := float(number)) else None


# Python accepts NaN and Infinity, JSON and SQLite do not: they become null. Control characters in strings are allowed.
_JSON = json.JSONDecoder(parse_constant=lambda name: None, parse_float=_finite, strict=False)


def _json_lines(lines: Iterable[str], name: str) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if line and not line.isspace():
            yield json_record(line, name, number)


def _parquet(path: Path, name: str, on_bytes: Callable[[int], None]) -> Iterator[Document]:
    # Dates and other values that JSON does not have become texts.
    for number, row in enumerate(read_rows(path, on_bytes=on_bytes), start=1):
        yield json_record(json.dumps(row, default=str), name, number)


def _table(lines: Iterable[str], name: str, delimiter: str) -> Iterator[Document]:
    rows = _rows(lines, name, delimiter)
    _, header = next(rows, (1, None))
    if header is None:
        return
    columns = [column.strip() for column in header]
    named = [column for column in columns if column]
    if "text" not in named or len(set(named)) < len(named):
        found = ", ".join(map(repr, columns))
        raise ValueError(f"{name}: the first row must name the columns, one of them 'text', none twice; got {found}")
    for number, row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{name}, line {number}: {len(row)} cells for {len(columns)} columns; are quotes missing?")
        yield _document({column: cell for column, cell in zip(columns, row, strict=True) if column}, name, number)


def _rows(lines: Iterable[str], name: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table that are not empty, each with the number of its first line."""
    rows, number = csv.reader(lines, delimiter=delimiter, strict=True), 1
    while True:
        # The limit belongs to the whole process, so it is raised only while a row is read.
        limit = csv.field_size_limit(LARGEST)
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{name}, line {number}: broken table ({error})") from error
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        if row:
            yield number, row
        number = rows.line_num + 1


def _document(record: Mapping[str, Any], name: str, number: int) -> Document:
    """The document of a record. Its `text` must be a string."""
    key = "_id" if "_id" in record else "id"
    title, text, identity = record.get("title") or "", record["text"], record.get(key, number)
    if not isinstance(title, str) or isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise ValueError(f'{name}, line {number}: "title" and "{key}" must be strings, got {title!r} and {identity!r}')
    metadata = {field: value for field, value in record.items() if field not in (key, "title", "text")}
    if isinstance(inner := metadata.get("metadata") or {}, dict):
        metadata.pop("metadata", None)
        metadata = {**inner, **metadata}
    # JSON has no raw line ends, so two different records never give the same bytes. The line number is left out: a
    # record that has moved is the same record.
    digest = hashlib.sha256(json.dumps([title, metadata], sort_keys=True).encode())
    digest.update(b"\n" + text.encode())
    return Document(name, str(identity), title, text, number, metadata, digest.hexdigest())


def _storable(value: Any, depth: int = 0) -> Any:
    """A JSON value with all its texts made storable."""
    if depth > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} deep")
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, list):
        return [_storable(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {storable(key): _storable(item, depth + 1) for key, item in value.items()}
    return value
