"""Hard negatives: passages that a ranker finds for a query, and that are not likely to answer it.

`mine` asks some sources (`mining_bm25`, `mining_vectors`, `Random`) for candidates of each pair, leaves out what may be
a positive, and writes rows that `examples.read_triples` reads. Passages and vectors are on a disk, and the rows are
read a part at a time: memory holds some numbers for each pair and passage, and one part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from ..files import replacing
from .examples import Pair
from .passages import PassageFile, as_array, passage_key, write_passages
from .ragged import chunks
from .teacher_folder import text_key

ROWS = 2_048
"""Pairs that are mined together: what a run that was killed does again."""


class Candidates(NamedTuple):
    """What a source finds for B queries.

    Attributes:
        numbers_BK: int64, passages, the best first; -1: there are no more. A passage is there once.
        scores_BK: float32. NaN: the source does not score.
        positive_B: float32, the score of the positive of each query.
    """

    numbers_BK: np.ndarray
    scores_BK: np.ndarray
    positive_B: np.ndarray


class Source(Protocol):
    """A ranker of the passages."""

    def search(self, rows: np.ndarray, queries: Sequence[str], positives: np.ndarray, depth: int) -> Candidates:
        """The `depth` best passages of each query: the same ones for the same arguments.

        Args:
            rows: int64 [B], the numbers of the pairs. positives: int64 [B], the passages that are their positives.
        """
        ...


@dataclass(frozen=True)
class Random:
    """Any passages, drawn by the seed and the number of the pair; their scores are NaN."""

    passages: int
    seed: int = 0

    def search(self, rows: np.ndarray, queries: Sequence[str], positives: np.ndarray, depth: int) -> Candidates:
        numbers_BK = np.full((len(rows), depth), -1)
        for place, row in enumerate(rows.tolist()):
            draw = np.random.default_rng((self.seed, row))
            found = (
                draw.permutation(self.passages)
                if self.passages < 4 * depth
                else draw.integers(self.passages, size=2 * depth)
            )
            different = list(dict.fromkeys(found.tolist()))[:depth]
            numbers_BK[place, : len(different)] = different
        return Candidates(numbers_BK, np.full(numbers_BK.shape, np.nan, np.float32), np.zeros(len(rows), np.float32))


@dataclass(frozen=True)
class Filter:
    """Which candidates may be negatives, by their score and that of the positive.

    Attributes:
        share: a negative scores less than this share of the positive (NV-Retriever, arXiv 2407.15831: 0.95). For a
            positive below 0, less than `positive - (1 - share) * |positive|`. None: it may score anything.
        margin: a negative scores at least this much less than the positive. None: it may score anything.
        eligible: a pair is left out if a source that scores finds fewer negatives than this (LateOn: 50, with 0.99).
    """

    share: float | None = 0.95
    margin: float | None = None
    eligible: int = 0

    def passes(self, found: Candidates) -> np.ndarray:
        """bool [B, K]. NaN passes, -1 does not."""
        positive_B1, passes_BK = found.positive_B[:, None], found.numbers_BK >= 0
        limits = []
        if self.share is not None:
            limits.append(found.scores_BK < positive_B1 - (1 - self.share) * np.abs(positive_B1))
        if self.margin is not None:
            limits.append(found.scores_BK <= positive_B1 - self.margin)
        for limit in limits:
            passes_BK &= limit | np.isnan(found.scores_BK)
        return passes_BK


class Positives:
    """Which passages are positives of which pairs. All pairs are read once, and three numbers of each are kept.

    Attributes:
        passages: int64 [N], the positive of each pair.
    """

    def __init__(self, pairs: Iterable[Pair], passages: PassageFile) -> None:
        keys_3N = as_array(key for pair in pairs for key in _keys(pair)).reshape(-1, 3).T.copy()
        positives, self._queries, self._groups = keys_3N
        self.passages = passages.find_keys(positives)
        self._by_query = np.argsort(self._queries, kind="stable")
        self._by_group = np.argsort(self._groups, kind="stable")

    def of_query(self, row: int) -> set[int]:
        """The positives of all pairs that have the query of this one, and of all pairs in the groups of these."""
        rows = _equal(self._queries, self._by_query, self._queries[row])
        groups = np.unique(self._groups[rows])
        others = [_equal(self._groups, self._by_group, group) for group in groups]
        return set(self.passages[np.concatenate([rows, *others])].tolist())


def _equal(values: np.ndarray, order: np.ndarray, value: np.uint64) -> np.ndarray:
    """The rows with this value; `order` sorts the values."""
    first, last = (np.searchsorted(values, value, side=side, sorter=order) for side in ("left", "right"))
    return order[first:last]


def _keys(pair: Pair) -> tuple[int, int, int]:
    """Of the positive, of the query, and of the group."""
    return passage_key(pair.positive), passage_key(pair.query), text_key(repr((pair.source, pair.group)))


def mine(
    pairs: Iterable[Pair],
    folder: Path,
    sources: Callable[[PassageFile], Sequence[tuple[Source, float]]],
    *,
    negatives: int,
    depth: int = 200,
    filter: Filter = Filter(),
    more: Iterable[str] = (),
) -> int:
    """Write the pairs with their negatives to `folder/rows/000000.jsonl` and so on; the number of pairs written.

    A run that was stopped goes on where it was when it is called again, and writes the same bytes. Left out as a
    negative is a text that equals, but for case and white space, the query, its positive, or another positive of the
    same query or group. A pair without enough negatives is left out.

    Args:
        pairs: as `data.choose_pairs` gives them: each iteration gives the same ones.
        folder: an existing folder of this run, for the passages too.
        sources: made of the passages, each with its share of the negatives of a pair. Where one has too few, the
            others fill up, the first one first.
        negatives: of each pair, the hardest ones that pass the filter.
        depth: candidates of each source.
        more: further passages, besides the positives of all pairs; can be iterated twice.

    Raises:
        ValueError: no pair is left, or there are none.
    """
    passages = write_passages(lambda: chain((pair.positive for pair in pairs), more), folder)
    if negatives >= len(passages):
        raise ValueError(
            f"{negatives} negatives of each pair are more than {len(passages):,} passages offer: ask for fewer"
        )
    known = Positives(pairs, passages)
    output = folder / "rows"
    output.mkdir(exist_ok=True)
    files = {start: output / f"{number:06d}.jsonl" for number, start, _ in parts_of(len(known.passages), ROWS)}
    if not all(file.exists() for file in files.values()):
        rankers, shares = zip(*sources(passages), strict=True)
        quotas = quotas_of(shares, negatives)
        for (start, file), part in zip(files.items(), chunks(pairs, ROWS), strict=True):
            if not file.exists():
                pools = _pools(start, part, rankers, passages, known, depth, filter)
                with replacing(file) as beside, beside.open("w", encoding="utf-8") as lines:
                    for pair, of_pair in zip(part, pools, strict=True):
                        if len(chosen := choose(of_pair, quotas)) == negatives:
                            lines.write(_row(pair, passages.select(chosen)))
                print(f"mined {start + len(part):,} of {len(known.passages):,} pairs", flush=True)
    count = sum(1 for file in files.values() for _ in file.open("rb"))
    if not count:
        raise ValueError(
            f"none of {len(known.passages):,} pairs has {negatives} negatives: ask for fewer, add a source such as "
            "random, or loosen the filter"
        )
    return count


def _pools(
    start: int,
    pairs: Sequence[Pair],
    rankers: Sequence[Source],
    passages: PassageFile,
    known: Positives,
    depth: int,
    filter: Filter,
) -> Iterator[list[list[int]]]:
    """For each pair, from `start` on, what each ranker has to choose from; nothing if a scoring one has too little."""
    rows = np.arange(start, start + len(pairs))
    queries = [pair.query for pair in pairs]
    found = [ranker.search(rows, queries, known.passages[rows], depth) for ranker in rankers]
    passing = [filter.passes(each) for each in found]
    for place, same in enumerate(passages.find(queries).tolist()):
        excluded = known.of_query(start + place) | {same}
        pools = [
            [number for number in each.numbers_BK[place][passes_BK[place]].tolist() if number not in excluded]
            for each, passes_BK in zip(found, passing, strict=True)
        ]
        scoring = [not np.isnan(each.scores_BK[place]).all() for each in found]
        enough = all(len(pool) >= filter.eligible for pool, scores in zip(pools, scoring, strict=True) if scores)
        yield pools if enough else [[] for _ in pools]


def quotas_of(shares: Sequence[float], negatives: int) -> list[int]:
    """How many negatives each source gives: whole numbers, those with the largest remainders rounded up."""
    if not 0 < sum(shares) < math.inf or min(shares) < 0:
        raise ValueError(f"the shares of the sources must be finite, 0 or more and not all 0, got {list(shares)}")
    exact = np.array(shares) / sum(shares) * negatives
    quotas = np.floor(exact).astype(int)
    for place in np.argsort(quotas - exact, kind="stable")[: negatives - quotas.sum()]:
        quotas[place] += 1
    return quotas.tolist()


def choose(pools: Sequence[Sequence[int]], quotas: Sequence[int]) -> list[int]:
    """The first passages of each pool, up to its quota, none twice; then what is missing, from the first pool on."""
    chosen: dict[int, None] = {}
    for pool, quota in [*zip(pools, quotas, strict=True), *((pool, sum(quotas)) for pool in pools)]:
        wanted = min(sum(quotas), len(chosen) + quota)
        for passage in pool:
            if len(chosen) >= wanted:
                break
            chosen[passage] = None
    return list(chosen)


def _row(pair: Pair, negatives: Sequence[str]) -> str:
    fields = {"query": pair.query, "positive": pair.positive, "negatives": list(negatives)}
    return json.dumps({**fields, "source": pair.source, "group": pair.group}, ensure_ascii=False) + "\n"


def best_first(numbers: np.ndarray, scores: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The `depth` highest scores of one query with their passages; of equal ones those of lower number."""
    if len(scores) > depth:
        at_least = scores >= np.partition(scores, -depth)[-depth]
        numbers, scores = numbers[at_least], scores[at_least]
    order = np.lexsort((numbers, -scores))[:depth]
    return numbers[order], scores[order]


def parts_of(count: int, size: int) -> Iterator[tuple[int, int, int]]:
    """`number, start, stop` of each part of `size`."""
    for number, start in enumerate(range(0, count, size)):
        yield number, start, min(count, start + size)
