"""Exact MaxSim over ragged documents on the CPU: similarities block by block, in the cache, with no padding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import linear, maxsim

BLOCK = 1 << 18
"""Similarities computed at a time: 1 MB of float32."""


def _accepts(queries_QE: Tensor, *_: object, paired: bool = False, **__: object) -> bool:
    return queries_QE.is_cpu and not paired and not torch.compiler.is_compiling()


@maxsim.register("cpu", when=_accepts)
def maxsim_cpu(
    queries_QE: Tensor, cu_queries: Tensor, documents_NE: Tensor, cu_documents: Tensor, *, paired: bool = False
) -> Tensor:
    """`maxsim` of all pairs; same arguments and result."""
    if paired:
        raise ValueError("the cpu backend of maxsim scores all pairs; use the reference for paired scores")
    dtype = torch.promote_types(queries_QE.dtype, torch.float32)
    queries_QE, documents_NE = queries_QE.to(dtype), documents_NE.to(dtype)
    training = torch.is_grad_enabled() and (queries_QE.requires_grad or documents_NE.requires_grad)
    best = _DifferentiableBest.apply if training else _best
    best_NQ = best(queries_QE, documents_NE, cu_documents.diff())
    return torch.stack([part.sum(1) for part in best_NQ.split(cu_queries.diff().tolist(), dim=1)])


def _best(queries_QE: Tensor, documents_NE: Tensor, lengths: Tensor) -> Tensor:
    """`[documents, Q]`: for every query token the similarity of the best token of every document."""
    best_NQ = queries_QE.new_full((len(lengths), len(queries_QE)), float("-inf"))
    owner_N1 = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[:, None]
    size = max(1, BLOCK // max(1, len(queries_QE)))
    for block_NE, owner in zip(documents_NE.split(size), owner_N1.split(size), strict=True):
        best_NQ.scatter_reduce_(0, owner.expand(-1, len(queries_QE)), linear(block_NE, queries_QE), "amax")
    return best_NQ


class _DifferentiableBest(torch.autograd.Function):
    """`_best` that keeps the place of every maximum, and nothing else, for the backward pass."""

    @staticmethod
    def forward(ctx, queries_QE: Tensor, documents_NE: Tensor, lengths: Tensor) -> Tensor:
        ctx.lengths = lengths.tolist()
        best_NQ = queries_QE.new_full((len(lengths), len(queries_QE)), float("-inf"))
        place_NQ = torch.zeros(best_NQ.shape, dtype=torch.int64)
        for index, document_SE in enumerate(documents_NE.split(ctx.lengths)):
            if len(document_SE):
                torch.max(linear(document_SE, queries_QE), 0, out=(best_NQ[index], place_NQ[index]))
        ctx.save_for_backward(queries_QE, documents_NE, place_NQ)
        return best_NQ

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NQ: Tensor):
        queries_QE, documents_NE, place_NQ = ctx.saved_tensors
        grad_queries_QE, grads_SE = torch.zeros_like(queries_QE), []
        for document_SE, grad_Q, place_Q in zip(documents_NE.split(ctx.lengths), grad_NQ, place_NQ, strict=True):
            if not len(document_SE):
                grads_SE.append(document_SE)
                continue
            weight_SQ = grad_Q.new_zeros(len(document_SE), len(grad_Q)).scatter_(0, place_Q[None], grad_Q[None])
            grads_SE.append(weight_SQ @ queries_QE)
            grad_queries_QE.addmm_(weight_SQ.T, document_SE)
        return grad_queries_QE, torch.cat(grads_SE), None
