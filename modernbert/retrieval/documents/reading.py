"""How files are read whose form they do not show."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass

from .encodings import named_encoding

_AROUND_NAMES = string.whitespace + "\u00a0\u200b\u200c\u200d\u2060\ufeff"

TEXT = "text"
"""The column and field that is the text, unless others are chosen."""


@dataclass(frozen=True)
class Reading:
    """What a user says about files. None: as it is found in each of them.

    Attributes:
        encoding: of texts, tables and JSON lines without a byte order mark, and of web pages that declare none.
        text_column: the columns of tables, and fields of JSON lines, that are the text, such as "title,body": the name
            of one, or several with commas. In a table whose first row does not name columns, their numbers from 1.
        id_column: the one that is the `_id`.
        delimiter: of the cells in a row: one character.
        skip_bad_rows: whether rows and records that are broken are left out with a note, instead of an error.
    """

    encoding: str | None = None
    text_column: str | None = None
    id_column: str | None = None
    delimiter: str | None = None
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be meant."""
        if self.encoding is not None:
            named_encoding(self.encoding)
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise ValueError(f"delimiter is {self.delimiter!r}; give one character")
        for name in ("text_column", "id_column"):
            if (value := getattr(self, name)) is not None and not value.strip():
                raise ValueError(f"{name} is empty; give the name of a column")

    @property
    def codec(self) -> str | None:
        """Python's name of the encoding."""
        return None if self.encoding is None else named_encoding(self.encoding)

    def text_columns(self, names: Sequence[str]) -> list[str]:
        """The columns that are the text, of a table or record with these `names`."""
        if self.text_column is None or self.text_column in names:
            return [self.text_column or TEXT]
        return [name.strip() for name in self.text_column.split(",")]

    def id_key(self, names: Container[str]) -> str:
        """The column that is the id, of a table or record with these `names`, if it has one."""
        return self.id_column or ("_id" if "_id" in names else "id")

    def column_names(self, first: Sequence[str]) -> list[str]:
        """The names of a table's columns, given its first row: their numbers, if numbers are asked for that it lacks.

        None at all if columns are asked for that the table lacks, or if there are two of one name.
        """
        names = [column_name(cell) for cell in first]
        wanted = [*self.text_columns(names), *([self.id_column] if self.id_column else [])]
        if all(name in names for name in wanted):
            named = list(filter(None, names))
            return names if len(set(named)) == len(named) else []
        numbers = [str(number) for number in range(1, len(names) + 1)]
        return numbers if all(name in numbers for name in wanted) else []

    def missing_columns(self, first: Sequence[str]) -> str:
        """What to say of a table for which `column_names` finds none."""
        wanted = [*self.text_columns(()), *([self.id_column] if self.id_column else [])]
        return (
            f"the first row must name the columns, one of them {' and one '.join(map(repr, wanted))}, none twice; got "
            f"{', '.join(map(repr, map(column_name, first))):.1000}; choose with --text-column and "
            "--id-column of `modernbert index`, by number if the first row is text, or name the --delimiter"
        )

    def options(self) -> dict[str, str | bool]:
        """What differs from the default, by name."""
        return {name: value for name, value in asdict(self).items() if value}


def column_name(cell: str) -> str:
    """A cell of the first row as the name of a column: in one form of Unicode, with nothing invisible around it."""
    return unicodedata.normalize("NFC", cell).strip(_AROUND_NAMES)


DEFAULT = Reading()
