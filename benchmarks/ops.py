"""Suite `kernels`: every op on one GPU, all ways to compute it in turns, forward and with its backward pass.

Time is that of replays of a graph of many calls, each on memory that no cache holds. Outputs and gradients must be
those of the reference in float32 (float64 for float32), within what the tests of the kernels allow. Rates of a copy and
of a product are measured first, and each row has its share of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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
from benchmarks.clock import Loop, Machine, Rates, Refused
from benchmarks.gate import worst_row
from benchmarks.harness import Difference, Measured, Result, Run, Suite, difference, in_turns
from benchmarks.rows import rounded
from benchmarks.work import visible_pairs

CHOSEN = "what the op chooses"
TOKENS, FEW = 16_384, 2_048
ROUNDS = 9

Args = tuple[Any, ...]


@dataclass(frozen=True)
class Way:
    """One way to compute a task.

    Attributes:
        call: takes the arguments of the task. around: a context for both passes of a call.
    """

    name: str
    call: Callable[..., Any]
    settings: str = ""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Task:
    """A call `op(*args, **kwargs)` with all ways to compute it; floating-point tensors of `args` get gradients.

    Attributes:
        more: ways beside the backends of the op and its reference.
        compile: whether the reference takes part under torch.compile too.
        moved: bytes that a forward pass must read and write; by default all arguments and outputs once.
        flops: operations of the products, of a forward pass and of both passes.
    """

    what: str
    op: ops.Op[..., Any]
    args: Args
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    more: tuple[Way, ...] = ()
    compile: bool = False
    moved: int | None = None
    flops: tuple[int, int] | None = None

    def ways(self) -> Iterator[Way]:
        """The backends of the op that take this call, the reference, and `more`."""
        names = [name for name, when, _ in self.op._choices if when(*self.args, **self.kwargs)]
        for name in names:
            yield Way(name, self.op.backends[name], CHOSEN if name == names[0] else "")
        yield Way("reference", plain(self.op.reference), "" if names else CHOSEN)
        if self.compile:
            yield Way("torch.compile", compiled(self.op.reference), "of the reference")
        yield from self.more

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)]

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest of its arguments."""
        dtypes = [x.dtype for x in real(self.tensors)]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)


def randn(*shape: int, dtype: torch.dtype, device: str | torch.device = "cpu", scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def offsets(count: int, length: int, device: str | torch.device = "cpu") -> Tensor:
    """Cumulative lengths of `count` texts of one length."""
    return torch.arange(count + 1, device=device, dtype=torch.int32) * length


def real(args: Sequence[Any]) -> list[Tensor]:
    """The tensors that get gradients."""
    return [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]


def copied(task: Task, backward: bool, dtype: torch.dtype | None = None) -> tuple[Args, dict[str, Any]]:
    """Arguments of the same numbers in new memory, the real ones in this dtype."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(dtype or x.dtype, copy=True).requires_grad_(backward) if x.is_floating_point() else x.clone()

    return tuple(map(leaf, task.args)), tree_map_only(Tensor, lambda x: x.clone(), dict(task.kwargs))


def call_of(way: Way, args: Args, kwargs: dict[str, Any], backward: bool) -> Callable[[], list[Tensor]]:
    """What is timed: outputs, and then the gradients of all real arguments by a fixed cotangent."""
    # Leaves of this way alone, which no other's backward pass has met on another stream.
    args = tuple(x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args)
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
    reference = Way("", plain(task.op.reference))
    truth = call_of(reference, *copied(task, backward, higher), backward)()
    return truth, call_of(reference, *copied(task, backward), backward)()


def check(way: Way, task: Task, backward: bool, truth: Sequence[Tensor], plain: Sequence[Tensor]) -> Difference:
    """The worst error of outputs and gradients, or `Refused`.

    Allowed are twice the error of the reference in the same dtype and one rounding step of the coarsest argument, as
    root mean squares over a tensor and shares of the truth; and over each row, as `gate.py` has it.
    """
    got = call_of(way, *copied(task, backward), backward)()
    each = []
    for at, (mine, exact, yardstick) in enumerate(zip(got, truth, plain, strict=True)):
        each.append(difference(mine, exact, yardstick, dtype=task.dtype))
        if exact.numel() and not (worst := worst_row(mine, yardstick, exact, torch.finfo(task.dtype).eps)).is_right:
            raise Refused(f"of result {at}, {worst}")
    return max(each, key=lambda one: one.found / (one.allowed or 1.0))


def measure(here: Run, names: Sequence[str]) -> Iterator[Result]:
    """A result for each task and pass. A CPU takes --quick only, with a few tasks: those figures are not results."""
    machine = clock.this_machine()
    if not machine.is_gpu:
        if not here.quick:
            raise SystemExit("the suite `kernels` needs a GPU, and there is none here (--quick tries it on the CPU)")
        names = [name for name in names if name in ("attention", "elementwise")]
    rates = clock.rates(machine.device, torch.bfloat16, quick=here.quick)
    for name in names:
        for task in TASKS[name][0](machine.device, FEW if here.quick else TOKENS):
            if here.left() <= 0:
                yield here.rest(name)
                return
            # What is overwritten can have no gradient.
            for backward in (False,) if task.kwargs.get("inplace") else (False, True):
                ways, rounds = tuple(task.ways()), 3 if here.quick else ROUNDS
                yield timed(name, task, ways, backward, machine, rates, rounds=rounds)


def timed(
    workload: str, task: Task, ways: Sequence[Way], backward: bool, machine: Machine, rates: Rates, *, rounds: int
) -> Result:
    """Check these ways to compute a task, and time those that are right in turns."""
    what = f"{task.what}, {'forward + backward' if backward else 'forward'}"
    ready, refused = prepared(task, ways, backward, machine)
    taken, _ = in_turns({name: partial(machine.read, loop.run) for name, (_, loop) in ready.items()}, rounds)
    for name, (measured, loop) in ready.items():
        measured.costs = [reading.seconds / loop.calls for reading in taken[name]]
        if not machine.is_gpu:
            measured.quiet(taken[name])
    done = [measured for measured, _ in ready.values()]
    known: dict[str, Any] = {"pass": "forward + backward" if backward else "forward", "device": machine.device.type}
    known |= {"suite": "kernels", "workload": workload, "dtype": str(task.dtype).removeprefix("torch.")}
    rows = []
    for one in done:
        found = shares(task, one, backward, rates)
        rows.append(one.row(done, lambda seconds: 1e6 * seconds, what=what, unit="us", **known, **found))
    return Result(workload, rows, {f"{what}: {name}": reason for name, reason in refused.items()})


def prepared(
    task: Task, ways: Sequence[Way], backward: bool, machine: Machine
) -> tuple[dict[str, tuple[Measured, Loop]], dict[str, str]]:
    """The ways that are right, each with a loop of calls, and why others are refused."""
    slots = [copied(task, backward) for _ in range(clock.copies_beyond_cache(task.nbytes, machine.cache))]
    ready: dict[str, tuple[Measured, Loop]] = {}
    refused: dict[str, str] = {}
    known = None
    for way in ways:
        try:
            known = known or truth_of(task, backward)
            error = check(way, task, backward, *known)
            calls = [call_of(way, *slot, backward) for slot in slots]
            loop = clock.loop(calls, machine)
            settings = ", ".join(filter(None, (way.settings, loop.how)))
            ready[way.name] = Measured(way.name, settings, error, loop.calls), loop
        except Refused as reason:
            refused[way.name] = str(reason)
        except Exception as error:
            # Whatever other packages raise, and too little memory, costs no other way its row.
            refused[way.name] = f"fails: {type(error).__name__}: {str(error)[:300]}"
    return ready, refused


def shares(task: Task, one: Measured, backward: bool, rates: Rates) -> dict[str, float | None]:
    """Bytes of a forward pass and operations per second, and their share of what this machine reached in this run."""
    bytes_per_s = None if backward else (task.moved or task.nbytes + bytes_of_outputs(task)) / one.median
    flops_per_s = task.flops[backward] / one.median if task.flops else None
    return {
        "gb_per_s": rounded(bytes_per_s, 1e-9),
        "tflop_per_s": rounded(flops_per_s, 1e-12),
        "percent_of_copy": rounded(bytes_per_s, 100 / rates.copy),
        # The rate of bfloat16 is not a yardstick for float32.
        "percent_of_matmul": rounded(flops_per_s, 100 / rates.matmul) if task.dtype.itemsize == 2 else None,
    }


def bytes_of_outputs(task: Task) -> int:
    return sum(x.nbytes for x in call_of(Way("", task.op), *copied(task, False), False)())


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


def liger(file: str, function: str, call: Callable[..., Any], settings: str = "") -> tuple[Way, ...]:
    """A kernel of Liger, which `call` gets before the arguments of the task."""
    if not (find_spec("liger_kernel") and find_spec("triton")):
        return ()
    run = getattr(import_module(f"liger_kernel.ops.{file}"), function).apply
    return (Way("liger", partial(call, run), settings),)


def plain_loss(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """What people write: logits of all tokens, in float32 for the softmax."""
    return F.cross_entropy(F.linear(x, weight, bias).float(), targets)


def attentions(args: Args, kwargs: Mapping[str, Any], count: int, *, flex: bool) -> Iterator[Way]:
    """FlashAttention at every length, cuDNN, PyTorch's sdpa and FlexAttention; of texts of one length."""
    qkv, _, length = args
    window, on_gpu = kwargs["window"], qkv.is_cuda
    if on_gpu and "flash" in ops.attention.backends:
        yield Way("flash, forced", ops.attention.backends["flash"], "also where the op takes another backend")

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
        yield Way("sdpa, cuDNN", sdpa, "rotated before", around=partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION))
    if on_gpu and flex:
        package = import_module("torch.nn.attention.flex_attention")
        torch._dynamo.reset()
        attend = torch.compile(package.flex_attention, dynamic=False)
        near = lambda batch, head, query, key: (query - key).abs() <= window  # noqa: E731
        blocks = None if window is None else package.create_block_mask(near, None, None, length, length, qkv.device)
        yield Way("FlexAttention", batched(partial(attend, block_mask=blocks)), "rotated before, torch.compile")


def maxsims(queries: int, documents: int) -> Iterator[Way]:
    """Plain products, late-interaction-kernels and flash-maxsim; sides have one length each."""

    def padded(score: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda q, _, d, __: score(q.unflatten(0, (queries, -1)), d.unflatten(0, (documents, -1)))

    def einsum(q: Tensor, d: Tensor) -> Tensor:
        return torch.einsum("ase,bte->abst", q, d).max(dim=-1).values.float().sum(dim=-1)

    yield Way("einsum, max and sum", padded(einsum), "padded")
    if find_spec("late_interaction_kernels") and find_spec("triton"):
        late = import_module("late_interaction_kernels")
        varlen = lambda q, cu_q, d, cu_d: late.maxsim_varlen(q, d, cu_q, cu_d, 32, 300)  # noqa: E731
        yield Way("late-interaction-kernels, packed", varlen)
    if find_spec("flash_maxsim") and find_spec("triton"):
        flash = import_module("flash_maxsim")

        def trained(q: Tensor, d: Tensor) -> Tensor:
            wanted = torch.is_grad_enabled() and q.requires_grad
            return (flash.flash_maxsim_batched_train if wanted else flash.flash_maxsim_batched)(q, d)

        yield Way("flash-maxsim, padded", padded(trained), "in float16")


def elementwise(device: torch.device, tokens: int) -> Iterator[Task]:
    """Bound by memory: the bytes that a fusion saves are the time that it saves."""
    make = partial(randn, dtype=torch.bfloat16, device=device)
    of_256, x, of_1024, qkv = make(tokens, 256), make(tokens, 768), make(tokens, 1024), make(tokens, 3, 12, 64)
    norms = {width: (make(width), None, 1e-5) for width in (256, 768, 1024)}
    at = torch.arange(tokens, device=device)
    rope = dict(zip(("cos_TR", "sin_TR"), ops.rotary_table(at % 512, 10_000.0, 64), strict=True))

    def task(what: str, op: ops.Op[..., Any], *args: Any, **known: Any) -> Task:
        return Task(f"{what}, bfloat16, {tokens:,} tokens", op, args, compile=device.type == "cuda", **known)

    # Its norm needs a bias.
    norm = liger("layer_norm", "LigerLayerNormFunction", lambda run, x, w, _, eps: run(x, w, torch.zeros_like(w), eps))
    yield task("layer_norm 768", ops.layer_norm, x, *norms[768], more=norm)
    yield task("add_layer_norm 256", ops.add_layer_norm, of_256, of_256, *norms[256])
    yield task("add_layer_norm 768", ops.add_layer_norm, x, x, *norms[768])
    yield task("add_layer_norm 768, float32 stream", ops.add_layer_norm, x.float(), x, *norms[768])
    yield task("add_layer_norm 1024", ops.add_layer_norm, of_1024, of_1024, *norms[1024])
    for width, activation in ((384, "gelu"), (1152, "gelu"), (1152, "silu"), (2624, "gelu")):
        yield task(f"geglu {width} {activation}", ops.geglu, make(tokens, 2 * width), activation)
    yield task("rotary 12 x 64", ops.rotary, qkv, kwargs=rope)
    yield task("rotary 12 x 64, in place", ops.rotary, kwargs={"qkv_T3HK": qkv, **rope, "inplace": True})
    table, ids = make(50_368, 768), at * 7919 % 50_368
    yield task("embed_layer_norm 768", ops.embed_layer_norm, ids, table, *norms[768], moved=2 * x.nbytes)
    yield task("project_normalize 256 to 48", ops.project_normalize, of_256, make(48, 256))
    half = "project_normalize 256 to 128, half of the rows", ops.project_normalize
    yield task(*half, of_256, make(128, 256), None, at[::2], moved=of_256.nbytes)
    texts = offsets(tokens // 256, 256, device)
    for mode in ("cls", "mean", "max"):
        moved = 2 * x[::256].nbytes if mode == "cls" else None  # one row of each text
        yield task(f"pool {mode}", ops.pool, x, texts, mode, kwargs={"normalize": True}, moved=moved)


def attention(device: torch.device, tokens: int) -> Iterator[Task]:
    """By length at constant tokens: where FlashAttention overtakes ours."""
    gpu, heads, width = device.type == "cuda", 12, 64
    tokens = tokens if gpu else 256
    for length in (128, 256, 512, 1024, 2048, 4096, 8192) if gpu else (128,):
        if (count := tokens // length) == 0:
            continue
        dtype = torch.bfloat16 if gpu else torch.float32  # the backends of the CPU are for float32
        qkv = randn(tokens, 3, heads, width, dtype=dtype, device=device)
        rope = ops.rotary_table(torch.arange(length, device=device).repeat(count), 160_000.0, width)
        for window in (64, None) if gpu else (64,):
            args, kwargs = (qkv, offsets(count, length, device), length), {"rope": rope, "window": window}
            how = "global" if window is None else f"window {window}"
            what = f"attention {heads} x {width}, {how}, {count} times {length:,} tokens"
            # Two products over the visible pairs, and five backward: the scores once more, and four gradients.
            product = 2 * heads * width * count * visible_pairs(length, window)
            # What has to be compiled takes part here and there: it takes seconds each.
            more = tuple(attentions(args, kwargs, count, flex=length in (512, 8192)))
            flops, compile = (2 * product, 7 * product), gpu and length == 512
            yield Task(what, ops.attention, args, kwargs, more, compile, flops=flops)


def cross_entropy(device: torch.device, tokens: int) -> Iterator[Task]:
    """The loss of masked language modelling, 30 percent of the tokens masked."""
    classes, at = 50_368, torch.arange(tokens, device=device)
    targets = (at * 7919 % classes).masked_fill(at % 10 >= 3, -100)
    for width in (256, 768):
        x, weight = (randn(n, width, dtype=torch.bfloat16, device=device, scale=width**-0.5) for n in (tokens, classes))
        loss = lambda run, x, weight, bias, targets: run(x, weight, targets, bias)[0]  # noqa: E731
        fused = liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction", loss)
        more = (Way("F.cross_entropy", plain_loss, "over F.linear of all tokens"), *fused)
        product = 2 * int((targets >= 0).sum()) * weight.numel()
        what, args = f"linear_cross_entropy {width} to {classes}, {tokens:,} tokens", (x, weight, None, targets)
        flops = (product, 3 * product)
        yield Task(what, ops.linear_cross_entropy, args, {}, more, flops=flops)


def maxsim(device: torch.device, tokens: int) -> Iterator[Task]:
    """Queries of 32 and documents of 300 tokens: all pairs as in training, and one query as in reranking."""
    many, single = (16, 100) if tokens == FEW else (128, 1000)
    for queries, documents, width in ((many, many, 128), (many, many, 48), (1, single, 128), (1, single, 48)):
        vectors = (randn(n, width, dtype=torch.float32, device=device) for n in (32 * queries, 300 * documents))
        q, d = (F.normalize(x, dim=-1).bfloat16() for x in vectors)
        args = (q, offsets(queries, 32, device), d, offsets(documents, 300, device))
        what = f"maxsim of {queries} queries and {documents} documents, width {width}"
        # Backward each query token meets one token of every document, twice.
        flops = 2 * len(q) * d.numel(), 2 * len(q) * d.numel() + 4 * q.numel() * documents
        yield Task(what, ops.maxsim, args, {}, tuple(maxsims(queries, documents)), flops=flops)


TASKS: dict[str, tuple[Callable[[torch.device, int], Iterator[Task]], str]] = {
    "attention": (attention, "local and global by length, 128 to 8192: ours, FlashAttention, cuDNN, FlexAttention"),
    "cross-entropy": (cross_entropy, "the loss of masked tokens, F.cross_entropy and Liger"),
    "maxsim": (maxsim, "128 queries and documents of 32 and 300 tokens, and one query against 1000; two libraries"),
    "elementwise": (elementwise, "norms, GeGLU, rotary, projection, pooling: their share of a copy's rate; Liger"),
}
SUITES = {
    "kernels": Suite(
        "every op on one GPU, all ways to compute it, forward and with its backward pass",
        {name: line for name, (_, line) in TASKS.items()},
        "every backend of an op, its reference under torch.compile, FlashAttention, Liger-Kernel, "
        "late-interaction-kernels, flash-maxsim",
        measure,
        on="needs a GPU; about nine minutes",
        needs_gpu=True,
        weight=20,
    )
}
