"""Which passages of a store a search looks at. What was found out is kept, because questions come one at a time."""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np

from .copies import Copies
from .fields import Fields
from .filters import Condition, numbers_at, numbers_where
from .opened import OpenFiles


class Selection:
    """Selects passages in the files of a store."""

    def __init__(self, files: OpenFiles) -> None:
        self._files, self._fields = files, Fields(files.table)
        self._rows = lru_cache(maxsize=1024)(self._read)
        self._in_shard = lru_cache(maxsize=1024)(self._select)
        self._documents = lru_cache(maxsize=8)(self._choose)

    def passages(self, by: str, path: str | None, wanted: tuple[Condition, ...], *, copies: bool) -> list[np.ndarray]:
        """For each shard, `[N, 3]` int64: what counts once (the id of the passage or document), shard, row.

        Args:
            by: "document" or "passage", which counts. path, wanted: filters on the document.
            copies: also of older documents with the same content as a newer one that matches.
        """
        return [self._in_shard(number, by, path, wanted, copies) for number in self._files.shards]

    def copies_of(self, passage_id: int) -> tuple[str, ...]:
        """The paths of the other documents with the same content as the one of a passage, the newest first."""
        if not len(self._copies):
            return ()
        select = "SELECT document FROM passages WHERE number = ?"
        return self._copies.paths(self._files.table.execute(select, (passage_id,)).fetchone()[0])

    def _select(
        self, number: int, by: str, path: str | None, wanted: tuple[Condition, ...], copies: bool
    ) -> np.ndarray:
        rows_N4, chosen_M = self._rows(number), self._documents(path, wanted, copies)
        if chosen_M is not None:
            rows_N4 = rows_N4[np.isin(rows_N4[:, 1], chosen_M)]
        return np.ascontiguousarray(rows_N4[:, [1 if by == "document" else 0, 2, 3]])

    def _read(self, number: int) -> np.ndarray:
        """`[N, 4]` int64: the passages in a shard, by number, document, shard and row."""
        found = self._files.table.execute(
            "SELECT number, document, shard, row FROM passages WHERE shard = ? ORDER BY row", (number,)
        )
        return np.array(found.fetchall(), dtype=np.int64).reshape(-1, 4)

    def _choose(self, path: str | None, wanted: tuple[Condition, ...], copies: bool) -> np.ndarray | None:
        """`[M]` int64, increasing: the numbers of the documents to search; None: all."""
        table, chosen_M = self._files.table, None
        if path is not None:
            chosen_M = numbers_at(table, path)
        if wanted:
            found = numbers_where(table, self._fields, wanted)
            chosen_M = found if chosen_M is None else np.intersect1d(found, chosen_M, assume_unique=True)
        return chosen_M if copies else self._copies.without_older(chosen_M)

    @cached_property
    def _copies(self) -> Copies:
        return Copies(self._files.table)
