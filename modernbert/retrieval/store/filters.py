"""Which documents of a store a search looks at, by their paths and their metadata.

Texts are compared in Unicode's form NFC, because macOS and Linux spell the same name in two forms. Upper and lower case
differ. A text is equal to a number, to true, false and null if it is written like one, since all that a table or a
command line holds are texts. A field with a list fulfils a condition if one of its elements does.
"""

from __future__ import annotations

import json
import math
import operator
import re
import sqlite3
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np

from .fields import NULL, Fields, Scalar, Value, nfc

RANGES: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
OPERATORS = ("=", "!=", *RANGES)

FIELDS = 20
"""Fields that an error names."""

_NUMBER = re.compile(r"-?\d{1,300}(\.\d+)?([eE][-+]?\d+)?", re.ASCII)
_DATE = re.compile(r"\d{4}-\d\d", re.ASCII)
_BOOLEANS = {"true": True, "false": False}


class Condition(NamedTuple):
    """What a field of the metadata must be: one of the `values`, none of them for `!=`, or in a range.

    Attributes:
        field: its name in NFC; `author.name` is the field `name` of the object `author`, or of one in a list of them.
        operator: one of `OPERATORS`.
    """

    field: str
    operator: str
    values: tuple[Value, ...]


Where = Mapping[str, Any] | Sequence[Condition]
"""A filter, see `Store.search`."""


def conditions(where: Where) -> Iterator[Condition]:
    """The conditions in a filter. ValueError for one of another form."""
    if not isinstance(where, Mapping):
        is_list = isinstance(where, Sequence) and not isinstance(where, str)
        if not is_list or not all(isinstance(one, Condition) for one in where):
            raise ValueError(f"where is {where!r}; give a dict of fields and values")
        yield from where
        return
    for field, wanted in where.items():
        if not isinstance(field, str):
            raise ValueError(f"where has the field {field!r}; give its name as a text")
        yield from _of_field(field, wanted)


def _of_field(field: str, wanted: Any) -> Iterator[Condition]:
    if not isinstance(wanted, Mapping):
        yield condition(field, "=", wanted)
        return
    if not wanted:
        raise ValueError(f"where has {field!r}: {{}}; its keys are {', '.join(OPERATORS)} or names of fields")
    for key, inner in wanted.items():
        if key in OPERATORS:
            yield condition(field, key, inner)
        elif isinstance(key, str) and key:
            yield from _of_field(f"{field}.{key}", inner)
        else:
            raise ValueError(f"where has {field!r}: {wanted!r}; its keys are {', '.join(OPERATORS)} or names of fields")


def condition(field: str, sign: str, wanted: Any) -> Condition:
    """The condition that a field is related to a value, or to one of a list, by one of `OPERATORS`.

    Raises ValueError for a value of another type, or one that has no range.
    """
    several = isinstance(wanted, (list, tuple, set, frozenset))
    values = tuple(_value(each, field) for each in (wanted if several else (wanted,)))
    if sign in RANGES and (several or values[0].type not in ("text", "number")):
        raise ValueError(f"where has {field!r}: {{{sign!r}: {wanted!r}}}; a range ends at a number or a text")
    return Condition(normalize("NFC", field), sign, values)


def _value(value: object, field: str) -> Value:
    if value is None:
        return NULL
    if isinstance(value, bool):
        return Value("boolean", value)
    if isinstance(value, str):
        return Value("text", normalize("NFC", value))
    if isinstance(value, Integral):
        return Value("number", int(value))
    if isinstance(value, Real) and math.isfinite(value):
        return Value("number", float(value))
    raise ValueError(
        f"where has {field!r}: {value!r}; give a text, a number, True, False or None, a list of these, or a range, as "
        "in {'year': {'>=': 2020}}"
    )


def numbers_at(table: sqlite3.Connection, pattern: str) -> np.ndarray:
    """`[N]` int64, increasing: the numbers of the documents whose path matches a pattern."""
    found = table.execute(f"SELECT number FROM documents WHERE {PATH} ORDER BY number", (path_pattern(pattern),))
    return np.fromiter((number for (number,) in found), dtype=np.int64)


PATH = "path IN (SELECT path FROM (SELECT DISTINCT path FROM documents) WHERE nfc(path) GLOB ?)"
"""The documents that match a `path_pattern`."""


def path_pattern(path: str) -> str:
    """The pattern for `PATH`. A relative one matches the end of a path."""
    absolute = path if path.startswith("/") else f"*/{path}"
    return nfc(absolute.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def numbers_where(table: sqlite3.Connection, fields: Fields, wanted: Sequence[Condition]) -> np.ndarray:
    """`[N]` int64, increasing: the numbers of the documents that fulfil all conditions.

    Raises ValueError for a field that no document has, and for a value that cannot be compared with any of a field.
    """
    checks = [_Check(one) for one in wanted]
    found = array("q")
    numbers = table.execute("SELECT number FROM documents ORDER BY number")
    for (number,), rows in zip(numbers, fields.values([one.field for one in wanted]), strict=True):
        # A list: each learns what its field holds in all documents.
        held = [check.holds(values) for check, values in zip(checks, rows, strict=True)]
        if all(held):
            found.append(number)
    for check in checks:
        check.finish(fields)
    return np.array(found, dtype=np.int64)


class _Check:
    """A condition, and what was learned about its field."""

    def __init__(self, wanted: Condition) -> None:
        self._wanted = wanted
        self._is_known = False
        self._unlike: dict[Value, Value] = {}  # for each wanted value a value that cannot be compared with it
        self._alike: set[Value] = set()  # the wanted values that could be compared with something
        self.holds = lru_cache(maxsize=1 << 12)(self._holds)  # Documents mostly have values that others have too.

    def _holds(self, found: tuple[Value, ...]) -> bool:
        self._is_known |= bool(found)
        # A missing field is like null. All are compared, because `_compare` learns from it.
        hits = [self._compare(value, wanted) for value in found or [NULL] for wanted in self._wanted.values]
        return any(hits) != (self._wanted.operator == "!=")

    def finish(self, fields: Fields) -> None:
        """Raise ValueError if no document has the field, or if a wanted value could be compared with none in it."""
        field = self._wanted.field
        if not self._is_known:
            known = fields.names()
            listed = ", ".join(known[:FIELDS]) + (", ..." if len(known) > FIELDS else "")
            raise ValueError(f"no document has the field {field!r}; the fields are: {listed or 'none'}")
        for wanted, stored in self._unlike.items():
            if wanted not in self._alike:
                raise ValueError(
                    f"the field {field!r} cannot be compared with {wanted.value!r}: it holds values such as "
                    f"{json.dumps(stored.value, ensure_ascii=False)[:80]}"
                )

    def _compare(self, stored: Value, wanted: Value) -> bool:
        if stored.type == "null" and wanted.type != "null":
            return self._wanted.operator not in RANGES and wanted == Value("text", "null")
        if wanted.type == "null":
            return stored.type == "null" or stored == Value("text", "null")
        ends = _alike(stored, wanted, self._wanted.operator in RANGES)
        if ends is None:
            self._unlike.setdefault(wanted, stored)
            return False
        self._alike.add(wanted)
        return RANGES.get(self._wanted.operator, operator.eq)(*ends)


def _alike(stored: Value, wanted: Value, in_range: bool) -> tuple[Scalar, Scalar] | None:
    """The two values in one type, or None. In a range, texts are compared as numbers if the wanted one is one."""
    if stored.type == wanted.type != "text":
        return (stored.value, wanted.value) if not (in_range and stored.type == "boolean") else None
    if stored.type == wanted.type:
        if not in_range or (end := _as_type("number", wanted)) is None:
            return stored.value, wanted.value
        start = _as_type("number", stored)
        if start is None and _DATE.match(str(stored.value)):
            return stored.value, wanted.value  # The wanted value is a year.
        return None if start is None else (start, end)
    if "text" not in (stored.type, wanted.type):
        return None
    kind = stored.type if wanted.type == "text" else wanted.type
    ends = _as_type(kind, stored), _as_type(kind, wanted)
    return None if None in ends or (in_range and kind == "boolean") else ends


def _as_type(kind: str, value: Value) -> Scalar:
    """A value as a number or boolean; None for a text that is not written like one."""
    if value.type == kind:
        return value.value
    text = str(value.value).strip()
    if kind == "boolean":
        return _BOOLEANS.get(text.lower())
    if not _NUMBER.fullmatch(text):
        return None
    return int(text) if text.removeprefix("-").isdigit() else float(text)
