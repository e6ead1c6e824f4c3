"""The kernels of LayerNorm in one pass over memory, alone or fused with what precedes it: a residual sum or a gather.

One kernel forward and one backward serve `layer_norm.py` and `embed_layer_norm.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, for_arch, multiprocessors, operator
from .jit import jit

TILE = 1024
"""Elements that 4 warps take at once, 8 for each thread: 16 bytes of bfloat16, one access to memory. A longer row has a
program with more warps; shorter rows share a program. Chosen by registers, not yet timed."""

WARPS_PER_SM = {80: 16, 89: 12, 90: 16, 120: 12}
"""Warps of the backward kernel on each multiprocessor. Its programs loop over the rows and keep sums for the weight, so
all should be resident at once, and none may wait for another one to end. These fit beside one another under autocast,
which takes the most: 25 KB for 4 warps, of 100 KB on sm_89 and sm_120."""

STAGES = 3
"""With so few programs, each hides the latency of memory by prefetching two tiles; one where both are float32, which
otherwise spills registers."""

WIDEST = 4096
"""The longest row: 16 warps. The models have 256 to 1792 elements."""


@jit(do_not_specialize=["T"])
def norm_forward_kernel(
    x, ids, delta, weight, bias, s, y, stats, T, eps, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    column_mask = columns < D
    mask = (rows < T)[:, None] & column_mask[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    w = tl.load(weight + columns, mask=column_mask, other=0.0).to(tl.float32)
    x_offsets = offsets
    if ids is not None:
        x_offsets = tl.load(ids + rows, mask=rows < T, other=0).to(tl.int64)[:, None] * D + columns[None, :]
    values = tl.load(x + x_offsets, mask=mask, other=0.0).to(tl.float32)
    if delta is not None:
        values += tl.load(delta + offsets, mask=mask, other=0.0).to(tl.float32)
        # Rounded to the dtype of the stream before its statistics are computed.
        values = values.to(s.dtype.element_ty)
        tl.store(s + offsets, values, mask=mask)
        values = values.to(tl.float32)
    mean = tl.sum(values, axis=1) / D
    centred = tl.where(mask, values - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)
    if stats is not None:
        tl.store(stats + rows, mean, mask=rows < T)
        tl.store(stats + T + rows, rstd, mask=rows < T)
    result = centred * rstd[:, None] * w[None, :]
    if bias is not None:
        result += tl.load(bias + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(y + offsets, result, mask=mask)


@jit(do_not_specialize=["T"])
def norm_backward_kernel(
    dy, ds, x, ids, weight, stats, dx, ddelta, dweight, dbias, T,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`dx = ds + rstd * (g - mean(g) - x_hat * mean(g * x_hat))` for the normalised `x_hat` and `g = dy * weight`; sums
    of `dy * x_hat` and of `dy` over the rows of this program. What is None is not computed.
    """
    columns = tl.arange(0, COLUMNS)
    column_mask = columns < D
    w = tl.load(weight + columns, mask=column_mask, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    bias_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < T)[:, None] & column_mask[None, :]
        offsets = rows[:, None] * D + columns[None, :]
        x_offsets = offsets
        if ids is not None:
            x_offsets = tl.load(ids + rows, mask=rows < T, other=0).to(tl.int64)[:, None] * D + columns[None, :]
        mean = tl.load(stats + rows, mask=rows < T, other=0.0)
        rstd = tl.load(stats + T + rows, mask=rows < T, other=0.0)
        # Zero outside of the rows, so that all sums are right.
        grad = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        x_hat = (tl.load(x + x_offsets, mask=mask, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        if dweight is not None:
            weight_sum += grad * x_hat
        if dbias is not None:
            bias_sum += grad
        if dx is not None:
            grad *= w[None, :]
            mean_g = tl.sum(grad, axis=1) / D
            mean_gx = tl.sum(grad * x_hat, axis=1) / D
            grad = (grad - mean_g[:, None] - x_hat * mean_gx[:, None]) * rstd[:, None]
            if ds is not None:
                grad += tl.load(ds + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx + offsets, grad, mask=mask)
            if ddelta is not None:
                tl.store(ddelta + offsets, grad, mask=mask)
    partial = tl.program_id(0).to(tl.int64) * D + columns
    if dweight is not None:
        tl.store(dweight + partial, tl.sum(weight_sum, axis=0), mask=column_mask)
    if dbias is not None:
        tl.store(dbias + partial, tl.sum(bias_sum, axis=0), mask=column_mask)


@cache
def _tile(D: int) -> tuple[int, int, int]:
    """Rows and columns of a tile for rows of D elements, and the warps that take it."""
    columns = 1 << (D - 1).bit_length()
    return max(1, TILE // columns), columns, max(4, 4 * columns // TILE)


def _programs(device: torch.device, warps: int) -> int:
    """As many programs of the backward kernel as are resident at once."""
    return multiprocessors(device) * -(-for_arch(WARPS_PER_SM, device) // warps)


def _like_forward(
    x: Tensor, ids: Tensor | None, delta: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float,
    dtype: torch.dtype, keep: bool,
) -> list[Tensor]:  # fmt: skip
    shape = (*(x.shape[:-1] if ids is None else ids.shape), x.shape[-1])
    y_TD = x.new_empty(shape, dtype=dtype)
    stats_2T = x.new_empty((2, y_TD.numel() // shape[-1]) if keep else 0, dtype=torch.float32)
    kept = [] if delta is None else [x.new_empty(shape, dtype=torch.promote_types(x.dtype, delta.dtype))]
    return [y_TD, stats_2T, *kept]


@operator(
    "norm_forward(Tensor x, Tensor? ids, Tensor? delta, Tensor weight, Tensor? bias, float eps, ScalarType dtype, "
    "bool keep) -> Tensor[]",
    fake=_like_forward,
)
def norm_forward(
    x: Tensor, ids: Tensor | None, delta: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float,
    dtype: torch.dtype, keep: bool,
) -> list[Tensor]:  # fmt: skip
    """`[y, stats]` of rows of x, or of the rows `ids` of the table x; `[y, stats, x + delta]` with a delta.

    y has this dtype. `stats`, `[2, T]` float32, holds the mean and the inverse standard deviation of every row for the
    backward pass; it is empty unless it is to be kept.
    """
    y, stats_2T, *kept = outputs = _like_forward(x, ids, delta, weight_D, bias_D, eps, dtype, keep)
    D = x.shape[-1]
    T, (rows, columns, warps) = y.numel() // D, _tile(D)
    if T:
        norm_forward_kernel[(-(-T // rows),)](
            x, ids, delta, weight_D, bias_D, kept[0] if kept else None, y, stats_2T if keep else None, T, eps, D, rows,
            columns, num_warps=warps,
        )  # fmt: skip
    return outputs


def _like_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, ids: Tensor | None, weight_D: Tensor, stats_2T: Tensor,
    wanted: Sequence[bool], delta: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    of_x, of_weight, of_bias = wanted
    dparameters = weight_D.new_empty(of_weight + of_bias, weight_D.shape[0])
    ddelta = [] if delta is None else [dy.new_empty(dy.shape, dtype=delta)]
    return [dy.new_empty(dy.shape if of_x else 0, dtype=x.dtype), dparameters, *ddelta]


@operator(
    "norm_backward(Tensor dy, Tensor? ds, Tensor x, Tensor? ids, Tensor weight, Tensor stats, bool[3] wanted, "
    "ScalarType? delta) -> Tensor[]",
    fake=_like_backward,
)
def norm_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, ids: Tensor | None, weight_D: Tensor, stats_2T: Tensor,
    wanted: Sequence[bool], delta: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    """`[dx, dparameters]`, and dx once more in the dtype `delta` where that is given.

    `wanted`: of x, weight and bias. `ds` is added to dx, which is empty if it is not wanted. `dparameters` has a row
    for the weight and one for the bias, if they are wanted.
    """
    T, D = stats_2T.shape[1], x.shape[-1]
    rows, columns, warps = _tile(D)
    programs = min(-(-T // rows), _programs(x.device, warps))
    dx, dparameters, *ddelta = _like_backward(dy, ds, x, ids, weight_D, stats_2T, wanted, delta)
    partial_2PD = x.new_empty(len(dparameters), programs, D, dtype=torch.float32)
    of_x, of_weight, of_bias = wanted
    if T:
        norm_backward_kernel[(programs,)](
            dy, ds, x, ids, weight_D, stats_2T, dx if of_x else None, ddelta[0] if ddelta else None,
            partial_2PD[0] if of_weight else None, partial_2PD[-1] if of_bias else None, T, D, rows, columns,
            STAGES - (dy.dtype == x.dtype == torch.float32), num_warps=warps,
        )  # fmt: skip
    # Summed by torch in a fixed order: some hundred rows, which are still in the cache.
    return [dx, partial_2PD.sum(1).to(weight_D.dtype) if len(dparameters) else dparameters, *ddelta]


def each_parameter(dparameters: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of weight and bias, None where it is not wanted, from those that `norm_backward` gives."""
    rows = iter(dparameters)
    return [next(rows) if want else None for want in wanted]


def fits(x: Tensor, delta: Tensor | None, weight_D: Tensor, bias_D: Tensor | None) -> bool:
    """Whether the kernels take these shapes and dtypes: one dtype for all, or a float32 stream `x + delta`."""
    terms = {x.dtype} if delta is None else {x.dtype, delta.dtype}
    alike = terms == {weight_D.dtype} or (delta is not None and torch.float32 in terms)
    return (
        alike
        and terms.union({weight_D.dtype}) <= set(DTYPES)
        and (delta is None or delta.shape == x.shape)
        and weight_D.shape == x.shape[-1:]
        and (bias_D is None or (bias_D.dtype == weight_D.dtype and bias_D.shape == weight_D.shape))
        and 0 < weight_D.shape[0] <= WIDEST
    )


def check(x: Tensor, delta: Tensor | None, weight_D: Tensor, bias_D: Tensor | None) -> None:
    """Raise ValueError where `fits` is False."""
    if not fits(x, delta, weight_D, bias_D):
        given = {"x": x, "delta": delta, "weight": weight_D, "bias": bias_D}
        got = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in given.items() if t is not None)
        raise ValueError(
            f"the Triton LayerNorm takes rows of 1 to {WIDEST} in float32, bfloat16 or float16, one dtype for all, or "
            f"a float32 stream with weights of any of them; got {got}: use the reference"
        )
