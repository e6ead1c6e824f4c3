"""The backward pass of MaxSim: each query token gets the document tokens that it chose, and they get it.

Every sum has one owner, which adds in a fixed order: a program for each query row gathers from the documents, a program
for each tile of document tokens scans the rows that chose one of them. Nothing is added atomically.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import operator, owners
from .maxsim_forward import KEPT, LONGEST, keeps, launch, load_rows, options


@triton.jit(do_not_specialize=["Q", "M"])
def maxsim_grad_queries_kernel(
    grad, owners, documents, cu_documents, places, grad_queries, Q, M,
    E: tl.constexpr, K: tl.constexpr, PAIRED: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + row).to(tl.int64)
    k = tl.arange(0, K)[None, :]
    total = tl.zeros([DOCUMENTS, K], tl.float32)
    for first in tl.range(owner if PAIRED else 0, owner + 1 if PAIRED else M, DOCUMENTS):
        document = first + tl.arange(0, DOCUMENTS).to(tl.int64)
        inside = document < (owner + 1 if PAIRED else M)
        weight = tl.load(grad + (document if PAIRED else owner * M + document), mask=inside, other=0)
        # Not "greater than zero": a NaN goes on.
        live = inside & (weight != 0)
        if tl.sum(live.to(tl.int32), axis=0) > 0:
            place = tl.load(places + document * (0 if PAIRED else Q) + row, mask=live, other=0).to(tl.int64)
            start = tl.load(cu_documents + document, mask=live, other=0).to(tl.int64)
            end = tl.load(cu_documents + document + 1, mask=live, other=0)
            # An empty document has no token that could be chosen.
            d = load_rows(documents, start + place, live & (start + place < end), k, E)
            total += weight[:, None] * d.to(tl.float32)
    tl.store(grad_queries + row * E + k, tl.sum(total, axis=0)[None, :], mask=k < E)


@triton.jit(do_not_specialize=["Q", "M", "chunks"])
def maxsim_grad_documents_kernel(
    grad, owners, queries, cu_queries, places, cu_documents, grad_documents, Q, M, chunks,
    E: tl.constexpr, K: tl.constexpr, PAIRED: tl.constexpr, ADD: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    document = (tl.program_id(0) // chunks).to(tl.int64)
    start, end = tl.load(cu_documents + document).to(tl.int64), tl.load(cu_documents + document + 1).to(tl.int64)
    top, bottom = 0, Q
    if PAIRED:
        top, bottom = tl.load(cu_queries + document), tl.load(cu_queries + document + 1)
    k = tl.arange(0, K)[None, :]
    for first in tl.range(start + tl.program_id(0) % chunks * TOKENS, end, chunks * TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        mine = (tokens[:, None] < end) & (k < E)
        total = tl.zeros([TOKENS, K], tl.float32)
        if ADD:
            total += tl.load(grad_documents + tokens[:, None] * E + k, mask=mine, other=0)
        for row in tl.range(top, bottom, ROWS):
            rows = row + tl.arange(0, ROWS)
            inside = rows < bottom
            owner = tl.load(owners + rows, mask=inside, other=0).to(tl.int64)
            weight = tl.load(grad + (owner if PAIRED else owner * M + document), mask=inside, other=0)
            live = inside & (weight != 0)
            place = tl.load(places + (0 if PAIRED else document * Q) + rows, mask=live, other=0).to(tl.int64)
            live = live & (place >= first - start) & (place < first - start + TOKENS)
            if tl.sum(live.to(tl.int32), axis=0) > 0:
                q = load_rows(queries, rows, live, k, E)
                chosen = live[None, :] & (place[None, :] == (tokens - start)[:, None])
                if q.dtype == tl.float16:
                    # Relative to the largest, weights of any size are in range.
                    peak = tl.max(tl.abs(weight), axis=0)
                    share = tl.where(chosen, (weight / peak)[None, :], 0.0).to(q.dtype)
                    total += peak * tl.dot(share, q, input_precision=PRECISION)
                else:
                    share = tl.where(chosen, weight[None, :], 0.0).to(q.dtype)
                    total = tl.dot(share, q, total, input_precision=PRECISION)
        tl.store(grad_documents + tokens[:, None] * E + k, total, mask=mine)


def _tile(width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Document tokens, query rows at a time, and warps; chosen by registers (offline compile), not yet timed."""
    if dtype is torch.float32:
        return 32, 16, 8 if width > 128 else 4
    return 64 if width <= 64 else 32, 32, 4


def _like_inputs(queries_QE: Tensor, cu_queries: Tensor, documents_NE: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries_QE), torch.empty_like(documents_NE)


@operator(
    "maxsim_backward(Tensor queries, Tensor cu_queries, Tensor documents, Tensor cu_documents, Tensor places,"
    " Tensor grad, bool paired) -> (Tensor, Tensor)",
    fake=_like_inputs,
)
def maxsim_backward(
    queries_QE: Tensor, cu_queries: Tensor, documents_NE: Tensor, cu_documents: Tensor, places: Tensor, grad: Tensor,
    paired: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of queries and documents; without places that were kept, by blocks of query rows that fit in `KEPT`."""
    Q, M = len(queries_QE), len(cu_documents) - 1
    kept = keeps(Q, M, paired)
    block = max(1, Q) if kept else max(1, KEPT // (2 * M))
    grad_queries_QE = torch.zeros_like(queries_QE)
    # Blocks add up, in float32.
    grad_documents_NE = torch.zeros_like(documents_NE, dtype=documents_NE.dtype if kept else torch.float32)
    owners_Q, told = owners(cu_queries, Q), options(documents_NE, Q)
    # Documents of up to four times the mean length need no second round.
    tokens, rows, warps = _tile(told["K"], documents_NE.dtype)
    chunks = triton.cdiv(4 * len(documents_NE), max(1, M) * tokens)
    widths = {"E": told["E"], "K": told["K"], "PAIRED": paired}
    for first in range(0, Q if len(documents_NE) else 0, block):
        q, owner = queries_QE[first : first + block], owners_Q[first : first + block]
        if not kept:
            places = torch.empty(M, len(q), dtype=torch.uint16, device=q.device)
            launch(q, owner, documents_NE, cu_documents, LONGEST, grad=grad, places=places)
        maxsim_grad_queries_kernel[(len(q),)](
            grad, owner, documents_NE, cu_documents, places, grad_queries_QE[first : first + block], len(q), M,
            **widths, DOCUMENTS=1 if paired else 16, num_warps=2,
        )  # fmt: skip
        maxsim_grad_documents_kernel[(M * chunks,)](
            grad, owner, q, cu_queries, places, cu_documents, grad_documents_NE, len(q), M, chunks,
            **widths, ADD=not kept, TOKENS=tokens, ROWS=rows, PRECISION=told["PRECISION"], num_warps=warps,
        )  # fmt: skip
    return grad_queries_QE, grad_documents_NE.to(documents_NE.dtype)
