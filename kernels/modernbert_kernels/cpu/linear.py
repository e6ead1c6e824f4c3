"""Float32 matrix products through oneDNN.

PyTorch sends float32 GEMMs to MKL, which runs its AVX2 code on AMD processors that have AVX-512; oneDNN uses what the
processor has. On two Zen 5 cores: 185 GFLOP/s against 425. On Zen 3, which has no AVX-512, the two were level; Intel
processors have not been measured.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from ..reference import linear

FEW = 64
"""Up to this many rows, preparing the weight costs oneDNN as much as the product, so a prepared copy is kept."""

# Prepared copies by the id of their parameter: (weak reference to it, its version, its address, the copy).
_prepared: dict[int, tuple[weakref.ref[nn.Parameter], int, int, Tensor]] = {}


def forget(weight_FD: Tensor) -> None:
    """Drop the prepared copy, for writers that PyTorch's version counter does not see (`weight.data`, FSDP)."""
    _prepared.pop(id(weight_FD), None)


def _prepare(weight_FD: Tensor) -> Tensor:
    """The same matrix in the memory layout that oneDNN multiplies with."""
    if not isinstance(weight_FD, nn.Parameter) or weight_FD.is_inference():
        return weight_FD
    known = _prepared.get(id(weight_FD))
    version, address = weight_FD._version, weight_FD.data_ptr()
    if known is None or known[0]() is not weight_FD or known[1:3] != (version, address):
        key = id(weight_FD)
        owner = weakref.ref(weight_FD, lambda _: _prepared.pop(key, None))
        known = _prepared[key] = owner, version, address, weight_FD.detach().T.contiguous().T
    return known[3]


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
        and type(weight_FD) in (Tensor, nn.Parameter)
    )


if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):

    @linear.register("onednn", when=_accepts)
    def linear_onednn(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """`linear` in float32 without gradients, `[T, D]` to `[T, F]`."""
        if _differentiable(x_TD, weight_FD):
            raise ValueError("the onednn backend of linear has no gradient; use the reference, or torch.no_grad()")
        if len(x_TD) <= FEW:
            weight_FD = _prepare(weight_FD)
        return torch.ops.mkldnn._linear_pointwise(x_TD, weight_FD, bias_F, "none", [], "")
