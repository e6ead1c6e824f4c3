"""MaxSim of ragged queries and documents in Triton: the operators, and the gradient around them.

Memory holds the matrix of scores, and nothing larger that the gradient does not need. The gradient needs the position
of every maximum. While all of them fit into `ARGMAX_BYTES`, the forward pass stores them in 16 bits each. Beyond that,
the backward pass finds them again wherever a gradient is not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import needs_gradient, operator, precision, segment_ids, supported
from ..reference import maxsim
from .maxsim_kernels import (
    maxsim_carry_kernel,
    maxsim_grad_documents_kernel,
    maxsim_grad_queries_kernel,
    maxsim_kernel,
    maxsim_paired_kernel,
)
from .tiles import tile_for

WIDEST = 256
"""Width of vectors. Wider ones do not fit into the registers of the gradient kernels."""

ARGMAX_BYTES = 1 << 28
"""Positions that are stored: those of 1,448 queries of 64 tokens with as many documents."""

LONGEST = (1 << 16) - 1
"""Tokens of a document that 16 bits can tell apart. A longer one scores NaN where gradients are needed."""

PROGRAMS = 4096
"""From this number on a program takes several documents: enough for every GPU, and its query rows are read once."""


class Blocks(NamedTuple):
    """What a program of the forward pass works on.

    Attributes:
        block_m: query rows. block_n: document tokens at a time.
        block_k: columns at a time; the query rows of the first ones stay loaded.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def _padded(width: int) -> int:
    """A power of two that tensor cores can multiply; the rest is loaded as zero."""
    return max(16, triton.next_power_of_2(width))


def _blocks(x_QE: Tensor, rows: int) -> Blocks:
    """The blocks for vectors like these and `rows` query rows in all.

    Vectors in float32, and wide ones, are rare: their blocks are the same on every GPU, and not yet timed.
    """
    width = _padded(x_QE.shape[1])
    rows = min(128, max(32, triton.next_power_of_2(rows)))
    if x_QE.dtype is torch.float32:  # multiplied without tensor cores: whatever is loaded is in registers
        return Blocks(min(rows, 64), 32, 16, 4, 2)
    if width > 128:
        return Blocks(min(rows, 64), 32, width, 4, 2)
    tile = tile_for(x_QE.device, "maxsim", rows)
    return Blocks(rows, tile.block_n, width, tile.num_warps, tile.num_stages)


def _options(x_QE: Tensor, rows: int) -> dict[str, Any]:
    """The arguments of every kernel that compares vectors: their width, the blocks, the precision, the warps."""
    width, blocks = x_QE.shape[1], _blocks(x_QE, rows)
    options = {"E": width, "K": _padded(width), "PRECISION": precision(x_QE), "num_warps": blocks.num_warps}
    sizes = {"BLOCK_M": blocks.block_m, "BLOCK_N": blocks.block_n, "BLOCK_K": blocks.block_k}
    return options | sizes | {"STAGES": blocks.num_stages}


def _stores_argmax(rows: int, documents: int, paired: bool) -> bool:
    """Whether the positions of the maxima are stored for the backward pass."""
    return paired or 2 * rows * documents <= ARGMAX_BYTES


def _launch(
    queries_QE: Tensor, segment_ids_Q: Tensor, documents_NE: Tensor, cu_documents: Tensor, longest: int, **outputs: Any
) -> None:
    """`maxsim_kernel` over all pairs: for scores and `carry`, or for the positions where a gradient is not zero."""
    Q, M, options = len(queries_QE), len(cu_documents) - 1, _options(queries_QE, len(queries_QE))
    tiles = triton.cdiv(Q, options["BLOCK_M"])
    group = max(1, min(16, tiles * M // PROGRAMS))
    tensors = {"cu_queries": None, "grad": None, "scores": None, "carry": None, "argmax": None} | outputs
    maxsim_kernel[(tiles * triton.cdiv(M, group),)](
        queries_QE, segment_ids=segment_ids_Q, documents=documents_NE, cu_documents=cu_documents, **tensors, Q=Q, M=M,
        group=group, longest=longest,
        STORE_SCORES=tensors["scores"] is not None, STORE_ARGMAX=tensors["argmax"] is not None, **options,
    )  # fmt: skip


def _outputs(
    queries_QE: Tensor, cu_queries: Tensor, documents_NE: Tensor, cu_documents: Tensor, paired: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    Q, M = len(queries_QE), len(cu_documents) - 1
    # Zeros, because no program writes the score of an empty query.
    scores = queries_QE.new_zeros(M if paired else (len(cu_queries) - 1, M), dtype=torch.float32)
    shape = 0 if not gradient or not _stores_argmax(Q, M, paired) else Q if paired else (M, Q)
    return scores, queries_QE.new_empty(shape, dtype=torch.uint16)


@operator(
    "maxsim_forward(Tensor queries, Tensor cu_queries, Tensor documents, Tensor cu_documents, bool paired,"
    " bool gradient) -> (Tensor, Tensor)",
    fake=_outputs,
)
def maxsim_forward(
    queries_QE: Tensor, cu_queries: Tensor, documents_NE: Tensor, cu_documents: Tensor, paired: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Scores, and the positions of the maxima if there will be a gradient and they fit."""
    scores, argmax = _outputs(queries_QE, cu_queries, documents_NE, cu_documents, paired, gradient)
    Q, B, M = len(queries_QE), len(cu_queries) - 1, len(cu_documents) - 1
    if not scores.numel() or not Q:
        return scores, argmax
    longest = LONGEST if gradient else torch.iinfo(torch.int32).max
    stored = argmax if gradient and _stores_argmax(Q, M, paired) else None
    if paired:
        maxsim_paired_kernel[(M,)](
            queries_QE, cu_queries, documents_NE, cu_documents, scores, stored, longest,
            STORE_ARGMAX=stored is not None, **_options(queries_QE, triton.cdiv(Q, B)),
        )  # fmt: skip
        return scores, argmax
    block_m = _blocks(queries_QE, Q).block_m
    carry = scores.new_empty(triton.cdiv(Q, block_m), M)
    outputs = {"cu_queries": cu_queries, "scores": scores, "carry": carry, "argmax": stored}
    _launch(queries_QE, segment_ids(cu_queries, Q), documents_NE, cu_documents, longest, **outputs)
    if block_m < Q:
        maxsim_carry_kernel[(B, triton.cdiv(M, 1024))](carry, cu_queries, scores, M, block_m, 1024, num_warps=4)
    return scores, argmax


def _backward_blocks(width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Document tokens, query rows at a time, and warps; chosen by registers (offline compile), not yet timed."""
    if dtype is torch.float32:
        return 32, 16, 8 if width > 128 else 4
    return 64 if width <= 64 else 32, 32, 4


def _gradients(
    queries_QE: Tensor, cu_queries: Tensor, documents_NE: Tensor, cu_documents: Tensor, argmax: Tensor, grad: Tensor,
    paired: bool, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    of_queries, of_documents = (
        torch.empty_like(x) if want else x.new_empty(0)
        for x, want in zip((queries_QE, documents_NE), wanted, strict=True)
    )
    return of_queries, of_documents


@operator(
    "maxsim_backward(Tensor queries, Tensor cu_queries, Tensor documents, Tensor cu_documents, Tensor argmax,"
    " Tensor grad, bool paired, bool[2] wanted) -> (Tensor, Tensor)",
    fake=_gradients,
)
def maxsim_backward(
    queries_QE: Tensor, cu_queries: Tensor, documents_NE: Tensor, cu_documents: Tensor, argmax: Tensor, grad: Tensor,
    paired: bool, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of queries and documents, empty if not `wanted`.

    Without stored positions, by blocks of query rows that fit `ARGMAX_BYTES`.
    """
    Q, M = len(queries_QE), len(cu_documents) - 1
    stored = _stores_argmax(Q, M, paired)
    block = max(1, Q) if stored else max(1, ARGMAX_BYTES // (2 * M))
    of_queries, of_documents = wanted
    grad_queries_QE = torch.zeros_like(queries_QE) if of_queries else queries_QE.new_empty(0)
    # The blocks add up, in float32.
    dtype = documents_NE.dtype if stored else torch.float32
    grad_documents_NE = torch.zeros_like(documents_NE, dtype=dtype) if of_documents else documents_NE.new_empty(0)
    segment_ids_Q, options = segment_ids(cu_queries, Q), _options(documents_NE, Q)
    tokens, rows, warps = _backward_blocks(options["K"], documents_NE.dtype)
    # Documents of up to four times the mean length need no second round.
    chunks = triton.cdiv(4 * len(documents_NE), max(1, M) * tokens)
    widths = {"E": options["E"], "K": options["K"], "PAIRED": paired}
    for first in range(0, Q if len(documents_NE) else 0, block):
        q, ids = queries_QE[first : first + block], segment_ids_Q[first : first + block]
        if not stored:
            argmax = torch.empty(M, len(q), dtype=torch.uint16, device=q.device)
            _launch(q, ids, documents_NE, cu_documents, LONGEST, grad=grad, argmax=argmax)
        if of_queries:
            maxsim_grad_queries_kernel[(len(q),)](
                grad, ids, documents_NE, cu_documents, argmax, grad_queries_QE[first : first + block], len(q), M,
                **widths, DOCUMENTS=1 if paired else 16, num_warps=2,
            )  # fmt: skip
        if of_documents:
            maxsim_grad_documents_kernel[(M * chunks,)](
                grad, ids, q, cu_queries, argmax, cu_documents, grad_documents_NE, len(q), M, chunks,
                **widths, ADD=not stored, TOKENS=tokens, ROWS=rows, PRECISION=options["PRECISION"], num_warps=warps,
            )  # fmt: skip
    return grad_queries_QE, grad_documents_NE.to(documents_NE.dtype)


class _MaxSim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors_and_paired: Any) -> Tensor:  # pyright: ignore
        *tensors, ctx.paired = tensors_and_paired
        scores, argmax = maxsim_forward(*tensors, ctx.paired, True)
        ctx.save_for_backward(*tensors, argmax)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore
        of_queries, _, of_documents, *_ = ctx.needs_input_grad
        saved = *ctx.saved_tensors, grad.contiguous()
        grad_queries_QE, grad_documents_NE = maxsim_backward(*saved, ctx.paired, [of_queries, of_documents])
        return grad_queries_QE if of_queries else None, None, grad_documents_NE if of_documents else None, None, None


def _accepts(queries_QE: Tensor, _: Tensor, documents_NE: Tensor, *__: object, **___: object) -> bool:
    same = queries_QE.dtype == documents_NE.dtype and queries_QE.shape[1] == documents_NE.shape[1]
    return supported(queries_QE, documents_NE) and same and 1 <= queries_QE.shape[1] <= WIDEST


@maxsim.register("triton", when=_accepts)
def maxsim_triton(
    queries_QE: Tensor, cu_queries: Tensor, documents_NE: Tensor, cu_documents: Tensor, *, paired: bool = False
) -> Tensor:
    """`maxsim` up to a width of 256; same arguments and result, offsets on the host or on the device.

    With gradients a document has at most 65,535 tokens, and a longer one scores NaN. NaN in vectors may be lost.
    Offsets in pinned memory are read later: do not change them until the scores are used.
    """
    if paired and len(cu_queries) != len(cu_documents):
        raise ValueError(f"{len(cu_queries) - 1} queries cannot be paired with {len(cu_documents) - 1} documents")
    # Copies of offsets on the host need not wait for the work of the device.
    cu_queries, cu_documents = (x.to(queries_QE.device, non_blocking=True) for x in (cu_queries, cu_documents))
    tensors = (x.contiguous() for x in (queries_QE, cu_queries, documents_NE, cu_documents))
    arguments = *tensors, paired
    if needs_gradient(queries_QE, documents_NE):
        return _MaxSim.apply(*arguments)
    return maxsim_forward(*arguments, False)[0]
