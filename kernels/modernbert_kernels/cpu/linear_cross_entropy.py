"""Linear + cross-entropy on the CPU: the logits of some rows at a time, in the cache, and their gradients at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import Reduction, check_loss, linear_cross_entropy

LOGITS = 1 << 22
"""Logits of a block of rows: 16 MB of float32. Smaller blocks read and write the gradient of the weight more often."""


def _accepts(
    x_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    *,
    reduction: Reduction = "mean",
    **_: object,
) -> bool:
    leaves = [x_TD, weight_VD] if bias_V is None else [x_TD, weight_VD, bias_V]
    return (
        all(leaf.is_cpu and leaf.dtype is torch.float32 for leaf in leaves)
        and targets_T.is_cpu
        and reduction != "none"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


@linear_cross_entropy.register("cpu", when=_accepts)
def linear_cross_entropy_cpu(
    x_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    *,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`linear_cross_entropy` with one loss for all rows; same arguments and result. Differentiable once."""
    check_loss(reduction, label_smoothing)
    if reduction == "none":
        raise ValueError("the cpu backend of linear_cross_entropy has no losses of single rows; use the reference")
    rows_N = (targets_T >= 0).nonzero().squeeze(1)
    share = 1 / max(1, len(rows_N)) if reduction == "mean" else 1.0
    arguments = (x_TD[rows_N], weight_VD, bias_V, targets_T[rows_N])
    wanted = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in arguments[:3]]
    return _Loss.apply(*arguments, share, z_loss, label_smoothing, wanted)


class _Loss(torch.autograd.Function):
    """`share` times the sum of the losses. The forward pass computes the gradients, so that no logits are kept."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        share: float,
        z_loss: float,
        label_smoothing: float,
        wanted: Sequence[bool],
    ) -> Tensor:
        classes = len(weight_VD)
        gradients = [
            torch.zeros_like(leaf) if leaf is not None and want else None
            for leaf, want in zip((x_ND, weight_VD, bias_V), wanted, strict=True)
        ]
        dx_ND, dweight_VD, dbias_V = gradients
        loss = x_ND.new_zeros(())
        rows = max(1, LOGITS // classes)
        logits = x_ND.new_empty(min(rows, len(x_ND)), classes)
        for at in range(0, len(x_ND), rows):
            x_CD, target_C1 = x_ND[at : at + rows], targets_N[at : at + rows, None]
            y_CV = torch.mm(x_CD, weight_VD.T, out=logits[: len(x_CD)])
            if bias_V is not None:
                y_CV += bias_V
            true_C, largest_C = y_CV.gather(1, target_C1)[:, 0], y_CV.amax(1)
            if label_smoothing:
                true_C = (1 - label_smoothing) * true_C + label_smoothing * y_CV.mean(1)
            torch.softmax(y_CV, 1, out=y_CV)
            lse_C = largest_C - y_CV.amax(1).log()  # The largest probability is exp(largest - lse), and not 0.
            loss += (lse_C - true_C + z_loss * lse_C.square()).sum()
            if not any(wanted):
                continue
            if z_loss:
                y_CV *= (1 + 2 * z_loss * lse_C)[:, None]
            if label_smoothing:
                y_CV -= label_smoothing / classes
            y_CV.scatter_add_(1, target_C1, y_CV.new_full(target_C1.shape, label_smoothing - 1))
            if dx_ND is not None:
                torch.mm(y_CV, weight_VD, out=dx_ND[at : at + rows]).mul_(share)
            if dweight_VD is not None:
                dweight_VD.addmm_(y_CV.T, x_CD, alpha=share)
            if dbias_V is not None:
                dbias_V.add_(y_CV.sum(0), alpha=share)
        ctx.save_for_backward(*gradients)
        return loss * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor):  # pyright: ignore
        scaled = (None if gradient is None else gradient * dloss for gradient in ctx.saved_tensors)
        return *scaled, None, None, None, None, None
