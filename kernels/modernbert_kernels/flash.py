"""FlashAttention as a backend of `attention`: q and k are rotated before it, and their gradients back behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import flash_attention
from .flash_attention import LONG, choose, empty_outputs
from .launch import operator
from .reference import attention, rotary, rotate_back

TRITON = "triton" in attention.backends


def _accepts(
    qkv_T3HK: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, window: int | None = None, **options: Any
) -> bool:
    """Long sequences without a window, and without Triton whatever it takes."""
    wanted = (window is None and max_seqlen > LONG) if TRITON else True
    return wanted and choose(qkv_T3HK, cu_seqlens, max_seqlen, window=window, **options) is not None


@attention.register("flash", when=_accepts)
def attention_flash(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    rope: tuple[Tensor, Tensor],
    window: int | None = None,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`attention` in bfloat16 or float16, without a window or without query rows; same arguments and result.

    Raises:
        ValueError: no FlashAttention takes the call: `flash_attention.choose` says what one takes.
    """
    options: dict[str, Any] = {"rope": rope, "window": window, "key_lengths": key_lengths, "dropout_p": dropout_p}
    name = choose(qkv_T3HK, cu_seqlens, max_seqlen, **options)
    if name is None:
        raise ValueError(
            f"no FlashAttention takes this call: {qkv_T3HK.dtype} on {qkv_T3HK.device}, head width "
            f"{qkv_T3HK.shape[-1]}, dropout {dropout_p}, window {window} "
            f"{'without' if key_lengths is None else 'with'} key_lengths; use another backend or the reference"
        )
    return _Flash.apply(qkv_T3HK, cu_seqlens, key_lengths, *rope, max_seqlen, window, name)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_T3HK: Tensor,
        cu_seqlens: Tensor,
        key_lengths: Tensor | None,
        cos_TR: Tensor,
        sin_TR: Tensor,
        max_seqlen: int,
        window: int | None,
        name: str,
    ) -> Tensor:
        rotated_T3HK = rotary(qkv_T3HK, cos_TR, sin_TR)
        ctx.call = max_seqlen, window, name
        out_THK, lse_HT = flash_forward(rotated_T3HK, cu_seqlens, key_lengths, *ctx.call)
        ctx.save_for_backward(rotated_T3HK, cu_seqlens, key_lengths, cos_TR, sin_TR, out_THK, lse_HT)
        return out_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THK: Tensor):  # pyright: ignore
        dqkv_T3HK = flash_backward(dout_THK.contiguous(), *ctx.saved_tensors, *ctx.call)
        return dqkv_T3HK, None, None, None, None, None, None, None


@operator(
    "flash_forward(Tensor qkv, Tensor cu_seqlens, Tensor? key_lengths, SymInt max_seqlen, int? window, str name) "
    "-> (Tensor, Tensor)",
    fake=empty_outputs,
)
def flash_forward(
    rotated_T3HK: Tensor,
    cu_seqlens: Tensor,
    key_lengths: Tensor | None,
    max_seqlen: int,
    window: int | None,
    name: str,
) -> tuple[Tensor, Tensor]:
    """The attended values `[T, H, K]`, and the logarithm of the sums of the softmax, float32 `[H, T]`."""
    q_THK, k_THK, v_THK = rotated_T3HK.unbind(1)
    return flash_attention.forward(name, q_THK, k_THK, v_THK, cu_seqlens, max_seqlen, window, key_lengths)


def _backward_output(dout_THK: Tensor, rotated_T3HK: Tensor, *_: object) -> Tensor:
    return torch.empty_like(rotated_T3HK)


@operator(
    "flash_backward(Tensor dout, Tensor qkv, Tensor cu_seqlens, Tensor? key_lengths, Tensor cos, Tensor sin, "
    "Tensor out, Tensor lse, SymInt max_seqlen, int? window, str name) -> Tensor",
    fake=_backward_output,
)
def flash_backward(
    dout_THK: Tensor,
    rotated_T3HK: Tensor,
    cu_seqlens: Tensor,
    key_lengths: Tensor | None,
    cos_TR: Tensor,
    sin_TR: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    max_seqlen: int,
    window: int | None,
    name: str,
) -> Tensor:
    """The gradient of the qkv that was not rotated yet, packed."""
    q_THK, k_THK, v_THK = rotated_T3HK.unbind(1)
    saved = (dout_THK, q_THK, k_THK, v_THK, out_THK, lse_HT)
    gradients = flash_attention.backward(name, *saved, cu_seqlens, max_seqlen, window, key_lengths)
    return rotate_back(*gradients, cos_TR, sin_TR)
