"""Linear + cross-entropy over the tokens that have a target, in chunks: at most one chunk of logits exists at a time.

The forward pass also computes the gradients, from the logits of each chunk. The backward pass only multiplies them by
the gradient of the loss. The three products are cuBLAS's. Between them, one kernel replaces the logits of a chunk by
their gradient in place: two reads and one write of a chunk (one read where no gradient is needed).

Memory for T tokens, N of them with a target, width D, V classes, s bytes per element. Forward it is

    s T D (dx) + 4 V D (dweight) + 4 V (dbias) + CHUNK_BYTES + a few rows per chunk,

and backward twice the gradients. For T = 65,536, D = 768, V = 50,368 in bfloat16 that is 96 + 148 + 0.2 + 246 + 8 =
498 MiB forward and 96 + 148 + 96 + 74 = 414 MiB backward, whatever N is; logits alone would be 1.84 GiB at N = 0.3 T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import operator, supported
from ..reference import linear_cross_entropy

CHUNK_BYTES = 256 << 20
"""Size of a chunk of logits. Each chunk reads and writes the float32 dweight once more. At 50,368 x 768 that is 296 MiB
for every 2,560 rows in bfloat16: 8 chunks and 2.3 GiB for 19,661 rows, next to 4.6 TFLOP of products."""

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


@triton.jit
def cross_entropy_kernel(logits, targets, losses, z_loss, V, stride, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr):
    # A program for each row.
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    # Read before any logit is overwritten: the reductions below are barriers between this and the second loop.
    target_logit = tl.load(logits + target, mask=target < V, other=float("nan")).to(tl.float32)
    columns = tl.arange(0, COLUMNS)
    # A finite start, so that a block in which all classes are excluded by -inf adds zero and not NaN.
    m_i = LOWEST
    l_i = 0.0
    for start in tl.range(0, V, COLUMNS):
        # The stride is a multiple of 16, so loads are wide for any number of classes; columns from V on are dropped.
        x = tl.load(logits + start + columns, mask=start + columns < stride, other=0.0).to(tl.float32)
        x = tl.where(start + columns < V, x, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(x, axis=0))
        l_i = l_i * tl.exp(m_i - m_new) + tl.sum(tl.exp(x - m_new), axis=0)
        m_i = m_new
    lse = m_i + tl.log(l_i)
    tl.store(losses + row, lse - target_logit + z_loss * lse * lse)
    if GRADIENT:
        # NaN in the gradients too, so that the error shows even if the loss is never read.
        slope = tl.where(target < V, 1 + 2 * z_loss * lse, float("nan"))
        for start in tl.range(0, V, COLUMNS):
            x = tl.load(logits + start + columns, mask=start + columns < stride).to(tl.float32)
            gradient = tl.exp(x - lse) * slope - tl.where(start + columns == target, 1.0, 0.0)
            tl.store(logits + start + columns, gradient, mask=start + columns < stride)


@triton.jit
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
    x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, z_loss: float, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = (x_TD.shape, weight_VD.shape, weight_VD.shape[:1])
    dx, dweight, dbias = (shape if want else (0,) for shape, want in zip(shapes, wanted, strict=True))
    scalar, share = (x_TD.new_empty((), dtype=torch.float32) for _ in range(2))
    dweight, dbias = (x_TD.new_empty(shape, dtype=torch.float32) for shape in (dweight, dbias))
    return scalar, share, x_TD.new_empty(dx), dweight, dbias


@operator(
    "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor? bias, Tensor targets, float z_loss, bool[3] wanted)"
    " -> (Tensor loss, Tensor share, Tensor dx, Tensor dweight, Tensor dbias)",
    fake=_empty,
    tags=[torch.Tag.cudagraph_unsafe],  # The host reads the number of targets.
)
def linear_cross_entropy_forward(
    x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, z_loss: float, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the share of each row (one over their number), and the gradients of the sum over rows.

    Of the sum and not the mean, because 1 / 20,000 of a probability is zero in float16. dx has the dtype of x. dweight
    and dbias are float32, because a bfloat16 sum over many chunks would lose the later ones. Gradients that are not
    `wanted` are empty. The host waits once, for the number of rows.
    """
    num_classes = len(weight_VD)
    rows_N = (targets_T >= 0).nonzero()[:, 0]
    num_rows = len(rows_N)
    losses_N = x_TD.new_empty(num_rows, dtype=torch.float32)
    dx_TD, dweight_VD, dbias_V = (
        gradient.zero_() for gradient in _empty(x_TD, weight_VD, bias_V, targets_T, z_loss, wanted)[2:]
    )
    chunk = min(num_rows, chunk_rows(num_classes, x_TD.element_size()))
    # Rows begin at multiples of 32 bytes for any number of classes, for cuBLAS and for wide loads.
    stride = triton.cdiv(num_classes, 16) * 16
    logits_CV = x_TD.new_empty(chunk, stride)[:, :num_classes]
    for start in range(0, num_rows, chunk or 1):
        rows_C = rows_N[start : start + chunk]
        x_CD, targets_C = x_TD.index_select(0, rows_C), targets_T.index_select(0, rows_C)
        y_CV = logits_CV[: len(rows_C)]
        if bias_V is None:
            torch.mm(x_CD, weight_VD.T, out=y_CV)
        else:
            torch.addmm(bias_V, x_CD, weight_VD.T, out=y_CV)
        losses_C = losses_N[start : start + chunk]
        arguments = (y_CV, targets_C, losses_C, z_loss, num_classes, stride, any(wanted), COLUMNS)
        cross_entropy_kernel[(len(rows_C),)](*arguments, num_warps=8, num_stages=1)
        if wanted[0]:
            dx_TD.index_copy_(0, rows_C, torch.mm(y_CV, weight_VD))
        if wanted[1]:
            _add_product(dweight_VD, y_CV.T, x_CD)
        if wanted[2]:
            dbias_V += y_CV.sum(0, dtype=torch.float32)
    share = losses_N.new_full((), 1 / max(1, num_rows))
    return losses_N.sum() * share, share, dx_TD, dweight_VD, dbias_V


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


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        z_loss: float,
        wanted: Sequence[bool],
    ) -> Tensor:
        loss, *saved = linear_cross_entropy_forward(x_TD, weight_VD, bias_V, targets_T, z_loss, wanted)
        ctx.save_for_backward(*saved)
        ctx.wanted, ctx.dtype = wanted, x_TD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor):  # pyright: ignore
        share, *gradients = ctx.saved_tensors
        scaled = [
            linear_cross_entropy_backward(gradient, dloss * share, ctx.dtype) if want else None
            for gradient, want in zip(gradients, ctx.wanted, strict=True)
        ]
        return *scaled, None, None, None


def _accepts(x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, *, z_loss: float = 0.0) -> bool:
    tensors = [x_TD, weight_VD] if bias_V is None else [x_TD, weight_VD, bias_V]
    alike = torch.is_autocast_enabled("cuda") or all(x.dtype == x_TD.dtype for x in tensors)
    return supported(*tensors) and targets_T.is_cuda and alike


@linear_cross_entropy.register("triton", when=_accepts)
def linear_cross_entropy_triton(
    x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, *, z_loss: float = 0.0
) -> Tensor:
    """`linear_cross_entropy` in float32, bfloat16 or float16, all of one dtype; same arguments and result.

    Under autocast the product is in its dtype, like `torch.nn.functional.linear`. A target that is not a class makes
    the loss and the gradients NaN, because checking it would wait for the device. The number of targets is read from
    the device, so a call cannot be captured in a CUDA graph; `torch.compile` leaves it out of its graphs.
    """
    leaves = (x_TD, weight_VD, bias_V)
    if torch.is_autocast_enabled(x_TD.device.type):
        # Here, because inside of the operator autocast would reach only some of the products.
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        leaves = tuple(leaf if leaf is None else leaf.to(dtype) for leaf in leaves)
    wanted = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    return _LinearCrossEntropy.apply(*leaves, targets_T, z_loss, wanted)
