"""DDP and FSDP over two processes give the numbers of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hf_twin import BIASES, TINY, make_loud, pad, random_ids
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modernbert import Encoder, pack

RANKS = 2
TEXTS = random_ids([3, 40, 17, 9], 100)  # rank 0 takes the first two, rank 1 the others
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def make() -> Encoder:
    """In float64, so that only the order of sums differs."""
    torch.manual_seed(0)
    encoder = Encoder(replace(TINY, **BIASES))
    make_loud(encoder)
    return encoder.double()


def step(model: Callable, encoder: nn.Module, texts: list[list[int]], padded: bool) -> dict[str, Tensor]:
    """Rows of a forward pass, and the gradient of every parameter."""
    encoder.zero_grad()
    if padded:
        ids, mask = pad(texts, "left")
        rows = model(ids, mask).last_hidden_state[mask.bool()]
    else:
        rows = model(pack(texts))
    rows.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x.clone() for name, x in grads.items()}
    return {"rows": rows.detach(), **whole}


def work(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    mine = TEXTS[2 * rank : 2 * rank + 2]
    found = {}
    encoder = make()
    ddp = nn.parallel.DistributedDataParallel(encoder)
    found["ddp"] = step(ddp, encoder, mine, padded=False)
    found["ddp padded"] = step(ddp, encoder, mine, padded=True)

    encoder, mesh = make(), init_device_mesh("cpu", (RANKS,))
    for part in (encoder.embeddings, *encoder.layers, encoder):
        fully_shard(part, mesh=mesh)
    found["fsdp"] = step(encoder, encoder, mine, padded=False)
    found["fsdp padded"] = step(encoder, encoder, mine, padded=True)
    encoder.gradient_checkpointing = True
    found["fsdp checkpointed"] = step(encoder, encoder, mine, padded=False)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    encoder = make()
    wanted = step(encoder, encoder, TEXTS, padded=False)
    assert ranks[0].keys() == {"ddp", "ddp padded", "fsdp", "fsdp padded", "fsdp checkpointed"}
    for way in ranks[0]:
        got = {"rows": torch.cat([found[way]["rows"] for found in ranks])}
        for found in ranks:
            # Both average over ranks, where one process sums.
            got |= {name: RANKS * x for name, x in found[way].items() if name != "rows"}
            assert got.keys() == wanted.keys()
            for name, value in wanted.items():
                limit = 1e-12 * value.abs().max().item()
                torch.testing.assert_close(got[name], value, rtol=0, atol=limit, msg=f"{way} {name}")
