"""The calls that kernels are compiled for, checked on and timed with, and the least that each must do: a row an op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

import modernbert_kernels as ops
from benchmarks.work import visible_pairs
from modernbert_kernels.dispatch import LONG
from modernbert_kernels.reference import rotate_back


class Case(NamedTuple):
    """A call `op(*args, **kwargs)`; floating-point tensors of `args` get gradients. `name` is unique within its op."""

    op: ops.Op[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}


Make = Callable[[torch.dtype, str, int], Iterator[Case]]


def randn(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def offsets(count: int, length: int, device: str | torch.device) -> Tensor:
    """Cumulative lengths of `count` texts of one length."""
    return torch.arange(count + 1, device=device, dtype=torch.int32) * length


def _geglu(dtype: torch.dtype, device: str, tokens: int) -> Iterator[Case]:
    for width in (384, 576, 1152, 2624):
        for activation in ("gelu", "silu"):
            h = randn(tokens, 2 * width, dtype=dtype, device=device)
            yield Case(ops.geglu, f"{width} {activation}", (h, activation))


def _norm(width: int, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Weight, bias and epsilon; with a bias at one width only, which is one more kernel."""
    weight, bias = randn(2, width, dtype=dtype, device=device)
    return weight, (bias if width == 256 else None), 1e-5


def _layer_norm(dtype: torch.dtype, device: str, tokens: int) -> Iterator[Case]:
    for width in (256, 768, 1024, 1792):
        x = randn(tokens, width, dtype=dtype, device=device)
        yield Case(ops.layer_norm, f"{width}", (x, *_norm(width, dtype, device)))


def _add_layer_norm(dtype: torch.dtype, device: str, tokens: int) -> Iterator[Case]:
    for width in (256, 768, 1024, 1792):
        x, delta = randn(2, tokens, width, dtype=dtype, device=device)
        norm = _norm(width, dtype, device)
        yield Case(ops.add_layer_norm, f"{width}", (x, delta, *norm))
        if width == 768 and dtype != torch.float32:
            yield Case(ops.add_layer_norm, f"{width} float32 stream", (x.float(), delta, *norm))


def _embed_layer_norm(dtype: torch.dtype, device: str, tokens: int) -> Iterator[Case]:
    ids = torch.arange(tokens, device=device) * 7919 % 50_368
    for width in (256, 768):
        table = randn(50_368, width, dtype=dtype, device=device)
        yield Case(ops.embed_layer_norm, f"{width}", (ids, table, *_norm(width, dtype, device)))


def _rotary(dtype: torch.dtype, device: str, tokens: int) -> Iterator[Case]:
    for heads, width in ((4, 64), (12, 64), (12, 32), (8, 128)):
        qkv = randn(tokens, 3, heads, width, dtype=dtype, device=device)
        angle = randn(tokens, width // 2, dtype=torch.float32, device=device)
        rope = {"cos_TR": angle.cos(), "sin_TR": angle.sin()}
        yield Case(ops.rotary, f"{heads} x {width}", (qkv,), rope)
        # By name, because what needs a gradient cannot be overwritten.
        yield Case(ops.rotary, f"{heads} x {width}, in place", (), {"qkv_T3HK": qkv.clone(), **rope, "inplace": True})


def _rotary_table(dtype: torch.dtype, device: str, tokens: int) -> Iterator[Case]:
    """The tables are float32 whatever the dtype is."""
    positions = torch.arange(tokens, device=device) % 512
    for width in (64, 32, 128):
        for theta in (10_000.0, 160_000.0) if width == 64 else (10_000.0,):
            named = {"theta": theta, "head_dim": width}
            yield Case(ops.rotary_table, f"{width}, theta {theta:,.0f}", (positions,), named)


def _rotate_back(dtype: torch.dtype, device: str, tokens: int) -> Iterator[Case]:
    for heads, width in ((12, 64), (12, 32), (8, 128)):
        angle = randn(tokens, width // 2, dtype=torch.float32, device=device)
        # By name, because a gradient has no gradient here.
        of_qkv = randn(3, tokens, heads, width, dtype=dtype, device=device)
        named = dict(zip(("dq_THK", "dk_THK", "dv_THK"), of_qkv, strict=True)) | {
            "cos_TR": angle.cos(),
            "sin_TR": angle.sin(),
        }
        yield Case(rotate_back, f"{heads} x {width}", (), named)


def _attention(dtype: torch.dtype, device: str, tokens: int) -> Iterator[Case]:
    lengths = [tokens // 2, tokens // 4, tokens - tokens // 2 - tokens // 4]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    keys = torch.tensor(lengths, dtype=torch.int32, device=device) // 2
    for heads, width in ((4, 32), (12, 64), (8, 128)):
        qkv = randn(tokens, 3, heads, width, dtype=dtype, device=device)
        rope = tuple(randn(2, tokens, width // 2, dtype=torch.float32, device=device))
        for window in (64, None):
            for key_lengths in (None, keys) if width == 64 else (None,):
                how = "global" if window is None else f"window {window}"
                name = f"{heads} x {width}, {how}{'' if key_lengths is None else ', query rows'}"
                options = {"rope": rope, "window": window, "key_lengths": key_lengths}
                yield Case(ops.attention, name, (qkv, cu_seqlens, max(lengths)), options)
        # The longest sequence is what the caller says: above LONG, q and k are rotated before.
        options = {"rope": rope, "window": None, "key_lengths": None}
        yield Case(ops.attention, f"{heads} x {width}, rotated before", (qkv, cu_seqlens, 2 * LONG), options)


def _maxsim(dtype: torch.dtype, device: str, tokens: int) -> Iterator[Case]:
    """32 query tokens and 300 document tokens each: all pairs of as many as `tokens` holds, one query, and pairs."""

    def sides(queries: int, documents: int, width: int) -> tuple[Tensor, ...]:
        q, d = (randn(n, width, dtype=dtype, device=device, scale=width**-0.5) for n in (32 * queries, 300 * documents))
        return q, offsets(queries, 32, device), d, offsets(documents, 300, device)

    count = max(1, tokens // 32)
    for width in (48, 128, 256):
        yield Case(ops.maxsim, f"{count} x {count} x {width}", sides(count, count, width))
    # By name, because a search has no gradients.
    names = ("queries_QE", "cu_queries", "documents_NE", "cu_documents")
    yield Case(ops.maxsim, f"1 x {count} x 128, scores only", (), dict(zip(names, sides(1, count, 128), strict=True)))
    yield Case(ops.maxsim, f"{count} pairs x 128", sides(count, count, 128), {"paired": True})
    # More scores than one program keeps: 2 queries of 8,192 tokens, and 16,384 documents of one token.
    q, d = randn(2, 16_384, 48, dtype=dtype, device=device)
    args = (q, offsets(2, 8192, device), d, offsets(16_384, 1, device))
    yield Case(ops.maxsim, "2 long x 16384 short x 48", args)


def _project_normalize(dtype: torch.dtype, device: str, tokens: int) -> Iterator[Case]:
    for width in (48, 128):
        x, weight = randn(tokens, 256, dtype=dtype, device=device), randn(width, 256, dtype=dtype, device=device)
        yield Case(ops.project_normalize, f"256 to {width}", (x, weight))
        rows = torch.arange(0, tokens, 2, device=device)
        yield Case(ops.project_normalize, f"256 to {width}, half of the rows", (x, weight, None, rows))


def _pool(dtype: torch.dtype, device: str, tokens: int) -> Iterator[Case]:
    cu_seqlens = torch.tensor([0, tokens // 2, tokens // 2 + 1, tokens], device=device, dtype=torch.int32)
    for width in (256, 768):
        x = randn(tokens, width, dtype=dtype, device=device)
        for mode in ("cls", "last", "mean", "max"):
            for normalize in (False, True):
                name = f"{mode} {width}{' normalized' if normalize else ''}"
                yield Case(ops.pool, name, (x, cu_seqlens, mode), {"normalize": normalize})


def _linear_cross_entropy(dtype: torch.dtype, device: str, tokens: int) -> Iterator[Case]:
    """ModernBERT's vocabulary, 30 percent of the tokens masked; and a number of classes that is not a multiple of 8."""
    for width, classes in ((256, 50_368), (768, 50_368), (256, 50_371)):
        x, weight = (randn(n, width, dtype=dtype, device=device, scale=width**-0.5) for n in (tokens, classes))
        targets = torch.arange(tokens, device=device) * 7919 % classes
        targets[torch.arange(tokens, device=device) % 10 >= 3] = -100
        for bias in (None, randn(classes, dtype=dtype, device=device)):
            name = f"{width} to {classes}{'' if bias is None else ' bias'}"
            yield Case(ops.linear_cross_entropy, name, (x, weight, bias, targets))


class Work(NamedTuple):
    """The bytes that a call reads and writes once, and the operations of its products; None is not stated.

    What is small next to rows of tokens (weights of a norm, statistics, cumulative lengths) is left out, and so is what
    a kernel moves more often than it must.
    """

    forward_bytes: int | None
    backward_bytes: int | None
    forward_flops: int | None = None
    backward_flops: int | None = None

    def of(self, backward: bool) -> tuple[int | None, int | None]:
        """Bytes and operations of the forward pass, or of both passes."""
        if not backward:
            return self.forward_bytes, self.forward_flops
        pairs = ((self.forward_bytes, self.backward_bytes), (self.forward_flops, self.backward_flops))
        sums = [None if a is None or b is None else a + b for a, b in pairs]
        return sums[0], sums[1]


def _work_of_add_norm(x: Tensor, delta: Tensor, weight: Tensor, *_: object) -> Work:
    """The gradients of x and delta are one tensor where they have one dtype."""
    normed = x.numel() * weight.element_size()
    gradients = x.nbytes + (0 if x.dtype == delta.dtype else delta.nbytes)
    return Work(2 * x.nbytes + delta.nbytes + normed, 2 * x.nbytes + normed + gradients)


def _work_of_embedding(ids: Tensor, table: Tensor, *_: object) -> Work:
    """The gradient of the table is dense."""
    rows = len(ids) * table.shape[1] * table.element_size()
    return Work(ids.nbytes + 2 * rows, ids.nbytes + 2 * rows + table.nbytes)


def _work_of_rotary(qkv_T3HK: Tensor, cos_TR: Tensor, sin_TR: Tensor, inplace: bool = False) -> Work:
    moved = 2 * qkv_T3HK.nbytes * (2 if inplace else 3) // 3 + cos_TR.nbytes + sin_TR.nbytes
    return Work(moved, moved)


def _work_of_pool(x: Tensor, cu_seqlens: Tensor, mode: str, **_: object) -> Work:
    """One row of each text is read, or all of them; the gradient has all rows, zeros too."""
    vectors = (len(cu_seqlens) - 1) * x.shape[1] * x.element_size()
    return Work((vectors if mode in ("cls", "last") else x.nbytes) + vectors, vectors + x.nbytes)


def _work_of_projection(x: Tensor, weight: Tensor, bias: object = None, rows: Tensor | None = None) -> Work:
    """Backward what the chosen rows were projected to is read again, and the gradient of x has all rows."""
    chosen, (width, inner), size = len(x if rows is None else rows), weight.shape, x.element_size()
    read, vectors, flops = chosen * inner * size, chosen * width * size, 2 * chosen * inner * width
    return Work(read + weight.nbytes + vectors, 2 * vectors + read + x.nbytes + 2 * weight.nbytes, flops, 2 * flops)


def _work_of_attention(
    qkv: Tensor, cu_seqlens: Tensor, longest: int, rope: Any, window: int | None = None, key_lengths: Any = None
) -> Work:
    """Two products for each visible pair, five backward: the scores once more, and four gradients."""
    if key_lengths is not None:
        raise ValueError("pairs of texts with query rows are not counted")
    pairs = sum(visible_pairs(end - start, window) for start, end in pairwise(cu_seqlens.tolist()))
    product, out, tables = 2 * qkv.shape[2] * qkv.shape[3] * pairs, qkv.nbytes // 3, sum(table.nbytes for table in rope)
    return Work(qkv.nbytes + out + tables, 2 * qkv.nbytes + 2 * out + tables, 2 * product, 5 * product)


def _work_of_maxsim(q: Tensor, cu_queries: Tensor, d: Tensor, cu_documents: Tensor) -> Work:
    """Of all pairs. Backward each query token meets one token of every document, twice."""
    documents, read = len(cu_documents) - 1, q.nbytes + d.nbytes
    scores = 4 * (len(cu_queries) - 1) * documents
    return Work(read + scores, 2 * read + scores, 2 * len(q) * d.numel(), 4 * q.numel() * documents)


def _work_of_loss(x: Tensor, weight: Tensor, bias: object, targets: Tensor) -> Work:
    """Of the tokens with a target. Bytes are not stated: keeping logits moves a hundred times more."""
    product = 2 * int((targets >= 0).sum()) * weight.numel()
    return Work(None, None, product, 2 * product)


OPS: dict[str, tuple[Make, Callable[..., Work] | None]] = {
    "geglu": (_geglu, lambda h, *_: Work(h.nbytes * 3 // 2, h.nbytes * 5 // 2)),
    "layer_norm": (_layer_norm, lambda x, *_: Work(2 * x.nbytes, 3 * x.nbytes)),
    "add_layer_norm": (_add_layer_norm, _work_of_add_norm),
    "embed_layer_norm": (_embed_layer_norm, _work_of_embedding),
    "rotary": (_rotary, _work_of_rotary),
    "rotary_table": (_rotary_table, lambda at, theta, head_dim: Work(at.nbytes + 4 * len(at) * head_dim, None)),
    "rotate_back": (_rotate_back, None),
    "attention": (_attention, _work_of_attention),
    "maxsim": (_maxsim, _work_of_maxsim),
    "project_normalize": (_project_normalize, _work_of_projection),
    "pool": (_pool, _work_of_pool),
    "linear_cross_entropy": (_linear_cross_entropy, _work_of_loss),
}
"""Per op: its calls, from a dtype, a device and a number of tokens; and the least work of a call."""

CASES: dict[str, Make] = {name: make for name, (make, _) in OPS.items()}


def work(case: Case) -> Work | None:
    least = OPS[case.op.name][1] if case.op.name in OPS else None
    return least(*case.args, **case.kwargs) if least else None


def named(op: str, names: tuple[str, ...], dtype: torch.dtype, device: str, tokens: int) -> Iterator[Case]:
    """The cases of an op that have one of these names; the last ones are not even made."""
    left = set(names)
    for case in CASES[op](dtype, device, tokens) if left else ():
        if case.name in left:
            left.remove(case.name)
            yield case
        if not left:
            return
    if left:
        raise ValueError(f"{op} has no case {', '.join(sorted(left))} in benchmarks/cases.py")
