"""Schedules against the formulas of FlexBERT and the schedules of transformers."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from modernbert.train.schedules import DECAYS, cosine, linear, one_minus_sqrt, warmup_stable_decay

TOTAL, WARMUP = 200, 30


def ours(step: int, **settings) -> float:
    return warmup_stable_decay(step, total=TOTAL, **settings)


def theirs(schedule, *counts, **settings) -> list[float]:
    """The factors of one of transformers' schedules, which begin with a step at 0: moved by one in the warm-up."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = schedule(optimizer, *counts, **settings)
    return [scheduler.lr_lambdas[0](step) for step in range(TOTAL)]


def test_it_rises_stays_and_falls():
    rates = [warmup_stable_decay(step, total=100, warmup=10, decay=40) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:61] == pytest.approx([1.0] * 52)
    assert rates[80] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 40)


@pytest.mark.parametrize(("steps", "warmup", "decay"), [(1500, 0.03, 0.4), (7, 0.0, 1.0), (7, 1.0, 1.0), (1, 0.5, 0.0)])
def test_the_factors_of_the_model_that_ships_have_not_changed(steps, warmup, decay):
    for step in range(steps):
        rise = (step + 1) / max(1, warmup * steps)
        fall = (steps - step) / max(1, decay * steps)
        got = warmup_stable_decay(step, total=steps, warmup=warmup * steps, decay=decay * steps)
        assert got == min(1.0, rise, fall)


def test_linear_and_cosine_are_those_of_transformers():
    for schedule, shape in (
        (transformers.get_linear_schedule_with_warmup, linear),
        (transformers.get_cosine_schedule_with_warmup, cosine),
    ):
        wanted = theirs(schedule, WARMUP, TOTAL)
        got = [ours(step, warmup=WARMUP, decay=TOTAL - WARMUP, shape=shape) for step in range(TOTAL)]
        assert got[WARMUP:] == pytest.approx(wanted[WARMUP:], abs=1e-12)
        assert got[: WARMUP - 1] == pytest.approx(wanted[1:WARMUP], abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine", "1-sqrt"])
def test_a_plateau_with_a_decay_is_that_of_transformers(name):
    decay, floor = 50, 0.1
    wanted = theirs(
        transformers.get_wsd_schedule,
        num_warmup_steps=WARMUP,
        num_decay_steps=decay,
        num_training_steps=TOTAL,
        decay_type=name,
        min_lr_ratio=floor,
    )
    got = [ours(step, warmup=WARMUP, decay=decay, shape=DECAYS[name], final=floor) for step in range(TOTAL)]
    assert got[WARMUP:] == pytest.approx(wanted[WARMUP:], abs=1e-12)


def test_one_minus_sqrt_is_that_of_flexbert():
    decay, floor = 80, 0.001
    for now in range(TOTAL + 1):
        done = (now - (TOTAL - decay)) / decay
        wanted = 1.0 if done <= 0 else floor + (1 - floor) * (1 - math.sqrt(done))
        assert ours(now, decay=decay, shape=one_minus_sqrt, final=floor) == pytest.approx(wanted, abs=1e-12)


def test_in_tokens_the_warm_up_is_that_of_flexbert():
    """It begins at 1e-10, not at 0. With tokens as the unit, the step that rises at once is as small."""
    warmup, batch = 3 * 10**9, 4608 * 1024
    for now in range(0, warmup, batch):
        wanted = 1e-10 + (1 - 1e-10) * now / warmup
        assert warmup_stable_decay(now, total=10**12, warmup=warmup) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("shape", DECAYS.values(), ids=DECAYS)
def test_every_shape_falls_from_one_to_the_end_and_stays_there(shape):
    factors = [ours(step, decay=TOTAL, shape=shape, final=0.2) for step in range(TOTAL + 5)]
    assert factors[0] == 1.0
    assert factors == sorted(factors, reverse=True)
    assert factors[TOTAL:] == pytest.approx([0.2] * 5)


def test_warm_up_and_decay_that_overlap_never_pass_either():
    factors = [ours(step, warmup=150, decay=150) for step in range(TOTAL)]
    assert max(factors) < 1
    assert factors[99] == pytest.approx(min(100 / 150, 101 / 150))


def test_nothing_to_warm_up_or_decay_is_a_constant():
    assert {ours(step) for step in range(TOTAL)} == {1.0}
    assert {warmup_stable_decay(0, total=1, shape=shape) for shape in DECAYS.values()} == {1.0}
