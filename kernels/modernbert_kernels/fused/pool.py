"""Pooling of packed sequences: a program for each sequence and 128 columns reads its rows once.

Dividing the result by its norm needs all of its columns: that is the kernel of `project_normalize`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import needs_gradient, operator, segment_ids, supported
from ..reference import pool
from .jit import jit
from .project_normalize import normalize as divide_by_norm

MODES = ("cls", "last", "mean", "max")
ROWS, COLUMNS = 32, 128
"""32 elements for each thread of 4 warps; 256 bytes of a row in 16 bits."""


@jit()
def pool_forward_kernel(
    x,
    cu_seqlens,
    pooled,
    argmax,
    D,
    MODE: tl.constexpr,
    STORE_ARGMAX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if MODE == "cls" or MODE == "last":
        row = start if MODE == "cls" else end - 1
        result = tl.load(x + row * D + columns, mask=(columns < D) & (start < end), other=0).to(tl.float32)
    elif MODE == "mean":
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in tl.range(start, end, ROWS):
            rows = first + tl.arange(0, ROWS)[:, None]
            total += tl.load(x + rows * D + columns[None, :], mask=(rows < end) & (columns < D)[None, :], other=0)
        result = tl.sum(total, axis=0) / tl.maximum(end - start, 1).to(tl.float32)
    else:
        best = tl.full([COLUMNS], float("-inf"), tl.float32)
        best_row = tl.zeros([COLUMNS], tl.int32)
        for first in tl.range(start, end, ROWS):
            rows = first + tl.arange(0, ROWS)[:, None]
            mask = (rows < end) & (columns < D)[None, :]
            block = tl.load(x + rows * D + columns[None, :], mask=mask, other=float("-inf")).to(tl.float32)
            top, where = tl.max(block, axis=0, return_indices=True)
            # Strictly greater: a tie goes to the earlier row.
            best_row = tl.where(top > best, (first - start).to(tl.int32) + where, best_row)
            best = tl.maximum(best, top)
        result = tl.where(start < end, best, 0.0)
        if STORE_ARGMAX:
            tl.store(argmax + sequence * D + columns, best_row, mask=columns < D)
    tl.store(pooled + sequence * D + columns, result, mask=columns < D)


@jit()
def pool_backward_kernel(
    grad, segment_ids, cu_seqlens, argmax, dx, T, B, D, MODE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (rows < T)[:, None] & (columns < D)
    # Rows after the last sequence count as rows of it that are after its end: their gradient is zero.
    segment = tl.minimum(tl.load(segment_ids + rows, mask=rows < T, other=0), B - 1).to(tl.int64)
    start = tl.load(cu_seqlens + segment, mask=rows < T, other=0).to(tl.int64)
    end = tl.load(cu_seqlens + segment + 1, mask=rows < T, other=1).to(tl.int64)
    share = tl.load(grad + segment[:, None] * D + columns, mask=mask, other=0).to(tl.float32)
    if MODE == "cls":
        share = tl.where((rows == start)[:, None], share, 0.0)
    elif MODE == "last":
        share = tl.where((rows == end - 1)[:, None], share, 0.0)
    elif MODE == "mean":
        length = tl.where(rows < end, (end - start).to(tl.float32), float("inf"))
        share = share / length[:, None]
    else:
        best_row = tl.load(argmax + segment[:, None] * D + columns, mask=mask, other=0)
        share = tl.where(best_row == (rows - start)[:, None], share, 0.0)
    tl.store(dx + rows[:, None] * D + columns, share, mask=mask)


def _outputs(x_TD: Tensor, cu_seqlens: Tensor, mode: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = len(cu_seqlens) - 1, x_TD.shape[1]
    return x_TD.new_empty(shape, dtype=dtype), x_TD.new_empty(shape if mode == "max" else 0, dtype=torch.int32)


@operator("pool_forward(Tensor x, Tensor cu_seqlens, str mode, ScalarType dtype) -> (Tensor, Tensor)", fake=_outputs)
def pool_forward(x_TD: Tensor, cu_seqlens: Tensor, mode: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The pooled rows, and for "max" the row of each maximum within its sequence."""
    pooled_BD, argmax_BD = _outputs(x_TD, cu_seqlens, mode, dtype)
    B, D = pooled_BD.shape
    if B:
        pool_forward_kernel[(B, triton.cdiv(D, COLUMNS))](
            x_TD, cu_seqlens, pooled_BD, argmax_BD, D, mode, mode == "max", ROWS, COLUMNS, num_warps=4
        )
    return pooled_BD, argmax_BD


def _like_input(
    dpooled_BD: Tensor, cu_seqlens: Tensor, argmax_BD: Tensor, mode: str, tokens: int, dtype: torch.dtype
) -> Tensor:
    return dpooled_BD.new_empty(tokens, dpooled_BD.shape[1], dtype=dtype)


@operator(
    "pool_backward(Tensor dpooled, Tensor cu_seqlens, Tensor argmax, str mode, SymInt tokens, ScalarType dtype)"
    " -> Tensor",
    fake=_like_input,
)
def pool_backward(
    dpooled_BD: Tensor, cu_seqlens: Tensor, argmax_BD: Tensor, mode: str, tokens: int, dtype: torch.dtype
) -> Tensor:
    dx_TD = _like_input(dpooled_BD, cu_seqlens, argmax_BD, mode, tokens, dtype)
    T, D = dx_TD.shape
    if T:
        pool_backward_kernel[(triton.cdiv(T, ROWS), triton.cdiv(D, COLUMNS))](
            dpooled_BD,
            segment_ids(cu_seqlens, T),
            cu_seqlens,
            argmax_BD,
            dx_TD,
            T,
            len(dpooled_BD),
            D,
            mode,
            ROWS,
            COLUMNS,
            num_warps=4,
        )
    return dx_TD


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, cu_seqlens: Tensor, mode: str, dtype: torch.dtype) -> Tensor:  # pyright: ignore
        pooled_BD, argmax_BD = pool_forward(x_TD, cu_seqlens, mode, dtype)
        ctx.save_for_backward(cu_seqlens, argmax_BD)
        ctx.mode, ctx.tokens, ctx.dtype = mode, len(x_TD), x_TD.dtype
        return pooled_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dpooled_BD: Tensor):  # pyright: ignore
        dx_TD = pool_backward(dpooled_BD.contiguous(), *ctx.saved_tensors, ctx.mode, ctx.tokens, ctx.dtype)
        return dx_TD, None, None, None


def _accepts(x_TD: Tensor, cu_seqlens: Tensor, mode: str = "cls", *, normalize: bool = False) -> bool:
    return supported(x_TD) and x_TD.dim() == 2 and mode in MODES


@pool.register("triton", when=_accepts)
def pool_triton(x_TD: Tensor, cu_seqlens: Tensor, mode: str = "cls", *, normalize: bool = False) -> Tensor:
    """`pool` in float32, bfloat16 or float16; same arguments and result. A NaN may be lost under "max"."""
    # Float32 until it is divided, so that it is rounded once.
    call = x_TD.contiguous(), cu_seqlens.contiguous(), mode, torch.float32 if normalize else x_TD.dtype
    pooled_BD = _Pool.apply(*call) if needs_gradient(x_TD) else pool_forward(*call)[0]
    return divide_by_norm(pooled_BD, None, x_TD.dtype) if normalize else pooled_BD
