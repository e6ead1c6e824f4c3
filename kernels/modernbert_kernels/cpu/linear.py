"""Float32 matrix products through oneDNN.

PyTorch sends float32 products to MKL, which runs its AVX2 code on AMD processors that have AVX-512. oneDNN uses what
the processor has: on two Zen 5 cores 425 GFLOP/s against 185. Without AVX-512 the two are level (Zen 3), and on an
Intel Xeon with AVX-512 MKL is 1.1 to 1.4 times as fast, attention twice. oneDNN also multiplies a weight that was
packed once, in its own layout; else it packs the weight in every call, which takes half of the time at 16 rows and a
tenth at 2,048. A packed weight is the caller's: nothing is remembered here.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference import linear

ROWS = 64
"""The layout of a packed weight is chosen for so many rows. From 16 to 2,048 it was the same, and the fastest."""


def _is_intel() -> bool:
    """MKL uses AVX-512 by the maker of the processor, and not by what it can do."""
    cpuinfo = Path("/proc/cpuinfo")  # of Linux; the maker is in its second line
    if not cpuinfo.exists():
        return "Intel" in platform.processor()
    with cpuinfo.open(encoding="utf-8", errors="replace") as file:
        return "Intel" in "".join(islice(file, 5))


PLAIN = ("none", [], "")
"""Arguments of `mkldnn::_linear_pointwise` for operations after the product: none."""

FASTER_THAN_MKL = "AVX512" in torch.backends.cpu.get_cpu_capability() and not _is_intel()
"""Whether products go through oneDNN. Where MKL is as fast it is used, because it keeps nothing."""

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack_weight(weight_FD: Tensor) -> Tensor:
    """A copy in the layout that oneDNN multiplies with, opaque to PyTorch. `linear` takes it in the weight's place."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_FD.detach(), ROWS)


def packed(weight_FD: Tensor, bias_F: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`linear` on a packed copy of the weight. The rows are as they come: the caller rounds them up to a step."""
    copy = pack_weight(weight_FD)
    return lambda x_TD: pointwise(x_TD, copy, bias_F, *PLAIN)


def transposed(weight_FD: Tensor, bias_F: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`linear` on a copy whose columns are contiguous: with few rows MKL multiplies with it faster."""
    copy = weight_FD.detach().t().contiguous().t()
    return lambda x_TD: F.linear(x_TD, copy, bias_F)


def row_step(rows: int) -> int:
    """Row counts are rounded up to a multiple of this: 8, or about a twentieth of them.

    Every new number of rows costs oneDNN 0.8 ms a product and memory that it keeps.
    """
    return 8 if rows <= 64 else max(16, 1 << rows.bit_length() - 5)


def _accepts(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> bool:
    if weight_FD.is_mkldnn:
        return True
    return (
        FASTER_THAN_MKL
        and x_TD.is_cpu
        and x_TD.dim() == 2
        and x_TD.dtype is torch.float32
        and weight_FD.dtype is torch.float32
        and x_TD.numel() > 0
        and not _differentiable(x_TD, weight_FD)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and type(x_TD) is Tensor
        and type(weight_FD) in (Tensor, nn.Parameter)
    )


def _differentiable(x_TD: Tensor, weight_FD: Tensor) -> bool:
    return torch.is_grad_enabled() and (x_TD.requires_grad or weight_FD.requires_grad)


if AVAILABLE:
    pointwise = torch.ops.mkldnn._linear_pointwise.default

    @linear.register("onednn", when=_accepts)
    def linear_onednn(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """`linear` in float32 without gradients, `[T, D]` to `[T, F]`; the weight may be packed."""
        if _differentiable(x_TD, weight_FD):
            raise ValueError("the onednn backend of linear has no gradient; use the reference, or torch.no_grad()")
        rows = x_TD.shape[0]
        fill = -rows % row_step(rows)
        if not fill:
            return pointwise(x_TD, weight_FD, bias_F, *PLAIN)
        return pointwise(F.pad(x_TD, (0, 0, 0, fill)), weight_FD, bias_F, *PLAIN)[:rows]
