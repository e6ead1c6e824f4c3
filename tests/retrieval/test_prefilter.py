"""The pre-filter against its definition, in float64 and token by token, and its recall against exact search."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert import maxsim
from modernbert.late_interaction import Ragged
from modernbert.retrieval.store import kmeans, prefilter
from modernbert.retrieval.store.prefilter import (
    InvertedLists,
    build_lists,
    num_centroids,
    select,
    shortlist,
    train_centroids,
)

WIDTH = 16


def topical(lengths: list[int], topics: int = 40, *, seed: int = 0) -> Ragged:
    """Passages of tokens around a few of `topics` directions; every passage has its own mixture."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(topics, WIDTH, generator=torch.Generator().manual_seed(99))
    passages = []
    for length in lengths:
        own = torch.randint(topics, (4,), generator=generator)
        about = directions[own[torch.randint(4, (length,), generator=generator)]]
        passages.append(F.normalize(about + 0.6 * torch.randn(length, WIDTH, generator=generator), dim=1))
    return Ragged.from_list(passages)


def shards_of(vectors: Ragged, sizes: list[int]) -> list[Ragged]:
    return [vectors[start:stop] for start, stop in pairwise(accumulate(sizes, initial=0))]


LENGTHS = [3, 0, 7, 1, 12, 5, 0, 9, 2, 6] * 6
SIZES = [20, 0, 1, 39]


@pytest.fixture(scope="module")
def shards() -> list[Ragged]:
    return shards_of(topical(LENGTHS), SIZES)


@pytest.fixture(scope="module")
def centroids(shards: list[Ragged]) -> Ragged:
    """Fewer than a store of this size would train, so that passages share them."""
    whole = train_centroids(shards)
    return Ragged.from_list([cell[: max(1, len(cell) // 3)] for cell in whole])


@pytest.fixture(scope="module")
def lists(shards: list[Ragged], centroids: Ragged) -> list[InvertedLists]:
    return [build_lists(shard, centroids) for shard in shards]


@pytest.fixture
def queries() -> Ragged:
    return topical([4, 9, 1], seed=5)


@pytest.fixture(scope="module")
def nearest(shards: list[Ragged], centroids: Ragged) -> list[list[list[int]]]:
    """For each passage of each shard the centroid of every token: in float64, the nearest of the nearest cell."""
    centers = torch.stack([F.normalize(cell.double().sum(0), dim=0) for cell in centroids])

    def one(token: Tensor) -> int:
        cell = int((centers @ token.double()).argmax())
        return int(centroids.offsets[cell]) + int((centroids[cell].double() @ token.double()).argmax())

    return [[[one(token) for token in passage] for passage in shard] for shard in shards]


def test_lists_name_the_passages_of_each_centroid(
    nearest: list[list[list[int]]], centroids: Ragged, lists: list[InvertedLists]
) -> None:
    assert len(centroids) > 10
    for passages, found in zip(nearest, lists, strict=True):
        wanted = [set[int]() for _ in range(len(centroids.values))]
        for number, near in enumerate(passages):
            for centroid in near:
                wanted[centroid].add(number)
        parts = found.passages.split(found.offsets.diff().tolist())
        assert [part.tolist() for part in parts] == [sorted(passages) for passages in wanted]
        assert found.num_passages == len(passages)


def rough_scores(query: Tensor, nearest: list[list[list[int]]], centroids: Ragged, nprobe: int) -> Tensor:
    """The definition: the similarity of a query token to the best centroid of a passage, or to the last one probed."""
    similarity = query.double() @ centroids.values.double().T
    floor = similarity.topk(min(nprobe, len(centroids.values)), dim=1).values[:, -1]
    passages = [near for shard in nearest for near in shard]
    return torch.stack([similarity[:, near].amax(1).maximum(floor).sum() if near else floor.sum() for near in passages])


@pytest.mark.parametrize("nprobe", [1, 5, 10_000])
@pytest.mark.parametrize("candidates", [1, 7, 60])
def test_the_candidates_are_the_best_by_centroids(
    nearest: list[list[list[int]]],
    centroids: Ragged,
    lists: list[InvertedLists],
    queries: Ragged,
    nprobe: int,
    candidates: int,
) -> None:
    found = shortlist(queries, centroids, lists, candidates=candidates, nprobe=nprobe)
    for query, positions in zip(queries, found, strict=True):
        scores = rough_scores(query, nearest, centroids, nprobe)
        assert positions.tolist() == sorted(set(positions.tolist()))
        assert len(positions) == candidates
        # Passages with equal scores are interchangeable, so scores are compared instead of passages.
        torch.testing.assert_close(scores[positions].sort(descending=True).values, scores.topk(candidates).values)


def test_with_all_candidates_the_ranking_is_exact(
    shards: list[Ragged], centroids: Ragged, lists: list[InvertedLists], queries: Ragged
) -> None:
    whole = Ragged.from_list([passage for shard in shards for passage in shard])
    for number, positions in enumerate(shortlist(queries, centroids, lists, candidates=1000, nprobe=10_000)):
        query = queries[number : number + 1]
        got = maxsim(query, select(shards, positions), top_k=10)
        wanted = maxsim(query, whole, top_k=10)
        assert positions[got[1]].tolist() == wanted[1].tolist()
        torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=0)


def test_only_allowed_passages_are_candidates(
    nearest: list[list[list[int]]], centroids: Ragged, lists: list[InvertedLists], queries: Ragged
) -> None:
    allowed = [torch.rand(size) < 0.3 for size in SIZES]
    living = torch.cat(allowed).nonzero().flatten()
    for positions in shortlist(queries, centroids, lists, candidates=1000, allowed=allowed):
        assert positions.tolist() == living.tolist()
    everywhere = shortlist(queries, centroids, lists, candidates=7)
    living_too = shortlist(queries, centroids, lists, candidates=7, allowed=[torch.ones_like(one) for one in allowed])
    assert [one.tolist() for one in everywhere] == [one.tolist() for one in living_too]
    # An allowed passage is found even if it is the worst of all.
    for query, rough in zip(queries, shortlist(queries, centroids, lists, candidates=1), strict=True):
        worst = int(rough_scores(query, nearest, centroids, 5).argmin())
        only = (torch.arange(sum(SIZES)) == worst).split(SIZES)
        (found,) = shortlist(Ragged.from_list([query]), centroids, lists, candidates=1, nprobe=5, allowed=only)
        assert found.tolist() == [worst] != rough.tolist()
    nothing = [torch.zeros_like(one) for one in allowed]
    assert [len(found) for found in shortlist(queries, centroids, lists, allowed=nothing)] == [0, 0, 0]


def test_select_copies_passages_of_all_shards(shards: list[Ragged]) -> None:
    passages = [passage for shard in shards for passage in shard]
    for positions in ([], [1], [59], [0, 19, 20, 21, 58, 59], list(range(60))):
        got = select(shards, torch.tensor(positions, dtype=torch.int64))
        wanted = Ragged.from_list([torch.zeros(0, WIDTH), *(passages[position] for position in positions)])
        assert got.offsets.tolist() == wanted.offsets[1:].tolist()
        assert torch.equal(got.values, wanted.values)


def test_centroids_depend_on_vectors_and_seed_alone(shards: list[Ragged]) -> None:
    first = train_centroids(shards)
    torch.manual_seed(1234)
    again = train_centroids(shards_of(Ragged.from_list([x for shard in shards for x in shard]), [5, 30, 25]))
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.offsets, again.offsets)
    assert not torch.equal(first.values, train_centroids(shards, seed=1).values)
    torch.testing.assert_close(first.values.norm(dim=1), torch.ones(len(first.values)))


def test_stored_dtypes_give_the_same_lists(shards: list[Ragged], centroids: Ragged) -> None:
    """int8 is the vector times about 300, and nothing has to be multiplied back."""
    vectors = shards[-1]
    eighths = (vectors.values * 127 / vectors.values.abs().max()).round()
    float_lists = build_lists(Ragged(eighths, vectors.offsets), centroids)
    for dtype in (torch.int8, torch.float16):
        stored = build_lists(Ragged(eighths.to(dtype), vectors.offsets), centroids)
        assert torch.equal(stored.passages, float_lists.passages)
        assert torch.equal(stored.offsets, float_lists.offsets)


@pytest.fixture(scope="module")
def corpus() -> list[Ragged]:
    lengths = torch.randint(20, 60, (2000,), generator=torch.Generator().manual_seed(3)).tolist()
    return shards_of(topical(lengths, topics=300), [1000, 700, 300])


def test_k_means_finds_centroids_that_stand_for_tokens(corpus: list[Ragged], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearer to the tokens than the same number of random tokens."""
    monkeypatch.setattr(prefilter, "num_centroids", lambda tokens: 600)
    found = train_centroids(corpus)
    assert len(found.values) == pytest.approx(600, rel=0.05)
    tokens = torch.cat([shard.values for shard in corpus])
    drawn = tokens[torch.randperm(len(tokens))[: len(found.values)]]
    others = topical([2000], topics=300, seed=8).values
    error, by_chance = (float(1 - (others @ centers.T).amax(1).mean()) for centers in (found.values, drawn))
    assert error < 0.8 * by_chance


def test_recall_on_topical_passages(corpus: list[Ragged]) -> None:
    """A tenth of the corpus holds nearly all of the ten best, a fortieth most of them; one centroid is too few."""
    queries = topical([12] * 20, topics=300, seed=77)
    whole = Ragged.from_list([passage for shard in corpus for passage in shard])
    best = maxsim(queries, whole, top_k=10)[1]
    centroids = train_centroids(corpus)
    assert len(centroids.values) == pytest.approx(num_centroids(len(whole.values)), rel=0.02)
    lists = [build_lists(shard, centroids) for shard in corpus]

    def recall(candidates: int, nprobe: int) -> float:
        found = shortlist(queries, centroids, lists, candidates=candidates, nprobe=nprobe)
        return float(np.mean([np.isin(top, positions).mean() for top, positions in zip(best, found, strict=True)]))

    assert recall(200, 128) >= 0.97
    assert recall(50, 128) >= 0.8
    assert recall(200, 1) < 0.5


def test_the_number_of_centroids_grows_with_the_root() -> None:
    assert [num_centroids(tokens) for tokens in (0, 1, 1024, 4096)] == [0, 1, 1024, 2048]
    assert num_centroids(4_000_000) == 2 * num_centroids(1_000_000) == 64_000


@pytest.mark.parametrize("lengths", [[1], [2, 0], [1] * 5, [0, 0, 40]])
def test_tiny_stores(lengths: list[int], queries: Ragged) -> None:
    vectors = topical(lengths)
    centroids = train_centroids([vectors])
    assert 1 <= len(centroids.values) <= sum(lengths)
    for positions in shortlist(queries, centroids, [build_lists(vectors, centroids)]):
        assert positions.tolist() == list(range(len(lengths)))


def test_nothing_at_all(centroids: Ragged, lists: list[InvertedLists], queries: Ragged) -> None:
    with pytest.raises(ValueError, match="2 passages without a single token"):
        train_centroids([topical([0, 0]), topical([])])
    with pytest.raises(ValueError, match="0 passages"):
        train_centroids([])
    assert [len(found) for found in shortlist(queries, centroids, [])] == [0, 0, 0]
    assert shortlist(queries[:0], centroids, lists) == []
    no_words = Ragged(torch.zeros(0, WIDTH), torch.zeros(2, dtype=torch.int64))
    assert [len(found) for found in shortlist(no_words, centroids, lists, candidates=9)] == [9]


def test_a_shard_of_many_passages(centroids: Ragged) -> None:
    """More passages than 16 bits can count."""
    vectors = Ragged(topical([40_000]).values, torch.arange(40_001))
    found = build_lists(vectors, centroids)
    assert found.passages.sort().values.tolist() == list(range(40_000))
    assert build_lists(vectors[: 1 << 15], centroids).passages.sort().values.tolist() == list(range(1 << 15))


@pytest.mark.parametrize("similarities", [1, 100, 3000])
def test_blocks_change_nothing(
    shards: list[Ragged], centroids: Ragged, similarities: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_lists(shards[0], centroids)
    monkeypatch.setattr(kmeans, "SIMILARITIES", similarities)
    parts = build_lists(shards[0], centroids)
    assert torch.equal(whole.offsets, parts.offsets)
    assert torch.equal(whole.passages, parts.passages)
