"""Suite `kernels`: every op on one GPU, next to what else computes it; each pass alone, with cold and warm caches."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cache, partial
from importlib import import_module
from itertools import islice, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import modernbert_kernels as ops
from benchmarks import clock
from benchmarks.harness import Result, Run, Suite
from benchmarks.inputs import SETS
from benchmarks.ops import FORWARD, Args, Task, Way, call_of, copied, offsets, randn, timed
from benchmarks.work import visible_pairs
from modernbert_kernels.flash import flash_forward, packages

TOKENS, FEW, FEWEST = 16_384, 2_048, 256
"""Of a batch; in a try-out; and there on a CPU."""

SWEEP = (32, 512, 4_096, 65_536)
"""Tokens of a batch beside `TOKENS`."""

ROUNDS, HURRY = 5, 10.0
"""Samples of a call; minutes of a run below which they are shorter, and what compiles for long is left out."""


def peer(name: str, module: str, call: Callable[..., Any], settings: str = "", **known: Any) -> Way:
    """A function of a package, whose module `call` gets before the arguments of the task."""
    run = lambda *args, **kwargs: call(import_module(module), *args, **kwargs)  # noqa: E731
    return Way(name, run, settings, package=module.partition(".")[0], **known)


def attention_task(
    lengths: Sequence[int], heads: int, width: int, window: int | None, *, name: str = "", **of: Any
) -> Task:
    """Of texts of these lengths, in this `dtype` on this `device`."""
    cu_seqlens = torch.tensor([0, *lengths], device=of["device"]).cumsum(0, dtype=torch.int32)
    tokens, at = sum(lengths), torch.cat([torch.arange(length, device=of["device"]) for length in lengths])
    # The ranges of tokens are computed once for all layers of a pass.
    kwargs = {"rope": ops.rotary_table(at, 160_000.0, width), "window": window}
    kwargs |= {"ranges_3T": ops.token_ranges(cu_seqlens, None, tokens)}
    # Two products over the visible pairs, and five backward: the scores once more, and four gradients.
    flops = 2 * heads * width * sum(visible_pairs(length, window) for length in lengths)
    how = "global" if window is None else f"window {window}"
    name = name or f"{len(lengths):,} x {lengths[0]:,}"
    args = (randn(tokens, 3, heads, width, **of), cu_seqlens, max(lengths))
    what = f"attention {heads} x {width}, {how}, {name}, {tokens:,} tokens"
    row = args[0].nbytes // 3  # backward reads q, k, v, the output and its gradient
    return Task(what, ops.attention, args, kwargs, flops=(2 * flops, 5 * flops), moved=(4 * row, 8 * row))


def attentions(lengths: Sequence[int], window: int | None, qkv: Tensor, compiling: bool) -> Iterator[Way]:
    """FlashAttention at every length and at its best, PyTorch's sdpa and cuDNN of equal lengths, FlexAttention."""
    on_gpu, equal, longest = qkv.is_cuda, len(set(lengths)) == 1, max(lengths)
    if on_gpu:
        yield Way("flash, forced", ops.attention.backends["flash"], "also where the op takes another backend")
    for name in packages.usable(qkv.device):
        attend = partial(flash, name)
        known: dict[str, Any] = {"trains": False}
        yield Way(f"FlashAttention ({name}) alone", attend, "rotated before the clock starts", ready=rotated, **known)
        in_place = lambda *args, on=attend, **kwargs: on(*rotated(*args, inplace=True, **kwargs), **kwargs)  # noqa: E731
        yield Way(f"FlashAttention ({name}), rotated in place", in_place, "as text-embeddings-inference", **known)

    def batched(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        shape = (len(lengths), longest) if equal else (1, sum(lengths))

        def call(qkv: Tensor, *_: Any, rope: Any, **__: Any) -> Tensor:
            q, k, v = ops.rotary(qkv, *rope).unflatten(0, shape).permute(2, 0, 3, 1, 4)
            return attend(q, k, v).transpose(1, 2).flatten(0, 1)

        return call

    at = torch.arange(longest if equal else sum(lengths), device=qkv.device)
    if equal:
        mask = None if window is None else (at[:, None] - at).abs() <= window
        sdpa = batched(partial(F.scaled_dot_product_attention, attn_mask=mask))
        yield Way("sdpa", sdpa, "rotated before, as PyTorch chooses")
        if on_gpu and mask is None:
            yield Way("sdpa, cuDNN", sdpa, "rotated before", around=partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION))
    if on_gpu and compiling:
        package, cu_seqlens = import_module("torch.nn.attention.flex_attention"), torch.tensor(lengths).cumsum(0)
        text = torch.zeros_like(at) if equal else torch.bucketize(at, cu_seqlens.to(at.device), right=True)
        torch._dynamo.reset()
        attend = torch.compile(package.flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")

        def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = text[query] == text[key]
            return seen if window is None else seen & ((query - key).abs() <= window)

        @cache
        def blocks() -> Any:
            masked = window is not None or not equal
            return package.create_block_mask(near, None, None, len(at), len(at), at.device) if masked else None

        def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, block_mask=blocks())

        settings = "rotated before, torch.compile, max-autotune"
        yield Way("FlexAttention", batched(flex), settings, slow=True)


def rotated(qkv: Tensor, *args: Any, rope: Any, inplace: bool = False, **_: Any) -> Args:
    return (ops.rotary(qkv, *rope, inplace=inplace), *args)


def flash(name: str, rotated: Tensor, cu_seqlens: Tensor, longest: int, *, window: int | None, **_: Any) -> Tensor:
    return flash_forward(rotated, cu_seqlens, None, longest, window, name)[0]


def attention(device: torch.device, tokens: int) -> Iterator[Task]:
    """Lengths at constant tokens, sets of the real world, fewer and more tokens, heads and their widths."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32  # the backends of the CPU are for float32
    equal = [(length,) * (tokens // length) for length in (512, 1024, 128, 256, 2048, 4096, 8192) if length <= tokens]
    usual = (min(512, tokens),) * max(1, tokens // 512)
    cases: list[tuple[Sequence[int], int, int, str]] = [(lengths, 12, 64, "") for lengths in equal or [usual]]
    cases += [(lengths, 12, 64, name) for name, lengths in ragged(tokens).items()]
    cases += [((min(512, count),) * max(1, count // 512), 12, 64, "") for count in SWEEP if gpu]
    cases += [(usual, heads, width, "") for heads, width in ((4, 64), (16, 64), (4, 32), (12, 32), (16, 32))]
    for lengths, heads, width, name in cases:
        for window in (64, None):
            # What has to be compiled takes part here and there.
            compile = gpu and (heads, width) == (12, 64) and (bool(name) or lengths[0] in (512, 8192))
            task = attention_task(lengths, heads, width, window, name=name, dtype=dtype, device=device)
            more = tuple(attentions(lengths, window, task.args[0], compile))
            yield replace(task, more=more, compile=compile)


def ragged(tokens: int) -> dict[str, Sequence[int]]:
    """Sets of about so many tokens: the paper's variable lengths, queries, one long text beside many short ones."""
    return {
        "the paper's lengths": SETS["variable-short"].first(max(1, tokens // 256)),
        "queries of 8 to 32 tokens": [8 + 3 * at % 25 for at in range(max(1, tokens // 20))],
        "one long beside texts of 32": (max(32, tokens // 2), *(32,) * max(1, tokens // 64)),
    }


def geglu_task(tokens: int, width: int, activation: str = "gelu", **of: Any) -> Task:
    function, module = {"silu": ("LigerSiLUMulFunction", "swiglu"), "gelu": ("LigerGELUMulFunction", "geglu")}[
        activation
    ]
    halves = lambda home, h, _: getattr(home, function).apply(*h.chunk(2, dim=-1))  # noqa: E731
    settings = ("GELU by tanh, " if activation == "gelu" else "") + "copies of both halves"
    more = (peer("Liger", f"liger_kernel.ops.{module}", halves, settings),)
    args = (randn(tokens, 2 * width, **of), activation)
    return Task(f"geglu {width} {activation}, {tokens:,} tokens", ops.geglu, args, more=more)


def elementwise(device: torch.device, tokens: int) -> Iterator[Task]:
    """Bound by memory: the bytes that a fusion saves are the time that it saves."""
    of: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    make = partial(randn, **of)

    def norm(width: int) -> Args:
        return make(width), None, 1e-5

    def task(what: str, op: ops.Op[..., Any], *args: Any, **known: Any) -> Task:
        return Task(f"{what}, {tokens:,} tokens", op, args, **known)

    def added(width: int, tokens: int = tokens) -> Task:
        x = make(tokens, width)
        known: dict[str, Any] = {"moved": (4 * x.nbytes, 4 * x.nbytes)}
        return Task(f"add_layer_norm {width}, {tokens:,} tokens", ops.add_layer_norm, (x, x, *norm(width)), **known)

    x, of_256, qkv = make(tokens, 768), make(tokens, 256), make(tokens, 3, 12, 64)
    ones = lambda home, x, w, _, eps: home.LigerLayerNormFunction.apply(x, w, torch.zeros_like(w), eps)  # noqa: E731
    fast = lambda home, x, w, bias, eps: home.layernorm_fwd(x, w, bias, eps)  # noqa: E731
    exactly = lambda x, w, *rest: (x, w.float(), *rest)  # noqa: E731
    more = (
        peer("Liger", "liger_kernel.ops.layer_norm", ones, "with a bias, which it needs"),
        peer("quack", "quack.rmsnorm", fast, "float32 weights, forward only", ready=exactly, trains=False),
    )
    yield task("layer_norm 768", ops.layer_norm, x, *norm(768), more=more)
    yield from (added(width) for width in (768, 256, 384, 1024, 1792))
    of_training = (x.float(), x, make(768).float(), None, 1e-5, torch.bfloat16)
    moved = (12 * x.numel(), 14 * x.numel())
    yield task("add_layer_norm 768, autocast in training", ops.add_layer_norm, *of_training, moved=moved)
    yield from (geglu_task(tokens, width, **of) for width in (1152, 384, 2624))
    yield geglu_task(tokens, 1152, "silu", **of)
    for count in SWEEP if device.type == "cuda" else ():
        yield from (added(width, count) for width in (768, 256))
        yield from (geglu_task(count, width, **of) for width in (1152, 384))
    at = torch.arange(tokens, device=device)
    rope = dict(zip(("cos_TR", "sin_TR"), ops.rotary_table(at % 512, 10_000.0, 64), strict=True))
    tables = sum(table.nbytes for table in rope.values())
    moved = (2 * qkv.nbytes + tables,) * 2
    yield task("rotary 12 x 64", ops.rotary, qkv, kwargs=rope, moved=moved)
    in_place, moved = {"qkv_T3HK": qkv, **rope, "inplace": True}, (4 * qkv.nbytes // 3 + tables, 0)  # not v
    yield task("rotary 12 x 64, in place", ops.rotary, kwargs=in_place, moved=moved)
    table, ids = make(50_368, 768), at * 7919 % 50_368
    moved = (2 * x.nbytes, x.nbytes + table.nbytes)
    yield task("embed_layer_norm 768", ops.embed_layer_norm, ids, table, *norm(768), moved=moved)
    yield task("project_normalize 256 to 48", ops.project_normalize, of_256, make(48, 256))
    half, moved = (of_256, make(128, 256), None, at[::2]), (of_256.nbytes, 3 * of_256.nbytes // 2)
    yield task("project_normalize 256 to 128, half of the rows", ops.project_normalize, *half, moved=moved)
    texts = offsets(tokens // 256, 256, device)
    for mode in ("cls", "mean", "max"):
        row = x[::256].nbytes  # one of each text
        moved = (row + (row if mode == "cls" else x.nbytes), row + x.nbytes)
        yield task(f"pool {mode}", ops.pool, x, texts, mode, kwargs={"normalize": True}, moved=moved)


def masked_targets(tokens: int, classes: int, device: torch.device) -> Tensor:
    """Of 30 percent of the tokens."""
    at = torch.arange(tokens, device=device)
    return (at * 7919 % classes).masked_fill(at % 10 >= 3, -100)


def cross_entropy(device: torch.device, tokens: int) -> Iterator[Task]:
    """The loss of masked language modelling, 30 percent of the tokens masked."""
    classes = 50_368 if device.type == "cuda" else 512
    targets = masked_targets(tokens, classes, device)
    fused = lambda home, x, weight, bias, targets: home.LigerFusedLinearCrossEntropyFunction.apply(  # noqa: E731
        x, weight, targets, bias
    )[0]
    chunked = lambda home, x, weight, _, targets: home.chunked_linear_cross_entropy(x, weight, targets)  # noqa: E731
    plain = lambda x, weight, bias, targets: F.cross_entropy(F.linear(x, weight, bias).float(), targets)  # noqa: E731
    more = (
        Way("F.cross_entropy", plain, "over F.linear of all tokens, float32 for the softmax"),
        peer("Liger", "liger_kernel.ops.fused_linear_cross_entropy", fused),
        peer("quack", "quack.linear_cross_entropy", chunked, "tuned"),
    )
    for width in (768, 256):
        x, weight = (randn(n, width, dtype=torch.bfloat16, device=device, scale=width**-0.5) for n in (tokens, classes))
        flops = 2 * int((targets >= 0).sum()) * weight.numel()
        what, args = f"linear_cross_entropy {width} to {classes}, {tokens:,} tokens", (x, weight, None, targets)
        yield Task(what, ops.linear_cross_entropy, args, {}, more, flops=(flops, 2 * flops), ahead=True)


def maxsim_task(queries: int, documents: int, width: int, *, tokens: int = 32, **of: Any) -> Task:
    """All pairs of queries of so many tokens and documents of 300."""
    vectors = (randn(n, width, dtype=torch.float32, device=of["device"]) for n in (tokens * queries, 300 * documents))
    q, d = (F.normalize(x, dim=-1).to(of["dtype"]) for x in vectors)
    args = (q, offsets(queries, tokens, of["device"]), d, offsets(documents, 300, of["device"]))
    # Backward each query token meets one token of every document, twice.
    flops, what = (2 * len(q) * d.numel(), 4 * q.numel() * documents), f"{queries} queries and {documents} documents"
    return Task(f"maxsim of {what}, width {width}", ops.maxsim, args, {}, flops=flops)


def maxsims(queries: int, documents: int) -> Iterator[Way]:
    """Plain products, late-interaction-kernels and flash-maxsim; sides of 32 and 300 tokens."""
    padded = lambda q, _, d, __: (q.unflatten(0, (queries, -1)), d.unflatten(0, (documents, -1)))  # noqa: E731

    def einsum(*args: Any) -> Tensor:
        return torch.einsum("ase,bte->abst", *padded(*args)).max(dim=-1).values.float().sum(dim=-1)

    def flash(home: Any, *args: Any) -> Tensor:
        q, d = padded(*args)
        if torch.is_grad_enabled() and q.requires_grad:
            return home.flash_maxsim_batched_train(q, d)
        return home.flash_maxsim_batched(q, d, pad_lq=False)

    late, half = "late_interaction_kernels", "in float16"
    yield Way("einsum, max and sum", einsum, "padded")
    yield peer(f"{late}, packed", late, lambda home, q, cu_q, d, cu_d: home.maxsim_varlen(q, d, cu_q, cu_d, 32, 300))
    yield peer(f"{late}, padded", late, lambda home, *args: home.maxsim(*padded(*args)))
    yield peer("flash_maxsim, padded", "flash_maxsim", flash, half)
    if queries == 1:
        packed = lambda home, q, _, d, cu_d: home.flash_maxsim_packed(q, d, cu_d, 300)[None]  # noqa: E731
        yield peer("flash_maxsim, packed", "flash_maxsim", packed, half, trains=False)


def maxsim(device: torch.device, tokens: int) -> Iterator[Task]:
    """Queries of 32 and documents of 300 tokens: all pairs as in training, and one query as in reranking."""
    many, single = max(1, tokens // 128), max(1, tokens // 16)
    for queries, documents in ((many, many), (1, single)):
        for width in (128, 48):
            task = maxsim_task(queries, documents, width, dtype=torch.bfloat16, device=device)
            yield replace(task, more=tuple(maxsims(queries, documents)))


TASKS: dict[str, tuple[Callable[[torch.device, int], Iterator[Task]], str]] = {
    "attention": (attention, "by length, ragged sets, tokens, heads: ours, FlashAttention, cuDNN, FlexAttention"),
    "cross-entropy": (cross_entropy, "the loss of masked tokens, F.cross_entropy, Liger and quack"),
    "maxsim": (maxsim, "128 queries and documents of 32 and 300 tokens, and one query against 1000; two libraries"),
    "elementwise": (
        elementwise,
        "norms, GeGLU, rotary, projection, pooling: their share of a copy's rate; Liger, quack",
    ),
}


def tasks_of(name: str, machine: clock.Machine, *, quick: bool) -> Iterator[Task]:
    """Of a workload."""
    return TASKS[name][0](machine.device, TOKENS if not quick else FEW if machine.is_gpu else FEWEST)


def measure(here: Run, names: Sequence[str]) -> Iterator[Result]:
    """A result for each task and pass. A CPU takes --quick only, and two tasks: those figures are not results."""
    machine, hurry = clock.this_machine(), here.minutes < HURRY
    if hurry:
        machine = machine._replace(window=machine.window / 5)
    for at, name in enumerate(names):
        until = time.monotonic() + here.left() / (len(names) - at)  # each has its share
        missing: dict[str, str] = {}
        for task in islice(tasks_of(name, machine, quick=here.quick), None if machine.is_gpu else 2):
            if time.monotonic() > until:
                yield here.rest(name)
                break
            rates = clock.rates(machine.device, task.dtype, quick=here.quick)
            missing |= {way.name: f"{way.package} is not installed" for way in task.more if not way.installed}
            ways = tuple(way for way in task.ways() if not (way.slow and hurry))  # once, as some compile
            for which in task.passes:
                rounds = 2 if here.quick else ROUNDS
                yield timed(name, task, ways, which, machine, rates, rounds=rounds, warm=True)
        yield Result(name, [], missing)


def profile(name: str, names: Sequence[str], *, quick: bool) -> None:
    """Make one call between cudaProfilerStart and Stop: that of this name, a table without its caches and a row."""
    machine, known = clock.this_machine(), []
    for workload in names:
        for task in tasks_of(workload, machine, quick=quick):
            for which, way in product(task.passes, task.ways()):
                known.append(f"{task.what}, {which}: {way.name}")
                if known[-1] == name:
                    options = ["--only", workload, "--profile", name, *["--quick"] * quick]
                    command = shlex.join(["python", "-m", "benchmarks", "kernels", *options])
                    print(f"one call of {name}. To record it:")
                    print(f"ncu --profile-from-start off --set full --export kernel {command}")
                    print(f"nsys profile --capture-range cudaProfilerApi --output kernel {command}")
                    clock.record(call_of(task, way, copied(task, which != FORWARD), which), machine, name)
                    return
    near = get_close_matches(name, known, n=5, cutoff=0.3)
    raise SystemExit("\n".join([f"no call has the name {name!r}. Near it are:", *near]))


SUITES = {
    "kernels": Suite(
        "every op on one GPU, all ways to compute it, each pass alone, with cold and warm caches",
        {name: line for name, (_, line) in TASKS.items()},
        "every backend of an op, its reference under torch.compile (max-autotune), FlashAttention alone and with "
        "rotation in place, cuDNN, FlexAttention, Liger-Kernel, quack, late-interaction-kernels, flash-maxsim",
        measure,
        on="needs a GPU; about twenty minutes",
        needs_gpu=True,
        weight=20,
    )
}
