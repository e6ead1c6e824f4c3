"""GradCache over two ranks gives the gradients of one rank with the joined batch, in float64.

The ranks have other numbers of pairs, of mined negatives, of tokens and of chunks. Each backpropagates its mean loss
times its number of pairs, and the sum over ranks is divided by the number of all pairs, as the training loop does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cached_model import DOCUMENTS, QUERIES, assert_same, gradients, make
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modernbert import pack
from modernbert.train.grad_cache import grad_cache, token_chunks
from modernbert.train.in_batch import in_batch_info_nce

RANKS = 2
PAIRS, TOKENS = ([0, 1, 2], [3, 4]), (1000, 12)
NEGATIVES = ([5], [6, 7, 8, 9])
GROUPS = torch.tensor([0, 1, 2, 0, 4, 1, 2, 7, 8, 2])  # of documents; some are shared between ranks
OPTIONS = {
    "late": (True, {"temperature": 0.5}),
    "late, both directions": (True, {"temperature": 0.5, "both_directions": True, "elements": 60}),
    "dense, both directions": (False, {"temperature": 0.05, "both_directions": True}),
}
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


CALLS = {"gathers": 0, "scatters": 0}


class Gather(torch.autograd.Function):
    """Rows of all ranks, whose numbers differ; the gradient is the sum over ranks. Plain, and counted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        CALLS["gathers"] += x.is_floating_point()
        counts: list[int] = [0] * RANKS
        dist.all_gather_object(counts, len(x))
        parts = [x.new_empty(max(counts), *x.shape[1:]) for _ in counts]
        dist.all_gather(parts, torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])]))
        ctx.counts = counts
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        CALLS["scatters"] += 1
        total = grads[0].clone()
        dist.all_reduce(total)
        return total.split(ctx.counts)[dist.get_rank()]


def backpropagate(encode: Callable, name: str, rank: int | None, **cache: Any) -> Tensor:
    """The loss of one rank, or of all pairs (None), and its gradients times the number of its pairs."""
    options = OPTIONS[name][1]
    pairs = [pair for own in PAIRS for pair in own] if rank is None else PAIRS[rank]
    negatives = [index for own in NEGATIVES for index in own] if rank is None else NEGATIVES[rank]
    documents = [*pairs, *negatives]
    if rank is not None:
        options = options | {"gather": Gather.apply, "rank": rank}
    at_least = cache.pop("at_least", 1)
    columns = [
        token_chunks(pack(texts), 1000 if rank is None else TOKENS[rank], at_least=at_least)
        for texts in ([QUERIES[i] for i in pairs], [DOCUMENTS[i] for i in documents])
    ]
    loss = grad_cache(encode, columns, partial(in_batch_info_nce, groups_N=GROUPS[documents], **options), **cache)
    (loss * len(pairs)).backward()
    return loss.detach() * len(pairs)


def whole(model: nn.Module, factor: float) -> dict[str, Tensor]:
    grads = gradients(model)
    return {n: factor * (g.full_tensor() if isinstance(g, DTensor) else g) for n, g in grads.items()}


def work(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found: dict[str, dict[str, Tensor]] = {}
    for name, (late, _) in OPTIONS.items():
        model = make(late)
        CALLS.update(gathers=0, scatters=0)
        loss = backpropagate(model, name, rank)
        assert set(CALLS.values()) == {2 if "both" in name else 1}
        for grad in gradients(model).values():
            dist.all_reduce(grad)
        dist.all_reduce(loss)
        found[name] = {"loss": loss, **whole(model, 1)}

    name = "late, both directions"
    model = make(True)
    ddp = nn.parallel.DistributedDataParallel(model)
    backpropagate(ddp, name, rank, no_sync=ddp.no_sync)
    found[f"{name}, DDP"] = whole(model, RANKS)  # it averages over ranks, as the next one does

    model = make(True)
    for part in (model.encoder.embeddings, *model.encoder.layers, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (RANKS,)))
    # Every chunk gathers weights, so the ranks need as many.
    backpropagate(model, name, rank, at_least=5, no_sync=partial(without_sync, model))
    found[f"{name}, FSDP"] = whole(model, RANKS)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@contextmanager
def without_sync(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def test_two_ranks_are_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    assert len(ranks[0]) == len(OPTIONS) + 2
    for name in ranks[0]:
        option = name if name in OPTIONS else "late, both directions"
        model = make(OPTIONS[option][0])
        wanted = {"loss": backpropagate(model, option, None), **whole(model, 1)}
        for found in ranks:
            assert_same(found[name], {key: wanted[key] for key in found[name]}, 1e-12)
        assert ranks[0][name].keys() >= dict(model.named_parameters()).keys()
