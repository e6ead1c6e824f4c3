"""The values of fields in the metadata of documents."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from unicodedata import normalize

Scalar = str | int | float | bool | None

KEPT = 8
"""Fields whose values are kept."""

LARGEST = 1 << 24
"""Characters of the different values of a field that is kept."""


class Value(NamedTuple):
    """A value, and its type by JSON: 1 and True are equal to Python, and so are their keys in a cache."""

    type: str
    value: Scalar


NULL = Value("null", None)


class Fields:
    """The fields of all documents in a table. To parse the metadata takes longest, so values are kept for a while."""

    def __init__(self, table: sqlite3.Connection) -> None:
        self._table = table
        self._kept: dict[str, list[tuple[Value, ...]]] = {}

    def values(self, fields: Sequence[str]) -> Iterator[tuple[tuple[Value, ...], ...]]:
        """For each document, in the order of their numbers, the values of each of these fields."""
        kept = [self._kept[field] for field in fields if field in self._kept]
        if len(kept) == len(fields):
            yield from zip(*kept, strict=True)
            return
        columns: list[list[tuple[Value, ...]]] = [[] for _ in fields]
        same: dict[tuple[Value, ...], tuple[Value, ...]] = {}
        room = LARGEST
        for (text,) in self._table.execute("SELECT metadata FROM documents ORDER BY number"):
            metadata = json.loads(text)
            row = tuple(tuple(map(_stored, _find(metadata, field))) for field in fields)
            yield row
            if room < 0:
                continue
            for column, values in zip(columns, row, strict=True):
                if values not in same:
                    same[values] = values
                    room -= 64 + sum(len(value.value) for value in values if isinstance(value.value, str))
                column.append(same[values])
            if room < 0:
                columns, same = [], {}
        if room >= 0:
            found = self._kept | dict(zip(fields, columns, strict=True))
            self._kept = dict(list(found.items())[-KEPT:])

    def names(self) -> list[str]:
        """All fields that have values."""
        rows = self._table.execute("SELECT metadata FROM documents")
        return sorted({name for (text,) in rows for name in _names(json.loads(text))})


def nfc(text: str) -> str:
    """A text in the form in which texts are compared."""
    return text if text.isascii() else normalize("NFC", text)


def _stored(value: Scalar) -> Value:
    if value is None:
        return NULL
    if isinstance(value, bool):
        return Value("boolean", value)
    return Value("text", nfc(value)) if isinstance(value, str) else Value("number", value)


def _find(value: Any, field: str) -> Iterator[Scalar]:
    """The values of a field: those in lists one at a time, and None for an empty list."""
    if isinstance(value, list):
        for item in value:
            yield from _find(item, field)
    elif isinstance(value, dict):
        for key, inner in value.items():
            key = nfc(key)
            if key == field:
                yield from _scalars(inner)
            elif field.startswith(f"{key}."):
                yield from _find(inner, field[len(key) + 1 :])


def _scalars(value: Any) -> Iterable[Scalar]:
    """The values in a list, in lists in it too; objects have none."""
    if isinstance(value, list):
        return [scalar for item in value for scalar in _scalars(item)] if value else [None]
    return [] if isinstance(value, dict) else [value]


def _names(value: Any, above: str = "") -> Iterator[str]:
    """The fields that `_find` finds."""
    if isinstance(value, list):
        for item in value:
            yield from _names(item, above)
    elif isinstance(value, dict):
        for key, inner in value.items():
            name = f"{above}{key}"
            if not isinstance(inner, (dict, list)):
                yield name
                continue
            if _scalars(inner):
                yield name
            yield from _names(inner, f"{name}.")
