"""Exact MaxSim over ragged documents on the CPU: one GEMM per block of documents, one maximum per document, no padding.

The similarities of a block stay in the cache and are never kept: the backward pass holds the index of each maximum.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference import linear, maxsim

BLOCK = 1 << 18
"""Similarities computed at a time (1 MB of float32)."""


def _accepts(queries_QE: Tensor, *_: object, paired: bool = False) -> bool:
    return queries_QE.is_cpu and not paired and not torch.compiler.is_compiling()


@maxsim.register("cpu", when=_accepts)
def maxsim_cpu(
    queries_QE: Tensor, cu_queries: Tensor, documents_NE: Tensor, cu_documents: Tensor, *, paired: bool = False
) -> Tensor:
    """`maxsim` of all pairs; same arguments and result."""
    if paired:
        raise ValueError("the cpu backend of maxsim scores all pairs; use the reference for paired scores")
    dtype = torch.promote_types(queries_QE.dtype, torch.float32)
    best_NQ = _Best.apply(queries_QE.to(dtype), documents_NE.to(dtype), tuple(cu_documents.diff().tolist()))
    # A cumulative sum would lose digits; queries are few, so one short sum each.
    return torch.stack([best.sum(1) for best in best_NQ.split(cu_queries.diff().tolist(), dim=1)])


class _Best(torch.autograd.Function):
    """`[N, Q]`: for every query token the similarity of the best token of every document."""

    @staticmethod
    def forward(ctx, queries_QE: Tensor, documents_NE: Tensor, lengths: tuple[int, ...]) -> Tensor:
        training = any(ctx.needs_input_grad)
        best_NQ = queries_QE.new_full((len(lengths), len(queries_QE)), float("-inf"))
        argmax_NQ = torch.zeros(best_NQ.shape, dtype=torch.int64) if training else None
        for first, block in _blocks(lengths, max(1, BLOCK // max(1, len(queries_QE)))):
            rows, token = block
            similarity = linear(documents_NE[token : token + sum(rows)], queries_QE)
            for index, part in enumerate(similarity.split(rows), first):
                if argmax_NQ is None and len(part):
                    torch.amax(part, 0, out=best_NQ[index])
                elif len(part):
                    torch.max(part, 0, out=(best_NQ[index], argmax_NQ[index]))
        ctx.lengths = lengths
        ctx.save_for_backward(queries_QE, documents_NE, argmax_NQ)
        return best_NQ

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NQ: Tensor):
        queries_QE, documents_NE, argmax_NQ = ctx.saved_tensors
        grad_queries_QE, grad_documents_NE = torch.zeros_like(queries_QE), torch.zeros_like(documents_NE)
        token = 0
        for length, grad_Q, argmax_Q in zip(ctx.lengths, grad_NQ, argmax_NQ, strict=True):
            if length:
                rows = slice(token, token + length)
                weight_LQ = grad_Q.new_zeros(length, len(grad_Q)).scatter_(0, argmax_Q[None], grad_Q[None])
                grad_documents_NE[rows] = weight_LQ @ queries_QE
                grad_queries_QE.addmm_(weight_LQ.T, documents_NE[rows])
            token += length
        return grad_queries_QE, grad_documents_NE, None


def _blocks(lengths: tuple[int, ...], tokens: int) -> Iterator[tuple[int, tuple[list[int], int]]]:
    """Runs of documents of about `tokens` tokens: index of the first document, (their lengths, their first token)."""
    first, start, rows = 0, 0, []
    for index, length in enumerate(lengths):
        if rows and sum(rows) + length > tokens:
            yield first, (rows, start)
            first, start, rows = index, start + sum(rows), []
        rows.append(length)
    if rows:
        yield first, (rows, start)
