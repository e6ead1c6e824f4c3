"""The forward pass of MaxSim: the similarities live in registers, and only scores are written.

A program owns a tile of query rows, of as many queries as fit, and streams some documents past it. Queries may have any
length: what a tile holds of a query that began in an earlier tile goes to a carry, which a second kernel adds in order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import operator, owners, precision
from .tiles import chosen

KEPT = 1 << 28
"""Bytes of places; 1,448 queries of 64 tokens with as many documents."""

LONGEST = (1 << 16) - 1
"""Tokens of a document that 16 bits can tell apart; a longer one scores NaN where gradients are wanted."""

PROGRAMS = 4096
"""From this many on, a program takes several documents: enough for every GPU, and its query rows are read once."""


class Tile(NamedTuple):
    """What a program works on.

    Attributes:
        columns: document tokens at a time. chunk: of the width, at a time; the query rows of one chunk stay loaded.
    """

    rows: int
    columns: int
    chunk: int
    warps: int
    stages: int


def padded(width: int) -> int:
    """A power of two that tensor cores can multiply; the rest is loaded as zero."""
    return max(16, triton.next_power_of_2(width))


def tile(x_QE: Tensor, rows: int) -> Tile:
    """For vectors like these; `rows` are all there are of queries.

    Vectors in float32, and wide ones, are rare: their tiles are the same on every GPU, and not yet timed.
    """
    width = padded(x_QE.shape[1])
    rows = min(128, max(32, triton.next_power_of_2(rows)))
    if x_QE.dtype is torch.float32:  # multiplied without tensor cores: whatever is loaded lies in registers
        return Tile(min(rows, 64), 32, 16, 4, 2)
    if width > 128:
        return Tile(min(rows, 64), 32, width, 4, 2)
    known = chosen(x_QE.device, "maxsim", rows)
    return Tile(rows, known.visit, width, known.num_warps, known.num_stages)


@triton.jit
def load_rows(x, rows, inside, k, E: tl.constexpr):
    """`[rows, k]` of a matrix that is `E` wide; zero outside."""
    return tl.load(x + rows.to(tl.int64)[:, None] * E + k, mask=inside[:, None] & (k < E), other=0)


@triton.jit
def _best(
    queries, q, rows, inside, documents, start, end, E: tl.constexpr, K: tl.constexpr, PLACES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For each row the largest product with a token from `start` to `end`, and with `PLACES` the first that has it."""
    best = tl.full([ROWS], float("-inf"), tl.float32)
    place = tl.zeros([ROWS], tl.int32)
    k = tl.arange(0, CHUNK)[None, :]
    for first in tl.range(start, end, COLUMNS, num_stages=STAGES):
        tokens = first + tl.arange(0, COLUMNS)
        d = load_rows(documents, tokens, tokens < end, k, E)
        similarity = tl.dot(q, tl.trans(d), input_precision=PRECISION)
        if CHUNK < K:
            for more in tl.range(CHUNK, K, CHUNK):
                q_more = load_rows(queries, rows, inside, k + more, E)
                d = load_rows(documents, tokens, tokens < end, k + more, E)
                similarity = tl.dot(q_more, tl.trans(d), similarity, input_precision=PRECISION)
        similarity = tl.where((tokens < end)[None, :], similarity, float("-inf"))
        if PLACES:
            top, where = tl.max(similarity, axis=1, return_indices=True)
            # Only more is better: a tie stays with the token before.
            place = tl.where(top > best, (first - start).to(tl.int32) + where, place)
        else:
            top = tl.max(similarity, axis=1)
        best = tl.maximum(best, top)
    return best, place


@triton.jit
def _add_within(a, a_owner, b, b_owner):
    return tl.where(a_owner == b_owner, a, 0.0) + b, b_owner


@triton.jit(do_not_specialize=["Q", "M", "group", "longest"])
def maxsim_kernel(
    queries, cu_queries, owners, documents, cu_documents, grad, scores, carry, places, Q, M, group, longest,
    E: tl.constexpr, K: tl.constexpr, SCORES: tl.constexpr, PLACES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Neighbours share documents: those come from memory once, and the query rows from the cache.
    tiles = tl.cdiv(Q, ROWS)
    tile = tl.program_id(0) % tiles
    first_document = (tl.program_id(0) // tiles).to(tl.int64) * group
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < Q
    owner = tl.load(owners + rows, mask=inside, other=-1).to(tl.int64)
    q = load_rows(queries, rows, inside, tl.arange(0, CHUNK)[None, :], E)
    if SCORES:
        begins_here = tl.load(cu_queries + owner, mask=inside, other=0) >= tile * ROWS
        next_row = (rows + 1 < Q) & (rows + 1 < (tile + 1) * ROWS)
        is_last = inside & (owner != tl.load(owners + rows + 1, mask=next_row, other=-1))
    for document in tl.range(first_document, tl.minimum(first_document + group, M)):
        start = tl.load(cu_documents + document).to(tl.int64)
        end = tl.load(cu_documents + document + 1).to(tl.int64)
        live = True
        if not SCORES:
            weight = tl.load(grad + owner * M + document, mask=inside, other=0)
            live = tl.sum((weight != 0).to(tl.int32), axis=0) > 0
        if live:
            best, place = _best(
                queries, q, rows, inside, documents, start, end, E, K, PLACES, ROWS, COLUMNS, CHUNK, STAGES, PRECISION
            )
            if SCORES:
                best = tl.where(end - start > longest, float("nan"), best)
                score, _ = tl.associative_scan((best, owner), 0, _add_within)
                tl.store(scores + owner * M + document, score, mask=is_last & begins_here)
                here = tl.full([ROWS], tile, tl.int64)
                tl.store(carry + here * M + document, score, mask=is_last & (begins_here == 0))
            if PLACES:
                tl.store(places + document * Q + rows, place.to(tl.uint16), mask=inside)


@triton.jit(do_not_specialize=["M"])
def maxsim_carry_kernel(carry, cu_queries, scores, M, ROWS: tl.constexpr, DOCUMENTS: tl.constexpr):
    """To the score of every query that spans tiles of rows, add what the later ones hold of it."""
    query = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_queries + query).to(tl.int64) // ROWS
    last = (tl.load(cu_queries + query + 1).to(tl.int64) - 1) // ROWS
    documents = tl.program_id(1) * DOCUMENTS + tl.arange(0, DOCUMENTS)
    if last > first:
        score = tl.load(scores + query * M + documents, mask=documents < M, other=0)
        for tile in tl.range(first + 1, last + 1):
            score += tl.load(carry + tile * M + documents, mask=documents < M, other=0)
        tl.store(scores + query * M + documents, score, mask=documents < M)


@triton.jit(do_not_specialize=["longest"])
def maxsim_paired_kernel(
    queries, cu_queries, documents, cu_documents, scores, places, longest,
    E: tl.constexpr, K: tl.constexpr, PLACES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    top, bottom = tl.load(cu_queries + pair).to(tl.int64), tl.load(cu_queries + pair + 1).to(tl.int64)
    start, end = tl.load(cu_documents + pair).to(tl.int64), tl.load(cu_documents + pair + 1).to(tl.int64)
    total = tl.zeros([ROWS], tl.float32)
    for first in tl.range(top, bottom, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows < bottom
        q = load_rows(queries, rows, inside, tl.arange(0, CHUNK)[None, :], E)
        best, place = _best(
            queries, q, rows, inside, documents, start, end, E, K, PLACES, ROWS, COLUMNS, CHUNK, STAGES, PRECISION
        )
        best = tl.where(end - start > longest, float("nan"), best)
        total += tl.where(inside, best, 0.0)
        if PLACES:
            tl.store(places + rows, place.to(tl.uint16), mask=inside)
    tl.store(scores + pair, tl.sum(total, axis=0))


def options(x_QE: Tensor, rows: int) -> dict[str, Any]:
    """What every kernel that compares vectors is told: their width, the tile, the precision, the warps."""
    width, taken = x_QE.shape[1], tile(x_QE, rows)
    names = {"E": width, "K": padded(width), "PRECISION": precision(x_QE), "num_warps": taken.warps}
    return names | {"ROWS": taken.rows, "COLUMNS": taken.columns, "CHUNK": taken.chunk, "STAGES": taken.stages}


def keeps(rows: int, documents: int, paired: bool) -> bool:
    """Whether the places of the maxima are kept for the backward pass."""
    return paired or 2 * rows * documents <= KEPT


def launch(
    queries_QE: Tensor, owners_Q: Tensor, documents_NE: Tensor, cu_documents: Tensor, longest: int, **outputs: Any
) -> None:
    """`maxsim_kernel` over all pairs, for scores and a carry, or for places where a gradient is not zero."""
    Q, M, told = len(queries_QE), len(cu_documents) - 1, options(queries_QE, len(queries_QE))
    tiles = triton.cdiv(Q, told["ROWS"])
    group = max(1, min(16, tiles * M // PROGRAMS))
    tensors = {"cu_queries": None, "grad": None, "scores": None, "carry": None, "places": None} | outputs
    maxsim_kernel[(tiles * triton.cdiv(M, group),)](
        queries_QE, owners=owners_Q, documents=documents_NE, cu_documents=cu_documents, **tensors, Q=Q, M=M,
        group=group, longest=longest,
        SCORES=tensors["scores"] is not None, PLACES=tensors["places"] is not None, **told,
    )  # fmt: skip


def _outputs(
    queries_QE: Tensor, cu_queries: Tensor, documents_NE: Tensor, cu_documents: Tensor, paired: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    Q, M = len(queries_QE), len(cu_documents) - 1
    # A query without a token is written by nobody.
    scores = queries_QE.new_zeros(M if paired else (len(cu_queries) - 1, M), dtype=torch.float32)
    places = 0 if not gradient or not keeps(Q, M, paired) else Q if paired else (M, Q)
    return scores, queries_QE.new_empty(places, dtype=torch.uint16)


@operator(
    "maxsim_forward(Tensor queries, Tensor cu_queries, Tensor documents, Tensor cu_documents, bool paired,"
    " bool gradient) -> (Tensor, Tensor)",
    fake=_outputs,
)
def maxsim_forward(
    queries_QE: Tensor, cu_queries: Tensor, documents_NE: Tensor, cu_documents: Tensor, paired: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Scores, and the places of the maxima if there will be a gradient and they fit."""
    scores, places = _outputs(queries_QE, cu_queries, documents_NE, cu_documents, paired, gradient)
    Q, B, M = len(queries_QE), len(cu_queries) - 1, len(cu_documents) - 1
    if not scores.numel() or not Q:
        return scores, places
    longest = LONGEST if gradient else torch.iinfo(torch.int32).max
    kept = places if gradient and keeps(Q, M, paired) else None
    if paired:
        maxsim_paired_kernel[(M,)](
            queries_QE, cu_queries, documents_NE, cu_documents, scores, kept, longest,
            PLACES=kept is not None, **options(queries_QE, triton.cdiv(Q, B)),
        )  # fmt: skip
        return scores, places
    rows = options(queries_QE, Q)["ROWS"]
    carry = scores.new_empty(triton.cdiv(Q, rows), M)
    outputs = {"cu_queries": cu_queries, "scores": scores, "carry": carry, "places": kept}
    launch(queries_QE, owners(cu_queries, Q), documents_NE, cu_documents, longest, **outputs)
    if rows < Q:
        maxsim_carry_kernel[(B, triton.cdiv(M, 1024))](carry, cu_queries, scores, M, rows, 1024, num_warps=4)
    return scores, places
