"""The ranks of a run: how they meet, add up, gather, and what happens when one of them fails.

Under `torchrun` each process is a rank. Without it there is one, and nothing here communicates.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..inference.devices import is_there

T = TypeVar("T")

BUCKET_BYTES = 64 << 20
"""Gradients that are added up in one message."""
GRACE, PATIENCE = 2.0, 10.0
"""Seconds that a rank which has lost the connection waits, at least and at most, for the reports of the others.

Meanwhile `torchrun` sees the process that has died. It would blame this one if both ended at once.
"""

LOST = (dist.DistError, RuntimeError)
"""What a store raises that cannot be reached."""


@dataclass(frozen=True)
class Ranks:
    """This rank among all ranks of a run.

    Attributes:
        rank: from 0. The first one writes files and prints.
        world_size: the number of ranks.
        device: of this rank.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.world_size == 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the tensors of all ranks, of one shape, in place; the same bits on each of them."""
        if not self.is_alone:
            dist.all_reduce(x)
        return x

    def gather(self, value: T) -> list[T]:
        """A small Python object of each rank, on every rank."""
        if self.is_alone:
            return [value]
        found = cast("list[T]", [None] * self.world_size)
        dist.all_gather_object(found, value)
        return found

    def on_first(self, work: Callable[[], T]) -> T:
        """`work()` of the first rank, on every rank: its result, or the error that it raised."""
        if self.is_alone:
            return work()
        done: list[Any] = [None, None]
        if self.is_first:
            try:
                done[0] = work()
            except Exception as error:
                done[1] = error
        dist.broadcast_object_list(done, src=0)
        if done[1] is not None:
            raise done[1]
        return done[0]


ALONE = Ranks()


@contextmanager
def ranks(device: str | torch.device = "cpu", *, timeout_minutes: float = 30.0) -> Iterator[Ranks]:
    """The rank that this process is: one of those that `torchrun` has started, or the only one.

    An error on one rank ends the run. What the others raise names the rank and its error, or the rank that died.
    A process group that is there already is used as it is.

    Args:
        device: "cpu" (gloo), or "cuda" (NCCL), of which a rank takes the one with its number on its machine.
        timeout_minutes: how long a rank waits for another that is alive but does not answer.

    Raises:
        ValueError: a device that this machine does not have.
        ConnectionError: another rank has died, has failed, or does not answer.
    """
    if not is_there(device):
        what = f"device is {str(device)!r:.80}, which this machine does not have"
        raise ValueError(f"{what}: name one such as 'cpu' or 'cuda'")
    device = torch.device(device)
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), _own(device))
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(device=device)
        return
    device = _own(device)
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    options = {"store": PrefixStore("group", store), "rank": rank, "world_size": world_size}
    dist.init_process_group(backend, timeout=timeout, **options)
    reports = Reports(PrefixStore("reports", store), rank, world_size)
    try:
        yield Ranks(rank, world_size, device)
    except Exception as error:
        # The group is left as it is: to close it would wait for the rank that is lost.
        reports.explain(error)
        raise
    dist.destroy_process_group()


def _own(device: torch.device) -> torch.device:
    """The device of this rank on its machine."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


class Reports:
    """Why ranks failed, in the store through which they met."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size

    def explain(self, error: Exception) -> None:
        """Report the error of this rank; raise a ConnectionError if it is only the echo of another rank's.

        A rank that has lost the connection waits here for the reports of the others. One that reports nothing is dead.
        """
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        if not _is_lost_connection(error):
            get_error_handler().record_exception(error)  # for the summary of `torchrun`
            with suppress(*LOST):
                self.store.set(str(self.rank), f"{type(error).__name__}: {error}")
            return
        try:
            self.store.set(str(self.rank), "")
            found = self._others(time.monotonic())
        except LOST:
            words = "rank 0, which kept the store of the run, is lost"
            raise ConnectionError(f"{words}. This is rank {self.rank} of {self.world_size}") from error
        failed = [f"rank {rank} has failed: {report}" for rank, report in found.items() if report]
        silent = [rank for rank in range(self.world_size) if rank != self.rank and rank not in found]
        dead = [f"rank {rank} has died, or does not answer" for rank in silent]
        words = "; ".join(failed or dead) or "the connection between the ranks is lost"
        raise ConnectionError(f"{words}. This is rank {self.rank} of {self.world_size}") from error

    def _others(self, start: float) -> dict[int, str]:
        """The reports of the other ranks that come in time. One with an error of its own explains all others."""
        found: dict[int, str] = {}
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        while (waited := time.monotonic() - start) < PATIENCE:
            if waited > GRACE and (len(found) == len(others) or any(found.values())):
                break
            time.sleep(0.1)
            found = {rank: self.store.get(str(rank)).decode() for rank in others if self.store.check([str(rank)])}
        return found


def _is_lost_connection(error: Exception) -> bool:
    # gloo has no class of its own.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def is_sharded(x: Tensor) -> bool:
    """Whether it is in parts on several ranks: a `DTensor`, whose import takes long."""
    return hasattr(x, "full_tensor")


def local(x: Tensor) -> Tensor:
    """The part of this rank; all of a tensor that is not sharded."""
    return x.to_local() if is_sharded(x) else x  # pyright: ignore[reportAttributeAccessIssue]


# Gradients


@contextmanager
def no_sync(module: nn.Module) -> Iterator[None]:
    """Backward passes in here leave gradients on their rank; the next one outside brings all of them together.

    It saves messages: with it or without it, the gradients of a step are the same. Only for a model of `fully_shard`;
    `sum_gradients` is called once a step anyway.
    """
    sharded: list[Any] = [each for each in module.modules() if hasattr(each, "set_requires_gradient_sync")]
    for each in sharded:
        each.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for each in sharded:
            each.set_requires_gradient_sync(True, recurse=False)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Replace each gradient by its sum over all ranks, in few messages.

    A parameter that only some ranks have used counts as zero on the others; one that none has used keeps no gradient.
    Those of `fully_shard` are left out: the backward pass has summed them.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad and not is_sharded(parameter)]
    if ranks.is_alone or not trained:
        return
    has = [float(parameter.grad is not None) for parameter in trained]
    used = ranks.sum(torch.tensor(has, device=trained[0].device)).tolist()
    gradients: list[Tensor] = []
    for parameter, count in zip(trained, used, strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = ranks.sum(torch.cat([gradient.flatten() for gradient in bucket]))
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients, together about as large as `BUCKET_BYTES`."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and size + gradient.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


# Rows


def gather_counts(count: int, ranks: Ranks) -> list[int]:
    """The numbers of rows of all ranks. Those of this one begin at `sum(counts[: ranks.rank])` of the gathered ones."""
    if ranks.is_alone:
        return [count]
    counts = torch.zeros(ranks.world_size, dtype=torch.int64, device=ranks.device)
    counts[ranks.rank] = count
    return ranks.sum(counts).tolist()


def gather_rows(x_NE: Tensor, ranks: Ranks, counts: Sequence[int] | None = None) -> Tensor:
    """The rows of all ranks, in the order of the ranks, on every rank. Differentiable.

    One all-gather forward, one reduce-scatter backward: the gradient of a row is the sum over the ranks that used it.
    So each rank computes its own share of a loss from all rows, and `fit` brings the shares together. The backward
    pass is a message too: all ranks have to run it.

    Args:
        x_NE: `[n, ...]` on `ranks.device`; n may differ between ranks and may be 0, the rest of the shape not.
        counts: `gather_counts(n, ranks)`, if it is known already.
    """
    if ranks.is_alone:
        return x_NE
    counts = gather_counts(len(x_NE), ranks) if counts is None else list(counts)
    if counts[ranks.rank] != len(x_NE):
        raise ValueError(f"counts has {counts[ranks.rank]} rows for rank {ranks.rank}, x_NE has {len(x_NE)}")
    return cast("Tensor", _GatherRows.apply(x_NE, counts, ranks)) if any(counts) else x_NE


class _GatherRows(torch.autograd.Function):
    """Ranks send as many rows as the longest has; a message of unequal parts is not on every backend."""

    @staticmethod
    def forward(ctx: Any, x_NE: Tensor, counts: list[int], ranks: Ranks) -> Tensor:
        ctx.counts, ctx.ranks = counts, ranks
        longest = max(counts)
        mine = x_NE.new_zeros(longest, *x_NE.shape[1:])
        mine[: len(x_NE)] = x_NE
        every = mine.new_empty(longest * ranks.world_size, *x_NE.shape[1:])
        dist.all_gather_into_tensor(every, mine)
        return torch.cat([part[:count] for part, count in zip(every.split(longest), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), counts, longest = grads, ctx.counts, max(ctx.counts)
        every = grad.new_zeros(ctx.ranks.world_size, longest, *grad.shape[1:])
        for part, own in zip(every, grad.split(counts), strict=True):
            part[: len(own)] = own
        mine = grad.new_empty(longest, *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, every.flatten(0, 1))
        return mine[: counts[ctx.ranks.rank]], None, None
