"""Ways to compute a task on one machine: checked, and timed in turns by pass and by what the caches hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import modernbert_kernels as ops
from benchmarks import clock
from benchmarks.clock import Loop, Machine, Rates, Reading, Refused
from benchmarks.gate import worst_row
from benchmarks.harness import Difference, Measured, Result, difference, in_turns
from benchmarks.work import reached

CHOSEN = "what the op chooses"
PASSES = FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
TRAINING = "forward in training"
CACHES = COLD, WARM = "cold caches", "warm caches"

Args = tuple[Any, ...]
Context = Callable[[], AbstractContextManager[Any]]

REFERENCE: Context = partial(ops.backend, "reference")
"""Inside, ops that an op calls are computed by their references too."""


@dataclass(frozen=True)
class Way:
    """One way to compute a task.

    Attributes:
        call: takes the arguments of the task. around: a context for both passes of a call.
        package: must be installed. trains: whether it has a backward pass. slow: compiles for long.
        ready: makes its arguments of the task's before the clock starts.
    """

    name: str
    call: Callable[..., Any]
    settings: str = ""
    around: Context = nullcontext
    package: str | None = None
    trains: bool = True
    slow: bool = False
    ready: Callable[..., Args] = lambda *args, **kwargs: args

    @property
    def installed(self) -> bool:
        return self.package is None or find_spec(self.package) is not None


@dataclass(frozen=True)
class Task:
    """A call `op(*args, **kwargs)` with all ways to compute it; floating-point tensors of `args` get gradients.

    Attributes:
        more: ways beside the backends of the op and its reference.
        compile: whether the reference takes part under torch.compile too.
        flops: operations of the products, forward and backward.
        moved: bytes that must be read and written, forward and backward. By default all arguments and outputs once,
            and backward the gradients of the arguments too.
        ahead: the forward pass computes the gradients too, so that the backward pass alone has no work of its own.
        around: a context for every call, such as autocast.
    """

    what: str
    op: ops.Op[..., Any]
    args: Args = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    more: tuple[Way, ...] = ()
    compile: bool = False
    flops: tuple[int, int] = (0, 0)
    moved: tuple[int, int] | None = None
    ahead: bool = False
    around: Context = nullcontext

    def ways(self) -> Iterator[Way]:
        """The backends of the op that take this call, the reference, and `more`."""
        names = [name for name, when, _ in self.op._choices if when(*self.args, **self.kwargs)]
        for name in names:
            yield Way(name, self.op.backends[name], CHOSEN if name == names[0] else "")
        yield Way("reference", self.op.reference, "" if names else CHOSEN, REFERENCE)
        if self.compile:
            compiled = of_compile(self.op.reference)
            yield Way("torch.compile", compiled, "of the reference, max-autotune", REFERENCE, slow=True)
        yield from self.more

    @property
    def passes(self) -> tuple[str, ...]:
        return ((FORWARD, BOTH) if self.ahead else PASSES) if real(self.args) else (FORWARD,)

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest of its arguments."""
        dtypes = [x.dtype for x in real([*self.args, *self.kwargs.values()])]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor))

    @cached_property
    def all_moved(self) -> tuple[int, int]:
        if self.moved is not None:
            return self.moved
        outputs = call_of(self, Way("", self.op.reference, "", REFERENCE), copied(self, False), FORWARD)()
        forward = self.nbytes + sum(x.nbytes for x in outputs)
        return forward, forward + sum(x.nbytes for x in real(self.args))

    def work(self, which: str) -> tuple[int, int]:
        """Operations and bytes of a pass."""
        wanted = slice(which == BACKWARD, 1 + (which in (BACKWARD, BOTH)))
        return sum(self.flops[wanted]), sum(self.all_moved[wanted])


def randn(*shape: int, dtype: torch.dtype, device: str | torch.device = "cpu", scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)


def offsets(count: int, length: int, device: str | torch.device = "cpu") -> Tensor:
    """Cumulative lengths of `count` texts of one length."""
    return torch.arange(count + 1, device=device, dtype=torch.int32) * length


def real(args: Sequence[Any]) -> list[Tensor]:
    """The tensors that get gradients."""
    return [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]


Slot = tuple[Args, dict[str, Any]]
"""Arguments of a task in memory of their own."""


def copied(task: Task, backward: bool, dtype: torch.dtype | None = None) -> Slot:
    """Arguments of the same numbers in new memory, the real ones in this dtype."""

    def copy(x: Tensor) -> Tensor:
        return x.to(dtype or x.dtype, copy=True) if x.is_floating_point() else x.clone()

    args, kwargs = tree_map_only(Tensor, copy, (task.args, dict(task.kwargs)))
    for x in real(args):
        x.requires_grad_(backward)
    return args, kwargs


def call_of(task: Task, way: Way, slot: Slot, which: str) -> Callable[[], list[Tensor]]:
    """What is timed: outputs, the gradients of all real arguments by a fixed cotangent, or both."""
    # Leaves of this way alone, which no other's backward pass has met on another stream.
    args = tuple(x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in slot[0])
    args, kwargs = way.ready(*args, **slot[1]), slot[1]
    leaves, held, cotangents = [x for x in args if isinstance(x, Tensor) and x.requires_grad], [], []

    def outputs() -> list[Tensor]:
        with torch.set_grad_enabled(which != FORWARD):
            found = way.call(*args, **kwargs)
        return list(found) if isinstance(found, tuple) else [found]

    def call() -> list[Tensor]:
        with task.around(), way.around():
            if which in (FORWARD, TRAINING):
                return outputs()
            found = held or outputs()
            if not cotangents:
                cotangents.extend(cotangent(at, output) for at, output in enumerate(found))
            gradients = torch.autograd.grad(found, leaves, cotangents, retain_graph=which == BACKWARD)
        if which == BACKWARD:
            held[:] = found
            return [*gradients]
        # Without their history, which would keep the stream of this call.
        return [*(output.detach() for output in found), *gradients]

    return call


def cotangent(at: int, output: Tensor) -> Tensor:
    """Random numbers, the same for every way and in every dtype."""
    generator = torch.Generator(output.device).manual_seed(at)
    return torch.randn(output.shape, generator=generator, device=output.device).bfloat16().to(output.dtype)


def truth_of(task: Task, backward: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The reference in float32 (in float64 for float32 arguments), and in the dtype of the arguments."""
    higher, which = torch.float64 if task.dtype is torch.float32 else torch.float32, BOTH if backward else FORWARD
    reference, exact = Way("", task.op.reference, "", REFERENCE), replace(task, around=nullcontext)
    truth = call_of(exact, reference, copied(task, backward, higher), which)()
    return truth, call_of(task, reference, copied(task, backward), which)()


def check(way: Way, task: Task, backward: bool, truth: Sequence[Tensor], plain: Sequence[Tensor]) -> Difference:
    """The worst error of outputs and gradients, or `Refused`.

    Allowed are twice the error of the reference in the same dtype and one rounding step of the coarsest argument, as
    root mean squares over a tensor and shares of the truth; and over each row, as `gate.py` has it.
    """
    got = call_of(task, way, copied(task, backward), BOTH if backward else FORWARD)()
    each = []
    for at, (mine, exact, yardstick) in enumerate(zip(got, truth, plain, strict=True)):
        each.append(difference(mine, exact, yardstick, dtype=task.dtype))
        if exact.numel() and not (worst := worst_row(mine, yardstick, exact, torch.finfo(task.dtype).eps)).is_right:
            raise Refused(f"of result {at}, {worst}")
    return max(each, key=lambda one: one.found / (one.allowed or 1.0))


Checked = list[tuple[Way, Difference]]


def checked(task: Task, ways: Sequence[Way], which: str) -> tuple[Checked, dict[str, str]]:
    """The ways that are right, and why others are refused."""
    right, refused, known, backward = Checked(), {}, None, which != FORWARD
    for way in ways:
        if not way.installed or (backward and not way.trains):
            continue
        try:
            known = known or truth_of(task, backward)
            right.append((way, check(way, task, backward, *known)))
        except Exception as error:
            refused[way.name] = reason_of(error)
    return right, refused


def reason_of(error: Exception) -> str:
    """Whatever other packages raise, and too little memory, costs no other way its row."""
    return str(error) if isinstance(error, Refused) else f"fails: {type(error).__name__}: {str(error)[:300]}"


def measured(
    task: Task, right: Checked, which: str, machine: Machine, cache: str, rounds: int
) -> tuple[list[Measured], dict[str, str]]:
    """Seconds of a call of each way, taken in turns, and why others have none."""
    loops: dict[str, tuple[Measured, Loop]] = {}
    refused: dict[str, str] = {}
    slots, flush = [], None
    for way, error in right:
        try:
            slots, flush = (slots, flush) if slots else memory_of(task, which, machine, cache)
            loop = clock.loop([call_of(task, way, slot, which) for slot in slots], machine, flush)
            settings = ", ".join(filter(None, (way.settings, loop.how)))
            loops[way.name] = Measured(way.name, settings, error, loop.calls), loop
        except Exception as error:
            refused[way.name] = reason_of(error)

    def read(loop: Loop) -> Reading:
        try:
            return machine.read(loop.run)
        except Exception as error:
            raise Refused(reason_of(error)) from None

    taken, failed = in_turns({name: partial(read, loop) for name, (_, loop) in loops.items()}, rounds)
    done = []
    for name, readings in taken.items():
        one, loop = loops[name]
        one.costs = [loop.seconds(reading) for reading in readings]
        done.append(one if machine.is_gpu else one.quiet(readings))
    if done:
        done[0].sensors = clock.sensors(loops[done[0].name][1].run)
    return done, refused | failed


def memory_of(task: Task, which: str, machine: Machine, cache: str) -> tuple[list[Slot], Callable[[], Any] | None]:
    """Copies of the arguments, one after the other used by a call, and what else evicts them from the cache."""
    count, fill = 1, 0
    if cache == COLD:
        count, fill = clock.copies_beyond_cache(task.nbytes, task.work(which)[1], machine.cache)
    slots = [copied(task, which != FORWARD) for _ in range(count)]
    return slots, torch.empty(fill, dtype=torch.uint8, device=machine.device).zero_ if fill else None


def caches_of(task: Task, which: str, machine: Machine) -> tuple[str, ...]:
    """Only where all that a call moves fits into the last cache of a GPU it can be warm."""
    return CACHES if task.work(which)[1] <= machine.cache or not machine.is_gpu else (COLD,)


def timed(
    workload: str,
    task: Task,
    ways: Sequence[Way],
    which: str,
    machine: Machine,
    rates: Rates,
    *,
    rounds: int,
    warm: bool = False,
) -> Result:
    """Check these ways to compute a task, and time those that are right in turns; with `warm` caches too, if it fits.

    What finds its data in a cache has no share of the roofline, which is that of the memory.
    """
    right, refused = checked(task, ways, which)
    rows = []
    for cache in caches_of(task, which, machine)[: 1 + warm] if right else ():
        done, failed = measured(task, right, which, machine, cache, rounds)
        refused |= failed
        known: dict[str, Any] = {"suite": "kernels", "workload": workload, "what": f"{task.what}, {which}, {cache}"}
        known |= {"dtype": str(task.dtype).removeprefix("torch."), "pass": which, "cache": cache}
        known |= {"unit": "us", "device": machine.device.type}
        for one in done:
            of_work = reached(one.median, rates, *task.work(which))
            of_work |= {"percent_of_roofline": None} if cache == WARM else {}
            rows.append(one.row(done, lambda seconds: 1e6 * seconds, **known, **of_work))
    return Result(workload, rows, {f"{task.what}, {which}: {name}": reason for name, reason in refused.items()})


def of_compile(call: Callable[..., Any]) -> Callable[..., Any]:
    """As fast as torch.compile makes it. A backward pass that is timed alone must keep what it reads."""
    torch._dynamo.reset()  # what was compiled before counts towards a limit
    config: Any = import_module("torch._functorch.config")
    config.donated_buffer = False
    return torch.compile(call, dynamic=False, mode="max-autotune-no-cudagraphs")
