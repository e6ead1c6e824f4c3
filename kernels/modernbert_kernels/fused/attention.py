"""Attention over packed tokens in Triton: the operators, and the gradient around them."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import LONG
from ..launch import DTYPES, attention_outputs, contiguous, operator, precision, rope_fits, supported
from ..reference import attention
from .attention_kernels import FAR, attention_dkv_kernel, attention_dq_kernel, attention_forward_kernel
from .rotary import rotary_copy
from .tiles import tile_for

WIDTHS = (32, 64, 128)
LOG2_E = 1.4426950408889634  # softmax uses powers of two


@operator(
    "attention_forward(Tensor qkv, Tensor cu_seqlens, Tensor? key_lengths, Tensor cos, Tensor sin, int? window, "
    "bool rotate) -> (Tensor, Tensor)",
    fake=attention_outputs,
)
def attention_forward(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    key_lengths: Tensor | None,
    cos_TR: Tensor,
    sin_TR: Tensor,
    window: int | None,
    rotate: bool,
) -> tuple[Tensor, Tensor]:
    """The output `[T, H, K]` and the log-sum-exp of each softmax, `[H, T]` float32, to base 2."""
    out_THK, lse_HT = attention_outputs(qkv_T3HK)
    sequences = (cu_seqlens, key_lengths, cos_TR, sin_TR)
    _launch("forward", attention_forward_kernel, qkv_T3HK, sequences, (out_THK, lse_HT), window, rotate)
    return out_THK, lse_HT


def _backward_output(qkv_T3HK: Tensor, *_: object) -> Tensor:
    return torch.empty_like(qkv_T3HK)


@operator(
    "attention_backward(Tensor qkv, Tensor cu_seqlens, Tensor? key_lengths, Tensor cos, Tensor sin, Tensor out, "
    "Tensor lse, Tensor dout, int? window, bool rotate) -> Tensor",
    fake=_backward_output,
)
def attention_backward(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    key_lengths: Tensor | None,
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
    sequences = (cu_seqlens, key_lengths, cos_TR, sin_TR)
    tensors = (out_THK, lse_HT, dout_THK, delta_HT, dqkv_T3HK)
    _launch("dq", attention_dq_kernel, qkv_T3HK, sequences, tensors, window, rotate)
    _launch("dkv", attention_dkv_kernel, qkv_T3HK, sequences, tensors[1:], window, rotate)
    return dqkv_T3HK


def _launch(
    part: str,
    kernel: Any,
    qkv_T3HK: Tensor,
    sequences: tuple[Tensor | None, ...],
    others: tuple[Tensor, ...],
    window: int | None,
    rotate: bool,
) -> None:
    tokens, _, heads, width = qkv_T3HK.shape
    if not tokens:
        return
    tile = tile_for(qkv_T3HK.device, f"attention {part}", width, qkv_T3HK.element_size())
    cu_seqlens = sequences[0]
    kernel[(triton.cdiv(tokens, tile.block_m), heads)](
        qkv_T3HK,
        *sequences,
        *others,
        tokens,
        len(cu_seqlens) - 1,
        FAR.value if window is None else min(window, FAR.value),
        width**-0.5 * LOG2_E,
        heads,
        width,
        tile.block_m,
        tile.block_n,
        rotate,
        precision(qkv_T3HK),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_T3HK: Tensor,
        cu_seqlens: Tensor,
        key_lengths: Tensor | None,
        cos_TR: Tensor,
        sin_TR: Tensor,
        window: int | None,
        rotate: bool,
    ) -> Tensor:  # pyright: ignore
        if not rotate:
            qkv_T3HK = rotary_copy(qkv_T3HK, cos_TR, sin_TR, False)
        out_THK, lse_HT = attention_forward(qkv_T3HK, cu_seqlens, key_lengths, cos_TR, sin_TR, window, rotate)
        ctx.save_for_backward(qkv_T3HK, cu_seqlens, key_lengths, cos_TR, sin_TR, out_THK, lse_HT)
        ctx.window, ctx.rotate = window, rotate
        return out_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THK: Tensor):  # pyright: ignore
        dqkv_T3HK = attention_backward(*ctx.saved_tensors, dout_THK.contiguous(), ctx.window, ctx.rotate)
        return dqkv_T3HK, None, None, None, None, None, None


def _accepts(qkv_T3HK: Tensor, *_: object, rope: tuple[Tensor, Tensor], dropout_p: float = 0.0, **__: object) -> bool:
    return supported(qkv_T3HK) and qkv_T3HK.shape[-1] in WIDTHS and rope_fits(qkv_T3HK, *rope) and dropout_p == 0.0


@attention.register("triton", when=_accepts)
def attention_triton(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    rope: tuple[Tensor, Tensor],
    window: int | None = None,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`attention` without dropout, in float32, bfloat16 or float16; same arguments and result.

    Sequences share tiles: an infinity or a NaN in one sequence may make its neighbours in the batch NaN.
    """
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
    tensors = contiguous(qkv_T3HK, cu_seqlens, key_lengths, *rope)
    return _Attention.apply(*tensors, window, window is not None or max_seqlen <= LONG)
