from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from modernbert.train.bins import BinSampler, best_fit

REAL = Path(__file__).parents[1] / "fixtures" / "lengths" / "documents.npy"


def cut(lengths, longest):
    """Documents to pieces of at most `longest` tokens, two of them special."""
    room = longest - 2
    whole = np.repeat(np.full(len(lengths), longest), lengths // room)
    return np.concatenate([whole, lengths[lengths % room > 0] % room + 2])


@pytest.mark.parametrize("capacity", [512, 1024, 8192])
def test_real_documents_fill_more_than_98_percent(capacity):
    """Wikipedia and technical documentation in ModernBERT's tokens, in pieces of the length of its phases."""
    bins = best_fit(cut(np.load(REAL).astype(np.int64), capacity), capacity)
    assert 0.98 < bins.fill <= 1


def slow_best_fit(lengths, capacity, seed):
    """By definition: look at every bin."""
    spaces, bin_of = [], {}
    for piece in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        fits = [i for i, space in enumerate(spaces) if space >= lengths[piece]]
        if not fits:
            spaces.append(capacity)
            fits = [len(spaces) - 1]
        best = min(fits, key=lambda i: spaces[i])
        spaces[best] -= lengths[piece]
        bin_of[piece] = best
    return sorted(spaces)


@pytest.mark.parametrize("n", [0, 1, 2, 300])
def test_each_piece_is_in_one_bin_with_the_best_fit(n):
    lengths = np.random.default_rng(n).integers(1, 65, n)
    bins = best_fit(lengths, 64, seed=3)
    assert sorted(bins.pieces) == list(range(n))
    spaces = [64 - lengths[bins[i]].sum() for i in range(len(bins))]
    assert sorted(spaces) == slow_best_fit(lengths, 64, 3)
    assert all(len(bins[i]) for i in range(len(bins)))
    assert bins.fill == (pytest.approx(lengths.sum() / (64 * len(bins))) if n else 1)


def test_a_piece_that_fits_no_bin_is_refused():
    with pytest.raises(ValueError, match="pieces have 1 to 65 tokens, but must have 1 to 64"):
        best_fit(np.array([1, 65]), 64)
    with pytest.raises(ValueError, match="pieces have 0 to 5 tokens"):
        best_fit(np.array([0, 5]), 64)


def test_pieces_of_one_length_change_places():
    lengths = np.random.default_rng(0).integers(1, 20, 400)
    bins = best_fit(lengths, 64)
    other = bins.shuffled(np.random.default_rng(1))
    assert np.array_equal(lengths[other.pieces], lengths[bins.pieces])
    assert sorted(other.pieces) == list(range(400))
    assert (other.pieces != bins.pieces).mean() > 0.8


def sampler(rows=3, rank=0, world_size=1, n=100, seed=0):
    lengths = np.random.default_rng(5).integers(1, 60, n)
    return BinSampler(best_fit(lengths, 64), rows, seed, rank, world_size)


def test_an_epoch_has_every_piece_once_and_no_two_are_alike():
    one = sampler(rows=1)
    n = len(one.bins)
    epochs = [np.concatenate(list(islice(one(epoch * n), n))) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(100))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], np.concatenate(list(islice(sampler(rows=1, seed=1)(), n))))


@pytest.mark.parametrize("first", [1, 10, 33, 500, 12_345])
def test_a_resumed_run_goes_on_at_the_exact_batch(first):
    whole = list(islice(sampler()(), first, first + 5))
    for got, wanted in zip(islice(sampler()(first), 5), whole, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches_of_one_rank(world_size):
    """The batch of all ranks is that of one rank with more rows, and of one that accumulates; also across epochs."""
    ranks = [list(islice(sampler(3, rank, world_size)(), 200)) for rank in range(world_size)]
    wide = list(islice(sampler(3 * world_size)(), 200))
    accumulated = list(islice(sampler(3)(), 200 * world_size))
    for step, parts in enumerate(zip(*ranks, strict=True)):
        np.testing.assert_array_equal(np.concatenate(parts), wide[step])
        for got, wanted in zip(parts, accumulated[step * world_size :], strict=False):
            np.testing.assert_array_equal(got, wanted)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="the corpus has no tokens"):
        sampler(n=0)
    with pytest.raises(ValueError, match="rows is 0"):
        sampler(rows=0)
    with pytest.raises(ValueError, match="rank is 2"):
        sampler(rank=2, world_size=2)
