"""The table of stages, and the rules of FlexBERT for what changes within one."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from fractions import Fraction

import pytest

from modernbert.config import PRESETS
from modernbert.train.stages import BILLION, STAGES, Stage

SMALL = Stage(
    tokens=200_000,
    sequence_length=16,
    batch_size=60,
    learning_rate=1e-3,
    weight_decay=1e-5,
    global_rope_theta=1e4,
    local_rope_theta=1e4,
    warmup_tokens=5_000,
    decay_tokens=40_000,
    first_batch_size=10,
    batch_warmup_tokens=50_000,
)
ALL = [(name, number) for name, stages in STAGES.items() for number in range(len(stages))]


def flexbert_batch_size(tokens: int, stage: Stage) -> int:
    """`BatchSizeWarmupScheduler`, written from its formula: sizes count what the batch grows by."""
    unit = stage.first_batch_size or stage.batch_size
    sizes = range(1, stage.batch_size // unit)
    if not sizes or tokens >= stage.batch_warmup_tokens:
        return stage.batch_size
    share = Fraction(stage.batch_warmup_tokens, sum(sizes))
    thresholds = [math.ceil(share * sum(range(1, size + 1))) for size in sizes]
    return unit * next((size for size, limit in zip(sizes, thresholds, strict=True) if tokens < limit), len(sizes) + 1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_warmup_tokens": 0},
        {"batch_warmup_tokens": 7},  # fewer tokens than a step has
        {"batch_warmup_tokens": 3_333},
        {"batch_warmup_tokens": 190_000},
        {"first_batch_size": None},
        {"first_batch_size": 60},
        {"first_batch_size": 1},
        {"tokens": 45_001, "warmup_tokens": 0},  # ends while the batch still grows
    ],
    ids=str,
)
def test_batches_grow_as_in_flexbert(changes):
    stage = replace(SMALL, **changes)
    tokens = 0
    for step in range(stage.steps):
        assert tokens < stage.tokens
        assert stage.tokens_before(step) == tokens
        assert stage.batch_size_at(step) == flexbert_batch_size(tokens, stage)
        tokens += stage.batch_size_at(step) * stage.sequence_length
    assert tokens >= stage.tokens


def test_each_size_has_as_many_steps():
    sizes = [SMALL.batch_size_at(step) for step in range(SMALL.steps)]
    counts = [sizes.count(size) for size in (10, 20, 30, 40, 50)]
    assert max(counts) - min(counts) <= 1
    assert sizes == sorted(sizes)


def test_the_learning_rate_follows_the_tokens():
    factors = [SMALL.factor(step) for step in range(SMALL.steps)]
    assert factors[0] == 1 / 5_000
    assert factors[1] == (SMALL.tokens_before(1) + 1) / 5_000
    plateau = [step for step in range(SMALL.steps) if 5_000 <= SMALL.tokens_before(step) <= 160_000]
    assert {factors[step] for step in plateau} == {1.0}
    done = (SMALL.tokens_before(SMALL.steps - 1) - 160_000) / 40_000
    assert factors[-1] == pytest.approx(1 - math.sqrt(done))


def test_the_rows_are_those_that_were_published():
    base, extension, decay = STAGES["modernbert-base"]
    assert (base.tokens, base.batch_size, base.first_batch_size) == (1_719 * BILLION, 4608, 768)
    assert (base.learning_rate, base.weight_decay, base.warmup_tokens) == (8e-4, 1e-5, 3 * BILLION)
    assert {base.factor(step) for step in (5_000, 10_000, base.steps - 1)} == {1.0}
    assert (extension.tokens, extension.batch_size, extension.learning_rate) == (250 * BILLION, 576, 3e-4)
    assert {extension.factor(0), extension.factor(extension.steps - 1)} == {1.0}
    assert (decay.tokens, decay.factor(0)) == (50 * BILLION, 1.0)
    assert decay.factor(decay.steps - 1) == pytest.approx(0.001, abs=1e-3)
    assert [decay.global_rope_theta, decay.local_rope_theta] == [160_000, 10_000]
    assert [stage.learning_rate for stage in STAGES["modernbert-large"]] == [5e-4, 5e-5, 5e-5, 5e-5]
    assert [stage.batch_size for stage in STAGES["modernbert-large"]] == [4928, 4928, 616, 624]

    first, second, third = STAGES["ettin-17m"]
    assert (first.learning_rate, first.weight_decay, first.batch_warmup_tokens) == (3e-3, 3e-4, 125 * BILLION)
    assert [second.learning_rate * factor for factor in (second.factor(0), second.final)] == [3e-3, 1.5e-3]
    assert [third.learning_rate * factor for factor in (third.factor(0), third.final)] == pytest.approx([1.5e-3, 6e-5])
    assert [stage.mask_rate for stage in (first, second, third)] == [0.3, 0.3, 0.15]
    assert [stage.local_rope_theta for stage in (first, second, third)] == [1e4, 1e4, 160e3]
    assert [stage.tokens for stage in STAGES["ettin-1b"]] == [1_700 * BILLION, 83_333_000_000, 16_666_666_667]


@pytest.mark.parametrize("name", STAGES)
def test_the_last_stage_ends_in_the_model_of_its_name(name):
    config, last = PRESETS[name], STAGES[name][-1]
    assert config.global_rope_theta == last.global_rope_theta
    assert config.local_rope_theta == last.local_rope_theta
    assert config.max_position_embeddings == last.sequence_length
    assert STAGES.keys() == PRESETS.keys()


@pytest.mark.parametrize(("name", "number"), ALL)
def test_every_row_can_be_counted_and_made_small(name, number):
    stage = STAGES[name][number]
    small = stage.scaled(1_000_000, sequence_length=64, batch_size=48)
    for each in (stage, small):
        last = each.steps - 1
        assert each.tokens_before(last) < each.tokens <= each.tokens_before(each.steps)
        assert each.batch_size_at(last) == each.batch_size
        assert each.batch_size_at(0) == (each.first_batch_size or each.batch_size)
        assert 0 < each.factor(0) <= 1
        assert each.factor(last) >= each.final
    assert small.warmup_tokens / small.tokens == pytest.approx(stage.warmup_tokens / stage.tokens, abs=1e-5)
    assert (small.mask_rate, small.decay, small.learning_rate) == (stage.mask_rate, stage.decay, stage.learning_rate)


def test_a_stage_made_small_can_keep_its_sizes_only_if_they_divide():
    stage = STAGES["modernbert-base"][0]
    assert stage.scaled(10**6, sequence_length=64, batch_size=12).first_batch_size == 2
    assert stage.scaled(10**6, sequence_length=64, batch_size=10).first_batch_size == 2
    assert stage.scaled(10**6, sequence_length=64, batch_size=7).first_batch_size == 7


def test_a_row_is_plain_data():
    assert Stage(**asdict(SMALL)) == SMALL


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0"),
        ({"mask_rate": 1.0}, r"mask_rate is 1\.0"),
        ({"warmup_tokens": -1}, "warmup_tokens is -1"),
        ({"weight_decay": -0.1}, r"weight_decay is -0\.1"),
        ({"final": 1.5}, r"final is 1\.5"),
        ({"decay": "sqrt"}, "one of linear, 1-sqrt, cosine"),
        ({"warmup_tokens": 170_000}, "more than the 200,000 tokens"),
        ({"first_batch_size": 7}, "not a multiple of first_batch_size 7"),
        ({"first_batch_size": 0}, "first_batch_size is 0"),
        ({"first_batch_size": 120}, "not a multiple of first_batch_size 120"),
    ],
    ids=str,
)
def test_rows_that_contradict_themselves_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **changes)
