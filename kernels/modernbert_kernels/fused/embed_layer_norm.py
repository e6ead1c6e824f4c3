"""Embedding and LayerNorm: rows of the table are normalised as they are gathered, and never written in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import autocast_float32, contiguous, needs_gradient, supported
from ..reference import embed_layer_norm
from .layer_norm_kernels import check, each_parameter, fits, norm_backward, norm_forward


class _EmbedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input_ids_T: Tensor,
        table_VD: Tensor,
        weight_D: Tensor,
        bias_D: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:  # pyright: ignore
        y, stats_2T = norm_forward(table_VD, input_ids_T, None, weight_D, bias_D, eps, dtype, True)
        ctx.save_for_backward(input_ids_T, table_VD, weight_D, stats_2T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor):  # pyright: ignore
        input_ids_T, table_VD, weight_D, stats_2T = ctx.saved_tensors
        _, *wanted, _, _ = ctx.needs_input_grad
        of_table, *of_parameters = wanted
        found = norm_backward(dy_TD.contiguous(), None, table_VD, input_ids_T, weight_D, stats_2T, wanted, None)
        dx_TD, dparameters = found
        dtable_VD = None
        if of_table:
            # Torch sums in a fixed order, without atomics. Above 3,072 tokens it sorts the ids and adds runs of equal
            # ones in float32; below, it adds in the dtype of the table. A kernel of ours would have to split the runs
            # too (a frequent token is a tenth of a batch), and would only save writing and reading dx once in a model.
            dtable_VD = torch.ops.aten.embedding_dense_backward(dx_TD, input_ids_T, table_VD.shape[0], -1, False)
        return None, dtable_VD, *each_parameter(dparameters, of_parameters), None, None


@embed_layer_norm.register(
    "triton",
    when=lambda input_ids_T, table_VD, weight_D, bias_D, eps: (
        supported(table_VD, weight_D) and fits(table_VD, None, weight_D, bias_D)
    ),
    check=lambda input_ids_T, table_VD, weight_D, bias_D, eps: check(table_VD, None, weight_D, bias_D),
)
def embed_layer_norm_triton(
    input_ids_T: Tensor, table_VD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> Tensor:
    """`embed_layer_norm` in float32, bfloat16 or float16; same arguments and result.

    Ids are not checked: they must be rows of the table.
    """
    ids, table = input_ids_T.contiguous(), table_VD.contiguous()
    weight, bias = weight_D.contiguous(), contiguous(bias_D)
    dtype = autocast_float32(table_VD, weight_D.dtype)
    if needs_gradient(table, weight, bias):
        return _EmbedLayerNorm.apply(ids, table, weight, bias, eps, dtype)
    return norm_forward(table, ids, None, weight, bias, eps, dtype, False)[0]
