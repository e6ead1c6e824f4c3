"""Float32 matrix products through oneDNN.

PyTorch sends float32 GEMMs to MKL, which runs its AVX2 code on AMD processors that have AVX-512; oneDNN uses what the
processor has. On two Zen 5 cores: 185 GFLOP/s against 425. On Zen 3, which has no AVX-512, the two were level; Intel
processors have not been measured. A parameter is multiplied as a copy in oneDNN's own layout, which takes its size in
memory once more: without it oneDNN prepares the matrix in every call, half of the time at 16 rows, a tenth at 2048. Of
large matrices, where a tenth of the time is worth less than the memory, there is a copy for few rows only.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..reference import linear

ROWS = 64
"""The layout of a prepared weight is chosen for so many rows. From 16 to 2048 it was the same, and the fastest."""

LARGE = 1 << 21
"""Numbers of a matrix from which on that is so: those of ModernBERT-base are smaller, of ModernBERT-large not."""

PLAIN = ("none", [], "")
"""What `mkldnn::_linear_pointwise` wants to know about operations after the product: there are none."""

_forgotten = 0

# By the id of a parameter: weak references to it and to its memory, its version and address, the prepared copy.
_prepared: dict[int, tuple[weakref.ref[nn.Parameter], StorageWeakRef, tuple[int, int], Tensor]] = {}


def forget(weight_FD: Tensor) -> None:
    """Drop the prepared copy, for writers that PyTorch's version counter does not see (`weight.data`, FSDP)."""
    global _forgotten
    _forgotten += 1
    _prepared.pop(id(weight_FD), None)


def forgotten() -> int:
    """How often `forget` was called, for those who keep copies of their own."""
    return _forgotten


def reordered(weight_FD: Tensor) -> Tensor:
    """A copy in the memory layout that oneDNN multiplies with, opaque to PyTorch."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_FD.detach(), ROWS)


def prepare(weight_FD: Tensor) -> Tensor:
    """`reordered`, kept for as long as the parameter is as it was; any other tensor as it is."""
    if type(weight_FD) is not nn.Parameter or weight_FD.is_inference():
        return weight_FD
    known = _prepared.get(id(weight_FD))
    state = weight_FD._version, weight_FD.data_ptr()
    # An address may come again, when the memory that was there before is gone.
    if known is None or known[0]() is not weight_FD or known[1].expired() or known[2] != state:
        key = id(weight_FD)
        owner = weakref.ref(weight_FD, lambda _: _prepared.pop(key, None))
        known = _prepared[key] = owner, StorageWeakRef(weight_FD.untyped_storage()), state, reordered(weight_FD)
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
    pointwise = torch.ops.mkldnn._linear_pointwise.default

    @linear.register("onednn", when=_accepts)
    def linear_onednn(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """`linear` in float32 without gradients, `[T, D]` to `[T, F]`."""
        if _differentiable(x_TD, weight_FD):
            raise ValueError("the onednn backend of linear has no gradient; use the reference, or torch.no_grad()")
        if len(x_TD) <= ROWS or weight_FD.numel() < LARGE:
            weight_FD = prepare(weight_FD)
        return pointwise(x_TD, weight_FD, bias_F, *PLAIN)
