"""Files that hold many documents: JSON lines as BEIR defines them, and tables."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from ..passages import Document
from .encodings import HEAD, text_encoding, utf16_without_mark
from .parquet import PARQUET
from .parquet import read_rows as read_parquet
from .reading import DEFAULT, Reading, column_name
from .tables import DELIMITERS, TAB, read_rows
from .text import OnNote, decode, file_name, gzip_errors, marked_encoding, replaced, storable

JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
TABLES = {".csv": DELIMITERS, ".tsv": TAB + DELIMITERS}  # suffix to the delimiters that are tried

LARGEST = 1 << 28
"""Bytes of the largest document or record that is read: there are several copies of it in memory."""

DEEPEST = 100
"""The deepest nesting of objects and lists in a record, because code that handles its metadata may be recursive."""

BAD_SHOWN = 3
"""Bad records that a note names; it counts them all."""


class Bad(NamedTuple):
    """A record that is broken: where in its file, and what is wrong."""

    where: str
    why: str


def is_records(path: Path) -> bool:
    """Whether a file holds records, judged by its name."""
    return path.name.lower().endswith((*JSON_LINES, *TABLES, PARQUET))


def read_records(
    path: Path,
    reading: Reading = DEFAULT,
    *,
    name: str | None = None,
    first: int = 1,
    on_bytes: Callable[[int], None],
    on_note: OnNote,
) -> Iterator[Document]:
    """The records of a file, one at a time.

    A record has a `text`, and optionally a `title` and an `_id` or `id` (default: the number of its line), unless
    `reading` names others. Its other fields are metadata, including those of an object `metadata`. In a table the first
    row names the fields.

    Args:
        name: of the file that these records are from, if `path` is a copy of it or of some of its lines.
        first: the number of the first record in JSON lines and parquet, if it is not the first of its file.

    Raises:
        ValueError: a record is broken, or an `_id` comes twice; with the file and the line. Not with `skip_bad_rows`.
    """
    name, kind = name or file_name(path), path.suffix.lower()
    encoding = reading.codec
    if kind in TABLES:
        with open(path, "rb") as file:
            encoding = text_encoding(file, encoding, lambda message: on_note(f"{name}: {message}"))
    lines = read_lines(path, encoding, on_bytes=on_bytes, on_note=on_note)
    if kind == PARQUET:
        documents = _parquet(read_parquet(path, on_bytes=on_bytes), name, reading, first)
    elif kind in TABLES:
        documents = _table(lines, name, reading, TABLES[kind])
    else:
        documents = _json_lines(lines, name, reading, first)
    skipped: list[Bad] = []
    count = 0
    for found in _unique(documents, name):
        if isinstance(found, Document):
            yield found
            continue
        if not reading.skip_bad_rows:
            raise ValueError(f"{name}{found.where}: {found.why}")
        count += 1
        skipped += [found] if count <= BAD_SHOWN else []
    if count:
        shown = "; ".join(f"{bad.where}: {bad.why}".lstrip(", :") for bad in skipped)
        on_note(f"{name}: skipped {count} bad records: {shown}{'; ...' if count > BAD_SHOWN else ''}")


def read_lines(
    path: Path, encoding: str | None = None, *, on_bytes: Callable[[int], None] = lambda size: None, on_note: OnNote
) -> Iterator[str]:
    """The lines of a text file, gzipped if its name ends in .gz, with their line ends.

    Only a newline ends a line, except in a file without any: Excel writes tables "for Macintosh" with carriage returns.

    `on_bytes` is called with the number of bytes of the file that were read for each line. A byte order mark counts
    more than `encoding`; None: UTF-8, or from the first line on that is not, what `text_encoding` finds.
    """
    name, count, done = file_name(path), 0, 0
    is_packed = path.suffix.lower() == ".gz"
    largest = LARGEST // 4 if is_packed else LARGEST  # A small file may unpack to a line of any length.
    with open(path, "rb") as file, gzip_errors(name):
        stream = gzip.GzipFile(fileobj=file) if is_packed else file
        head = stream.peek(HEAD)[:HEAD]
        is_utf8 = not encoding and not marked_encoding(head)  # as far as is known
        encoding = marked_encoding(head) or encoding or "utf-8-sig"
        if is_utf8 and utf16_without_mark(head):
            encoding = _guessed(path, on_note)
        if not encoding.startswith("utf-8"):  # In UTF-16 and UTF-32 a byte 10 is not always a line end.
            stream = io.TextIOWrapper(stream, encoding, errors="replace", newline="\n")
        while raw := stream.readline(largest + 1):
            if len(raw) > largest:
                raise ValueError(f"{name}: a line of more than {largest >> 20} MiB; cut it into several records")
            line, bad = _line(raw, encoding) if isinstance(raw, bytes) else (storable(raw), raw.count("\ufffd"))
            if bad and is_utf8 and isinstance(raw, bytes):
                is_utf8, encoding = False, _guessed(path, on_note)  # The lines before are ASCII, most likely.
                line, bad = _line(raw, encoding)
            del raw  # Free the bytes now: the caller may hold the line for a while.
            count += bad
            position, is_first = file.tell(), not done
            on_bytes(position - done)
            done = position
            if is_first and "\r" in line and not line.endswith("\n"):
                yield from (f"{part}\n" for part in line.split("\r"))
            else:
                yield line
        on_bytes(file.tell() - done)
    if count:
        on_note(f"{name}: {replaced(count, encoding)}")


def _line(raw: bytes, encoding: str) -> tuple[str, int]:
    """As `decode`. Files that begin with a byte order mark may follow each other in one."""
    return decode(raw, "utf-8-sig" if encoding.startswith("utf-8") else encoding)


def _guessed(path: Path, on_note: OnNote) -> str:
    """The encoding of a file of lines, which is noted if it is not UTF-8."""
    with open(path, "rb") as file:
        stream = gzip.GzipFile(fileobj=file) if path.suffix.lower() == ".gz" else file
        return text_encoding(stream, None, lambda message: on_note(f"{file_name(path)}: {message}"))


def json_record(line: str, name: str, number: int, reading: Reading = DEFAULT) -> Document:
    """The document in `line`, which is line `number` of the file `name`. Raises ValueError if it is not a record."""
    found = _json_record(line, name, number, reading)
    if isinstance(found, Bad):
        raise ValueError(f"{name}{found.where}: {found.why}")
    return found


def _unique(documents: Iterable[Document | Bad], name: str) -> Iterator[Document | Bad]:
    """The documents, of which those are bad that have the `_id` of an earlier one."""
    # A temporary database moves from memory to disk as it grows, and is deleted when it is closed.
    with closing(sqlite3.connect("", check_same_thread=False)) as seen:
        seen.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")
        for document in documents:
            if isinstance(document, Document):
                try:
                    seen.execute("INSERT INTO ids VALUES (?, ?)", (document.id, document.line))
                except sqlite3.IntegrityError:
                    (first,) = seen.execute("SELECT line FROM ids WHERE id = ?", (document.id,)).fetchone()
                    why = f'lines {first} and {document.line} both have the "_id" {document.id!r}; give each its own'
                    yield Bad("", why)
                    continue
                except sqlite3.Error as error:
                    raise OSError(f"{name}: no room for a temporary list of its records ({error})") from error
            yield document


def _finite(number: str) -> float | None:
    return value if isfinite(value := float(number)) else None


# Python accepts NaN and Infinity, JSON and SQLite do not: they become null. Control characters in strings are allowed.
_JSON = json.JSONDecoder(parse_constant=lambda name: None, parse_float=_finite, strict=False)


def _json_lines(lines: Iterable[str], name: str, reading: Reading, first: int) -> Iterator[Document | Bad]:
    for number, line in enumerate(lines, start=first):
        if line and not line.isspace():
            yield _json_record(line, name, number, reading)


def _json_record(line: str, name: str, number: int, reading: Reading) -> Document | Bad:
    where = f", line {number}"
    try:
        record = _storable(_JSON.decode(line))
    except (ValueError, RecursionError) as error:
        return Bad(where, f"not JSON ({error}); a corpus has one JSON object a line")
    names = list(record) if isinstance(record, dict) else []
    texts = reading.text_columns(names)
    found = [record[field] for field in texts if field in names and record[field] is not None]
    if not found or not all(isinstance(text, str) for text in found):
        wanted = " or ".join(f'"{field}"' for field in texts)
        fields = f"; its fields are {', '.join(map(repr, names))}" if names else ""
        return Bad(where, f"expected an object with a string {wanted}, got {line.strip()[:80]}{fields:.400}")
    if reading.id_column and reading.id_column not in names:
        return Bad(where, f"it has no {reading.id_column!r}; its fields are {', '.join(map(repr, names)):.400}")
    return _document(record, texts, name, number, reading)


def _parquet(rows: Iterable[Mapping[str, Any]], name: str, reading: Reading, first: int) -> Iterator[Document | Bad]:
    # Dates and other values that JSON does not have become texts.
    for number, row in enumerate(rows, start=first):
        yield _json_record(json.dumps(row, default=str), name, number, reading)


def _table(lines: Iterable[str], name: str, reading: Reading, delimiters: str) -> Iterator[Document | Bad]:
    rows = read_rows(lines, reading.delimiter or delimiters, lambda cells: bool(reading.column_names(cells)))
    first = next(rows, None)
    if first is None:
        return
    if first.problem:
        raise ValueError(f"{name}, line {first.line}: {first.problem}")
    columns = reading.column_names(first.cells)
    if not columns:
        raise ValueError(f"{name}: {reading.missing_columns(first.cells)}")
    texts, key = reading.text_columns(columns), reading.id_key(columns)
    for number, cells, problem in (
        rows if columns == [column_name(cell) for cell in first.cells] else chain([first], rows)
    ):
        if not problem and len(cells) != len(columns):
            problem = f"{len(cells)} cells for {len(columns)} columns; are quotes missing?"
        if problem:
            yield Bad(f", line {number}", problem)
            continue
        record = {column: cell for column, cell in zip(columns, cells, strict=True) if column}
        if not record.get(key, True):  # an empty cell: the record has no id
            del record[key]
        yield _document(record, texts, name, number, reading)


def _document(
    record: Mapping[str, Any], texts: Sequence[str], name: str, number: int, reading: Reading
) -> Document | Bad:
    """The document of a record, of which the fields `texts` are strings or null."""
    key = reading.id_key(record)
    title = (record.get("title") or "") if "title" not in texts else ""
    text = "\n\n".join(record[field] for field in texts if record.get(field))
    identity = record.get(key, number)
    if not isinstance(title, str) or isinstance(identity, bool) or not isinstance(identity, (str, int)):
        why = f'"title" and "{key}" must be strings, got {title!r} and {identity!r}'
        return Bad(f", line {number}", why)
    metadata = {field: value for field, value in record.items() if field not in (key, "title", *texts)}
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
