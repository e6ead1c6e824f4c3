"""Exact late-interaction search in a store on disk. Its vectors are streamed through a memory map."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch

from ...inference.encode import encode_tokens
from ...late_interaction import Ragged, maxsim
from ..explain import TokenMatch, match
from ..passages import Passage
from ..queries import EncodedQuery, check_run, check_search, encode_queries, query_vectors, tokenize
from .filters import PATH, Where, conditions, path_pattern
from .folder import check_name
from .format import read_manifest
from .identity import LoadedModel, ModelSource, load_model
from .opened import OpenFiles
from .prefilter import LARGE, Prefilter
from .ranking import TopK, score_shard
from .selection import Selection

RUN_QUERIES = 64
"""Queries of a run that are encoded and scored together."""

CANDIDATES_AT_ONCE = 256
"""Candidates of the pre-filter scored together: with more, every step would ask the system for new memory."""

COLUMNS = "p.number, d.path, d.id, p.title, p.text, p.start, p.stop, coalesce(d.line, p.line), d.metadata"
JOINED = "passages p JOIN documents d ON d.number = p.document"


@dataclass(frozen=True)
class Hit:
    """A passage that was found.

    Attributes:
        rank: from 1. score: its MaxSim with the query. passage_id: its key in the store.
        copies: the paths of other documents with the same content, the newest first; `passage` is from the newest one
            that was searched.
    """

    rank: int
    score: float
    passage: Passage
    passage_id: int
    copies: tuple[str, ...] = ()


class Store:
    """A store made by `index`, in the state in which it was opened.

    Attributes:
        session: encodes queries. colbert: its model.
        folder: of the store. model: the name of its model. fingerprint: of that model.
        dtype: of the vectors: as of `index`. dim: their width E. documents: how many there are.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: ModelSource | LoadedModel | None = None,
        *,
        engine: str | None = None,
    ) -> None:
        """Open the store in `folder` with its own model, or with `model`, which must be the same one.

        Args:
            engine: of the `Session` that encodes queries.

        Raises:
            FileNotFoundError: there is no store, a part is missing, or the store is unfinished; the message then has
                the command that finishes it.
            ValueError: the store is damaged, or has another version or another model.
        """
        self.folder = Path(folder)
        check_name(self.folder)
        manifest = read_manifest(self.folder)
        try:
            self._files = OpenFiles(self.folder, manifest)
        except FileNotFoundError:
            if read_manifest(self.folder) == manifest:
                raise
            manifest = read_manifest(self.folder)  # The store was updated in the meantime.
            self._files = OpenFiles(self.folder, manifest)
        self.dtype, self.dim, self.documents = manifest.dtype, manifest.width, manifest.documents
        self.model, self.fingerprint = manifest.model, manifest.fingerprint
        self._num_passages, self._centroids = manifest.passages, manifest.prefilter
        self._prefilter: Prefilter | None = None
        try:
            self.session = load_model(model, manifest.identity, engine).session
        except BaseException:
            self._files.close()
            raise
        self.colbert = self.session.model
        self._selection = Selection(self._files)

    def __len__(self) -> int:
        """The number of passages."""
        return self._num_passages

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the files. What needs them raises ValueError afterwards."""
        self._files.close()
        self._prefilter = None

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a Store cannot be pickled or copied: pass on the folder {self.folder}, and open it again")

    def encode(self, queries: Sequence[str]) -> list[EncodedQuery]:
        """Encode queries once, for `search` and `explain`."""
        self._files.check()
        return encode_queries(self.session, queries)

    def search(
        self,
        queries: Sequence[str | EncodedQuery],
        *,
        top_k: int = 10,
        by: Literal["passage", "document"] = "passage",
        path: str | None = None,
        where: Where | None = None,
        prefilter: bool = False,
    ) -> list[list[Hit]]:
        """For each query its `top_k` passages, best first; of equal scores the one that was indexed first.

        Of documents with the same content, only the one that was indexed last is searched, unless `path` asks for files
        by name; see `Hit.copies`.

        Args:
            queries: texts, or what `encode` made of them.
            by: "document" lists each document once, by its best passage.
            path: only documents whose path matches this shell pattern; `*` also matches `/`.
            where: only documents whose metadata has these fields and values, as in `{"lang": "en"}`. A value can be a
                text, a number, True, False, None for a missing field, a list of which one must match, or a dict of
                conditions, as in `{"year": {">=": 2020, "<": 2024}}`, with the keys `=`, `!=`, `>=`, `>`, `<=`, `<`.
                `{"author.name": "Ann"}` and `{"author": {"name": "Ann"}}` are about a field in an object, and a list
                in the metadata matches if one of its elements does. `store/filters.py` says what is equal.
            prefilter: score only likely passages, where this is faster (see `prefilter.LARGE`). It may miss some; the
                scores of those found are the same. Raises ValueError unless the store was made with `prefilter`.

        Raises:
            ValueError: an argument is not one of these, no document has a field of `where`, its values are of another
                type, or the store is closed.
            RuntimeError: the store was opened before a fork.
        """
        queries = check_search(queries, top_k)
        _check_filters(by, path)
        wanted = tuple(conditions(() if where is None else where))
        ids = self._selection.passages(by, path, wanted, copies=path is not None)
        vectors = query_vectors(self.session, queries)
        best = (self._likely if prefilter and self._is_likely_faster(ids) else self._best)(vectors, ids, top_k)
        return [self._hits(found) for found in best]

    def explain(self, query: str | EncodedQuery, hit: Hit) -> list[TokenMatch]:
        """For each token of `query` the most similar token of one of its hits; contributions sum to the score.

        Raises ValueError as `search`, KeyError for a hit of another store.
        """
        (query,) = check_search([query], 1)
        if not isinstance(hit, Hit):
            raise ValueError(f"hit is {hit!r:.80}; give one of the hits of a search")
        select = "SELECT shard, row FROM passages WHERE number = ?"
        found = self._files.table.execute(select, (hit.passage_id,)).fetchone()
        if found is None:
            raise KeyError(f"the store {self.folder} has no passage {hit.passage_id}: the hit is of another one")
        encoded = self.encode([query])[0] if isinstance(query, str) else query
        shard_number, row = found
        shard = self._files.shards[shard_number]
        rows = slice(int(shard.offsets[row]), int(shard.offsets[row + 1]))
        spans = [(start, stop) if stop else None for start, stop in shard.spans[rows].tolist()]
        return match(encoded.vectors, encoded.spans, shard.vectors(row, row + 1).values.float(), spans)

    def run(
        self, queries: Mapping[str, str], *, top_k: int = 100, path: str | None = None
    ) -> dict[str, dict[str, float]]:
        """For each query id its `top_k` documents, best first, as document id to score: a run for `evaluate`.

        A document scores as its best passage. `path` as in `search`. Raises ValueError if documents of several files
        share an id, or if an argument is not one of these.
        """
        check_run(queries, top_k)
        _check_filters("document", path)
        among, values = (f"WHERE {PATH}", [path_pattern(path)]) if path else ("", [])
        shared = self._files.table.execute(
            f"SELECT id FROM documents {among} GROUP BY id HAVING count(*) > 1", values
        ).fetchone()
        if shared:
            raise ValueError(
                f"the store holds several documents with the id {shared[0]!r}: a run could not tell them apart"
            )
        run: dict[str, dict[str, float]] = {}
        names, ids = list(queries), self._selection.passages("document", path, (), copies=True)
        tokens = tokenize(self.session, list(queries.values()), [f"query {name!r}" for name in names])
        for start in range(0, len(names), RUN_QUERIES):
            group = names[start : start + RUN_QUERIES]
            vectors = encode_tokens(self.session, tokens.select(range(start, start + len(group))))
            for name, found in zip(group, self._best(vectors, ids, top_k), strict=True):
                documents = map(self._document_id, found.ids_N3[:, 0].tolist())
                run[name] = dict(zip(documents, found.scores_N.tolist(), strict=True))
        return run

    def passages(self, passage_ids: Sequence[int]) -> list[Passage]:
        """The passages with these keys."""
        return [self._passage("p.number = ?", passage_id)[1] for passage_id in passage_ids]

    def origin(self, passage_id: int) -> tuple[str, int]:
        """The digest of the document of a passage, and how many passages it has."""
        select = """SELECT digest, (SELECT count(*) FROM passages WHERE document = documents.number) FROM documents
            WHERE number = (SELECT document FROM passages WHERE number = ?)"""
        return self._files.table.execute(select, (passage_id,)).fetchone()

    def document_ids(self) -> Iterator[str]:
        """The ids of all documents, in the order in which they were indexed."""
        yield from (name for (name,) in self._files.table.execute("SELECT id FROM documents ORDER BY number"))

    def batches(self) -> Iterator[tuple[list[int], list[Passage], Ragged]]:
        """Everything, a shard at a time: keys, passages, and their vectors in float32."""
        for number, shard in self._files.shards.items():
            found = self._files.table.execute(
                f"SELECT {COLUMNS}, p.row FROM {JOINED} WHERE p.shard = ? ORDER BY p.row", (number,)
            ).fetchall()
            matrices = list(shard.vectors(0, len(shard)))
            vectors = Ragged.from_list([matrices[columns[-1]].float() for columns in found])
            yield [columns[0] for columns in found], [_passage(columns) for columns in found], vectors

    def _best(self, queries: Ragged, ids: Sequence[np.ndarray], top_k: int) -> list[TopK]:
        best = [TopK(top_k) for _ in range(len(queries))]
        for shard, ids_N3 in zip(self._files.shards.values(), ids, strict=True):
            if len(ids_N3):
                scores_BN = score_shard(queries, shard)[:, ids_N3[:, 2]]
                for found, scores_N in zip(best, scores_BN, strict=True):
                    found.add(scores_N, ids_N3)
        return best

    def _is_likely_faster(self, ids: Sequence[np.ndarray]) -> bool:
        """The rule that chooses between `_likely` and `_best`, which reads every shard with an id."""
        if self._centroids is None:
            raise ValueError(f"{self.folder} has no pre-filter; modernbert index ... --prefilter gives it one")
        shards = zip(self._files.shards.values(), ids, strict=True)
        return sum(len(shard) for shard, ids_N3 in shards if len(ids_N3)) >= LARGE

    def _likely(self, queries: Ragged, ids: Sequence[np.ndarray], top_k: int) -> list[TopK]:
        """Like `_best`, among the candidates of the pre-filter."""
        if self._prefilter is None:
            assert self._centroids
            self._prefilter = Prefilter(self.folder, self._files.table, self._centroids, self._files.shards)
        allowed, by_row = [], [np.empty((0, 3), dtype=np.int64)]
        for shard, ids_N3 in zip(self._files.shards.values(), ids, strict=True):
            by_row.append(np.full((len(shard), 3), -1))
            by_row[-1][ids_N3[:, 2]] = ids_N3
            allowed.append(torch.from_numpy(by_row[-1][:, 0] >= 0))
        every_N3 = np.concatenate(by_row)
        best = [TopK(top_k) for _ in range(len(queries))]
        for number, positions in enumerate(self._prefilter.candidates(queries, top_k, allowed) if allowed else ()):
            for part in positions.split(CANDIDATES_AT_ONCE):
                scores_N = maxsim(queries[number : number + 1], self._prefilter.vectors(part))[0]
                best[number].add(scores_N.numpy(), every_N3[part.numpy()])
        return best

    def _hits(self, best: TopK) -> list[Hit]:
        hits = []
        for rank, (score, (_, shard, row)) in enumerate(
            zip(best.scores_N.tolist(), best.ids_N3.tolist(), strict=True), start=1
        ):
            passage_id, passage = self._passage("p.shard = ? AND p.row = ?", shard, row)
            hits.append(Hit(rank, score, passage, passage_id, self._selection.copies_of(passage_id)))
        return hits

    def _document_id(self, number: int) -> str:
        return self._files.table.execute("SELECT id FROM documents WHERE number = ?", (number,)).fetchone()[0]

    def _passage(self, condition: str, *values: int) -> tuple[int, Passage]:
        found = self._files.table.execute(f"SELECT {COLUMNS} FROM {JOINED} WHERE {condition}", values).fetchone()
        if found is None:
            raise KeyError(f"the store {self.folder} has no passage {values}")
        return found[0], _passage(found)


def _check_filters(by: str, path: str | None) -> None:
    """Raise ValueError for filters that would find nothing, or fail, because they are not of the right kind."""
    if by not in ("passage", "document"):
        raise ValueError(f"by is {by!r}; it can be 'passage' or 'document'")
    if path is not None and not isinstance(path, str):
        raise ValueError(f"path is {path!r}; give a shell pattern as a text")


def _passage(columns: Sequence[Any]) -> Passage:
    *fields, place, metadata = columns[1:9]
    return Passage(*fields, line=max(place, 0) or None, metadata=json.loads(metadata), page=max(-place, 0) or None)
