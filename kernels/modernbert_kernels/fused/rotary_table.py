"""The tables of the rotary embedding in one kernel: frequencies, angles, cosines and sines.

Frequencies and angles are rounded to float32 where the specification rounds them: at position 32,768 the rounding is
worth an angle of 0.002, and checkpoints were trained with it. The sine and cosine of the hardware are off by 5e-7, and
by more for larger angles. So the angle is reduced to an eighth of a turn in float64, and the remainder goes through the
polynomials of Cephes (Moshier, sinf and cosf) in float32. The frequencies are computed once for the rows of a program.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_gpu, operator
from ..reference import rotary_table
from .jit import jit

TILE = 1024
"""Angles of a program of 4 warps, 8 for each thread: a query of 32 tokens is one program."""

POSITIONS = (torch.int64, torch.int32)
HALF_PI = tl.constexpr(math.pi / 2)
TWO_OVER_PI = tl.constexpr(2 / math.pi)


@triton.jit
def _float64(value: tl.constexpr):
    """A Python number with all its digits. In an expression with a tensor, Triton would round it to float32."""
    return tl.full([1, 1], value, tl.float64)


@jit(do_not_specialize=["T"])
def rotary_table_kernel(
    positions, cos, sin, T, STEP: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """`STEP` is `log2(theta) / R`."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    position = tl.load(positions + rows, mask=rows < T, other=0)
    power = tl.exp2(columns.to(tl.float64) * _float64(STEP)).to(tl.float32)
    frequency = (1.0 / power.to(tl.float64)).to(tl.float32)
    angle = (position.to(tl.float32)[:, None] * frequency).to(tl.float64)
    quarters = tl.floor(angle * _float64(TWO_OVER_PI) + 0.5)
    x = (angle - quarters * _float64(HALF_PI)).to(tl.float32)
    quarter = quarters.to(tl.int64) & 3
    square = x * x
    s = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * x + x
    c = ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2) * square * square
    c += 1.0 - 0.5 * square
    # A quarter of a turn swaps sine and cosine; two quarters change the sign.
    swapped = (quarter & 1) == 1
    offsets = rows[:, None] * R + columns
    mask = (rows < T)[:, None] & (columns < R)
    result = tl.where(swapped, s, c)
    tl.store(cos + offsets, tl.where((quarter == 1) | (quarter == 2), -result, result), mask=mask)
    result = tl.where(swapped, c, s)
    tl.store(sin + offsets, tl.where(quarter >= 2, -result, result), mask=mask)


def _empty(positions_T: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    shape = (positions_T.shape[0], head_dim // 2)
    cos_TR, sin_TR = (positions_T.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return cos_TR, sin_TR


@operator("rotary_table(Tensor positions, float theta, int head_dim) -> (Tensor, Tensor)", fake=_empty)
def rotary_table_forward(positions_T: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    cos_TR, sin_TR = _empty(positions_T, theta, head_dim)
    T, R = cos_TR.shape
    columns = 1 << (R - 1).bit_length()
    rows = max(1, TILE // columns)
    if T:
        step = math.log2(theta) / R
        rotary_table_kernel[(-(-T // rows),)](positions_T, cos_TR, sin_TR, T, step, R, rows, columns, num_warps=4)
    return cos_TR, sin_TR


def _accepts(positions_T: Tensor, theta: float, head_dim: int) -> bool:
    fits = positions_T.dtype in POSITIONS and positions_T.dim() == 1 and head_dim % 2 == 0
    return fits and on_gpu(positions_T)


@rotary_table.register("triton", when=_accepts)
def rotary_table_triton(positions_T: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """`rotary_table`, accurate to the last bits of the float32 angles at every position; same arguments and result."""
    return rotary_table_forward(positions_T.contiguous(), theta, head_dim)
