"""Mining with an encoder: an `Embedder` by dot products, or a `ColBERT` by MaxSim."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import replacing
from ..late_interaction import Ragged, maxsim, token_blocks
from ..retrieval.store.prefilter import InvertedLists, build_lists, select, shortlist, train_centroids
from .dense import one_row_each
from .mining import Candidates, parts_of
from .passages import PassageFile

SHARD = 8_192
"""Passages of a file of vectors."""

QUERIES, TOKENS = 256, 1 << 17
"""Queries, and rows of passages, that are scored together."""


class Encoder(Protocol):
    """A `ColBERT` or an `Embedder`."""

    @property
    def device(self) -> torch.device: ...
    def encode_queries(self, texts: Iterable[str], *, progress: bool | None = None) -> Ragged | Tensor: ...
    def encode_documents(self, texts: Iterable[str], *, progress: bool | None = None) -> Ragged | Tensor: ...


class Vectors:
    """A source of candidates by the vectors of an encoder, exact unless `candidates` is given.

    Vectors are kept on the disk in float16, a shard at a time; a run that was stopped goes on with the next shard.

    Args:
        folder: an existing folder, of these passages and this encoder alone.
        candidates: passages of each query that MaxSim scores, found by the pre-filter of a store. 0: all. Exact
            MaxSim of a million passages takes some seconds for each query and core, so many pairs need the pre-filter.

    Raises:
        ValueError: `candidates` with an `Embedder`, whose dot products need none.
    """

    def __init__(self, encoder: Encoder, passages: PassageFile, folder: Path, *, candidates: int = 0) -> None:
        self._encoder, self._candidates = encoder, candidates
        self._shards = [_shard(encoder, passages, folder, *part) for part in parts_of(len(passages), SHARD)]
        self._lists: list[InvertedLists] = []
        if candidates:
            if all(len(shard) == len(shard.values) for shard in self._shards):
                raise ValueError("candidates are for MaxSim: an Embedder has one vector for a text, and scores all")
            self._centroids = train_centroids(self._shards)
            self._lists = [build_lists(shard, self._centroids) for shard in self._shards]

    def search(self, rows: np.ndarray, queries: Sequence[str], positives: np.ndarray, depth: int) -> Candidates:
        found = [
            self._search(queries[start:stop], torch.from_numpy(positives[start:stop]), depth)
            for _, start, stop in parts_of(len(queries), QUERIES)
        ]
        return Candidates(*map(np.concatenate, zip(*found, strict=True)))

    @torch.no_grad()
    def _search(self, queries: Sequence[str], positive_B: Tensor, depth: int) -> Candidates:
        asked = _ragged(self._encoder.encode_queries(queries, progress=False))
        asked = asked if self._candidates else asked.to(self._encoder.device)
        likely = self._likely(asked, depth) if self._candidates else self._best(asked, depth)
        # A query is scored with its own positive only.
        different, place_B = positive_B.unique(return_inverse=True)
        answers = select(self._shards, different)
        matrices = Ragged(answers.values.float(), answers.offsets).to(asked.values.device)
        own = maxsim(asked, Ragged.from_list([matrices[place] for place in place_B.tolist()]), paired=True)
        numbers_BK, scores_BK = (
            F.pad(x, (0, depth - x.shape[1]), value=v) for x, v in zip(likely, (-1, -torch.inf), strict=True)
        )
        return Candidates(numbers_BK.numpy(), scores_BK.numpy(), own.cpu().numpy())

    def _best(self, asked: Ragged, depth: int) -> tuple[Tensor, Tensor]:
        """The numbers and scores of the best of all passages."""
        numbers_BK = torch.zeros(len(asked), 0, dtype=torch.int64, device="cpu")
        scores_BK = torch.zeros(len(asked), 0, device="cpu")
        starts = accumulate((len(shard) for shard in self._shards), initial=0)
        for start, shard in zip(starts, self._shards, strict=False):
            for first, last in token_blocks(shard.offsets, TOKENS):
                block = shard[first:last].to(asked.values.device)
                scores = _scores(asked, Ragged(block.values.float(), block.offsets))
                best, index = (x.cpu() for x in scores.topk(min(depth, scores.shape[1]), dim=1))
                both = torch.cat([scores_BK, best], 1), torch.cat([numbers_BK, index + start + first], 1)
                scores_BK, order = both[0].sort(dim=1, descending=True, stable=True)
                scores_BK, numbers_BK = scores_BK[:, :depth], both[1].gather(1, order[:, :depth])
        return numbers_BK, scores_BK

    def _likely(self, asked: Ragged, depth: int) -> tuple[Tensor, Tensor]:
        """The same among the candidates of the pre-filter."""
        count = max(depth, self._candidates)
        found = []
        for query, positions in enumerate(shortlist(asked, self._centroids, self._lists, candidates=count)):
            rows = select(self._shards, positions)
            scores, order = maxsim(asked[query : query + 1], Ragged(rows.values.float(), rows.offsets))[0].sort(
                descending=True, stable=True
            )
            found.append((positions[order[:depth]], scores[:depth]))
        return torch.stack([numbers for numbers, _ in found]), torch.stack([scores for _, scores in found])


def _scores(queries: Ragged, documents: Ragged) -> Tensor:
    """`[B, N]`; with one vector for each text, MaxSim is a dot product."""
    if len(queries) == len(queries.values) and len(documents) == len(documents.values):
        return queries.values @ documents.values.T
    return maxsim(queries, documents)


def _ragged(vectors: Ragged | Tensor) -> Ragged:
    return vectors if isinstance(vectors, Ragged) else one_row_each(vectors)


def _shard(encoder: Encoder, passages: PassageFile, folder: Path, number: int, start: int, stop: int) -> Ragged:
    """The vectors of a part of the passages, mapped into memory; written first if they are not there."""
    lengths, vectors = folder / f"lengths-{number:06d}.npy", folder / f"vectors-{number:06d}.npy"
    if not vectors.exists():
        encoded = _ragged(encoder.encode_documents(passages.select(range(start, stop)), progress=False))
        if not bool(encoded.values.isfinite().all()):
            raise ValueError("a vector of a passage is not finite, and would pass any filter: use another model")
        # The lengths first: a shard whose vectors are there is whole.
        arrays = {lengths: encoded.offsets.diff().numpy(), vectors: encoded.values.half().numpy()}
        for file, array in arrays.items():
            with replacing(file) as beside, beside.open("wb") as part:
                np.save(part, array)
        print(f"encoded {stop:,} of {len(passages):,} passages", flush=True)
    offsets = F.pad(torch.from_numpy(np.load(lengths)).cumsum(0), (1, 0))
    # "c" instead of "r": PyTorch warns of memory that cannot be written to.
    return Ragged(torch.from_numpy(np.load(vectors, mmap_mode="c")), offsets)
