"""LayerNorm, and LayerNorm of a residual sum: one pass over memory each way, by `layer_norm_kernels.py`.

Reads and writes per element: `layer_norm` 2 forward and 3 backward, `add_layer_norm` 4 and 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import contiguous, supported
from ..reference import add_layer_norm, layer_norm
from .layer_norm_kernels import check, fits, norm_backward, norm_forward


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:  # pyright: ignore
        y, stats_2T = norm_forward(x, None, None, weight_D, bias_D, eps)
        ctx.save_for_backward(x, weight_D, stats_2T)
        ctx.bias = bias_D is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore
        x, weight_D, stats_2T = ctx.saved_tensors
        dx, dparameters = norm_backward(dy.contiguous(), None, x, None, weight_D, stats_2T, ctx.bias, None)
        return dx, dparameters[0], dparameters[1] if ctx.bias else None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float):  # pyright: ignore
        y, stats_2T, s = norm_forward(x, None, delta, weight_D, bias_D, eps)
        ctx.save_for_backward(s, weight_D, stats_2T)
        ctx.bias, ctx.dtypes = bias_D is not None, (x.dtype, delta.dtype)
        # The gradient of an unused output is None instead of zeros that the kernel would read. (The method
        # `set_materialize_grads` does the same, but torch.compile does not trace it.)
        ctx.materialize_grads = False
        return s, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor | None, dy: Tensor | None):  # pyright: ignore
        s, weight_D, stats_2T = ctx.saved_tensors
        x_dtype, delta_dtype = ctx.dtypes
        if dy is None:
            return ds.to(x_dtype), ds.to(delta_dtype), None, None, None
        # x and delta share a gradient if they share a dtype.
        narrow = next((dtype for dtype in (x_dtype, delta_dtype) if dtype != s.dtype), None)
        gradients = norm_backward(*contiguous(dy, ds), s, None, weight_D, stats_2T, ctx.bias, narrow)
        dx, dparameters, *rest = gradients
        of = {s.dtype: dx, narrow: rest[0] if rest else dx}
        return of[x_dtype], of[delta_dtype], dparameters[0], dparameters[1] if ctx.bias else None, None


@layer_norm.register(
    "triton",
    when=lambda x_TD, weight_D, bias_D, eps: supported(x_TD, weight_D) and fits(x_TD, None, weight_D, bias_D),
)
def layer_norm_triton(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """`layer_norm` in float32, bfloat16 or float16; same arguments and result."""
    check(x_TD, None, weight_D, bias_D)
    return _LayerNorm.apply(*contiguous(x_TD, weight_D, bias_D), eps)


@add_layer_norm.register(
    "triton",
    when=lambda x_TD, delta_TD, weight_D, bias_D, eps: (
        supported(x_TD, delta_TD, weight_D) and fits(x_TD, delta_TD, weight_D, bias_D)
    ),
)
def add_layer_norm_triton(
    x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in float32, bfloat16 or float16, and with a float32 stream; same arguments and result."""
    check(x_TD, delta_TD, weight_D, bias_D)
    return _AddLayerNorm.apply(*contiguous(x_TD, delta_TD, weight_D, bias_D), eps)
