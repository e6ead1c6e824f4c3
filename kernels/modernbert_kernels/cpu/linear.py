"""Float32 matrix products through oneDNN.

PyTorch sends float32 GEMMs to MKL, which runs its AVX2 code on AMD processors that have AVX-512; oneDNN uses what the
processor has. On a Zen 5 core pair: 185 GFLOP/s against 425, and level on processors that MKL favours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import linear


def _differentiable(x_TD: Tensor, weight_FD: Tensor) -> bool:
    return torch.is_grad_enabled() and (x_TD.requires_grad or weight_FD.requires_grad)


def _accepts(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> bool:
    return (
        x_TD.is_cpu
        and x_TD.dtype is torch.float32
        and weight_FD.dtype is torch.float32
        and x_TD.numel() > 0
        and not _differentiable(x_TD, weight_FD)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and type(x_TD) is Tensor
        and type(weight_FD) in (Tensor, torch.nn.Parameter)
    )


if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):

    @linear.register("onednn", when=_accepts)
    def linear_onednn(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """`linear` in float32 without gradients, `[T, D]` to `[T, F]`."""
        if _differentiable(x_TD, weight_FD):
            raise ValueError("the onednn backend of linear has no gradient; use the reference, or torch.no_grad()")
        return torch.ops.mkldnn._linear_pointwise(x_TD, weight_FD, bias_F, "none", [], "")
