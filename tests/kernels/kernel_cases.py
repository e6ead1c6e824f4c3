"""The calls that kernels are compiled for: every variant of every kernel, a function an op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import modernbert_kernels as ops
from benchmarks.ops import offsets, randn
from modernbert_kernels.dispatch import LONG
from modernbert_kernels.reference import rotate_back


class Case(NamedTuple):
    """A call `op(*args, **kwargs)`; floating-point tensors of `args` get gradients. `name` is unique within its op."""

    op: ops.Op[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}


Make = Callable[[torch.dtype, int], Iterator[Case]]


def _geglu(dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    for width in (384, 576, 1152, 2624):
        for activation in ("gelu", "silu"):
            h = randn(tokens, 2 * width, dtype=dtype)
            yield Case(ops.geglu, f"{width} {activation}", (h, activation))


WIDTHS = (256, 384, 768, 1024, 1792)
"""Of Ettin-17m, 32m, 150m, 400m and 1b."""


def _norm(width: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Weight, bias and epsilon; with a bias at one width only, which is one more kernel."""
    weight, bias = randn(2, width, dtype=dtype)
    return weight, (bias if width == 256 else None), 1e-5


def _layer_norm(dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    for width in WIDTHS:
        x = randn(tokens, width, dtype=dtype)
        yield Case(ops.layer_norm, f"{width}", (x, *_norm(width, dtype)))


def _add_layer_norm(dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    for width in WIDTHS:
        x, delta = randn(2, tokens, width, dtype=dtype)
        norm = _norm(width, dtype)
        yield Case(ops.add_layer_norm, f"{width}", (x, delta, *norm))
        if dtype != torch.float32:
            exact = _norm(width, torch.float32)
            yield Case(ops.add_layer_norm, f"{width} autocast", (x.float(), delta, *exact, dtype))
        if width == 768 and dtype != torch.float32:
            yield Case(ops.add_layer_norm, f"{width} float32 stream", (x.float(), delta, *norm))
            # The last norm, and those of LoRA, which are frozen.
            yield Case(ops.add_layer_norm, f"{width} autocast, float32 norm", (x.float(), delta, *exact))
            frozen = {"weight_D": exact[0], "bias_D": None, "eps": 1e-5, "dtype": dtype}
            yield Case(ops.add_layer_norm, f"{width} autocast, frozen norm", (x.float(), delta), frozen)


def _embed_layer_norm(dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    ids = torch.arange(tokens) * 7919 % 50_368
    for width in (256, 768):
        table = randn(50_368, width, dtype=dtype)
        yield Case(ops.embed_layer_norm, f"{width}", (ids, table, *_norm(width, dtype)))


def _rotary(dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    for heads, width in ((4, 64), (12, 64), (12, 32), (8, 128)):
        qkv = randn(tokens, 3, heads, width, dtype=dtype)
        angle = randn(tokens, width // 2, dtype=torch.float32)
        rope = {"cos_TR": angle.cos(), "sin_TR": angle.sin()}
        yield Case(ops.rotary, f"{heads} x {width}", (qkv,), rope)
        # By name, because what needs a gradient cannot be overwritten.
        yield Case(ops.rotary, f"{heads} x {width}, in place", (), {"qkv_T3HK": qkv.clone(), **rope, "inplace": True})


def _rotary_table(dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    """The tables are float32 whatever the dtype is."""
    positions = torch.arange(tokens) % 512
    for width in (64, 32, 128):
        for theta in (10_000.0, 160_000.0) if width == 64 else (10_000.0,):
            named = {"theta": theta, "head_dim": width}
            yield Case(ops.rotary_table, f"{width}, theta {theta:,.0f}", (positions,), named)


def _token_ranges(dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    lengths = torch.tensor([tokens // 2, tokens - tokens // 2], dtype=torch.int32)
    for key_lengths in (None, lengths // 2):
        how = "all keys" if key_lengths is None else "query rows"
        named = {"cu_seqlens": offsets(2, tokens // 2), "key_lengths": key_lengths, "num_tokens": tokens}
        yield Case(ops.token_ranges, how, (), named)


def _rotate_back(dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    for heads, width in ((12, 64), (12, 32), (8, 128)):
        angle = randn(tokens, width // 2, dtype=torch.float32)
        # By name, because a gradient has no gradient here.
        of_qkv = randn(3, tokens, heads, width, dtype=dtype)
        named = dict(zip(("dq_THK", "dk_THK", "dv_THK"), of_qkv, strict=True)) | {
            "cos_TR": angle.cos(),
            "sin_TR": angle.sin(),
        }
        yield Case(rotate_back, f"{heads} x {width}", (), named)


def _attention(dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    lengths = [tokens // 2, tokens // 4, tokens - tokens // 2 - tokens // 4]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    keys = torch.tensor(lengths, dtype=torch.int32) // 2
    for heads, width in ((12, 32), (12, 64), (8, 128)):
        qkv = randn(tokens, 3, heads, width, dtype=dtype)
        rope = tuple(randn(2, tokens, width // 2, dtype=torch.float32))
        # A window and key lengths change no kernel: one is a number, the other is in the ranges.
        ranges = ops.token_ranges.reference(cu_seqlens, keys, tokens)
        options = {"rope": rope, "window": 64, "ranges_3T": ranges}
        yield Case(ops.attention, f"{heads} x {width}", (qkv, cu_seqlens, max(lengths)), options)
        # By name, because inference has no gradients and keeps less.
        named = {"qkv_T3HK": qkv, "cu_seqlens": cu_seqlens, "max_seqlen": max(lengths)}
        yield Case(ops.attention, f"{heads} x {width}, inference", (), named | options)
        # The longest sequence is what the caller says: above LONG, q and k are rotated before.
        options = {"rope": rope, "window": None, "ranges_3T": ranges}
        yield Case(ops.attention, f"{heads} x {width}, rotated before", (qkv, cu_seqlens, 2 * LONG), options)


def _maxsim(dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    """32 query tokens and 300 document tokens each: all pairs of as many as `tokens` holds, one query, and pairs."""

    def sides(queries: int, documents: int, width: int) -> tuple[Tensor, ...]:
        q, d = (randn(n, width, dtype=dtype, scale=width**-0.5) for n in (32 * queries, 300 * documents))
        return q, offsets(queries, 32), d, offsets(documents, 300)

    count = max(1, tokens // 32)
    for width in (48, 128, 256):
        yield Case(ops.maxsim, f"{count} x {count} x {width}", sides(count, count, width))
    # By name, because a search has no gradients.
    names = ("queries_QE", "cu_queries", "documents_NE", "cu_documents")
    yield Case(ops.maxsim, f"1 x {count} x 128, scores only", (), dict(zip(names, sides(1, count, 128), strict=True)))
    yield Case(ops.maxsim, f"{count} pairs x 128", sides(count, count, 128), {"paired": True})
    # More scores than one program keeps: 2 queries of 8,192 tokens, and 16,384 documents of one token.
    q, d = randn(2, 16_384, 48, dtype=dtype)
    args = (q, offsets(2, 8192), d, offsets(16_384, 1))
    yield Case(ops.maxsim, "2 long x 16384 short x 48", args)


def _project_normalize(dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    for width in (48, 128):
        x, weight = randn(tokens, 256, dtype=dtype), randn(width, 256, dtype=dtype)
        yield Case(ops.project_normalize, f"256 to {width}", (x, weight))
        rows = torch.arange(0, tokens, 2)
        yield Case(ops.project_normalize, f"256 to {width}, half of the rows", (x, weight, None, rows))


def _pool(dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    cu_seqlens = torch.tensor([0, tokens // 2, tokens // 2 + 1, tokens], dtype=torch.int32)
    for width in (256, 768):
        x = randn(tokens, width, dtype=dtype)
        for mode in ("cls", "last", "mean", "max"):
            for normalize in (False, True):
                name = f"{mode} {width}{' normalized' if normalize else ''}"
                yield Case(ops.pool, name, (x, cu_seqlens, mode), {"normalize": normalize})


def _linear_cross_entropy(dtype: torch.dtype, tokens: int) -> Iterator[Case]:
    """ModernBERT's vocabulary, 30 percent of the tokens masked; and a number of classes that is not a multiple of 8."""
    for width, classes in ((256, 50_368), (768, 50_368), (256, 50_371)):
        x, weight = (randn(n, width, dtype=dtype, scale=width**-0.5) for n in (tokens, classes))
        targets = torch.arange(tokens) * 7919 % classes
        targets[torch.arange(tokens) % 10 >= 3] = -100
        for bias in (None, randn(classes, dtype=dtype)):
            name = f"{width} to {classes}{'' if bias is None else ' bias'}"
            yield Case(ops.linear_cross_entropy, name, (x, weight, bias, targets))


CASES: dict[str, Make] = {
    "geglu": _geglu,
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "embed_layer_norm": _embed_layer_norm,
    "rotary": _rotary,
    "rotary_table": _rotary_table,
    "token_ranges": _token_ranges,
    "rotate_back": _rotate_back,
    "attention": _attention,
    "maxsim": _maxsim,
    "project_normalize": _project_normalize,
    "pool": _pool,
    "linear_cross_entropy": _linear_cross_entropy,
}
"""Per op: its calls, from a dtype and a number of tokens."""
