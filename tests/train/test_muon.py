"""Muon with AdamW against the two of PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from modernbert.train.muon import MuonAdamW


def small() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 9), nn.Linear(9, 4, bias=False))


def backward(model: nn.Module, step: int) -> None:
    ids = torch.randint(11, (8,), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    model(ids).square().sum().backward()


def muon_adamw(model: nn.Sequential) -> MuonAdamW:
    decayed = [model[0].weight, model[1].weight, model[2].weight]
    groups = [
        {"params": decayed, "lr": 0.01, "weight_decay": 0.1},
        {"params": [model[1].bias], "lr": 0.02, "weight_decay": 0.0},
    ]
    return MuonAdamW(groups, [model[1].weight, model[2].weight])


def test_muon_with_adamw_is_the_two_of_pytorch():
    one, two = small(), small()
    optimizer = muon_adamw(one)
    muon = torch.optim.Muon([two[1].weight, two[2].weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = torch.optim.AdamW(
        [
            {"params": [two[0].weight], "lr": 0.01, "weight_decay": 0.1},
            {"params": [two[1].bias], "lr": 0.02, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(6):
        factor = 1 / (step + 1)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        for group, rate in zip([*muon.param_groups, *rest.param_groups], (0.01, 0.01, 0.02), strict=True):
            group["lr"] = rate * factor
        backward(one, step)
        optimizer.step()
        backward(two, step)
        muon.step()
        rest.step()
    for name, value in two.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name


def test_muon_with_adamw_is_saved_and_resumed_bit_equal():
    model = small()
    optimizer = muon_adamw(model)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    twin = copy.deepcopy(model)
    resumed = muon_adamw(twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        backward(model, step)
        optimizer.step()
        backward(twin, step)
        resumed.step()
    for name, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name


def test_muon_refuses_what_it_would_ignore():
    model = small()
    group = {"params": [model[0].weight, model[1].weight], "lr": 0.1, "weight_decay": 0.0}
    with pytest.raises(ValueError, match="1 of the 2 matrices are in no group"):
        MuonAdamW([group], [model[1].weight, model[2].weight])
    with pytest.raises(ValueError, match=r"torch\.optim\.AdamW alone"):
        MuonAdamW([group], [])
    with pytest.raises(ValueError, match="2D"):
        MuonAdamW([group | {"params": [model[0].weight, model[1].bias]}], [model[1].bias])
