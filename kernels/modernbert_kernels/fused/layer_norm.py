"""LayerNorm, and LayerNorm of a residual sum: one pass over memory each way, by `layer_norm_kernels.py`.

Reads and writes per element: `layer_norm` 2 forward and 3 backward, `add_layer_norm` 4 and 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import DTYPES, autocast_float32, contiguous, needs_gradient, supported
from ..reference import add_layer_norm, layer_norm
from .layer_norm_kernels import check, each_parameter, fits, norm_backward, norm_forward

NORM_DTYPES = (None, *DTYPES)
"""Of the norm that `add_layer_norm` returns; None is that of the weights."""


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:  # pyright: ignore
        y, stats_2T = norm_forward(x, None, None, weight_D, bias_D, eps, dtype, True)
        ctx.save_for_backward(x, weight_D, stats_2T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore
        x, weight_D, stats_2T = ctx.saved_tensors
        wanted = of_x, *of_parameters = ctx.needs_input_grad[:3]
        dx, dparameters = norm_backward(dy.contiguous(), None, x, None, weight_D, stats_2T, wanted, None)
        return dx if of_x else None, *each_parameter(dparameters, of_parameters), None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float, dtype: torch.dtype
    ):  # pyright: ignore
        y, stats_2T, s = norm_forward(x, None, delta, weight_D, bias_D, eps, dtype, True)
        ctx.save_for_backward(s, weight_D, stats_2T)
        ctx.dtypes = x.dtype, delta.dtype
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
            return ds.to(x_dtype), ds.to(delta_dtype), None, None, None, None
        of_x, of_delta, *of_parameters = ctx.needs_input_grad[:4]
        # x and delta share a gradient if they share a dtype.
        narrow = next((dtype for dtype in (x_dtype, delta_dtype) if dtype != s.dtype), None)
        wanted = [of_x or of_delta, *of_parameters]
        found = norm_backward(
            dy.contiguous(), contiguous(ds), s, None, weight_D, stats_2T, wanted, narrow if wanted[0] else None
        )
        dx, dparameters, *rest = found
        of = {s.dtype: dx, narrow: rest[0] if rest else dx}
        dx, ddelta = of[x_dtype] if of_x else None, of[delta_dtype] if of_delta else None
        return dx, ddelta, *each_parameter(dparameters, of_parameters), None, None


@layer_norm.register(
    "triton",
    when=lambda x_TD, weight_D, bias_D, eps: supported(x_TD, weight_D) and fits(x_TD, None, weight_D, bias_D),
    check=lambda x_TD, weight_D, bias_D, eps: check(x_TD, None, weight_D, bias_D),
)
def layer_norm_triton(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """`layer_norm` in float32, bfloat16 or float16; same arguments and result."""
    x, weight, bias = x_TD.contiguous(), weight_D.contiguous(), contiguous(bias_D)
    dtype = autocast_float32(x_TD, weight_D.dtype)
    if needs_gradient(x, weight, bias):
        return _LayerNorm.apply(x, weight, bias, eps, dtype)
    return norm_forward(x, None, None, weight, bias, eps, dtype, False)[0]


@add_layer_norm.register(
    "triton",
    when=lambda x_TD, delta_TD, weight_D, bias_D, eps, dtype=None: (
        supported(x_TD, delta_TD, weight_D) and dtype in NORM_DTYPES and fits(x_TD, delta_TD, weight_D, bias_D)
    ),
    check=lambda x_TD, delta_TD, weight_D, bias_D, eps, dtype=None: check(x_TD, delta_TD, weight_D, bias_D),
)
def add_layer_norm_triton(
    x_TD: Tensor,
    delta_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in float32, bfloat16 or float16, and with a float32 stream; same arguments and result."""
    x, delta, weight, bias = x_TD.contiguous(), delta_TD.contiguous(), weight_D.contiguous(), contiguous(bias_D)
    dtype = dtype or weight_D.dtype
    if needs_gradient(x, delta, weight, bias):
        return _AddLayerNorm.apply(x, delta, weight, bias, eps, dtype)
    y, _, s = norm_forward(x, None, delta, weight, bias, eps, dtype, False)
    return s, y
