"""Optimizers and averages over two processes, sharded in several ways, are those of one process."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from modernbert.train.averaging import EMA, average
from modernbert.train.muon import MuonAdamW
from modernbert.train.optim import StableAdamW

RANKS, STEPS = 2, 8
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


class Model(nn.Module):
    """Tensors that do not divide by two, one with a single row, and one without gradients in some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 4))
        self.matrix = nn.Parameter(torch.randn(4, 5))
        self.bias = nn.Parameter(torch.randn(5))
        self.row = nn.Parameter(torch.randn(1, 5))
        self.late = nn.Parameter(torch.randn(5))

    def forward(self, ids: Tensor, late: bool) -> Tensor:
        x = torch.tanh(self.table[ids] @ self.matrix + self.bias) * self.row
        return x * self.late if late else x


def make() -> Model:
    """In float64, so that only the order of sums differs."""
    torch.manual_seed(0)
    return Model().double()


def stable(model: Model) -> StableAdamW:
    groups = [
        {"params": [model.bias, model.row, model.late], "weight_decay": 0.0},
        {"params": [model.table, model.matrix]},
    ]
    return StableAdamW(groups, lr=0.05, weight_decay=0.1, decouple_lr=True)


def muon(model: Model) -> MuonAdamW:
    rest = [model.table, model.bias, model.row, model.late]
    groups = [{"params": [model.matrix], "lr": 0.05}, {"params": rest, "lr": 0.05}]
    return MuonAdamW(groups, [model.matrix])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, ema: EMA | None = None) -> None:
    """The same batch on every rank, so that its mean over ranks is that of one process. Gradients jump in one step."""
    for step in steps:
        optimizer.zero_grad()
        loss = model(torch.arange(step, step + 3) % 7, step % 3 == 2).square().sum()
        (loss * (1000.0 if step == 4 else 1.0)).backward()
        optimizer.step()
        if ema is not None:
            ema.update()


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone() for name, x in state.items()}


def shard(model: Model, way: str) -> Model:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if way == "replicated and sharded":
        return fully_shard(model, mesh=init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("replicas", "shards")))
    mesh = init_device_mesh("cpu", (RANKS,))
    if way == "fsdp":
        return fully_shard(model, mesh=mesh)
    for name, parameter in list(model.named_parameters()):
        # As tensor parallelism: columns, or nothing, are divided.
        placement = Shard(1) if name in ("table", "matrix") else Replicate()
        setattr(model, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))
    return model


WAYS = ("fsdp", "replicated and sharded", "columns")


def work(rank: int, folder: str) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found: dict[str, dict[str, Tensor]] = {}
    for way in WAYS:
        model = shard(make(), way)
        if way == "columns":
            found[way] = whole(follow(model).state_dict())
            continue
        optimizer, ema = stable(model), EMA(model, decay=0.9)
        train(model, optimizer, range(STEPS // 2), ema)
        # A run that is stopped and goes on, with PyTorch's own state dicts of sharded optimizers.
        saved = copy.deepcopy([model.state_dict(), get_optimizer_state_dict(model, optimizer), ema.state_dict()])
        train(model, optimizer, range(STEPS // 2, STEPS), ema)
        with ema.applied(), torch.no_grad():
            model(torch.arange(3), True)  # after it, the modules have whole tensors in place of shards
        found[way] = whole(model.state_dict())
        found[f"{way}, averages"] = whole(ema.state_dict())
        found[f"{way}, mean"] = whole(average([saved[0], model.state_dict()]))
        if way != "fsdp":
            continue

        resumed = shard(make(), way)
        resumed.load_state_dict(saved[0])
        optimizer, ema = stable(resumed), EMA(resumed, decay=0.9)
        set_optimizer_state_dict(resumed, optimizer, saved[1])
        ema.load_state_dict(saved[2])
        train(resumed, optimizer, range(STEPS // 2, STEPS), ema)
        found[f"{way}, resumed"] = whole(resumed.state_dict())
        found[f"{way}, resumed averages"] = whole(ema.state_dict())

    model = shard(make(), "fsdp")
    train(model, muon(model), range(STEPS))
    found["muon"] = whole(model.state_dict())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def follow(model: Model) -> Model:
    """Train with the gradients of one process, which nothing else can compute of these shards."""
    alone = make()
    pair = stable(alone), stable(model)
    for step in range(STEPS):
        train(alone, pair[0], range(step, step + 1))
        for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            mine.grad = None if theirs.grad is None else cut(theirs.grad, mine)
        pair[1].step()
    return model


def cut(value: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)


def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    model = make()
    ema = EMA(model, decay=0.9)
    optimizer = stable(model)
    train(model, optimizer, range(STEPS // 2), ema)
    half = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(STEPS // 2, STEPS), ema)
    with_muon = make()
    train(with_muon, muon(with_muon), range(STEPS))
    wanted = {"columns": model.state_dict(), "muon": with_muon.state_dict()}
    for way in ("fsdp", "replicated and sharded"):
        wanted[way], wanted[f"{way}, averages"] = model.state_dict(), ema.state_dict()
        wanted[f"{way}, mean"] = average([half, model.state_dict()])
    wanted["fsdp, resumed"], wanted["fsdp, resumed averages"] = model.state_dict(), ema.state_dict()
    for found in ranks:
        assert found.keys() == wanted.keys()
        for way, values in wanted.items():
            # Muon multiplies in bfloat16, in an order that sharding changes.
            limit = 2e-2 if way == "muon" else 1e-12
            for name, value in values.items():
                torch.testing.assert_close(found[way][name], value, rtol=limit, atol=limit, msg=f"{way} {name}")
