"""Rows divided by their norm, in one pass: the step after the product in `project_normalize`, and after `pool`.

`rows_Q` selects rows of the product's result. Gathering rows of the input first would read and write them once more: 3
Q D elements instead of T D. As long as more than a third of the rows are kept (a skiplist keeps most), multiplying all
rows costs less.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import autocast_float32, needs_gradient, operator, supported
from ..reference import project_normalize
from .jit import jit

TILE = 2048
"""Elements of a program: 16 for each thread of 4 warps."""

MIN_NORM = tl.constexpr(1e-12)


@jit()
def normalize_forward_kernel(
    u, selected, y, Q, E: tl.constexpr, SELECT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, K)[None, :]
    mask = (rows < Q)[:, None] & (k < E)
    source = tl.load(selected + rows, mask=rows < Q, other=0) if SELECT else rows
    vector = tl.load(u + source[:, None] * E + k, mask=mask, other=0).to(tl.float32)
    norm = tl.sqrt(tl.sum(vector * vector, axis=1))
    tl.store(y + rows[:, None] * E + k, vector / tl.maximum(norm, MIN_NORM)[:, None], mask=mask)


@jit()
def normalize_backward_kernel(
    u, selected, dy, du, Q, E: tl.constexpr, SELECT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, K)[None, :]
    mask = (rows < Q)[:, None] & (k < E)
    source = tl.load(selected + rows, mask=rows < Q, other=0) if SELECT else rows
    vector = tl.load(u + source[:, None] * E + k, mask=mask, other=0).to(tl.float32)
    grad = tl.load(dy + rows[:, None] * E + k, mask=mask, other=0).to(tl.float32)
    norm = tl.sqrt(tl.sum(vector * vector, axis=1))
    divisor = tl.maximum(norm, MIN_NORM)
    y = vector / divisor[:, None]
    # A row shorter than that was divided by a constant.
    along = tl.where(norm > MIN_NORM, tl.sum(grad * y, axis=1), 0.0)
    tl.store(du + rows[:, None] * E + k, (grad - y * along[:, None]) / divisor[:, None], mask=mask)


def _launch(kernel: Any, u_TE: Tensor, rows_Q: Tensor | None, *tensors: Tensor) -> None:
    num_rows, width = tensors[-1].shape
    padded = 1 << (max(16, width) - 1).bit_length()
    rows = max(1, TILE // padded)
    if num_rows:
        grid = (-(-num_rows // rows),)
        kernel[grid](u_TE, rows_Q, *tensors, num_rows, width, rows_Q is not None, rows, padded, num_warps=4)


def _rows(u_TE: Tensor, rows_Q: Tensor | None, dtype: torch.dtype) -> Tensor:
    return u_TE.new_empty(len(u_TE) if rows_Q is None else len(rows_Q), u_TE.shape[1], dtype=dtype)


@operator("normalize_forward(Tensor u, Tensor? rows, ScalarType dtype) -> Tensor", fake=_rows)
def normalize_forward(u_TE: Tensor, rows_Q: Tensor | None, dtype: torch.dtype) -> Tensor:
    y_QE = _rows(u_TE, rows_Q, dtype)
    _launch(normalize_forward_kernel, u_TE, rows_Q, y_QE)
    return y_QE


def _like_grad(u_TE: Tensor, rows_Q: Tensor | None, dy_QE: Tensor) -> Tensor:
    return torch.empty_like(dy_QE, dtype=u_TE.dtype)


@operator("normalize_backward(Tensor u, Tensor? rows, Tensor dy) -> Tensor", fake=_like_grad)
def normalize_backward(u_TE: Tensor, rows_Q: Tensor | None, dy_QE: Tensor) -> Tensor:
    """The gradients of the selected rows, `[Q, E]`."""
    du_QE = _like_grad(u_TE, rows_Q, dy_QE)
    _launch(normalize_backward_kernel, u_TE, rows_Q, dy_QE, du_QE)
    return du_QE


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u_TE: Tensor, rows_Q: Tensor | None, dtype: torch.dtype) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(u_TE, rows_Q)
        return normalize_forward(u_TE, rows_Q, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_QE: Tensor):  # pyright: ignore
        u_TE, rows_Q = ctx.saved_tensors
        du = normalize_backward(u_TE, rows_Q, dy_QE.contiguous())
        if rows_Q is not None:
            # A row may be selected twice; this sum of PyTorch has a fixed order.
            du = torch.zeros_like(u_TE).index_put((rows_Q,), du, accumulate=True)
        return du, None, None


def normalize(u_TE: Tensor, rows_Q: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The selected rows, or all, divided by their norm, in `dtype`. Differentiable."""
    return (_Normalize.apply if needs_gradient(u_TE) else normalize_forward)(u_TE, rows_Q, dtype)


def _accepts(x_TD: Tensor, weight_ED: Tensor, *_: object, **__: object) -> bool:
    return supported(x_TD, weight_ED) and x_TD.dim() == 2


@project_normalize.register("triton", when=_accepts)
def project_normalize_triton(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None, rows_Q: Tensor | None = None
) -> Tensor:
    """`project_normalize` in float32, bfloat16 or float16; same arguments and result."""
    u_TE = F.linear(x_TD, weight_ED, bias_E)
    dtype = autocast_float32(u_TE, u_TE.dtype)
    return normalize(u_TE.contiguous(), None if rows_Q is None else rows_Q.contiguous(), dtype)
