"""Means of checkpoints, and the moving average of a run against float64 and PyTorch's own."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hf_twin import TINY
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from modernbert import Encoder
from modernbert.train.averaging import EMA, average


def states(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    return [
        {"a.weight": torch.randn(5, 3).to(dtype), "a.steps": torch.tensor(3), "b": torch.randn(()).to(dtype)}
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 4])
def test_the_mean_is_rounded_once(dtype, count):
    given = states(count, dtype)
    mean = average(given)
    for name in ("a.weight", "b"):
        truth = torch.stack([state[name].double() for state in given]).mean(0)
        # In float64, the order of a sum shows.
        torch.testing.assert_close(mean[name], truth.to(dtype), rtol=1e-15 if dtype is torch.float64 else 0, atol=0)
    assert mean["a.steps"].item() == 3
    assert mean.keys() == given[0].keys()


def test_one_state_is_held_at_a_time_and_none_is_changed():
    given = states(3)
    kept = copy.deepcopy(given)
    average(state for state in given)
    for one, other in zip(given, kept, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_wrappers_add_to_names_does_not_matter():
    plain, compiled, parallel = states(3)
    compiled = {f"_orig_mod.{name}": value for name, value in compiled.items()}
    parallel = {f"module._orig_mod.{name}": value for name, value in parallel.items()}
    mean = average([plain, compiled, parallel])
    assert mean.keys() == plain.keys()
    assert average([compiled]).keys() == plain.keys()


def test_states_that_have_no_mean_are_named():
    one, other = states(2)
    with pytest.raises(ValueError, match="no state"):
        average([])
    with pytest.raises(ValueError, match=r"state 2 and the first one differ in b\b"):
        average([one, {name: value for name, value in other.items() if name != "b"}])
    with pytest.raises(ValueError, match=r"differ in c\b"):
        average([one, other | {"c": torch.zeros(1)}])
    with pytest.raises(ValueError, match=r"a\.weight of state 2"):
        average([one, other | {"a.weight": torch.zeros(3, 5)}])
    with pytest.raises(ValueError, match=r"a\.steps of state 2"):
        average([one, other | {"a.steps": torch.tensor(4)}])


def test_a_mean_of_encoders_loads_and_is_saved(tmp_path):
    encoders = [Encoder(TINY) for _ in range(3)]
    mean = Encoder(TINY)
    mean.load_state_dict(average(each.state_dict() for each in encoders))
    mean.save_pretrained(tmp_path / "model")
    loaded = Encoder.from_pretrained(tmp_path / "model")
    wanted = torch.stack([each.layers[1].mlp.Wi.weight.double() for each in encoders]).mean(0).float()
    assert torch.equal(loaded.layers[1].mlp.Wi.weight, wanted)


def run(model: nn.Module, ema: EMA, steps: range) -> list[dict[str, Tensor]]:
    """Weights that move at random, and what they were after each step."""
    seen = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        ema.update()
        seen.append({name: each.detach().clone() for name, each in model.named_parameters()})
    return seen


def small(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)


def test_it_is_that_of_pytorch():
    model = small()
    ema = EMA(model, decay=0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)  # its first update copies
    for step in range(20):
        run(model, ema, range(step, step + 1))
        theirs.update_parameters(model)
    for name, value in theirs.module.state_dict().items():
        torch.testing.assert_close(ema.state_dict()[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_is_its_formula(dtype):
    model = small(dtype)
    truth = {name: each.detach().double().clone() for name, each in model.named_parameters()}
    ema = EMA(model, decay=0.99)
    for seen in run(model, ema, range(50)):
        truth = {name: 0.99 * value + 0.01 * seen[name].double() for name, value in truth.items()}
    eps = 1e-15 if dtype is torch.float64 else 1e-7  # of the average, also for weights in bfloat16
    for name, value in truth.items():
        got = ema.state_dict()[name]
        assert (got.double() - value).abs().max() < 100 * eps * value.abs().max(), name


def test_averages_are_applied_and_weights_come_back_bit_equal():
    model = small(torch.bfloat16)
    ema = EMA(model, decay=0.9)
    run(model, ema, range(5))
    before = copy.deepcopy(model.state_dict())

    def check_then_fail() -> None:
        with ema.applied():
            for name, value in model.state_dict().items():
                assert torch.equal(value, ema.state_dict()[name].to(torch.bfloat16)), name
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_then_fail()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_saved_average_goes_on_bit_equal_with_and_without_compile():
    model, file = small(torch.bfloat16), io.BytesIO()
    ema = EMA(torch.compile(model), decay=0.95)
    run(model, ema, range(10))
    torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, file)
    run(model, ema, range(10, 20))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = small(torch.bfloat16)
    again.load_state_dict(saved["model"])
    resumed = EMA(again, decay=0.95)
    resumed.load_state_dict(saved["ema"])
    run(again, resumed, range(10, 20))
    assert resumed.state_dict().keys() == dict(again.named_parameters()).keys()
    for name, value in ema.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_parameters_that_are_replaced_are_followed():
    """As `fully_shard` and `resize_token_embeddings` do: an average of the old ones would stop without a word."""
    model = small()
    ema = EMA(model, decay=0.5)
    model[0].weight = nn.Parameter(torch.full((3, 4), 8.0))
    before = ema.state_dict()["0.weight"].clone()
    ema.update()
    torch.testing.assert_close(ema.state_dict()["0.weight"], (before + 8) / 2)


def test_frozen_parameters_have_no_average_and_stay():
    model = small()
    model[0].requires_grad_(False)
    ema = EMA(model, decay=0.9)
    assert ema.state_dict().keys() == {"1.weight", "1.bias"}
    with ema.applied():
        assert torch.equal(model[0].weight, small()[0].weight)


def test_tied_weights_have_one_average():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    model[1].weight = model[0].weight
    ema = EMA(model, decay=0.5)
    assert ema.state_dict().keys() == {"0.weight", "1.bias"}
    before = model[1].weight.detach().clone()
    with torch.no_grad():
        model[1].weight += 1
    ema.update()
    with ema.applied():
        torch.testing.assert_close(model[1].weight.detach(), before + 0.5)
    assert torch.equal(model[1].weight, before + 1)


def test_averages_of_another_model_are_refused_and_nothing_changes():
    ema = EMA(small(), decay=0.9)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    with pytest.raises(ValueError, match=r"differs in 1\.bias"):
        ema.load_state_dict({name: value for name, value in before.items() if name != "1.bias"})
    with pytest.raises(ValueError, match=r"1\.weight has shape \[3, 3\] in the averages, \[2, 3\] in the model"):
        ema.load_state_dict(before | {"0.bias": torch.zeros(3), "1.weight": torch.zeros(3, 3)})
    assert all(torch.equal(value, before[name]) for name, value in ema.state_dict().items())
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="decay is"):
            EMA(small(), decay=decay)
