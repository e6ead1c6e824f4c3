"""Rotary embedding of q and k in packed qkv, in place or into a copy. The gradient is the rotation by the negative
angle.

Memory traffic per token: 4 H K elements in place, 6 H K into a copy, and the two tables.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import DTYPES, needs_gradient, operator, rope_fits, supported
from ..reference import rotary, rotate_back
from .jit import jit

TILE = 1024
"""Pairs that a program of 4 warps rotates, 8 for each thread: two accesses of 16 bytes in bfloat16. Chosen by
registers, not yet timed."""


@jit(do_not_specialize=["N"])
def rotary_kernel(
    qkv, cos, sin, out, N, HEADS: tl.constexpr, TAKEN: tl.constexpr, R: tl.constexpr, INVERSE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rotate the first `TAKEN` of the 3 `HEADS` heads of a token: all of them, or in place only those of q and k."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    token, head = (rows // TAKEN).to(tl.int64)[:, None], (rows % TAKEN)[:, None]
    mask = (rows < N)[:, None] & (columns < R)
    offsets = token * (3 * HEADS * 2 * R) + head * (2 * R) + columns
    a = tl.load(qkv + offsets, mask=mask)
    b = tl.load(qkv + offsets + R, mask=mask)
    rotated = mask & (head < 2 * HEADS)
    c = tl.load(cos + token * R + columns, mask=rotated, other=1.0)
    s = tl.load(sin + token * R + columns, mask=rotated, other=0.0)
    if INVERSE:
        s = -s
    first = (a.to(tl.float32) * c - b.to(tl.float32) * s).to(a.dtype)
    second = (b.to(tl.float32) * c + a.to(tl.float32) * s).to(b.dtype)
    if TAKEN > 2 * HEADS:
        # v is copied, not multiplied by 1 and 0, which would turn an infinity into NaN.
        first = tl.where(rotated, first, a)
        second = tl.where(rotated, second, b)
    tl.store(out + offsets, first, mask=mask)
    tl.store(out + offsets + R, second, mask=mask)


def _launch(qkv_T3HK: Tensor, cos_TR: Tensor, sin_TR: Tensor, out_T3HK: Tensor, inverse: bool, taken: int) -> None:
    T, _, H, K = qkv_T3HK.shape
    columns = 1 << (K // 2 - 1).bit_length()
    rows = max(1, TILE // columns)
    if qkv_T3HK.numel():
        rotary_kernel[(-(-T * taken * H // rows),)](
            qkv_T3HK, cos_TR, sin_TR, out_T3HK, T * taken * H, H, taken * H, K // 2, inverse, rows, columns, num_warps=4
        )


def _like(qkv_T3HK: Tensor, cos_TR: Tensor, sin_TR: Tensor, inverse: bool) -> Tensor:
    return torch.empty_like(qkv_T3HK)


@operator("rotary(Tensor qkv, Tensor cos, Tensor sin, bool inverse) -> Tensor", fake=_like)
def rotary_copy(qkv_T3HK: Tensor, cos_TR: Tensor, sin_TR: Tensor, inverse: bool) -> Tensor:
    """A copy with q and k rotated by the angle, or by the negative angle if `inverse`; v is unchanged."""
    out_T3HK = _like(qkv_T3HK, cos_TR, sin_TR, inverse)
    _launch(qkv_T3HK, cos_TR, sin_TR, out_T3HK, inverse, 3)
    return out_T3HK


@operator("rotary_(Tensor(a!) qkv, Tensor cos, Tensor sin) -> ()", fake=lambda qkv_T3HK, cos_TR, sin_TR: None)
def rotary_inplace(qkv_T3HK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> None:
    """Rotate q and k in place; v is neither read nor written."""
    _launch(qkv_T3HK, cos_TR, sin_TR, qkv_T3HK, False, 2)


@jit(do_not_specialize=["N"])
def rotate_back_kernel(
    dq, dk, dv, cos, sin, dqkv, N, HEADS: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rotate separate gradients of q and k by the negative angle, and write them and that of v into packed dqkv."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    mask = (rows < N) & (columns < R)
    token, head = rows // HEADS, rows % HEADS
    source = rows * (2 * R) + columns
    target = token * (3 * HEADS * 2 * R) + head * (2 * R) + columns
    c = tl.load(cos + token * R + columns, mask=mask)
    s = tl.load(sin + token * R + columns, mask=mask)
    a = tl.load(dq + source, mask=mask).to(tl.float32)
    b = tl.load(dq + source + R, mask=mask).to(tl.float32)
    tl.store(dqkv + target, a * c + b * s, mask=mask)
    tl.store(dqkv + target + R, b * c - a * s, mask=mask)
    target += HEADS * 2 * R
    a = tl.load(dk + source, mask=mask).to(tl.float32)
    b = tl.load(dk + source + R, mask=mask).to(tl.float32)
    tl.store(dqkv + target, a * c + b * s, mask=mask)
    tl.store(dqkv + target + R, b * c - a * s, mask=mask)
    target += HEADS * 2 * R
    tl.store(dqkv + target, tl.load(dv + source, mask=mask), mask=mask)
    tl.store(dqkv + target + R, tl.load(dv + source + R, mask=mask), mask=mask)


def _packed(dq_THK: Tensor, dk_THK: Tensor, dv_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    T, H, K = dq_THK.shape
    return dq_THK.new_empty(T, 3, H, K)


@operator("rotate_back(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor", fake=_packed)
def rotate_back_packed(dq_THK: Tensor, dk_THK: Tensor, dv_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """The packed gradient before the rotation, of contiguous tensors."""
    dqkv_T3HK, (T, H, K) = _packed(dq_THK, dk_THK, dv_THK, cos_TR, sin_TR), dq_THK.shape
    columns = 1 << (K // 2 - 1).bit_length()
    rows = max(1, TILE // columns)
    if dq_THK.numel():
        rotate_back_kernel[(-(-T * H // rows),)](
            dq_THK, dk_THK, dv_THK, cos_TR, sin_TR, dqkv_T3HK, T * H, H, K // 2, rows, columns, num_warps=4
        )
    return dqkv_T3HK


@rotate_back.register(
    "triton", when=lambda dq_THK, dk_THK, dv_THK, cos_TR, sin_TR: supported(dq_THK, cos_TR) and not dq_THK.requires_grad
)
def rotate_back_triton(dq_THK: Tensor, dk_THK: Tensor, dv_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """`rotate_back` in one pass, without stacking the gradients first. Not differentiable."""
    return rotate_back_packed(*(x.contiguous() for x in (dq_THK, dk_THK, dv_THK, cos_TR, sin_TR)))


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_T3HK: Tensor, cos_TR: Tensor, sin_TR: Tensor, inplace: bool) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(cos_TR, sin_TR)
        if not inplace:
            return rotary_copy(qkv_T3HK, cos_TR, sin_TR, False)
        rotary_inplace(qkv_T3HK, cos_TR, sin_TR)
        ctx.mark_dirty(qkv_T3HK)
        return qkv_T3HK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T3HK: Tensor):  # pyright: ignore
        # Not in place: autograd may pass the same gradient to other functions.
        return rotary_copy(grad_T3HK.contiguous(), *ctx.saved_tensors, True), None, None, None


@rotary.register(
    "triton",
    when=lambda qkv_T3HK, cos_TR, sin_TR, *, inplace=False: (
        supported(qkv_T3HK, cos_TR, sin_TR) and rope_fits(qkv_T3HK, cos_TR, sin_TR)
    ),
)
def rotary_triton(qkv_T3HK: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, inplace: bool = False) -> Tensor:
    """`rotary` in float32, bfloat16 or float16, for any heads of an even width; same arguments and result."""
    if qkv_T3HK.dtype not in DTYPES or not rope_fits(qkv_T3HK, cos_TR, sin_TR):
        raise ValueError(
            "the Triton rotary takes [T, 3, H, K] in float32, bfloat16 or float16 and float32 tables [T, K / 2] that "
            f"need no gradient; got {tuple(qkv_T3HK.shape)} {qkv_T3HK.dtype}, {tuple(cos_TR.shape)} {cos_TR.dtype} and "
            f"{tuple(sin_TR.shape)} {sin_TR.dtype}: use the reference"
        )
    cos_TR, sin_TR = cos_TR.contiguous(), sin_TR.contiguous()
    # Compilers make their own copies of a tensor that is written in place.
    if inplace and (torch.compiler.is_compiling() or not qkv_T3HK.is_contiguous()):
        return qkv_T3HK.copy_(_Rotary.apply(qkv_T3HK.contiguous(), cos_TR, sin_TR, False))
    if not inplace and not needs_gradient(qkv_T3HK):
        return rotary_copy(qkv_T3HK.contiguous(), cos_TR, sin_TR, False)
    return _Rotary.apply(qkv_T3HK if inplace else qkv_T3HK.contiguous(), cos_TR, sin_TR, inplace)
