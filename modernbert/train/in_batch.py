"""InfoNCE over the vectors of a large batch, of one rank or of many, in bounded memory; with `grad_cache`, cached."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..late_interaction import Ragged, check_count, maxsim, token_blocks
from .losses import check_temperature, softmax_loss

Gather = Callable[[Tensor], Tensor]
Score = Callable[[Ragged, Ragged], Tensor]
Spans = Iterable[tuple[int, int]]

ELEMENTS = 1 << 26
"""Query tokens times documents of a block. The positions of their maxima take 128 MB on a GPU, less than its kernel may
store, and 800 MB with their values on a CPU."""


def in_batch_info_nce(
    queries: Ragged | Tensor,
    documents: Ragged | Tensor,
    groups_N: Tensor | None = None,
    *,
    temperature: float = 1.0,
    both_directions: bool = False,
    margin: float | None = None,
    elements: int = ELEMENTS,
    gather: Gather | None = None,
    rank: int = 0,
) -> Tensor:
    """`info_nce` of B queries over N documents, scored block by block: document i < B is query i's positive.

    The other documents, mined negatives, are negatives of all queries. With `gather`, the documents of all ranks are
    candidates of the queries of this rank, and the loss is the mean over these queries: `BatchLoss.count` is B. The
    gradient of a vector comes from the losses of all ranks.

    A block is some queries with all documents. Its gradient is computed together with its loss, so that no block is
    scored twice, and memory holds one block. For 16,384 pairs of 32 and 180 tokens of width 48, in bfloat16 on a GPU,
    the vectors take 0.3 GB, their gradients 1.0 GB, and a block less than 0.5 GB. All similarities would take 3 TB.

    Args:
        queries, documents: token vectors, for MaxSim; or `[B, E]` and `[N, E]`, for dot products in float32 or better.
        groups_N: int. A document is not a negative of a query if its group is that of the query's positive. None: all
            groups differ. All ranks give groups, or none does.
        temperature, both_directions, margin: as in `info_nce`.
        elements: the most query tokens times documents of a block.
        gather: rows of this rank to those of all ranks, in the order of ranks, with a gradient. Ranks may have
            different numbers of rows. It is called once with vectors and once with whole numbers; with
            `both_directions` twice.
        rank: the rank of this process in that order.

    Raises:
        TypeError: token vectors on one side only.
        ValueError: fewer documents than queries, another number of groups than of documents, or `temperature` or
            `elements` that are not positive.
    """
    if isinstance(queries, Ragged) != isinstance(documents, Ragged):
        kinds = f"queries are a {type(queries).__name__}, documents a {type(documents).__name__}"
        raise TypeError(f"{kinds}: give token vectors of both, or one vector for each text of both")
    score = maxsim if isinstance(queries, Ragged) else _dot_products
    queries, documents = _ragged(queries), _ragged(documents)
    count, device = len(queries), queries.values.device
    if len(documents) < count:
        raise ValueError(f"documents must begin with the positives of {count} queries, got {len(documents)} documents")
    if groups_N is not None and groups_N.shape != (len(documents),):
        shape = tuple(groups_N.shape)
        raise ValueError(f"groups_N must have one group for each of {len(documents)} documents, got {shape}")
    check_count("elements", elements)
    check_temperature("temperature", temperature)
    groups_N = None if groups_N is None else groups_N.to(device)
    groups_B = None if groups_N is None else groups_N[:count]

    def total(rows: Ragged, columns: _Side, score: Score, spans: Spans) -> Tensor:
        """The loss of each text in `rows` over all columns, summed."""

        def block_loss(rows_QE: Tensor, columns_NE: Tensor, start: int, stop: int) -> Tensor:
            offsets = rows.offsets[start : stop + 1] - rows.offsets[start]
            scores = score(Ragged(rows_QE, offsets), Ragged(columns_NE, columns.vectors.offsets))
            positive = torch.arange(columns.first + start, columns.first + stop, device=device)
            same = None if groups_B is None else groups_B[start:stop, None] == columns.groups
            return softmax_loss(scores, positive, same, temperature=temperature, margin=margin, reduction="sum")

        return _sum_of_blocks(rows, columns.vectors, spans, block_loss)

    candidates = _of_all_ranks(documents, groups_N, gather, rank)
    spans = token_blocks(queries.offsets, max(1, elements // max(1, len(candidates.vectors))))
    loss = total(queries, candidates, score, spans)
    if both_directions:
        askers = _of_all_ranks(queries, groups_B, gather, rank)
        size = max(1, elements // max(1, len(askers.vectors.values)))
        spans = [(start, min(count, start + size)) for start in range(0, count, size)]
        loss = (loss + total(documents[:count], askers, lambda d, q: score(q, d).T, spans)) / 2
    return loss / max(1, count)


def _dot_products(queries: Ragged, documents: Ragged) -> Tensor:
    q_BE, d_NE = queries.values, documents.values
    dtype = torch.promote_types(q_BE.dtype, torch.float32)
    with torch.autocast(q_BE.device.type, enabled=False):
        return q_BE.to(dtype) @ d_NE.to(dtype).T


def _ragged(vectors: Ragged | Tensor) -> Ragged:
    """One vector for each text, as one row for each."""
    return vectors if isinstance(vectors, Ragged) else Ragged(vectors, torch.arange(len(vectors) + 1, device="cpu"))


class _Side(NamedTuple):
    """Texts of all ranks: their vectors and groups, and the index of the first text of this rank."""

    vectors: Ragged
    groups: Tensor | None
    first: int


def _of_all_ranks(vectors: Ragged, groups: Tensor | None, gather: Gather | None, rank: int) -> _Side:
    if gather is None:
        return _Side(vectors, groups, 0)
    lengths, device = vectors.offsets.diff(), vectors.values.device
    own = [lengths, torch.full_like(lengths, rank), torch.zeros_like(lengths) if groups is None else groups.cpu()]
    lengths, ranks, all_groups = gather(torch.stack(own, dim=1).to(device)).cpu().unbind(1)
    everything = Ragged(gather(vectors.values), F.pad(lengths.cumsum(0), (1, 0)))
    return _Side(everything, None if groups is None else all_groups.to(device), int((ranks < rank).sum()))


BlockLoss = Callable[[Tensor, Tensor, int, int], Tensor]


def _sum_of_blocks(rows: Ragged, columns: Ragged, spans: Spans, block_loss: BlockLoss) -> Tensor:
    """The sum of `block_loss(values of the block's rows, values of all columns, start, stop)` over blocks of texts."""
    blocks = [(start, stop, int(rows.offsets[start]), int(rows.offsets[stop])) for start, stop in spans]
    if torch.is_grad_enabled() and (rows.values.requires_grad or columns.values.requires_grad):
        return _SumOfBlocks.apply(rows.values, columns.values, blocks, block_loss)
    losses = [block_loss(rows.values[a:b], columns.values, start, stop) for start, stop, a, b in blocks]
    return torch.stack(losses).sum() if losses else rows.values.new_zeros(())


class _SumOfBlocks(torch.autograd.Function):
    """`_sum_of_blocks` that computes the gradients of each block with its loss, and keeps nothing else."""

    @staticmethod
    def forward(ctx: Any, rows_QE: Tensor, columns_NE: Tensor, blocks: list[tuple[int, ...]], block_loss: BlockLoss):
        # The gradient of a document sums over many blocks: in float32 at least.
        dtype = torch.promote_types(rows_QE.dtype, torch.float32)
        total = rows_QE.new_zeros((), dtype=dtype)
        grad_rows_QE, grad_columns_NE = torch.zeros_like(rows_QE), torch.zeros_like(columns_NE, dtype=dtype)
        for start, stop, first, last in blocks:
            leaves = rows_QE[first:last].detach().requires_grad_(), columns_NE.detach().requires_grad_()
            with torch.enable_grad():
                loss = block_loss(*leaves, start, stop)
            # As in any backward pass, whose products autocast would round.
            with torch.autocast(rows_QE.device.type, enabled=False):
                grad_rows_QE[first:last], grad_block_NE = torch.autograd.grad(loss, leaves)
            grad_columns_NE += grad_block_NE
            total += loss.detach()
        ctx.save_for_backward(grad_rows_QE, grad_columns_NE)
        ctx.dtype = columns_NE.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        grad_rows_QE, grad_columns_NE = ctx.saved_tensors
        return grad_rows_QE * grad, (grad_columns_NE * grad).to(ctx.dtype), None, None
