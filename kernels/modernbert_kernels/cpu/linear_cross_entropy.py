"""Linear + cross-entropy on the CPU: the logits of some rows at a time, and their gradients at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import Reduction, check_loss, linear_cross_entropy

LOGITS = 1 << 24
"""Logits of a block of rows: 64 MB of float32. Smaller blocks read and write the gradient of the weight more often."""

ROWS = 16
"""Rows whose logits become gradients at a time: they stay in the cache from the first operation to the last."""


def _accepts(x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, **_: object) -> bool:
    tensors = [x_TD, weight_VD] if bias_V is None else [x_TD, weight_VD, bias_V]
    return (
        all(x.is_cpu and x.dtype is torch.float32 for x in tensors)
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
    """`linear_cross_entropy`; same arguments and result. Differentiable once."""
    check_loss(reduction, label_smoothing)
    chosen = targets_T >= 0
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    leaves = [None if leaf is None else leaf.to(dtype) for leaf in (x_TD[chosen], weight_VD, bias_V)]
    wanted = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    loss_N = _Losses.apply(*leaves, targets_T[chosen], z_loss, label_smoothing, wanted)
    if reduction == "none":
        return torch.zeros_like(targets_T, dtype=dtype).masked_scatter(chosen, loss_N)
    return loss_N.sum() / (max(1, len(loss_N)) if reduction == "mean" else 1)


class _Losses(torch.autograd.Function):
    """The loss of each row. The forward pass computes the gradients of their sum, so that no logits are kept."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:  # pyright: ignore
        loss_N, gradients = _blocks(*arguments)
        ctx.save_for_backward(*arguments[:4], *gradients)
        ctx.options = arguments[4:]
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_N: Tensor):  # pyright: ignore
        arguments, gradients = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        scale = dloss_N[0] if len(dloss_N) else dloss_N.sum()
        if not (dloss_N == scale).all():  # not of a sum or a mean
            gradients, scale = _blocks(*arguments, *ctx.options, scale_N=dloss_N)[1], 1
        return *(None if gradient is None else gradient * scale for gradient in gradients), None, None, None, None


def _blocks(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    z_loss: float,
    label_smoothing: float,
    wanted: Sequence[bool],
    scale_N: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses `[N]`, and the gradients, of x, weight and bias, of their sum; with `scale_N` of the weighted sum."""
    gradients = [
        torch.zeros_like(leaf) if leaf is not None and want else None
        for leaf, want in zip((x_ND, weight_VD, bias_V), wanted, strict=True)
    ]
    dx_ND, dweight_VD, dbias_V = gradients
    loss_N, size = x_ND.new_empty(len(x_ND)), max(1, LOGITS // len(weight_VD))
    logits = x_ND.new_empty(min(size, len(x_ND)), len(weight_VD))
    for start in range(0, len(x_ND), size):
        block = slice(start, start + size)
        y_CV = torch.mm(x_ND[block], weight_VD.T, out=logits[: len(x_ND) - start])
        for at in range(0, len(y_CV), ROWS):
            part = slice(at, at + ROWS)
            loss_N[block][part] = _differentiate(y_CV[part], targets_N[block][part], bias_V, z_loss, label_smoothing)
        if scale_N is not None:
            y_CV *= scale_N[block, None]
        if dx_ND is not None:
            torch.mm(y_CV, weight_VD, out=dx_ND[block])
        if dweight_VD is not None:
            dweight_VD.addmm_(y_CV.T, x_ND[block])
        if dbias_V is not None:
            dbias_V += y_CV.sum(0)
    return loss_N, gradients


def _differentiate(
    y_CV: Tensor, targets_C: Tensor, bias_V: Tensor | None, z_loss: float, label_smoothing: float
) -> Tensor:
    """The loss of each row of the products `x W^T`, which become the gradient of its logits."""
    target_C1 = targets_C[:, None]
    if bias_V is not None:
        y_CV += bias_V
    true_C1 = y_CV.gather(1, target_C1)
    if label_smoothing:
        true_C1 = (1 - label_smoothing) * true_C1 + label_smoothing * y_CV.mean(1, keepdim=True)
    largest_C1 = y_CV.amax(1, keepdim=True)
    sum_C1 = y_CV.sub_(largest_C1).exp_().sum(1, keepdim=True)
    lse_C1 = largest_C1 + sum_C1.log()
    y_CV *= (1 + 2 * z_loss * lse_C1) / sum_C1
    if label_smoothing:
        y_CV -= label_smoothing / y_CV.shape[1]
    y_CV.scatter_add_(1, target_C1, y_CV.new_full(target_C1.shape, label_smoothing - 1))
    return (lse_C1 - true_C1 + z_loss * lse_C1.square())[:, 0]
