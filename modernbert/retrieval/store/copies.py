"""Documents of the same content, such as a file in two folders: a search shows the one that was indexed last."""

from __future__ import annotations

import sqlite3

import numpy as np

GROUPS = """SELECT d.number, g.first FROM documents d JOIN (
    SELECT digest, CASE WHEN line IS NULL THEN '' ELSE id END AS name, min(number) AS first
    FROM documents GROUP BY digest, name HAVING count(*) > 1
) g ON g.digest = d.digest AND g.name = CASE WHEN d.line IS NULL THEN '' ELSE d.id END ORDER BY d.number"""
"""Copies, and the first document of their group. Records are copies only if they also have the same id: a corpus may
hold a text twice, under two ids that are judged."""

SEVERAL_FILES = "SELECT (SELECT min(path) FROM documents) < (SELECT max(path) FROM documents)"


class Copies:
    """The copies among the documents in a table."""

    def __init__(self, table: sqlite3.Connection) -> None:
        # In one file, all ids differ. This is found out from the index, without reading the documents.
        (several,) = table.execute(SEVERAL_FILES).fetchone()
        rows = table.execute(GROUPS).fetchall() if several else []
        self._table = table
        self._numbers_M, self._groups_M = np.array(rows, dtype=np.int64).reshape(-1, 2).T

    def __len__(self) -> int:
        """The number of documents that are copies of another one, or have copies."""
        return len(self._numbers_M)

    def without_older(self, numbers_N: np.ndarray | None) -> np.ndarray | None:
        """Document numbers, increasing, without those of which there is a newer copy among them; None: all."""
        if not len(self):
            return numbers_N
        if numbers_N is None:
            found = self._table.execute("SELECT number FROM documents ORDER BY number")
            numbers_N = np.fromiter((number for (number,) in found), dtype=np.int64)
        chosen = np.isin(self._numbers_M, numbers_N, assume_unique=True)
        copies, groups = self._numbers_M[chosen][::-1], self._groups_M[chosen][::-1]
        newest = np.unique(groups, return_index=True)[1]
        return np.setdiff1d(numbers_N, np.delete(copies, newest), assume_unique=True)

    def paths(self, number: int) -> tuple[str, ...]:
        """The paths of the other copies of a document, the newest first."""
        own = self._groups_M[self._numbers_M == number]
        group = self._numbers_M[np.isin(self._groups_M, own)]
        select = "SELECT path FROM documents WHERE number = ?"
        return tuple(
            self._table.execute(select, (int(other),)).fetchone()[0] for other in group[::-1] if other != number
        )
