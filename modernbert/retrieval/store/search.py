"""Exact late-interaction search over a store on disk, whose vectors are streamed through a memory map."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import torch

from ...late_interaction import Ragged, maxsim
from ..explain import TokenMatch, match
from ..passages import Passage
from . import format as files
from .candidates import Prefilter
from .format import Shard
from .identity import Model, load

TOKENS = 1 << 16
"""Document tokens scored at a time: they stay in the cache."""

QUERIES = 32
"""Queries scored at a time: the similarities of one block stay in the cache as well."""

PASSAGES = 256
"""Candidates of the pre-filter scored at a time: more would ask the system for new memory each time."""

COLUMNS = "p.number, d.path, d.id, p.title, p.text, p.start, p.stop, coalesce(d.line, p.line), d.metadata"
JOINED = "passages p JOIN documents d ON d.number = p.document"
FIELD = """SELECT 1 FROM json_each(d.metadata) f
    WHERE f.key = ? AND (CAST(f.value AS TEXT) = ? OR f.type IN ('true', 'false') AND f.type = ?)"""


@dataclass(frozen=True)
class Hit:
    """A passage found: `rank` counts from 1, `score` is its MaxSim with the query, `number` its key in the store."""

    rank: int
    score: float
    passage: Passage
    number: int


class Store:
    """What `index` has made, as it was when it was opened.

    Attributes:
        colbert: the model that queries are encoded with.
        folder: of the store. model: the name it remembers its model by. fingerprint: of that model.
        dtype: of the vectors: "fp16", "fp32" or "int8". dim: their width E. documents: how many it holds.
    """

    def __init__(self, folder: str | os.PathLike[str], model: Model | None = None) -> None:
        """Open the store in `folder` with its own model, or with `model`, which must be the same one.

        Raises:
            FileNotFoundError: no store, an unfinished one (with the command that finishes it), or a missing part.
            ValueError: a damaged store, one of another version, or of another model.
        """
        self.folder = Path(folder)
        manifest = files.read_manifest(self.folder)
        try:
            self._table, self._shards = self._parts(manifest)
        except FileNotFoundError:
            if files.read_manifest(self.folder) == manifest:
                raise
            manifest = files.read_manifest(self.folder)  # It was updated in between.
            self._table, self._shards = self._parts(manifest)
        self.dtype, self.dim, self.fingerprint = manifest["dtype"], manifest["width"], manifest["fingerprint"]
        self.documents, self._passages = manifest["documents"], manifest["passages"]
        self._centroids = manifest.get("prefilter")
        self._prefilter: Prefilter | None = None
        self.colbert, self.model = load(model, manifest)
        self._keys = lru_cache(maxsize=1024)(self._select)

    def _parts(self, manifest: Mapping[str, Any]) -> tuple[sqlite3.Connection, dict[int, Shard]]:
        path = self.folder / manifest["table"]
        files.verify(path, manifest["sha256"])
        # Nobody writes to a table that is published: no locks are needed, and none could be had on a read-only disk.
        address = f"file:{quote(os.path.abspath(path))}?mode=ro&immutable=1"
        table = sqlite3.connect(address, uri=True, check_same_thread=False)
        rows = table.execute("SELECT number, file, sha256 FROM shards ORDER BY number")
        return table, {number: Shard(self.folder / files.SHARDS / file, sha256) for number, file, sha256 in rows}

    def __len__(self) -> int:
        """How many passages it holds."""
        return self._passages

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        self._table.close()
        self._shards.clear()
        self._prefilter = None

    def search(
        self,
        queries: Sequence[str],
        *,
        top_k: int = 10,
        by: Literal["passage", "document"] = "passage",
        path: str | None = None,
        where: Mapping[str, str] | None = None,
        prefilter: bool = False,
    ) -> list[list[Hit]]:
        """For each query its `top_k` passages, best first; of equal scores the one that was indexed first.

        Args:
            by: "document" lists each document once, by its best passage.
            path: only documents whose path matches this shell pattern; `*` also stands for `/`.
            where: only documents with these fields and values in their metadata.
            prefilter: score only likely passages, which may miss some (README.md has the recall). The scores of those
                that are found are the same. Raises ValueError unless the store was made with `prefilter`.
        """
        if isinstance(queries, str):
            raise ValueError(f"queries must be a list of texts, got the text {queries!r}; write [query]")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; ask for 1 or more")
        vectors, keys = self.colbert.encode_queries(queries), self._keys_of(by, path, where)
        best = self._likely(vectors, keys, top_k) if prefilter else self._best(vectors, keys, top_k)
        return [self._hits(found) for found in best]

    def run(
        self, queries: Mapping[str, str], *, top_k: int = 100, path: str | None = None
    ) -> dict[str, dict[str, float]]:
        """For each query id its `top_k` documents, best first, as document id to score: a run of `evaluate`.

        A document scores as its best passage. `path` as in `search`. Raises ValueError if documents of several files
        share an id.
        """
        among, values = ("WHERE path GLOB ?", [_pattern(path)]) if path else ("", [])
        shared = self._table.execute(
            f"SELECT id FROM documents {among} GROUP BY id HAVING count(*) > 1", values
        ).fetchone()
        if shared:
            raise ValueError(
                f"the store holds several documents with the id {shared[0]!r}: a run could not tell them apart"
            )
        run: dict[str, dict[str, float]] = {}
        names = list(queries)
        for start in range(0, len(names), 2 * QUERIES):
            group = names[start : start + 2 * QUERIES]
            vectors = self.colbert.encode_queries([queries[name] for name in group])
            best = self._best(vectors, self._keys_of("document", path, None), top_k)
            for name, found in zip(group, best, strict=True):
                run[name] = {
                    self._id(keys[0]): score
                    for keys, score in zip(found.keys.tolist(), found.scores.tolist(), strict=True)
                }
        return run

    def explain(self, query: str, hit: Hit) -> list[TokenMatch]:
        """For each query token the most similar token of a hit of it; contributions sum to the score."""
        place = self._table.execute("SELECT shard, row FROM passages WHERE number = ?", (hit.number,)).fetchone()
        shard, row = self._shards[place[0]], place[1]
        rows = slice(int(shard.offsets[row]), int(shard.offsets[row + 1]))
        spans = [(start, stop) if stop else None for start, stop in shard.spans[rows].tolist()]
        query_QE, query_spans = (
            self.colbert.encode_queries([query]).values,
            self.colbert.tokenize_queries([query]).spans[0],
        )
        return match(query_QE, query_spans, shard.vectors(row, row + 1).values.float(), spans)

    def passages(self, numbers: Sequence[int]) -> list[Passage]:
        """The passages with these keys."""
        return [self._passage("p.number = ?", number)[1] for number in numbers]

    def batches(self) -> Iterator[tuple[list[int], list[Passage], Ragged]]:
        """Everything, a shard at a time: keys, passages, and their vectors in float32."""
        for number, shard in self._shards.items():
            found = self._table.execute(
                f"SELECT {COLUMNS}, p.row FROM {JOINED} WHERE p.shard = ? ORDER BY p.row", (number,)
            ).fetchall()
            whole = list(shard.vectors(0, len(shard)))
            vectors = Ragged.from_list([whole[columns[-1]].float() for columns in found])
            yield [columns[0] for columns in found], [_passage(columns) for columns in found], vectors

    def _keys_of(self, by: str, path: str | None, where: Mapping[str, str] | None) -> list[np.ndarray]:
        return [self._keys(number, by, path, tuple((where or {}).items())) for number in self._shards]

    def _best(self, queries: Ragged, keys: Sequence[np.ndarray], top_k: int) -> list[_Best]:
        best = [_Best(top_k) for _ in range(len(queries))]
        for shard, keys_N3 in zip(self._shards.values(), keys, strict=True):
            if len(keys_N3):
                scores_BN = _scores(queries, shard)[:, keys_N3[:, 2]]
                for found, scores_N in zip(best, scores_BN, strict=True):
                    found.add(scores_N, keys_N3)
        return best

    def _likely(self, queries: Ragged, keys: Sequence[np.ndarray], top_k: int) -> list[_Best]:
        """As `_best`, of the passages that the pre-filter gives."""
        if self._centroids is None:
            raise ValueError(f"{self.folder} has no pre-filter; modernbert index ... --prefilter gives it one")
        if self._prefilter is None:
            self._prefilter = Prefilter(self.folder, self._table, self._centroids, self._shards)
        alive, dense = [], []
        for shard, keys_N3 in zip(self._shards.values(), keys, strict=True):
            dense.append(np.full((len(shard), 3), -1))
            dense[-1][keys_N3[:, 2]] = keys_N3
            alive.append(torch.from_numpy(dense[-1][:, 0] >= 0))
        every = np.concatenate(dense) if dense else np.empty((0, 3))
        best = [_Best(top_k) for _ in range(len(queries))]
        for number, positions in enumerate(self._prefilter.candidates(queries, top_k, alive) if dense else ()):
            for part in positions.split(PASSAGES):
                scores_N = maxsim(queries[number : number + 1], self._prefilter.vectors(part))[0]
                best[number].add(scores_N.numpy(), every[part.numpy()])
        return best

    def _id(self, document: int) -> str:
        return self._table.execute("SELECT id FROM documents WHERE number = ?", (document,)).fetchone()[0]

    def _select(self, number: int, by: str, path: str | None, where: tuple[tuple[str, str], ...]) -> np.ndarray:
        """`[N, 3]`: of the passages of a shard that are searched, what they count as, the shard, and their row."""
        condition = "p.shard = ?"
        values: list[int | str] = [number]
        if path is not None:
            condition += " AND d.path GLOB ?"
            values.append(_pattern(path))
        for field, value in where:
            condition += f" AND EXISTS ({FIELD})"
            values += [field, value, value]
        owner = "p.document" if by == "document" else "p.number"
        found = self._table.execute(
            f"SELECT {owner}, p.shard, p.row FROM {JOINED} WHERE {condition} ORDER BY p.row", values
        )
        return np.array(found.fetchall(), dtype=np.int64).reshape(-1, 3)

    def _hits(self, best: _Best) -> list[Hit]:
        hits = []
        for rank, (score, (_, shard, row)) in enumerate(
            zip(best.scores.tolist(), best.keys.tolist(), strict=True), start=1
        ):
            number, passage = self._passage("p.shard = ? AND p.row = ?", shard, row)
            hits.append(Hit(rank, score, passage, number))
        return hits

    def _passage(self, condition: str, *values: int) -> tuple[int, Passage]:
        found = self._table.execute(f"SELECT {COLUMNS} FROM {JOINED} WHERE {condition}", values).fetchone()
        if found is None:
            raise KeyError(f"the store {self.folder} has no passage {values}")
        return found[0], _passage(found)


class _Best:
    """The best passages of one query so far: `scores` `[k]`, best first, and their `keys` `[k, 3]`."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self.scores, self.keys = np.empty(0, dtype=np.float32), np.empty((0, 3), dtype=np.int64)

    def add(self, scores_N: np.ndarray, keys_N3: np.ndarray) -> None:
        # What is no better than the last of a full list comes too late: it stands behind it.
        floor = self.scores[-1] if len(self.scores) == self._top_k else -np.inf
        better = scores_N > floor
        scores, keys = np.r_[self.scores, scores_N[better]], np.r_[self.keys, keys_N3[better]]
        order = np.argsort(-scores, kind="stable")
        first = np.unique(keys[order, 0], return_index=True)[1]  # a document with several passages counts once
        order = order[np.sort(first)[: self._top_k]]
        self.scores, self.keys = scores[order], keys[order]


def _scores(queries: Ragged, shard: Shard) -> np.ndarray:
    """`[B, N]` float32: every query with every passage of a shard."""
    scores_BN = np.empty((len(queries), len(shard)), dtype=np.float32)
    first = 0
    while first < len(shard):
        budget = shard.offsets[first] + TOKENS
        last = max(first + 1, int(torch.searchsorted(shard.offsets, budget, right=True)) - 1)
        vectors = shard.vectors(first, last)
        for start in range(0, len(queries), QUERIES):
            scores_BN[start : start + QUERIES, first:last] = maxsim(queries[start : start + QUERIES], vectors)
        first = last
    return scores_BN


def _pattern(path: str) -> str:
    """As people write it: a relative path ends the path of a document."""
    return path if os.path.isabs(path) else f"*/{path}"


def _passage(columns: Sequence[Any]) -> Passage:
    *fields, metadata = columns[1:9]
    return Passage(*fields, metadata=json.loads(metadata))
