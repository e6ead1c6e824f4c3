"""What the `kernels` suite measures: tasks of every workload, each with all ways to do it that run here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import modernbert_kernels as ops
from benchmarks.kernels import peers
from benchmarks.kernels.calls import Task, Way
from benchmarks.kernels.cases import CASES, Case, randn
from benchmarks.kernels.questions import questions
from benchmarks.kernels.work import work
from benchmarks.report.tables import CHOSEN

Tasks = Iterator[Task]

TOKENS, FEW = 16_384, 2_048

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

IN_FLOAT32 = ("768", "1152 gelu", "12 x 64")
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)


def tokens_of(quick: bool) -> int:
    return FEW if quick else TOKENS


def of_op(case: Case, what: str, more: tuple[Way, ...] = (), *, compiled: bool = False, memory: bool = False) -> Task:
    """A case with every backend of its op that takes it, the reference, and `more`.

    Args:
        compiled: the reference under torch.compile is one more way.
    """
    names = takers(case)
    ways = [Way(name, case.op.backends[name], CHOSEN if name == names[0] else "") for name in names]
    ways.append(Way("reference", peers.plain(case.op.reference), "" if names else CHOSEN))
    if compiled:
        ways.append(Way("torch.compile", peers.compiled(case.op.reference), "of the reference"))
    inplace = case.kwargs.get("inplace", False)
    table = case.op is ops.rotary_table
    return Task(
        what,
        case.args,
        case.kwargs,
        peers.plain(case.op.reference),
        (*ways, *more),
        work(case),
        # What is overwritten can have no gradient, and positions have none.
        passes=(False,) if inplace or table else (False, True),
        memory=memory,
        truth=peers.exact_rotary_table if table else None,
    )


def takers(case: Case) -> list[str]:
    """The backends of its op whose condition accepts the call, the one that the op would choose first."""
    names = {implementation: name for name, implementation in case.op.backends.items()}
    return [names[made] for when, made in case.op._choices if when(*case.args, **case.kwargs)]


def named(op: str, names: tuple[str, ...], dtype: torch.dtype, device: str, tokens: int) -> Iterator[Case]:
    """The cases of an op that have one of these names; the last ones are not even made."""
    left = set(names)
    for case in CASES[op](dtype, device, tokens):
        if case.name in left:
            left.remove(case.name)
            yield case
        if not left:
            return
    raise ValueError(f"{op} has no case {', '.join(sorted(left))} in benchmarks/kernels/cases.py")


def elementwise(device: torch.device, quick: bool) -> Tasks:
    """Bound by memory: bytes that a fusion saves are the time that it saves. A CPU tries one case of each op."""
    tokens, gpu = tokens_of(quick), device.type == "cuda"
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for op, names in ELEMENTWISE.items():
            chosen = names if dtype is torch.bfloat16 else tuple(name for name in names if name in IN_FLOAT32)
            chosen = chosen if gpu else chosen[: dtype is torch.bfloat16 or op == "add_layer_norm"]
            for case in named(op, chosen, dtype, str(device), tokens) if chosen else ():
                made = "float32" if op == "rotary_table" else kind
                what = f"{op} {case.name}, {made}, {tokens:,} tokens"
                # Compiling takes seconds for each, and on a CPU a C++ compiler.
                yield of_op(case, what, peers.liger(case), compiled=gpu and dtype is torch.bfloat16)
    for mode in ("cls", "mean", "max"):
        x = randn(tokens, 768, dtype=torch.bfloat16, device=str(device))
        case = Case(ops.pool, mode, (x, offsets(tokens // 256, 256, device), mode), {"normalize": True})
        yield of_op(case, f"pool {mode} normalized 768, bfloat16, {tokens // 256} texts of 256 tokens")


def offsets(count: int, length: int, device: torch.device) -> Tensor:
    """Cumulative lengths of so many texts of one length."""
    return torch.arange(count + 1, device=device, dtype=torch.int32) * length


def attention(device: torch.device, quick: bool) -> Tasks:
    """By length at constant tokens: where FlashAttention overtakes ours, and what it gains to rotate on load."""
    gpu, heads, width = device.type == "cuda", 12, 64
    tokens = tokens_of(quick) if gpu else 512
    for length in (length for length in LENGTHS if length <= tokens and (gpu or length == 256)):
        count = tokens // length
        # The backends of the CPU are for float32.
        dtype = torch.bfloat16 if gpu else torch.float32
        qkv = randn(tokens, 3, heads, width, dtype=dtype, device=str(device))
        angle = torch.arange(length)[:, None] / 160_000.0 ** (torch.arange(0, width, 2) / width)
        rope = tuple(table.repeat(count, 1).to(qkv.device) for table in (angle.cos(), angle.sin()))
        for window in (64, None) if gpu else (64,):
            options = {"rope": rope, "window": window}
            case = Case(ops.attention, "", (qkv, offsets(count, length, device), length), options)
            how = "global" if window is None else f"window {window}"
            what = f"attention {heads} x {width}, {how}, {count} times {length:,} tokens"
            ways = (*peers.rotations(case), *peers.flash(case), *peers.cudnn(case), *peers.sdpa(case, count))
            # What has to be compiled only here and there: it takes seconds each. The reference has masks of all pairs.
            ways += peers.flex(case, count) if length in (512, LENGTHS[-1]) else ()
            yield of_op(case, what, ways, compiled=gpu and length == 512)


def cross_entropy(device: torch.device, quick: bool) -> Tasks:
    """Time and peak memory of the loss of masked language modelling, 30 percent of the tokens masked."""
    tokens = tokens_of(quick)
    for case in named("linear_cross_entropy", ("256 to 50368", "768 to 50368"), torch.bfloat16, str(device), tokens):
        more = (Way("F.cross_entropy", peers.cross_entropy, "over F.linear of all tokens"), *peers.liger(case))
        yield of_op(case, f"linear_cross_entropy {case.name}, {tokens:,} tokens", more, memory=True)


def maxsim(device: torch.device, quick: bool) -> Tasks:
    """Queries of 32 and documents of 300 tokens: all pairs as in training, and one query as in reranking."""
    many, single = (16, 100) if quick else (128, 1000)
    for queries, documents, width in ((many, many, 128), (many, many, 48), (1, single, 128), (1, single, 48)):
        counts = (32 * queries, 300 * documents)
        vectors = (randn(n, width, dtype=torch.float32, device=str(device)) for n in counts)
        q, d = (F.normalize(x, dim=-1).bfloat16() for x in vectors)
        args = (q, offsets(queries, 32, device), d, offsets(documents, 300, device))
        case = Case(ops.maxsim, "", args, {})
        what = f"maxsim of {queries} queries and {documents} documents, width {width}"
        task = of_op(case, what, peers.maxsims(queries, documents))
        # The reference is a loop over pairs: of thousands it takes seconds, of millions of numbers it is the same.
        ways = tuple(way for way in task.ways if way.implementation != "reference" or queries == 1)
        yield replace(task, reference=peers.in_float32(queries, documents), ways=ways)


TASKS: dict[str, Callable[[torch.device, bool], Tasks]] = {
    "attention": attention,
    "cross-entropy": cross_entropy,
    "maxsim": maxsim,
    "questions": lambda device, quick: questions(device, tokens_of(quick)),
    "elementwise": elementwise,
}
