"""GeGLU in one pass over memory. The backward pass recomputes the activation instead of keeping it.

Memory traffic per element of the output: 3 elements forward, 5 backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import needs_gradient, operator, supported
from ..reference import geglu
from .jit import jit
from .tiles import tile_for

SQRT_HALF = tl.constexpr(0.7071067811865476)
LOG2_E = tl.constexpr(1.4426950408889634)
PEAK = tl.constexpr(0.3989422804014327)
"""Of the density of the normal distribution."""


@triton.jit
def _activate(a, SILU: tl.constexpr, EXACT: tl.constexpr):
    """The activation of `a` and its derivative. `EXACT` is for float32; the other form is off by 7.5e-8 at most."""
    if SILU:
        sigmoid = 1 / (1 + tl.exp2(a * -LOG2_E))
        return a * sigmoid, sigmoid * (1 + a * (1 - sigmoid))
    bell = tl.exp2(a * a * (-0.5 * LOG2_E))
    if EXACT:
        normal_cdf = 0.5 * (1 + tl.erf(a * SQRT_HALF))
    else:
        # Abramowitz and Stegun, 7.1.26: a polynomial of 1 / (1 + c |a|), with a third fewer instructions than erf.
        t = 1 / (1 + 0.23164189 * tl.abs(a))
        tail = (((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.1274147959
        tail *= t * bell
        normal_cdf = tl.where(a < 0, tail, 1 - tail)
    return a * normal_cdf, normal_cdf + a * bell * PEAK


@jit(do_not_specialize=["T"])
def geglu_forward_kernel(h, y, T, F: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < T) & (columns < F)
    a = tl.load(h + rows * (2 * F) + columns, mask=mask).to(tl.float32)
    gate = tl.load(h + rows * (2 * F) + F + columns, mask=mask).to(tl.float32)
    active, _ = _activate(a, SILU, y.dtype.element_ty == tl.float32)
    # Rounded where the reference rounds: after the activation and after the product.
    active = active.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + rows * F + columns, active * gate, mask=mask)


@jit(do_not_specialize=["T"])
def geglu_backward_kernel(h, dy, dh, T, F: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < T) & (columns < F)
    a = tl.load(h + rows * (2 * F) + columns, mask=mask).to(tl.float32)
    gate = tl.load(h + rows * (2 * F) + F + columns, mask=mask).to(tl.float32)
    grad = tl.load(dy + rows * F + columns, mask=mask).to(tl.float32)
    active, slope = _activate(a, SILU, dh.dtype.element_ty == tl.float32)
    tl.store(dh + rows * (2 * F) + columns, grad * gate * slope, mask=mask)
    tl.store(dh + rows * (2 * F) + F + columns, grad * active, mask=mask)


def _launch(kernel: Any, part: str, activation: str, h_T2F: Tensor, *tensors: Tensor) -> None:
    T, F = h_T2F.shape[0], h_T2F.shape[1] // 2
    tile = tile_for(h_T2F.device, f"geglu {part}")
    # A power of two that divides F leaves no lane idle.
    columns = max(64, min(F & -F, tile.block_n))
    rows = max(1, tile.block_m // columns)
    if T:
        grid = (-(-T // rows), -(-F // columns))
        kernel[grid](h_T2F, *tensors, T, F, activation == "silu", rows, columns, num_warps=tile.num_warps)


def _like_output(h_T2F: Tensor, activation: str) -> Tensor:
    return h_T2F.new_empty(h_T2F.shape[0], h_T2F.shape[1] // 2)


@operator("geglu_forward(Tensor h, str activation) -> Tensor", fake=_like_output)
def geglu_forward(h_T2F: Tensor, activation: str) -> Tensor:
    y_TF = _like_output(h_T2F, activation)
    _launch(geglu_forward_kernel, "forward", activation, h_T2F, y_TF)
    return y_TF


def _like_input(h_T2F: Tensor, dy_TF: Tensor, activation: str) -> Tensor:
    return torch.empty_like(h_T2F)


@operator("geglu_backward(Tensor h, Tensor dy, str activation) -> Tensor", fake=_like_input)
def geglu_backward(h_T2F: Tensor, dy_TF: Tensor, activation: str) -> Tensor:
    dh_T2F = _like_input(h_T2F, dy_TF, activation)
    _launch(geglu_backward_kernel, "backward", activation, h_T2F, dy_TF, dh_T2F)
    return dh_T2F


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_T2F: Tensor, activation: str) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(h_T2F)
        ctx.activation = activation
        return geglu_forward(h_T2F, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TF: Tensor):  # pyright: ignore
        return geglu_backward(*ctx.saved_tensors, dy_TF.contiguous(), ctx.activation), None


def _accepts(h_T2F: Tensor, activation: str = "gelu") -> bool:
    return supported(h_T2F) and h_T2F.dim() == 2 and h_T2F.shape[1] % 2 == 0 and activation in ("gelu", "silu")


@geglu.register("triton", when=_accepts)
def geglu_triton(h_T2F: Tensor, activation: str = "gelu") -> Tensor:
    """`geglu` in float32, bfloat16 or float16; same arguments and result."""
    h_T2F = h_T2F.contiguous()
    return _GeGLU.apply(h_T2F, activation) if needs_gradient(h_T2F) else geglu_forward(h_T2F, activation)
