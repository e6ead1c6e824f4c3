"""StableAdamW against its formula in float64."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor, nn

from modernbert.train import optim
from modernbert.train.optim import StableAdamW, adamw, load_moments

SHAPES = [(7,), (5, 3), (64, 33), (1,), (2, 3, 4), (0, 4), ()]
STEPS = 60


def formula(
    weights: np.ndarray,
    grads: list[np.ndarray],
    rates: list[float],
    *,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    max_lr: float | None = None,
) -> np.ndarray:
    """StableAdamW of one tensor, written from the formulas of torch-optimi, in the dtype of its arguments."""
    dtype = weights.dtype.type
    w, m, v = weights.copy(), np.zeros_like(weights), np.zeros_like(weights)
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), start=1):
        beta1, beta2 = ((beta**t - beta) / (beta**t - 1) for beta in betas)
        m = m + dtype(1 - beta1) * (g - m)
        v = dtype(beta2) * v + dtype(1 - beta2) * g * g
        rms = np.sqrt(np.mean(g * g / np.maximum(v, dtype(eps**2)), dtype=np.float64)) if g.size else 0.0
        step = lr / max(1.0, float(rms))
        w = w * dtype(1 - step / (max_lr or 1.0) * weight_decay)
        w = w - dtype(step) * m / (np.sqrt(v) + dtype(eps))
    return w


def problem(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """A weight and gradients of all sizes: some zero, and some so large that the RMS is far above 1."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    sizes = [0.0 if t % 13 == 5 else 300.0 if t in (17, 40) else 10 ** -(t % 4) for t in range(STEPS)]
    grads = [torch.randn(shape, generator=generator) * size * scale for size in sizes]
    return weight.to(dtype), [grad.to(dtype) for grad in grads]


RATES = [1e-2 * min(1.0, (t + 1) / 10) for t in range(STEPS)]


def train(
    optimizer: torch.optim.Optimizer, weights: list[Tensor], grads: list[list[Tensor]], rates: list[float]
) -> None:
    for t, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for weight, of_weight in zip(weights, grads, strict=True):
            weight.grad = of_weight[t].clone()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"weight_decay": 1e-2, "max_lr": 1e-2}], ids=str)
def test_stable_adamw_is_its_formula(dtype, settings):
    problems = [problem(shape, dtype) for shape in SHAPES]
    weights = [nn.Parameter(weight.clone()) for weight, _ in problems]
    optimizer = StableAdamW(weights, lr=0.5, decouple_lr="max_lr" in settings, **settings)
    train(optimizer, weights, [grads for _, grads in problems], RATES)
    for weight, (start, grads) in zip(weights, problems, strict=True):
        truth, plain = (
            torch.from_numpy(np.asarray(formula(each(start), [each(grad) for grad in grads], RATES, **settings)))
            for each in (lambda x: x.double().numpy(), lambda x: x.numpy())
        )
        if dtype is torch.float64:
            torch.testing.assert_close(weight.detach(), truth, rtol=1e-13, atol=1e-13)
        else:
            assert_accurate(weight.detach(), plain, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_parts_are_as_one(monkeypatch, dtype):
    """What one call updates is bounded, and on a CPU larger tensors are cut, if they are contiguous."""
    found = []
    for elements in (2**18, 40, 7):
        monkeypatch.setattr(optim, "CACHED", elements)
        problems = [problem(shape, dtype) for shape in SHAPES]
        weights = [nn.Parameter(weight.clone()) for weight, _ in problems]
        weights[2] = nn.Parameter(weights[2].detach().T.clone().T)
        train(StableAdamW(weights, weight_decay=0.1), weights, [grads for _, grads in problems], RATES[:2])
        found.append(weights)
    for weights in zip(*found, strict=True):
        for weight in weights[1:]:  # the order of sums differs
            torch.testing.assert_close(weight, weights[0])


def test_a_surprise_is_damped_for_its_tensor_only():
    """Gradients that grow by 1,000 move a weight by no more than the learning rate, and other tensors as ever."""
    calm, surprised, twin = (nn.Parameter(torch.zeros(100)) for _ in range(3))
    optimizer, alone = StableAdamW([calm, surprised], lr=0.1), StableAdamW([twin], lr=0.1)
    for size in [1.0] * 20 + [1000.0]:
        before = surprised.detach().clone()
        calm.grad, twin.grad, surprised.grad = torch.ones(100), torch.ones(100), torch.full((100,), size)
        optimizer.step()
        alone.step()
    assert torch.equal(calm, twin)
    moved = (surprised.detach() - before).abs().max().item()
    assert 0 < moved < 0.1


def test_the_rms_of_a_large_table_is_exact():
    """A sum of millions of numbers in float32, one after another, is off by percents, and with it the learning rate."""
    table = nn.Parameter(torch.zeros(2**23))
    optimizer = StableAdamW([table], lr=1.0, betas=(0.0, 0.98))
    for size in (0.3, 30.0):
        table.data.zero_()
        table.grad = torch.full_like(table, size)
        optimizer.step()
    # All numbers are alike, so that the update is the RMS times their sign, divided by it.
    assert table.detach()[[0, -1]].tolist() == pytest.approx([-1.0, -1.0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_follows_float64(dtype):
    """The weight with what its rounding lost is the float64 one, though each step is smaller than a rounding step."""
    weight, grads = problem((64, 33), dtype, scale=0.1)
    rates = [rate / 30 for rate in RATES]
    parameter = nn.Parameter(weight.clone())
    optimizer = StableAdamW([parameter], lr=1e-2, weight_decay=0.1)
    train(optimizer, [parameter], [grads], rates)
    truth = torch.from_numpy(
        formula(weight.double().numpy(), [grad.double().numpy() for grad in grads], rates, weight_decay=0.1)
    )
    eps, largest = torch.finfo(dtype).eps, truth.abs().max().item()
    assert (parameter.double() - truth).abs().max() <= 0.51 * eps * largest + STEPS * eps**2 * largest
    whole = parameter.double() + optimizer.state[parameter]["rounded"].double()
    assert (whole - truth).abs().max() <= STEPS * eps**2 * largest
    assert (truth - weight.double()).abs().max() > eps, "nothing was trained"


def test_weight_decay_smaller_than_a_rounding_step_is_not_lost():
    """ModernBERT's 1e-5 of a bfloat16 weight: rounded to nothing each time, it would never change the weight."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = StableAdamW([parameter], lr=1e-3, weight_decay=1e-5, decouple_lr=True)
    for _ in range(2000):
        parameter.grad = torch.zeros(4, dtype=torch.bfloat16)
        optimizer.step()
    assert parameter.detach().float().tolist() == pytest.approx([math.exp(-0.02)] * 4, rel=4e-3)


def test_nothing_waits_for_a_device():
    """Tensors of the meta device have no values, so that reading one on the host raises an error."""
    for dtype in (torch.float32, torch.bfloat16):
        parameters = [nn.Parameter(torch.ones(shape, dtype=dtype, device="meta")) for shape in SHAPES]
        optimizer = StableAdamW(parameters, lr=1e-3, weight_decay=0.1)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_optimizer_goes_on_bit_equal(dtype):
    """Also through a file, and with moments that are wider than the parameters."""
    problems = [problem(shape, dtype) for shape in SHAPES]
    grads = [each for _, each in problems]
    weights = [nn.Parameter(weight.clone()) for weight, _ in problems]
    optimizer = StableAdamW(weights, lr=1e-2, weight_decay=0.01)
    train(optimizer, weights, grads, RATES[:30])
    file = io.BytesIO()
    torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, file)
    train(optimizer, weights, [each[30:] for each in grads], RATES[30:])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = [nn.Parameter(weight.detach()) for weight in saved["weights"]]
    resumed = StableAdamW(again, lr=1.0)
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, again, [each[30:] for each in grads], RATES[30:])
    for one, other in zip(weights, again, strict=True):
        assert torch.equal(one, other)
        for name, value in optimizer.state[one].items():
            loaded = resumed.state[other][name]
            assert torch.equal(value, loaded) if isinstance(value, Tensor) else value == loaded, name
            assert not isinstance(value, Tensor) or value.dtype == loaded.dtype, name


def test_loaded_state_is_not_shared():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = StableAdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert saved["state"][0]["exp_avg"].tolist() == [1.0] * 3
    assert optimizer.state[weight]["step"] == 2


def test_the_next_stage_takes_moments_and_not_settings():
    problems = [problem(shape) for shape in SHAPES]
    grads = [each for _, each in problems]
    weights = [nn.Parameter(weight.clone()) for weight, _ in problems]
    before = StableAdamW(weights, lr=1e-2, weight_decay=0.5, decouple_lr=True)
    train(before, weights, grads, RATES[:9])
    later = StableAdamW(weights, lr=3e-3, weight_decay=0.1, decouple_lr=True)
    load_moments(later, copy.deepcopy(before.state_dict()))
    (group,) = later.param_groups
    assert [group[name] for name in ("lr", "max_lr", "weight_decay")] == [3e-3, 3e-3, 0.1]
    for weight in weights:
        assert later.state[weight]["step"] == 9
        assert torch.equal(later.state[weight]["exp_avg_sq"], before.state[weight]["exp_avg_sq"])


def test_a_parameter_without_gradient_is_left_and_begins_when_it_has_one():
    first, late, alone = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer, twin = StableAdamW([first, late], lr=0.1), StableAdamW([alone], lr=0.1)
    for step in range(5):
        first.grad = torch.ones(3)
        late.grad = torch.full((3,), 2.0) if step >= 3 else None
        optimizer.step()
    assert optimizer.state[late]["step"] == 2
    for _ in range(2):
        alone.grad = torch.full((3,), 2.0)
        twin.step()
    assert torch.equal(late, alone)


def test_groups_have_settings_of_their_own_and_a_highest_rate():
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups: list[dict[str, Any]] = [{"params": [one], "lr": 0.5}, {"params": [other], "weight_decay": 0.0}]
    optimizer = StableAdamW(groups, lr=0.1, weight_decay=0.25, decouple_lr=True)
    assert [group["max_lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    for group in optimizer.param_groups:
        group["lr"] /= 2  # half of the schedule
    one.grad, other.grad = torch.zeros(2), torch.zeros(2)
    optimizer.step()
    assert one.tolist() == [1 - 0.25 / 2] * 2
    assert other.tolist() == [1.0] * 2


def test_a_group_at_rest_stays():
    """A learning rate of 0 freezes a group. The highest rate is then 0, and nothing is divided by it."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = StableAdamW([weight], lr=0.0, weight_decay=0.1, decouple_lr=True)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert weight.tolist() == [1.0, 1.0]


def test_the_learning_rate_may_be_a_tensor():
    one, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    for weight, rate in ((one, 0.1), (other, torch.tensor(0.1))):
        optimizer = StableAdamW([weight], lr=rate, weight_decay=0.5, decouple_lr=True)
        weight.grad = torch.tensor([1.0, -2.0, 3.0])
        optimizer.step()
    torch.testing.assert_close(one, other)


def test_a_closure_is_called_with_gradients():
    weight = nn.Parameter(torch.ones(2))
    optimizer = StableAdamW([weight], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert weight.detach().tolist() == pytest.approx([0.9, 0.9])


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": -1.0},
        {"eps": 0.0},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"weight_decay": -1.0},
        {"max_lr": -1.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .* but must be"):
        StableAdamW([nn.Parameter(torch.ones(1))], **settings)


def test_complex_parameters_and_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="complex"):
        StableAdamW([nn.Parameter(torch.ones(1, dtype=torch.complex64))])
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        StableAdamW(table.parameters()).step()


def test_the_table_has_a_learning_rate_of_its_own():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 1))
    table, others = adamw(model, model[0].weight, learning_rate=0.1, table_rate=0.2).param_groups
    assert (table["lr"], others["lr"]) == (0.2, 0.1)
    assert table["params"] == [model[0].weight]
    assert [id(x) for x in others["params"]] == [id(x) for x in model[1].parameters()]
