"""Attention over packed tokens in Triton: the operators, and the gradient around them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import LONG
from ..launch import DTYPES, attention_outputs, needs_gradient, operator, precision, rope_fits, supported
from ..reference import attention
from .attention_kernels import attention_dkv_kernel, attention_dq_kernel, attention_forward_kernel
from .rotary import rotary_copy
from .tiles import tile_for
from .token_ranges import token_ranges_triton

WIDTHS = (32, 64, 128)
FAR = 1 << 30
"""A window of more tokens than a batch has; twice that still fits into 32 bits."""

LOG2_E = 1.4426950408889634  # softmax uses powers of two


def _outputs(
    qkv_T3HK: Tensor, ranges_3T: Tensor, cos_TR: Tensor, sin_TR: Tensor, window: int | None, rotate: bool, lse: bool
) -> tuple[Tensor, Tensor]:
    out_THK, lse_HT = attention_outputs(qkv_T3HK)
    return out_THK, lse_HT if lse else lse_HT.new_empty(0)


@operator(
    "attention_forward(Tensor qkv, Tensor ranges, Tensor cos, Tensor sin, int? window, bool rotate, bool lse) "
    "-> (Tensor, Tensor)",
    fake=_outputs,
)
def attention_forward(
    qkv_T3HK: Tensor, ranges_3T: Tensor, cos_TR: Tensor, sin_TR: Tensor, window: int | None, rotate: bool, lse: bool
) -> tuple[Tensor, Tensor]:
    """The output `[T, H, K]` and, if `lse`, the log-sum-exp of each softmax, `[H, T]` float32, to base 2."""
    out_THK, lse_HT = _outputs(qkv_T3HK, ranges_3T, cos_TR, sin_TR, window, rotate, lse)
    tables = {"qkv": qkv_T3HK, "ranges": ranges_3T, "cos": cos_TR, "sin": sin_TR}
    outputs = {"out": out_THK, "lse": lse_HT if lse else None}
    _launch("forward", attention_forward_kernel, tables | outputs, window, rotate)
    return out_THK, lse_HT


def _backward_output(qkv_T3HK: Tensor, *_: object) -> Tensor:
    return torch.empty_like(qkv_T3HK)


@operator(
    "attention_backward(Tensor qkv, Tensor ranges, Tensor cos, Tensor sin, Tensor out, Tensor lse, Tensor dout, "
    "int? window, bool rotate) -> Tensor",
    fake=_backward_output,
)
def attention_backward(
    qkv_T3HK: Tensor,
    ranges_3T: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    dout_THK: Tensor,
    window: int | None,
    rotate: bool,
) -> Tensor:
    """The gradient of packed qkv before the rotation. `rotate`: `qkv_T3HK` has not been rotated yet."""
    dqkv_T3HK, delta_HT = _backward_output(qkv_T3HK), torch.empty_like(lse_HT)
    tensors = {"qkv": qkv_T3HK, "ranges": ranges_3T, "cos": cos_TR, "sin": sin_TR}
    tensors |= {"lse": lse_HT, "dout": dout_THK, "delta": delta_HT, "dqkv": dqkv_T3HK}
    _launch("dq", attention_dq_kernel, {**tensors, "out": out_THK}, window, rotate)
    _launch("dkv", attention_dkv_kernel, tensors, window, rotate)
    return dqkv_T3HK


def _launch(part: str, kernel: Any, tensors: Mapping[str, Tensor | None], window: int | None, rotate: bool) -> None:
    qkv_T3HK = tensors["qkv"]
    assert qkv_T3HK is not None
    tokens, _, heads, width = qkv_T3HK.shape
    if not tokens:
        return
    tile = tile_for(qkv_T3HK.device, f"attention {part}", width, qkv_T3HK.element_size())
    kernel[(-(-tokens // tile.block_m) * heads,)](
        **tensors,
        T=tokens,
        window=FAR if window is None else min(window, FAR),
        scale=width**-0.5 * LOG2_E,
        H=heads,
        K=width,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        ROTATE=rotate,
        PRECISION=precision(qkv_T3HK),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _forward(
    qkv_T3HK: Tensor,
    ranges_3T: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    window: int | None,
    rotate: bool,
    *,
    lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels have read, the output, and the log-sum-exp. Without `rotate`, q and k are rotated before."""
    if not rotate:
        qkv_T3HK = rotary_copy(qkv_T3HK, cos_TR, sin_TR, False)
    return qkv_T3HK, *attention_forward(qkv_T3HK, ranges_3T, cos_TR, sin_TR, window, rotate, lse)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_T3HK: Tensor,
        ranges_3T: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        window: int | None,
        rotate: bool,
    ) -> Tensor:  # pyright: ignore
        qkv_T3HK, out_THK, lse_HT = _forward(qkv_T3HK, ranges_3T, cos_TR, sin_TR, window, rotate, lse=True)
        ctx.save_for_backward(qkv_T3HK, ranges_3T, cos_TR, sin_TR, out_THK, lse_HT)
        ctx.window, ctx.rotate = window, rotate
        return out_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THK: Tensor):  # pyright: ignore
        dqkv_T3HK = attention_backward(*ctx.saved_tensors, dout_THK.contiguous(), ctx.window, ctx.rotate)
        return dqkv_T3HK, None, None, None, None, None


def _accepts(qkv_T3HK: Tensor, *_: object, rope: tuple[Tensor, Tensor], dropout_p: float = 0.0, **__: object) -> bool:
    fits = supported(qkv_T3HK) and qkv_T3HK.shape[-1] in WIDTHS and rope_fits(qkv_T3HK, *rope)
    if fits and dropout_p and not torch.compiler.is_compiling():
        warnings.warn(
            f"attention with dropout {dropout_p} runs without the fused kernels, on padded sequences and a mask of "
            "them: train with attention_dropout=0.0, as ModernBERT was",
            stacklevel=3,
        )
    return fits and dropout_p == 0.0


def _check(qkv_T3HK: Tensor, *_: object, rope: tuple[Tensor, Tensor], dropout_p: float = 0.0, **__: object) -> None:
    if dropout_p:
        raise ValueError("the triton backend of attention has no dropout; use the reference")
    if qkv_T3HK.dtype not in DTYPES or qkv_T3HK.shape[-1] not in WIDTHS:
        raise ValueError(
            f"the triton backend of attention takes heads of width 32, 64 or 128 in float32, bfloat16 or float16, not "
            f"of width {qkv_T3HK.shape[-1]} in {qkv_T3HK.dtype}; use the reference"
        )
    if not rope_fits(qkv_T3HK, *rope):
        raise ValueError(
            "the triton backend of attention takes float32 tables [T, K / 2] that need no gradient; use the reference"
        )


@attention.register("triton", when=_accepts, check=_check)
def attention_triton(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    rope: tuple[Tensor, Tensor],
    window: int | None = None,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    ranges_3T: Tensor | None = None,
) -> Tensor:
    """`attention` without dropout, in float32, bfloat16 or float16; same arguments and result.

    Sequences share tiles: an infinity or a NaN in one sequence may make its neighbours in the batch NaN.
    """
    if ranges_3T is None:
        ranges_3T = token_ranges_triton(cu_seqlens, key_lengths, len(qkv_T3HK))
    tables = rope[0].contiguous(), rope[1].contiguous()
    call = qkv_T3HK.contiguous(), ranges_3T, *tables, window, window is not None or max_seqlen <= LONG
    return _Attention.apply(*call) if needs_gradient(qkv_T3HK) else _forward(*call, lse=False)[1]
