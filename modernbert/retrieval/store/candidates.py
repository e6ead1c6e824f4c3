"""The pre-filter of a store on disk: centroids once, lists for every shard, and the search that uses them."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...late_interaction import Ragged
from .format import SHARDS, Shard, finished_part, read_part, write_part
from .prefilter import Lists, invert, num_centroids, select, shortlist, train_centroids

CANDIDATES = 2048
"""Passages that are scored exactly, at least: enough for 99 of 100 of the best ten, of 10,000 and of 100,000."""

OUTGROWN = 2
"""New centroids are trained when a store deserves so many times as many as it has."""


def update_lists(folder: Path, table: sqlite3.Connection, known: Mapping[str, Any]) -> dict[str, Any]:
    """Give every shard its lists, and return the manifest's entry on the centroids, of which `known` is the old one."""
    rows = table.execute("SELECT number, file, sha256 FROM shards ORDER BY number").fetchall()
    shards = {number: Shard(folder / SHARDS / file, sha256).raw() for number, file, sha256 in rows}
    wanted = num_centroids(sum(len(shard.values) for shard in shards.values()))
    if not known or wanted > OUTGROWN * known["count"]:
        centroids = train_centroids(list(shards.values()))
        parts = {"values": centroids.values, "offsets": centroids.offsets}
        file, sha256 = write_part(folder, "centroids", parts)
        known = {"file": file, "sha256": sha256, "count": len(centroids.values)}
        table.execute("DELETE FROM lists")
    table.execute("DELETE FROM lists WHERE shard NOT IN (SELECT number FROM shards)")
    centroids = Ragged(**read_part(folder, known["file"], known["sha256"]))
    listed = {number for (number,) in table.execute("SELECT shard FROM lists")}
    for number, _, sha256 in rows:
        if number not in listed:
            name = f"lists-{sha256[:16]}-{known['sha256'][:16]}"
            part = finished_part(folder, name)
            if part is None:
                lists = invert(shards[number], centroids)
                part = write_part(folder, name, {"offsets": lists.offsets, "passages": lists.passages})
            table.execute("INSERT INTO lists VALUES (?, ?, ?)", (number, *part))
    return dict(known)


class Prefilter:
    """The centroids and lists of a store, read and verified."""

    def __init__(
        self, folder: Path, table: sqlite3.Connection, known: Mapping[str, Any], shards: Mapping[int, Shard]
    ) -> None:
        self._shards = list(shards.values())
        self._centroids = Ragged(**read_part(folder, known["file"], known["sha256"]))
        self._lists = []
        for number, shard in shards.items():
            row = table.execute("SELECT file, sha256 FROM lists WHERE shard = ?", (number,)).fetchone()
            shard.verify()
            self._lists.append(Lists(**read_part(folder, *row), num_passages=len(shard)))

    def candidates(self, queries: Ragged, count: int, alive: Sequence[Tensor]) -> list[Tensor]:
        """For each query the positions, counted over all shards, of passages that are worth an exact score."""
        count = max(CANDIDATES, 2 * count)
        return shortlist(queries, self._centroids, self._lists, candidates=count, alive=alive)

    def vectors(self, positions: Tensor) -> Ragged:
        """The passages at these positions, in float32."""
        rows = select([shard.raw() for shard in self._shards], positions)
        values = rows.values.float()
        if "scales" in self._shards[0].tensors:
            values *= select([shard.raw("scales") for shard in self._shards], positions).values
        return Ragged(values, rows.offsets)
