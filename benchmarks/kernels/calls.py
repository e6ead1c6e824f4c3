"""A task and the ways to do it: called on their own memory, forward or with gradients, and compared with the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.harness import WrongOutput
from benchmarks.kernels.work import Work

Args = tuple[Any, ...]


@dataclass(frozen=True)
class Way:
    """One way to do a task.

    Attributes:
        call: takes the arguments of the task (or what `prepare` made of them) and its keyword arguments.
        settings: what was chosen, in words.
        prepare: arguments in the form that this way likes best, made before the clock starts.
        restore: its gradients as those of the arguments of the task.
        reference, work: where they are not those of the task.
        repeats: how often `call` does what is timed.
        graph: False where the gaps between launches are what is asked for.
        around: a context that both passes of a call run in.
    """

    implementation: str
    call: Callable[..., Any]
    settings: str = ""
    prepare: Callable[[Args], Args] = lambda args: args
    restore: Callable[[list[Tensor]], list[Tensor]] = lambda gradients: gradients
    reference: Callable[..., Any] | None = None
    work: Work | None = None
    repeats: int = 1
    graph: bool = True
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Task:
    """A call with all ways to make it.

    Attributes:
        what: in words; unique within its workload.
        args: its tensors that are floating point get gradients. kwargs: those in it get none.
        reference: the specification.
        passes: False for the forward pass, True for forward and backward.
        memory: its peak is measured too.
        touched: bytes that a call uses at least, where it does not use all arguments.
        truth: what is right, where the reference in a higher precision does not say so.
    """

    what: str
    args: Args
    kwargs: dict[str, Any]
    reference: Callable[..., Any]
    ways: tuple[Way, ...]
    work: Work | None = None
    passes: tuple[bool, ...] = (False, True)
    memory: bool = False
    touched: int | None = None
    truth: Callable[..., Any] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest of its arguments; of integers alone float32 is made."""
        dtypes = [x.dtype for x in real((*self.args, *self.kwargs.values()))]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)

    @property
    def nbytes(self) -> int:
        """What a call brings into a cache at least."""
        tensors = real((*self.args, *self.kwargs.values()))
        return sum(x.nbytes for x in tensors) if self.touched is None else self.touched


class Error(NamedTuple):
    """The worst difference from the truth, and what is allowed there; both as shares of the truth."""

    found: float
    allowed: float


def real(args: Args) -> list[Tensor]:
    """The tensors that get gradients."""
    return [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]


def copied(task: Task, backward: bool, dtype: torch.dtype | None = None) -> tuple[Args, dict[str, Any]]:
    """Arguments of the same numbers in new memory, the real ones in this dtype."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(dtype or x.dtype, copy=True).requires_grad_(backward) if x.is_floating_point() else x.clone()

    return tuple(map(leaf, task.args)), tree_map_only(Tensor, lambda x: x.clone(), task.kwargs)


def call_of(way: Way, args: Args, kwargs: dict[str, Any], backward: bool) -> Callable[[], list[Tensor]]:
    """What is timed: outputs, and then the gradients of all real arguments by a fixed cotangent."""
    # Leaves of this way alone: no other's backward pass has met them, on whatever stream.
    args = tuple(x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in way.prepare(args))
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    cotangents: list[Tensor] = []

    def call() -> list[Tensor]:
        with way.around():
            return passes()

    def passes() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            found = way.call(*args, **kwargs)
        outputs = list(found) if isinstance(found, tuple) else [found]
        if not backward:
            return outputs
        if not cotangents:
            cotangents.extend(cotangent(at, output) for at, output in enumerate(outputs))
        gradients = torch.autograd.grad(outputs, leaves, cotangents)
        # Without their history, which would hold on to the stream of this call.
        return [*(output.detach() for output in outputs), *gradients]

    return call


def cotangent(at: int, output: Tensor) -> Tensor:
    """Random numbers, the same for every way, and rounded so that every dtype sees the same."""
    generator = torch.Generator(output.device).manual_seed(at)
    drawn = torch.randn(output.shape, generator=generator, device=output.device)
    return drawn.bfloat16().to(output.dtype)


def truth_and_yardstick(reference: Callable[..., Any], task: Task, backward: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The reference in float32 (in float64 for float32 arguments), and in the dtype of the arguments."""
    higher = torch.float64 if task.dtype is torch.float32 else torch.float32
    right, yardstick = Way("truth", task.truth or reference), Way("reference", reference)
    truth = call_of(right, *copied(task, backward, higher), backward)()
    return truth, call_of(yardstick, *copied(task, backward), backward)()


def check(way: Way, task: Task, backward: bool, truth: Sequence[Tensor], yardstick: Sequence[Tensor]) -> Error:
    """The worst error of outputs and gradients, or `WrongOutput`.

    Allowed is what the tests allow: twice the error that the reference makes in the same dtype, and one rounding step
    of the coarsest argument. Errors are root mean squares over a tensor.
    """
    got = call_of(way, *copied(task, backward), backward)()
    outputs = len(truth) - (len(real(task.args)) if backward else 0)
    step = torch.finfo(task.dtype).eps
    worst = Error(0.0, step)
    for mine, exact, plain in zip([*got[:outputs], *way.restore(got[outputs:])], truth, yardstick, strict=True):
        if mine.shape != exact.shape:
            raise WrongOutput(f"returned shape {tuple(mine.shape)}, the reference has {tuple(exact.shape)}")
        # Something of size zero is compared absolutely.
        size = rms(exact) or 1.0
        one = Error(rms(mine - exact) / size, 2 * rms(plain - exact) / size + step)
        if not one.found <= one.allowed:  # NaN is refused too
            raise WrongOutput(f"differs from the reference by {one.found:.2g} of it, allowed are {one.allowed:.2g}")
        worst = max(worst, one, key=lambda error: error.found / error.allowed)
    return worst


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def peak_mb(call: Callable[[], Any]) -> float:
    """Memory that a call takes at its peak beyond what was there before, in MB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
