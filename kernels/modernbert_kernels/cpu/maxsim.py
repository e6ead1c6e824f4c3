"""Exact MaxSim over ragged documents on the CPU: similarities block by block, in the cache, without padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import linear, maxsim
from .linear import AVAILABLE

BLOCK = 1 << 20
"""Elements of document vectors and similarities in a block: 4 MB of float32. The memory of larger blocks goes back to
the system after each, and taking it again is half the time of a search."""

LANES = 16
"""Query tokens are padded to a multiple: `scatter_reduce` takes three times as long for rows of 12 as for rows of
16."""

QUERIES = 128
"""Query tokens of one product: oneDNN keeps memory for each new shape."""


def _accepts(queries_QE: Tensor, *_: object, paired: bool = False, **__: object) -> bool:
    return queries_QE.is_cpu and not paired and not torch.compiler.is_compiling()


@maxsim.register("cpu", when=_accepts)
def maxsim_cpu(
    queries_QE: Tensor, cu_queries: Tensor, documents_NE: Tensor, cu_documents: Tensor, *, paired: bool = False
) -> Tensor:
    """`maxsim` of all pairs; same arguments and result. Under autocast the products are in its dtype."""
    if paired:
        raise ValueError("the cpu backend of maxsim scores all pairs; use the reference for paired scores")
    dtype = torch.promote_types(queries_QE.dtype, torch.float32)
    products = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype
    differentiable = torch.is_grad_enabled() and (queries_QE.requires_grad or documents_NE.requires_grad)
    best = _DifferentiableBest.apply if differentiable else _best
    best_NQ = best(queries_QE, documents_NE, cu_documents.diff(), products).to(dtype)
    return torch.stack([part.sum(1) for part in best_NQ.split(cu_queries.diff().tolist(), dim=1)])


def _best(queries_QE: Tensor, documents_NE: Tensor, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """`[documents, Q]`: for every query token the similarity of the best token of every document.

    Documents of another dtype are converted block by block, without a copy of all of them.
    """
    num_queries, width = queries_QE.shape
    parts = F.pad(queries_QE.to(dtype), (0, 0, 0, -num_queries % LANES)).split(QUERIES)
    best = [part.new_full((len(lengths), len(part)), float("-inf")) for part in parts]
    document_N1 = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), lengths)[:, None]
    # A power of two: oneDNN takes half as long again for 13,107 rows as for 12,288 or 16,384.
    size = 1 << max(1, BLOCK // max(1, width + num_queries)).bit_length() - 1
    # On any processor: where MKL is level for wide matrices, these take it up to 1.4 times as long.
    onednn = AVAILABLE and dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
    multiply = linear.backends["onednn"] if onednn else linear
    for block_NE, document in zip(documents_NE.split(size), document_N1.split(size), strict=True):
        block_NE = _rounded_up(block_NE.to(dtype)) if onednn else block_NE.to(dtype)
        for part_QE, best_NQ in zip(parts, best, strict=True):
            similarity_NQ = multiply(block_NE, part_QE)[: len(document)]
            best_NQ.scatter_reduce_(0, document.expand(-1, len(part_QE)), similarity_NQ, "amax")
    return torch.cat(best, dim=1)[:, :num_queries]


def _rounded_up(block_NE: Tensor) -> Tensor:
    """With rows of zeros up to one of four sizes an octave: oneDNN keeps memory for each new shape."""
    rows = len(block_NE)
    fill = -rows % max(LANES, 1 << rows.bit_length() >> 3)
    return F.pad(block_NE, (0, 0, 0, fill)) if fill else block_NE


class _DifferentiableBest(torch.autograd.Function):
    """`_best` that keeps the position of every maximum, and nothing else, for the backward pass."""

    @staticmethod
    def forward(ctx, queries_QE: Tensor, documents_NE: Tensor, lengths: Tensor, dtype: torch.dtype) -> Tensor:
        queries_QE, documents_NE = queries_QE.to(dtype), documents_NE.to(dtype)
        ctx.lengths = lengths.tolist()
        best_NQ = queries_QE.new_full((len(lengths), len(queries_QE)), float("-inf"))
        argmax_NQ = torch.zeros(best_NQ.shape, dtype=torch.int64, device="cpu")
        for index, document_SE in enumerate(documents_NE.split(ctx.lengths)):
            if len(document_SE):
                # Not the op, which takes oneDNN here, where no shape comes twice.
                torch.max(F.linear(document_SE, queries_QE), 0, out=(best_NQ[index], argmax_NQ[index]))
        ctx.save_for_backward(queries_QE, documents_NE, argmax_NQ)
        return best_NQ

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NQ: Tensor):
        queries_QE, documents_NE, argmax_NQ = ctx.saved_tensors
        # The gradient of a query sums over many documents: in float32 at least.
        dtype = torch.promote_types(queries_QE.dtype, torch.float32)
        grad_queries_QE, grads_SE = torch.zeros_like(queries_QE, dtype=dtype), []
        for document_SE, grad_Q, argmax_Q in zip(documents_NE.split(ctx.lengths), grad_NQ, argmax_NQ, strict=True):
            if not len(document_SE):
                grads_SE.append(document_SE)
                continue
            weight_SQ = grad_Q.new_zeros(len(document_SE), len(grad_Q)).scatter_(0, argmax_Q[None], grad_Q[None])
            grads_SE.append(weight_SQ @ queries_QE)
            grad_queries_QE += weight_SQ.T @ document_SE
        return grad_queries_QE, torch.cat(grads_SE), None, None
