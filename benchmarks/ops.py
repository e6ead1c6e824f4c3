"""Suite `kernels`: every op on one GPU, all ways to compute it in turns, forward and with its backward pass.

Time is that of replays of a graph of many calls, each on memory that no cache holds. Outputs and gradients must be
those of the reference in float32 (float64 for float32), within what the tests of the kernels allow. Rates of a copy and
of a product are measured first, and each row has its share of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

import modernbert_kernels as ops
from benchmarks import clock
from benchmarks.cases import Case, named, offsets, randn, work
from benchmarks.clock import Loop, Machine, Rates, Refused
from benchmarks.harness import MUST, Difference, Measured, Result, Run, Sample, Suite, in_turns
from benchmarks.rows import rounded
from benchmarks.work import DATASHEETS

CHOSEN = "what the op chooses"
TOKENS, FEW = 16_384, 2_048
MINUTES, ROUNDS = 8.5, 9
"""After these minutes nothing new is begun where no other limit is set, so that the suite fits into ten minutes."""

Args = tuple[Any, ...]


@dataclass(frozen=True)
class Way:
    """One way to compute a task.

    Attributes:
        call: takes the arguments of the task (or what `prepare` made of them) and its keyword arguments.
        prepare: makes the arguments that this way prefers, before the clock starts.
        restore: turns its gradients into those of the arguments of the task.
        around: a context for both passes of a call.
    """

    name: str
    call: Callable[..., Any]
    settings: str = ""
    prepare: Callable[[Args], Args] = lambda args: args
    restore: Callable[[list[Tensor]], list[Tensor]] = lambda gradients: gradients
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Task:
    """A case with all ways to compute it; `truth` replaces the reference where a higher precision does not give it."""

    what: str
    case: Case
    reference: Callable[..., Any]
    ways: tuple[Way, ...]
    passes: tuple[bool, ...] = (False, True)
    memory: bool = False
    truth: Callable[..., Any] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest of its arguments."""
        dtypes = [x.dtype for x in real((*self.case.args, *self.case.kwargs.values()))]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in real((*self.case.args, *self.case.kwargs.values())))


def real(args: Args) -> list[Tensor]:
    """The tensors that get gradients."""
    return [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]


def copied(case: Case, backward: bool, dtype: torch.dtype | None = None) -> tuple[Args, dict[str, Any]]:
    """Arguments of the same numbers in new memory, the real ones in this dtype."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(dtype or x.dtype, copy=True).requires_grad_(backward) if x.is_floating_point() else x.clone()

    return tuple(map(leaf, case.args)), tree_map_only(Tensor, lambda x: x.clone(), case.kwargs)


def call_of(way: Way, args: Args, kwargs: dict[str, Any], backward: bool) -> Callable[[], list[Tensor]]:
    """What is timed: outputs, and then the gradients of all real arguments by a fixed cotangent."""
    # Leaves of this way alone, which no other's backward pass has met on another stream.
    args = tuple(x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in way.prepare(args))
    leaves, cotangents = [x for x in args if isinstance(x, Tensor) and x.requires_grad], []

    def call() -> list[Tensor]:
        with way.around():
            with torch.set_grad_enabled(backward):
                found = way.call(*args, **kwargs)
            outputs = list(found) if isinstance(found, tuple) else [found]
            if not backward:
                return outputs
            if not cotangents:
                cotangents.extend(cotangent(at, output) for at, output in enumerate(outputs))
            gradients = torch.autograd.grad(outputs, leaves, cotangents)
            # Without their history, which would keep the stream of this call.
            return [*(output.detach() for output in outputs), *gradients]

    return call


def cotangent(at: int, output: Tensor) -> Tensor:
    """Random numbers, the same for every way and in every dtype."""
    generator = torch.Generator(output.device).manual_seed(at)
    return torch.randn(output.shape, generator=generator, device=output.device).bfloat16().to(output.dtype)


def truth_of(task: Task, backward: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The reference in float32 (in float64 for float32 arguments), and in the dtype of the arguments."""
    higher = torch.float64 if task.dtype is torch.float32 else torch.float32
    truth = call_of(Way("", task.truth or task.reference), *copied(task.case, backward, higher), backward)()
    return truth, call_of(Way("", task.reference), *copied(task.case, backward), backward)()


def check(way: Way, task: Task, backward: bool, truth: Sequence[Tensor], plain: Sequence[Tensor]) -> Difference:
    """The worst error of outputs and gradients, or `Refused`.

    Allowed are twice the error of the reference in the same dtype and one rounding step of the coarsest argument, as
    root mean squares over a tensor and shares of the truth.
    """
    got = call_of(way, *copied(task.case, backward), backward)()
    outputs = len(truth) - (len(real(task.case.args)) if backward else 0)
    step = torch.finfo(task.dtype).eps
    worst = Difference(0.0, step)
    for mine, exact, yardstick in zip([*got[:outputs], *way.restore(got[outputs:])], truth, plain, strict=True):
        if mine.shape != exact.shape:
            raise Refused(f"returned shape {tuple(mine.shape)}, the reference has {tuple(exact.shape)}")
        size = rms(exact) or 1.0  # something of size zero is compared absolutely
        found, allowed = rms(mine - exact) / size, 2 * rms(yardstick - exact) / size + step
        if not found <= allowed:  # NaN is refused too
            raise Refused(f"differs from the reference by {found:.2g} of it, allowed are {allowed:.2g}")
        worst = max(worst, Difference(found, allowed), key=lambda one: one.found / (one.allowed or step))
    return worst


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


# Measuring.


def measure(here: Run, names: Sequence[str], *, machine: Machine | None = None) -> Iterator[Result]:
    """A result for each table. A CPU takes --quick only, with a few tasks: those figures are not results."""
    machine = machine or clock.this_machine()
    if not machine.is_gpu:
        if not here.quick:
            raise SystemExit("the suite `kernels` needs a GPU, and there is none here (--quick tries it on the CPU)")
        names = [name for name in names if name in ("attention", "elementwise")]
    if here.minutes is None:
        here = replace(here, minutes=MINUTES, until=here.until if here.quick else clock.time.monotonic() + 60 * MINUTES)
    rates = clock.rates(machine.device, torch.bfloat16, quick=here.quick)
    for name in names:
        for task in TASKS[name](machine.device, FEW if here.quick else TOKENS):
            if here.left() <= 0:
                yield here.rest(name)
                return
            for backward in task.passes:
                yield timed(name, task, backward, machine, rates, rounds=3 if here.quick else ROUNDS)


def timed(workload: str, task: Task, backward: bool, machine: Machine, rates: Rates, *, rounds: int) -> Result:
    """Check every way of a task, and time those that are right in turns."""
    what = f"{task.what}, {'forward + backward' if backward else 'forward'}"
    ready, refused = prepared(task, backward, machine)
    for one in ready.values():
        clock.settle(one[1].run, machine)
    asks = {name: lambda run=loop.run: Sample(*machine.read(run)) for name, (_, loop) in ready.items()}
    taken, _ = in_turns(asks, rounds, retries=0)
    done = []
    for name, (measured, loop) in ready.items():
        measured.costs = [sample.seconds / loop.calls for sample in taken[name]]
        done.append(measured)
        if not machine.is_gpu:
            measured.quiet(taken[name])
    state = clock.sensors(machine.device, next(iter(ready.values()))[1].run) if ready else {}
    gpu, least = clock.identity(machine.device), work(task.case)
    known = gpu | {"pass": "forward + backward" if backward else "forward", "state": state, "suite": "kernels"}
    known |= {"workload": workload, "dtype": str(task.dtype).removeprefix("torch.")}
    moved, computed = least.of(backward) if least else (None, None)
    rows = []
    for one in done:
        found = shares(task, one, moved, computed, rates, gpu["gpu"])
        rows.append(one.row(done, lambda seconds: 1e6 * seconds, what=what, unit="us", **known, **found))
    if task.memory and machine.is_gpu:
        peaks = [replace(one, costs=one.more.pop("peaks")) for one in done]
        rows += [one.row(peaks, float, what=f"{what}, peak memory", unit="MB", **known) for one in peaks]
    return Result(workload, rows, {f"{what}: {name}": reason for name, reason in refused.items()})


def prepared(task: Task, backward: bool, machine: Machine) -> tuple[dict[str, tuple[Measured, Loop]], dict[str, str]]:
    """The ways that are right, each with a loop of calls, and why others are refused."""
    slots = [copied(task.case, backward) for _ in range(clock.copies_beyond_cache(task.nbytes, machine.cache))]
    ready: dict[str, tuple[Measured, Loop]] = {}
    refused: dict[str, str] = {}
    known = None
    for way in task.ways:
        try:
            known = known or truth_of(task, backward)
            error = check(way, task, backward, *known)
            calls = [call_of(way, *slot, backward) for slot in slots]
            more = {}
            if task.memory and machine.is_gpu:
                calls[0]()
                more = {"peaks": [clock.peak_bytes(calls[0]) / 1e6 for _ in range(3)]}
            loop = clock.loop(calls, machine)
            settings = ", ".join(filter(None, (way.settings, loop.how)))
            ready[way.name] = Measured(way.name, settings, error, loop.calls, more=more), loop
        except Refused as reason:
            refused[way.name] = str(reason)
        except Exception as error:
            # Whatever other packages raise, and too little memory, costs no other way its row.
            refused[way.name] = f"fails: {type(error).__name__}: {str(error)[:300]}"
    return ready, refused


def shares(
    task: Task, one: Measured, moved: int | None, computed: int | None, rates: Rates, gpu: str | None
) -> dict[str, float | None]:
    """Bytes and operations per second, and their share of what this machine can do."""
    half, sheet = task.dtype.itemsize == 2, DATASHEETS.get(gpu or "")
    bytes_per_s, flops_per_s = (None if amount is None else amount / one.median for amount in (moved, computed))
    bounds = ((bytes_per_s, sheet.bytes), (flops_per_s, sheet.bfloat16 if half else sheet.float32)) if sheet else ()
    return {
        "gb_per_s": rounded(bytes_per_s, 1e-9),
        "tflop_per_s": rounded(flops_per_s, 1e-12),
        "percent_of_copy": rounded(bytes_per_s, 100 / rates.copy),
        # The rate of bfloat16 is not a yardstick for float32.
        "percent_of_matmul": rounded(flops_per_s, 100 / rates.matmul) if half else None,
        "percent_of_datasheet": rounded(
            max((rate / most for rate, most in bounds if rate is not None), default=None), 100
        ),
    }


# The ways.


def plain(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` with the reference of every op that it calls."""

    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        with ops.backend("reference"):
            return call(*args, **kwargs)

    return run


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()  # what was compiled before counts towards a limit
    return plain(torch.compile(call, dynamic=False))


def task_of(case: Case, what: str, more: Sequence[Way] = (), *, compile: bool = False, memory: bool = False) -> Task:
    """A case with every backend of its op that takes it, the reference, `compile`d too if wanted, and `more`."""
    names = [name for name, when, _ in case.op._choices if when(*case.args, **case.kwargs)]
    ways = [Way(name, case.op.backends[name], CHOSEN if name == names[0] else "") for name in names]
    ways.append(Way("reference", plain(case.op.reference), "" if names else CHOSEN))
    if compile:
        ways.append(Way("torch.compile", compiled(case.op.reference), "of the reference"))
    table = case.op is ops.rotary_table
    # What is overwritten can have no gradient, and positions have none.
    passes = (False,) if table or case.kwargs.get("inplace") else (False, True)
    truth = exact_rotary_table if table else None
    return Task(what, case, plain(case.op.reference), (*ways, *more), passes, memory, truth)


def exact_rotary_table(positions: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """`rotary_table` in float64, which its specification does not reach: no argument of it has a dtype to raise."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device).double() / head_dim
    angle = positions.double()[:, None] * theta**-exponent
    return angle.cos(), angle.sin()


def liger(case: Case) -> tuple[Way, ...]:
    """Liger's kernel for this op, if it has one, with contiguous halves and a bias of zeros ready."""
    if case.op.name not in LIGER or not (find_spec("liger_kernel") and find_spec("triton")):
        return ()
    file, function = LIGER[case.op.name]
    if case.args[1:] == ("silu",):
        file, function = "swiglu", "LigerSiLUMulFunction"
    run = getattr(import_module(f"liger_kernel.ops.{file}"), function)
    if case.op is ops.geglu:
        return (
            Way(
                "liger",
                lambda a, gate: run.apply(a, gate),
                "two halves" if file == "swiglu" else "two halves, tanh in place of erf",
                lambda args: tuple(half.contiguous() for half in args[0].chunk(2, dim=-1)),
                lambda gradients: [torch.cat(gradients, dim=-1)] if gradients else [],
            ),
        )
    if case.op is ops.layer_norm:
        with_bias = lambda x, weight, bias, eps: (x, weight, torch.zeros_like(weight) if bias is None else bias, eps)  # noqa: E731
        return (Way("liger", run.apply, prepare=lambda args: with_bias(*args)),)

    def loss(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        found = run.apply(x, weight, targets, bias)
        return found[0] if isinstance(found, tuple) else found

    return (Way("liger", loss, "fused linear cross-entropy"),)


LIGER = {
    "geglu": ("geglu", "LigerGELUMulFunction"),
    "layer_norm": ("layer_norm", "LigerLayerNormFunction"),
    "linear_cross_entropy": ("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"),
}


def plain_loss(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """What people write: logits of all tokens, in float32 for the softmax."""
    return F.cross_entropy(F.linear(x, weight, bias).float(), targets)


def attentions(case: Case, count: int, *, flex: bool) -> Iterator[Way]:
    """Ours rotated on load and before, every FlashAttention, cuDNN, PyTorch's sdpa and FlexAttention; one length."""
    qkv, _, length = case.args
    window, on_gpu = case.kwargs["window"], qkv.is_cuda
    if "triton" in case.op.backends and on_gpu:
        # One of them is what `triton` does: the difference to it says how much two equal ways differ.
        ours = import_module("modernbert_kernels.fused.attention")._Attention
        for name, rotate in (("on load", True), ("before", False)):
            yield Way(
                f"triton, rotated {name}",
                lambda qkv, cu, longest, *, rope, window, rotate=rotate: ours.apply(
                    qkv, cu, None, *rope, window, rotate
                ),
            )
    flash = import_module("modernbert_kernels.flash")
    if flash.packages.choose(*case.args, **case.kwargs) is not None:
        for name in flash.packages.usable(qkv.device):
            yield Way(
                f"flash: {name}",
                lambda qkv, cu, longest, *, rope, window, name=name: flash._Flash.apply(
                    qkv, cu, None, *rope, longest, window, name
                ),
                "rotated before",
            )

    def batched(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def call(qkv: Tensor, cu_seqlens: Tensor, longest: int, *, rope: Any, window: int | None) -> Tensor:
            q, k, v = ops.rotary(qkv, *rope).unflatten(0, (count, length)).permute(2, 0, 3, 1, 4)
            return attend(q, k, v).transpose(1, 2).flatten(0, 1)

        return call

    at = torch.arange(length, device=qkv.device)
    mask = None if window is None else (at[:, None] - at).abs() <= window
    sdpa = batched(partial(F.scaled_dot_product_attention, attn_mask=mask))
    yield Way("sdpa", sdpa, "rotated before, as PyTorch chooses")
    if on_gpu and mask is None:
        only = partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)
        yield Way("sdpa, cuDNN", sdpa, "rotated before", around=only)
        if qkv.element_size() == 2:
            yield Way("cuDNN, packed", packed_cudnn, "rotated before")
    if on_gpu and flex:
        package = import_module("torch.nn.attention.flex_attention")
        torch._dynamo.reset()
        attend = torch.compile(package.flex_attention, dynamic=False)
        near = lambda batch, head, query, key: (query - key).abs() <= window  # noqa: E731
        blocks = None if window is None else package.create_block_mask(near, None, None, length, length, qkv.device)
        yield Way("FlexAttention", batched(partial(attend, block_mask=blocks)), "rotated before, torch.compile")


def packed_cudnn(qkv: Tensor, cu_seqlens: Tensor, longest: int, *, rope: Any, window: None) -> Tensor:
    return _Cudnn.apply(*ops.rotary(qkv, *rope).unbind(1), cu_seqlens, longest)


class _Cudnn(torch.autograd.Function):
    """PyTorch's packed cuDNN attention, which has no public name: q, k and v `[T, H, K]` of texts in a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:  # pyright: ignore
        bounds = (cu_seqlens, cu_seqlens, longest, longest)
        found = torch.ops.aten._cudnn_attention_forward(q, k, v, None, *bounds, True, 0.0, False, False)
        out, lse, seed, offset = found[0], found[1], found[6], found[7]
        ctx.save_for_backward(q, k, v, out, lse, seed, offset)
        ctx.bounds = bounds
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore
        # No bias is an undefined tensor here, written as None.
        gradients = torch.ops.aten._cudnn_attention_backward(dout, *ctx.saved_tensors, None, *ctx.bounds, 0.0, False)
        return *gradients, None, None


def products(queries: int, documents: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """`maxsim` of sides that have one length each, in one product."""

    def call(q: Tensor, cu_queries: Tensor, d: Tensor, cu_documents: Tensor) -> Tensor:
        q, d = q.to(dtype).unflatten(0, (queries, -1)), d.to(dtype).unflatten(0, (documents, -1))
        return torch.einsum("ase,bte->abst", q, d).max(dim=-1).values.float().sum(dim=-1)

    return call


def maxsims(queries: int, documents: int) -> Iterator[Way]:
    """Plain products, late-interaction-kernels and flash-maxsim, packed and padded; sides have one length each."""
    yield Way("einsum, max and sum", products(queries, documents, torch.bfloat16), "padded")
    yield Way("einsum, max and sum in float32", products(queries, documents, torch.float32), "padded")

    def padded(score: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda q, _, d, __: score(q.unflatten(0, (queries, -1)), d.unflatten(0, (documents, -1)))

    if find_spec("late_interaction_kernels") and find_spec("triton"):
        late = import_module("late_interaction_kernels")
        longest = 32, 300
        varlen = lambda q, cu_q, d, cu_d: late.maxsim_varlen(q, d, cu_q, cu_d, *longest)  # noqa: E731
        yield Way("late-interaction-kernels, packed", varlen)
        yield Way("late-interaction-kernels, padded", padded(late.maxsim))
    if find_spec("flash_maxsim") and find_spec("triton"):
        flash = import_module("flash_maxsim")

        def trained(q: Tensor, d: Tensor) -> Tensor:
            wanted = torch.is_grad_enabled() and q.requires_grad
            return (flash.flash_maxsim_batched_train if wanted else flash.flash_maxsim_batched)(q, d)

        yield Way("flash-maxsim, padded", padded(trained), "in float16")
        if queries == 1:
            packed = lambda q, _, d, cu_d: flash.flash_maxsim_packed(q, d, cu_d, 300)[None]  # noqa: E731
            yield Way("flash-maxsim, packed", packed, "in float16, no gradient")


# The tasks. An op is one more row of ELEMENTWISE, or one more function.

ELEMENTWISE = {
    "add_layer_norm": ("256", "768", "768 float32 stream", "1024"),
    "geglu": ("384 gelu", "1152 gelu", "1152 silu", "2624 gelu"),
    "rotary": ("12 x 64", "12 x 64, in place"),
    "rotary_table": ("64, theta 160,000",),
    "layer_norm": ("768",),
    "embed_layer_norm": ("768",),
    "project_normalize": ("256 to 48", "256 to 128, half of the rows"),
}
"""Of the cases of `cases.py` those of the models that people use."""


def elementwise(device: torch.device, tokens: int) -> Iterator[Task]:
    """Bound by memory: the bytes that a fusion saves are the time that it saves. A CPU tries one case of each op."""
    gpu = device.type == "cuda"
    for dtype in (torch.bfloat16, torch.float32):
        for op, names in ELEMENTWISE.items():
            half = dtype is torch.bfloat16
            chosen = names if half else tuple(name for name in names if name in ("768", "1152 gelu", "12 x 64"))
            chosen = chosen if gpu else chosen[: half or op == "add_layer_norm"]
            for case in named(op, chosen, dtype, str(device), tokens):
                made = "float32" if op == "rotary_table" else str(dtype).removeprefix("torch.")
                yield task_of(case, f"{op} {case.name}, {made}, {tokens:,} tokens", liger(case), compile=gpu and half)
    for mode in ("cls", "mean", "max"):
        x = randn(tokens, 768, dtype=torch.bfloat16, device=str(device))
        case = Case(ops.pool, mode, (x, offsets(tokens // 256, 256, device), mode), {"normalize": True})
        yield task_of(case, f"pool {mode} normalized 768, bfloat16, {tokens // 256} texts of 256 tokens")


def attention(device: torch.device, tokens: int) -> Iterator[Task]:
    """By length at constant tokens: where FlashAttention overtakes ours, and what it gains to rotate on load."""
    gpu, heads, width = device.type == "cuda", 12, 64
    tokens = tokens if gpu else 512
    for length in (128, 256, 512, 1024, 2048, 4096, 8192) if gpu else (256,):
        if (count := tokens // length) == 0:
            continue
        dtype = torch.bfloat16 if gpu else torch.float32  # the backends of the CPU are for float32
        qkv = randn(tokens, 3, heads, width, dtype=dtype, device=str(device))
        rope = ops.rotary_table(torch.arange(length, device=device).repeat(count), 160_000.0, width)
        for window in (64, None) if gpu else (64,):
            case = Case(
                ops.attention, "", (qkv, offsets(count, length, device), length), {"rope": rope, "window": window}
            )
            how = "global" if window is None else f"window {window}"
            what = f"attention {heads} x {width}, {how}, {count} times {length:,} tokens"
            # What has to be compiled takes part here and there: it takes seconds each.
            ways = tuple(attentions(case, count, flex=length in (512, 8192)))
            yield task_of(case, what, ways, compile=gpu and length == 512)


def cross_entropy(device: torch.device, tokens: int) -> Iterator[Task]:
    """Time and peak memory of the loss of masked language modelling, 30 percent of the tokens masked."""
    for case in named("linear_cross_entropy", ("256 to 50368", "768 to 50368"), torch.bfloat16, str(device), tokens):
        more = (Way("F.cross_entropy", plain_loss, "over F.linear of all tokens"), *liger(case))
        yield task_of(case, f"linear_cross_entropy {case.name}, {tokens:,} tokens", more, memory=True)


def maxsim(device: torch.device, tokens: int) -> Iterator[Task]:
    """Queries of 32 and documents of 300 tokens: all pairs as in training, and one query as in reranking."""
    many, single = (16, 100) if tokens == FEW else (128, 1000)
    for queries, documents, width in ((many, many, 128), (many, many, 48), (1, single, 128), (1, single, 48)):
        counts = (32 * queries, 300 * documents)
        vectors = (randn(n, width, dtype=torch.float32, device=str(device)) for n in counts)
        q, d = (F.normalize(x, dim=-1).bfloat16() for x in vectors)
        case = Case(ops.maxsim, "", (q, offsets(queries, 32, device), d, offsets(documents, 300, device)))
        what = f"maxsim of {queries} queries and {documents} documents, width {width}"
        task = task_of(case, what, tuple(maxsims(queries, documents)))
        # The reference is a loop over pairs, which takes seconds for thousands.
        ways = tuple(way for way in task.ways if way.name != "reference" or queries == 1)
        yield replace(task, reference=products(queries, documents, torch.float32), ways=ways)


TASKS: dict[str, Callable[[torch.device, int], Iterator[Task]]] = {
    "attention": attention,
    "cross-entropy": cross_entropy,
    "maxsim": maxsim,
    "elementwise": elementwise,
}
SUITES = {
    "kernels": Suite(
        "every op on one GPU, all ways to compute it, forward and with its backward pass",
        {
            "attention": "local and global by length, 128 to 8192: ours, FlashAttention, cuDNN, FlexAttention, sdpa",
            "cross-entropy": "time and peak memory of the loss of masked tokens, F.cross_entropy and Liger",
            "maxsim": "128 queries and documents of 32 and 300 tokens, and one query against 1000; two libraries",
            "elementwise": "norms, GeGLU, rotary, projection, pooling: their share of a copy's rate; Liger",
        },
        "every backend of an op, its reference under torch.compile, FlashAttention, Liger-Kernel, "
        "late-interaction-kernels, flash-maxsim",
        measure,
        MUST,
        "about nine minutes",
        weight=20,
    )
}
