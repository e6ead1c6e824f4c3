"""FlashAttention as a backend of `attention`: q and k are rotated first, and their gradients are rotated back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import LONG
from ..launch import attention_outputs, needs_gradient, operator
from ..reference import attention, rotary, rotate_back
from . import packages


def _accepts(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    window: int | None = None,
    ranges_3T: Tensor | None = None,
    **options: Any,
) -> bool:
    """Long sequences without a window; without Triton, whatever a package takes."""
    wanted = "triton" not in attention.backends or (window is None and max_seqlen > LONG)
    return wanted and packages.choose(qkv_T3HK, cu_seqlens, max_seqlen, window=window, **options) is not None


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
    ranges_3T: Tensor | None = None,
) -> Tensor:
    """`attention` in bfloat16 or float16, with a window or with `key_lengths` but not with both.

    Raises:
        ValueError: no FlashAttention takes the call. `packages.choose` has the conditions.
    """
    options: dict[str, Any] = {"rope": rope, "window": window, "key_lengths": key_lengths, "dropout_p": dropout_p}
    name = packages.choose(qkv_T3HK, cu_seqlens, max_seqlen, **options)
    if name is None:
        raise ValueError(
            f"no FlashAttention takes this call: {qkv_T3HK.dtype} on {qkv_T3HK.device}, head width "
            f"{qkv_T3HK.shape[-1]}, dropout {dropout_p}, window {window} "
            f"{'without' if key_lengths is None else 'with'} key_lengths; use another backend or the reference"
        )
    if needs_gradient(qkv_T3HK):
        return _Flash.apply(qkv_T3HK, cu_seqlens, key_lengths, *rope, max_seqlen, window, name)
    return flash_forward(rotary(qkv_T3HK, *rope), cu_seqlens, key_lengths, max_seqlen, window, name)[0]


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
    fake=attention_outputs,
)
def flash_forward(
    rotated_T3HK: Tensor,
    cu_seqlens: Tensor,
    key_lengths: Tensor | None,
    max_seqlen: int,
    window: int | None,
    name: str,
) -> tuple[Tensor, Tensor]:
    """The output `[T, H, K]` and the log-sum-exp of each softmax, `[H, T]` float32."""
    q_THK, k_THK, v_THK = rotated_T3HK.unbind(1)
    return packages.forward(name, q_THK, k_THK, v_THK, cu_seqlens, max_seqlen, window, key_lengths)


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
    """The gradient of packed qkv before the rotation, `[T, 3, H, K]`."""
    q_THK, k_THK, v_THK = rotated_T3HK.unbind(1)
    saved = (dout_THK, q_THK, k_THK, v_THK, out_THK, lse_HT)
    gradients = packages.backward(name, *saved, cu_seqlens, max_seqlen, window, key_lengths)
    return rotate_back(*gradients, cos_TR, sin_TR)
