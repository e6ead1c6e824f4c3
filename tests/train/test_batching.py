import random
from itertools import islice

import numpy as np

from modernbert.train.batching import epochs, plan_batches, topic_vectors
from modernbert.train.data import RaggedIds


def test_topics_are_weighted_means():
    rows = RaggedIds(np.array([0, 1, 1, 1], np.uint16), np.array([0, 2, 2, 4]))
    table = np.eye(2, dtype=np.float32)
    rare, common = np.log(4 / 1), np.log(4 / 3)
    np.testing.assert_allclose(topic_vectors(rows, table), [[rare / 2, common / 2], [0, 0], [0, common]], rtol=1e-6)


def plan(seed=0, max_pairs=8, max_tokens=100):
    rng = np.random.default_rng(1)
    lengths, strata = rng.integers(1, 40, 1000), rng.integers(0, 3, 1000)
    lengths[17] = 500
    topics = rng.normal(size=(1000, 4))
    return (
        lengths,
        strata,
        plan_batches(lengths, strata, topics, max_pairs=max_pairs, max_tokens=max_tokens, seed=seed),
    )


def test_a_plan_covers_every_pair_once_within_its_limits():
    lengths, strata, batches = plan()
    assert sorted(np.concatenate(batches)) == list(range(1000))
    for batch in batches:
        assert len(set(strata[batch])) == 1
        assert len(batch) <= 8
        assert lengths[batch].sum() <= 100 or len(batch) == 1
    assert np.mean([len(batch) for batch in batches]) > 3


def test_a_plan_is_a_function_of_its_seed():
    same, other = plan()[2], plan(seed=1)[2]
    assert all(np.array_equal(a, b) for a, b in zip(plan()[2], same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(same, other, strict=False))


def test_a_batch_is_of_one_topic():
    """Two topics: a random batch of 16 would hold one of them only with probability 2 ** -15."""
    draw = random.Random(0)
    side = np.array([draw.choice([-1.0, 1.0]) for _ in range(512)])
    topics = np.stack([side, np.zeros(512)], axis=1)
    batches = plan_batches(np.ones(512), np.zeros(512), topics, max_pairs=16, max_tokens=10**6, seed=0)
    pure = np.mean([abs(side[batch].mean()) == 1 for batch in batches])
    assert pure > 0.5


def test_epochs_are_plans_one_after_another():
    lengths, strata, first = plan(seed=6)
    second = plan(seed=7)[2]
    topics = np.random.default_rng(1)
    topics.integers(1, 40, 1000), topics.integers(0, 3, 1000)
    again = epochs(lengths, strata, topics.normal(size=(1000, 4)), max_pairs=8, max_tokens=100, seed=5)
    for got, wanted in zip(islice(again, len(first) + len(second)), first + second, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_ranks_share_the_batches_of_topics_and_resume_at_the_exact_batch():
    rng = np.random.default_rng(1)
    about = rng.integers(1, 40, 1000), rng.integers(0, 3, 1000), rng.normal(size=(1000, 4))
    limits = {"max_pairs": 8, "max_tokens": 100, "seed": 5}
    wide = list(islice(epochs(*about, max_pairs=16, max_tokens=200, seed=5), 400))
    ranks = [list(islice(epochs(*about, **limits, rank=rank, world_size=2), 400)) for rank in range(2)]
    wide = [batch for batch in wide if len(batch) > 1]
    for got, wanted in zip(zip(*ranks, strict=True), wide, strict=False):
        np.testing.assert_array_equal(np.concatenate(got), wanted)
    for first in (1, 250):
        tail = islice(epochs(*about, **limits, first=first, rank=1, world_size=2), 400 - first)
        for got, wanted in zip(tail, ranks[1][first:], strict=True):
            np.testing.assert_array_equal(got, wanted)
