from itertools import islice

import numpy as np
import pytest

from modernbert.train.sampling import Sampler, endless, part_of

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, 60, 500)
SOURCES = RNG.integers(0, 3, 500)
KINDS = {
    "tokens": {"max_tokens": 200},
    "rows": {"max_rows": 7},
    "both": {"max_tokens": 200, "max_rows": 4},
    "one source": {"max_tokens": 200, "sources": SOURCES},
}


def take(sampler, n, first=0):
    return list(islice(sampler(first), n))


def equal(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_every_row_once_within_the_limits(kind):
    options = KINDS[kind]
    batches = Sampler(LENGTHS, **options).plan(1)
    assert sorted(np.concatenate(batches)) == list(range(500))
    for batch in batches:
        assert LENGTHS[batch].sum() <= options.get("max_tokens", 10**9)
        assert len(batch) <= options.get("max_rows", 10**9)
    if kind == "tokens":  # but for the last batch, the next row would not fit
        assert min(LENGTHS[batch].sum() for batch in batches[:-1]) > 200 - 60


def test_one_source_a_batch_or_mixed():
    assert all(len(set(SOURCES[batch])) == 1 for batch in Sampler(LENGTHS, **KINDS["one source"]).plan(1))
    mixed = Sampler(LENGTHS, **KINDS["tokens"]).plan(1)
    assert np.mean([len(set(SOURCES[batch])) for batch in mixed]) > 2
    order = [SOURCES[batch[0]] for batch in Sampler(LENGTHS, **KINDS["one source"]).plan(1)]
    assert order != sorted(order)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_goes_on_at_the_exact_batch(kind, world_size):
    """At any place: within the first epoch, at its end, and in a later one."""
    sampler = Sampler(LENGTHS, **KINDS[kind], rank=world_size - 1, world_size=world_size)
    per_epoch = len(sampler.plan(1))
    whole = take(sampler, 3 * per_epoch)
    for first in (1, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch + 3):
        assert equal(take(sampler, 3 * per_epoch - first, first), whole[first:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_parts_of_all_ranks_are_the_batch_of_one_rank_with_larger_limits(kind, world_size):
    limits = {name: value * world_size for name, value in KINDS[kind].items() if name != "sources"}
    alone = Sampler(LENGTHS, **{**KINDS[kind], **limits})
    ranks = [Sampler(LENGTHS, **KINDS[kind], rank=rank, world_size=world_size) for rank in range(world_size)]
    wanted = [batch for batch in take(alone, 60) if len(batch) >= world_size][:50]
    parts = [take(rank, 50) for rank in ranks]
    assert equal([np.concatenate(batch) for batch in zip(*parts, strict=True)], wanted)
    sizes = np.array([[LENGTHS[part].sum() for part in rank] for rank in parts])
    assert sizes.min() > 0
    # A part differs from an equal share by less than the longest row.
    assert np.abs(sizes - sizes.mean(0)).max() < 60


def test_every_rank_gets_a_row_of_the_most_unequal_batch():
    lengths = np.array([1, 1, 1000])
    parts = [part_of(np.array([2, 0, 1]), lengths, rank, 3).tolist() for rank in range(3)]
    assert parts == [[2], [0], [1]]
    assert [part_of(np.array([2, 0, 1]), lengths, rank, 2).tolist() for rank in range(2)] == [[2], [0, 1]]


def test_a_batch_with_fewer_rows_than_ranks_is_left_out():
    plan = lambda epoch: [np.array([0, 1]), np.array([2]), np.array([3, 4])]  # noqa: E731
    got = [list(islice(endless(plan, np.ones(5, int), rank=rank, world_size=2), 3)) for rank in range(2)]
    assert [[part.tolist() for part in rank] for rank in got] == [[[0], [3], [0]], [[1], [4], [1]]]
    with pytest.raises(ValueError, match="no batch has a row for each of 3 ranks"):
        next(endless(plan, np.ones(5, int), rank=0, world_size=3))


def test_seeds_and_epochs_differ():
    plans = [Sampler(LENGTHS, max_rows=500, seed=seed).plan(epoch)[0] for seed in (0, 1) for epoch in (1, 2)]
    assert len({tuple(plan) for plan in plans}) == 4
    again = Sampler(LENGTHS, max_rows=500, seed=1).plan(2)[0]
    assert np.array_equal(again, plans[3])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "give max_tokens, max_rows, or both"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"max_tokens": 30}, r"row \d+ has 59 tokens, max_tokens is 30"),
        ({"max_rows": 3, "sources": SOURCES[1:]}, "sources has shape"),
    ],
)
def test_impossible_settings_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sampler(LENGTHS, **options)


@pytest.mark.parametrize(("options", "sentence"), [({"rank": 2, "world_size": 2}, "rank is 2"), ({"rank": -1}, "rank")])
def test_a_rank_that_does_not_exist_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        next(Sampler(LENGTHS, max_rows=2, **options)())
    with pytest.raises(ValueError, match="first is -1"):
        next(Sampler(LENGTHS, max_rows=2)(-1))


@pytest.mark.parametrize(("length", "rows"), [(4, 2), (8, 1), (2, 4)])
def test_a_batch_is_filled_to_its_last_token(length, rows):
    for world_size in (1, 2):
        sampler = Sampler(np.full(16, length), max_tokens=8, world_size=world_size)
        assert [len(batch) for batch in sampler.plan(1)] == [rows * world_size] * (16 // rows // world_size)
