"""MaxSim of ragged queries and documents: a matrix of scores, and nothing larger that the gradient does not need.

The gradient needs the place of every maximum. One rule: while all of them fit in `maxsim_forward.KEPT` bytes, the
forward pass keeps them in 16 bits each; beyond, the backward pass finds them again, where a gradient is not zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import supported
from ..reference import maxsim
from .maxsim_backward import maxsim_backward
from .maxsim_forward import maxsim_forward

WIDEST = 256
"""Width of vectors; wider ones do not fit in the registers of the gradients."""


class _MaxSim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors_and_paired: Any) -> Tensor:  # pyright: ignore
        *tensors, ctx.paired = tensors_and_paired
        scores, places = maxsim_forward(*tensors, ctx.paired, True)
        ctx.save_for_backward(*tensors, places)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore
        grad_queries_QE, grad_documents_NE = maxsim_backward(*ctx.saved_tensors, grad.contiguous(), ctx.paired)
        return grad_queries_QE, None, grad_documents_NE, None, None


def _accepts(queries_QE: Tensor, _: Tensor, documents_NE: Tensor, *__: object, **___: object) -> bool:
    same = queries_QE.dtype == documents_NE.dtype and queries_QE.shape[1] == documents_NE.shape[1]
    return supported(queries_QE, documents_NE) and same and 1 <= queries_QE.shape[1] <= WIDEST


@maxsim.register("triton", when=_accepts)
def maxsim_triton(
    queries_QE: Tensor, cu_queries: Tensor, documents_NE: Tensor, cu_documents: Tensor, *, paired: bool = False
) -> Tensor:
    """`maxsim` up to a width of 256; same arguments and result, offsets on the host or on the device.

    With gradients a document has at most 65,535 tokens, and a longer one scores NaN. NaN in vectors may be lost.
    Offsets in pinned memory are read later: leave them as they are until the scores are used.
    """
    if paired and len(cu_queries) != len(cu_documents):
        raise ValueError(f"{len(cu_queries) - 1} queries cannot be paired with {len(cu_documents) - 1} documents")
    # Offsets that come from the host need not wait for what the device is doing.
    cu_queries, cu_documents = (x.to(queries_QE.device, non_blocking=True) for x in (cu_queries, cu_documents))
    tensors = (x.contiguous() for x in (queries_QE, cu_queries, documents_NE, cu_documents))
    arguments = *tensors, paired
    if torch.is_grad_enabled() and (queries_QE.requires_grad or documents_NE.requires_grad):
        return _MaxSim.apply(*arguments)
    return maxsim_forward(*arguments, False)[0]
