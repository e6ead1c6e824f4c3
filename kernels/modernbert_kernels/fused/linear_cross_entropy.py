"""Linear + cross-entropy over the tokens that have a target, in chunks: at most one chunk of logits exists at a time.

The forward pass also computes the gradients, from the logits of each chunk. The backward pass only multiplies them by
the gradient of the loss. The three products are cuBLAS's. Between them, one kernel replaces the logits of a chunk by
their gradient in place: two reads and one write of a chunk (one read where no gradient is needed).

Memory for T tokens, N of them with a target, width D, V classes, s bytes per element. Forward it is

    s T D (dx) + 4 V D (dweight) + 4 V (dbias) + CHUNK_BYTES + a few rows per chunk,

and backward twice the gradients. For T = 65,536, D = 768, V = 50,368 in bfloat16 that is 96 + 148 + 0.2 + 246 + 8 =
498 MiB forward and 96 + 148 + 96 + 74 = 414 MiB backward, whatever N is; logits alone would be 1.84 GiB at N = 0.3 T.

Without a reduction the gradients of rows are not known before the backward pass, which then computes the logits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import operator, supported
from ..reference import Reduction, check_loss, linear_cross_entropy
from .jit import jit

CHUNK_BYTES = 256 << 20
"""Size of a chunk of logits. Each chunk reads and writes the float32 dweight once more. At 50,368 x 768 that is 296 MiB
for every 2,560 rows in bfloat16: 8 chunks and 2.3 GiB for 19,661 rows, next to 4.6 TFLOP of products."""

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)

COLUMNS = 4096
"""Classes of a row that a program holds at a time: 16 for each thread of 8 warps, which leaves many programs on an
SM."""

TILE = 2048
"""Elements of a program that scales a gradient: 16 for each thread of 4 warps."""


def chunk_rows(classes: int, itemsize: int) -> int:
    """Rows of a chunk of logits: a multiple of 128, the rows of a tile of the products."""
    rows = CHUNK_BYTES // (classes * itemsize)
    return max(128, rows - rows % 128)


@jit()
def cross_entropy_kernel(
    logits,
    targets,
    losses,
    scales,
    z_loss,
    smoothing,
    V,
    stride,
    GRADIENT: tl.constexpr,
    SMOOTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # A program for each row.
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    # Read before any logit is overwritten: the reductions below are barriers between this and the second loop.
    target_logit = tl.load(logits + target, mask=target < V, other=float("nan")).to(tl.float32)
    columns = tl.arange(0, COLUMNS)
    # Powers of two, as the hardware computes them: `tl.exp` takes twice the instructions, for the smallest results. The
    # difference comes before the factor, which would round a large logit.
    # A finite start, so that a block in which all classes are excluded by -inf adds zero and not NaN.
    m_i = LOWEST
    l_i = 0.0
    total = 0.0
    for start in tl.range(0, V, COLUMNS):
        # The stride is a multiple of 16, so loads are wide for any number of classes; columns from V on are dropped.
        x = tl.load(logits + start + columns, mask=start + columns < stride, other=0.0).to(tl.float32)
        x = tl.where(start + columns < V, x, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(x, axis=0))
        l_i = l_i * tl.exp2((m_i - m_new) * LOG2_E) + tl.sum(tl.exp2((x - m_new) * LOG2_E), axis=0)
        m_i = m_new
        if SMOOTH:
            total += tl.sum(tl.where(start + columns < V, x, 0.0), axis=0)
    lse = m_i + tl.log(l_i)
    if SMOOTH:
        target_logit = (1 - smoothing) * target_logit + smoothing / V * total
    tl.store(losses + row, lse - target_logit + z_loss * lse * lse)
    if GRADIENT:
        # NaN in the gradients too, so that the error shows even if the loss is never read.
        slope = tl.where(target < V, 1 + 2 * z_loss * lse, float("nan"))
        scale = 1.0 if scales is None else tl.load(scales + row)
        for start in tl.range(0, V, COLUMNS):
            x = tl.load(logits + start + columns, mask=start + columns < stride).to(tl.float32)
            gradient = tl.exp2((x - lse) * LOG2_E) * slope - tl.where(start + columns == target, 1 - smoothing, 0.0)
            if SMOOTH:
                gradient -= smoothing / V
            tl.store(logits + start + columns, gradient * scale, mask=start + columns < stride)


@jit()
def scale_kernel(x, scale, y, N, TILE: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(x + offsets, mask=offsets < N).to(tl.float32)
    tl.store(y + offsets, value * tl.load(scale), mask=offsets < N)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a b` in the dtype of `total`, without rounding the product to that of `a`."""
    if a.dtype != total.dtype and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _empty(
    x_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    z_loss: float,
    wanted: Sequence[bool],
    label_smoothing: float = 0.0,
    scales_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = (x_TD.shape, weight_VD.shape, weight_VD.shape[:1])
    dx, dweight, dbias = (shape if want else (0,) for shape, want in zip(shapes, wanted, strict=True))
    losses, share = (x_TD.new_empty(shape, dtype=torch.float32) for shape in (targets_T.shape, ()))
    dweight, dbias = (x_TD.new_empty(shape, dtype=torch.float32) for shape in (dweight, dbias))
    return losses, share, x_TD.new_empty(dx), dweight, dbias


@operator(
    "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor? bias, Tensor targets, float z_loss, bool[3] wanted,"
    " float label_smoothing=0.0, Tensor? scales=None)"
    " -> (Tensor losses, Tensor share, Tensor dx, Tensor dweight, Tensor dbias)",
    fake=_empty,
    tags=[torch.Tag.cudagraph_unsafe],  # The host reads the number of targets.
)
def linear_cross_entropy_forward(
    x_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    z_loss: float,
    wanted: Sequence[bool],
    label_smoothing: float = 0.0,
    scales_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The losses (0 without a target), the share of each (one over their number), and the gradients of their sum.

    Of the sum and not the mean, because 1 / 20,000 of a probability is zero in float16. `scales_T`, float32, multiplies
    the loss of each row in the gradients. dx has the dtype of x. dweight and dbias are float32, because a bfloat16 sum
    over many chunks would lose the later ones. Gradients that are not `wanted` are empty. The host waits once, for the
    number of rows.
    """
    num_classes = len(weight_VD)
    rows_N = (targets_T >= 0).nonzero()[:, 0]
    num_rows = len(rows_N)
    losses_N = x_TD.new_empty(num_rows, dtype=torch.float32)
    losses_T, share, *gradients = _empty(x_TD, weight_VD, bias_V, targets_T, z_loss, wanted)
    dx_TD, dweight_VD, dbias_V = map(Tensor.zero_, gradients)
    chunk = min(num_rows, chunk_rows(num_classes, x_TD.element_size()))
    # Rows begin at multiples of 32 bytes for any number of classes, for cuBLAS and for wide loads.
    stride = triton.cdiv(num_classes, 16) * 16
    # Zeros, because oneDNN's product in bfloat16 (AMX) reads what is behind the last class.
    logits_CV = x_TD.new_zeros(chunk, stride)[:, :num_classes]
    for start in range(0, num_rows, chunk or 1):
        rows_C = rows_N[start : start + chunk]
        x_CD, targets_C = x_TD.index_select(0, rows_C), targets_T.index_select(0, rows_C)
        y_CV = logits_CV[: len(rows_C)]
        if bias_V is None:
            torch.mm(x_CD, weight_VD.T, out=y_CV)
        else:
            torch.addmm(bias_V, x_CD, weight_VD.T, out=y_CV)
        losses_C = losses_N[start : start + chunk]
        scales_C = None if scales_T is None else scales_T.index_select(0, rows_C)
        tensors, numbers = (y_CV, targets_C, losses_C, scales_C), (z_loss, label_smoothing, num_classes, stride)
        flags = any(wanted), label_smoothing > 0, COLUMNS
        cross_entropy_kernel[(len(rows_C),)](*tensors, *numbers, *flags, num_warps=8, num_stages=1)
        if wanted[0]:
            dx_TD.index_copy_(0, rows_C, torch.mm(y_CV, weight_VD))
        if wanted[1]:
            _add_product(dweight_VD, y_CV.T, x_CD)
        if wanted[2]:
            dbias_V += y_CV.sum(0, dtype=torch.float32)
    losses_T.zero_().index_copy_(0, rows_N, losses_N)
    return losses_T, share.fill_(1 / max(1, num_rows)), dx_TD, dweight_VD, dbias_V


@operator(
    "linear_cross_entropy_backward(Tensor gradient, Tensor scale, ScalarType dtype) -> Tensor",
    fake=lambda gradient, scale, dtype: torch.empty_like(gradient, dtype=dtype),
)
def linear_cross_entropy_backward(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale * gradient` in `dtype`, with one rounding; `scale` is a float32 scalar on the device."""
    scaled = torch.empty_like(gradient, dtype=dtype)
    if gradient.numel():
        grid = (triton.cdiv(gradient.numel(), TILE),)
        scale_kernel[grid](gradient, scale, scaled, gradient.numel(), TILE, num_warps=4, num_stages=1)
    return scaled


class _Total(torch.autograd.Function):
    """The mean or the sum of all losses."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        z_loss: float,
        label_smoothing: float,
        wanted: Sequence[bool],
        is_mean: bool,
    ) -> Tensor:
        arguments = (x_TD, weight_VD, bias_V, targets_T, z_loss, wanted, label_smoothing)
        losses_T, share, *gradients = linear_cross_entropy_forward(*arguments)
        share = share if is_mean else torch.ones_like(share)
        ctx.save_for_backward(share, *gradients)
        ctx.wanted, ctx.dtype = wanted, x_TD.dtype
        return losses_T.sum() * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor):  # pyright: ignore
        share, *gradients = ctx.saved_tensors
        return *_scaled(gradients, dloss * share, ctx.wanted, ctx.dtype), None, None, None, None, None


class _EachRow(torch.autograd.Function):
    """The loss of each row. The backward pass computes the logits again, when it knows what to scale rows with."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        z_loss: float,
        label_smoothing: float,
        wanted: Sequence[bool],
    ) -> Tensor:
        ctx.save_for_backward(x_TD, weight_VD, bias_V, targets_T)
        ctx.z_loss, ctx.label_smoothing, ctx.wanted = z_loss, label_smoothing, wanted
        no_gradient = [False, False, False]
        arguments = (x_TD, weight_VD, bias_V, targets_T, z_loss, no_gradient, label_smoothing)
        return linear_cross_entropy_forward(*arguments)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses_T: Tensor):  # pyright: ignore
        x_TD, weight_VD, bias_V, targets_T = ctx.saved_tensors
        # The largest scale is 1, for the same reason as the sum in the place of the mean.
        largest = F.pad(dlosses_T.abs(), (0, 1)).amax().clamp_min(torch.finfo(torch.float32).tiny)
        arguments = (x_TD, weight_VD, bias_V, targets_T, ctx.z_loss, ctx.wanted, ctx.label_smoothing)
        _, _, *gradients = linear_cross_entropy_forward(*arguments, dlosses_T / largest)
        return *_scaled(gradients, largest, ctx.wanted, x_TD.dtype), None, None, None, None


def _scaled(
    gradients: Sequence[Tensor], scale: Tensor, wanted: Sequence[bool], dtype: torch.dtype
) -> list[Tensor | None]:
    return [
        linear_cross_entropy_backward(gradient, scale, dtype) if want else None
        for gradient, want in zip(gradients, wanted, strict=True)
    ]


def _accepts(x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, **_: object) -> bool:
    tensors = [x_TD, weight_VD] if bias_V is None else [x_TD, weight_VD, bias_V]
    alike = torch.is_autocast_enabled("cuda") or all(x.dtype == x_TD.dtype for x in tensors)
    return supported(*tensors) and targets_T.is_cuda and alike


@linear_cross_entropy.register("triton", when=_accepts)
def linear_cross_entropy_triton(
    x_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    *,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`linear_cross_entropy` in float32, bfloat16 or float16, all of one dtype; same arguments and result.

    Under autocast the product is in its dtype, like `torch.nn.functional.linear`. A target that is not a class makes
    the loss and the gradients NaN, because checking it would wait for the device. The number of targets is read from
    the device, so a call cannot be captured in a CUDA graph; `torch.compile` leaves it out of its graphs.
    """
    check_loss(reduction, label_smoothing)
    leaves = (x_TD, weight_VD, bias_V)
    if torch.is_autocast_enabled(x_TD.device.type):
        # Here, because inside of the operator autocast would reach only some of the products.
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        leaves = tuple(leaf if leaf is None else leaf.to(dtype) for leaf in leaves)
    wanted = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    arguments = (*leaves, targets_T, z_loss, label_smoothing, wanted)
    return _EachRow.apply(*arguments) if reduction == "none" else _Total.apply(*arguments, reduction == "mean")
