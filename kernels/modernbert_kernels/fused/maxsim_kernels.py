"""The kernels of MaxSim over ragged queries and documents, forward and backward.

Forward, a program owns a tile of query rows, of as many queries as fit, and loops over some documents; the similarities
stay in registers, and only scores are written. Queries may have any length: if a query began in an earlier tile, its
sum over this tile goes to `carry`, which a second kernel adds in a fixed order.

Backward, the gradient of a query row is a weighted sum of the document tokens it matched, and vice versa. A program for
each query row gathers from the documents, and a program for each tile of document tokens scans the rows that matched
one of them. So every sum has one writer and a fixed order, without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .jit import jit


@triton.jit
def _load_rows(x, rows, row_mask, k, E: tl.constexpr):
    """`[rows, k]` of a matrix that is `E` wide; zero outside."""
    return tl.load(x + rows.to(tl.int64)[:, None] * E + k, mask=row_mask[:, None] & (k < E), other=0)


@triton.jit
def _best(
    queries, q, rows, row_mask, documents, start, end, E: tl.constexpr, K: tl.constexpr, STORE_ARGMAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest product of each row with the tokens `start` to `end`; with `STORE_ARGMAX` also its first token."""
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    best_token = tl.zeros([BLOCK_M], tl.int32)
    k = tl.arange(0, BLOCK_K)[None, :]
    for start_n in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        tokens = start_n + tl.arange(0, BLOCK_N)
        d = _load_rows(documents, tokens, tokens < end, k, E)
        similarity = tl.dot(q, tl.trans(d), input_precision=PRECISION)
        if BLOCK_K < K:
            for start_k in tl.range(BLOCK_K, K, BLOCK_K):
                q_k = _load_rows(queries, rows, row_mask, k + start_k, E)
                d = _load_rows(documents, tokens, tokens < end, k + start_k, E)
                similarity = tl.dot(q_k, tl.trans(d), similarity, input_precision=PRECISION)
        similarity = tl.where((tokens < end)[None, :], similarity, float("-inf"))
        if STORE_ARGMAX:
            top, where = tl.max(similarity, axis=1, return_indices=True)
            # Strictly greater: a tie goes to the earlier token.
            best_token = tl.where(top > best, (start_n - start).to(tl.int32) + where, best_token)
        else:
            top = tl.max(similarity, axis=1)
        best = tl.maximum(best, top)
    return best, best_token


@triton.jit
def _add_within(a, a_segment, b, b_segment):
    return tl.where(a_segment == b_segment, a, 0.0) + b, b_segment


@jit(do_not_specialize=["Q", "M", "group", "longest"])
def maxsim_kernel(
    queries, cu_queries, segment_ids, documents, cu_documents, grad, scores, carry, argmax, Q, M, group, longest,
    E: tl.constexpr, K: tl.constexpr, STORE_SCORES: tl.constexpr, STORE_ARGMAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share documents: these are read from memory once, and the query rows from the cache.
    tiles = tl.cdiv(Q, BLOCK_M)
    tile = tl.program_id(0) % tiles
    first_document = (tl.program_id(0) // tiles).to(tl.int64) * group
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < Q
    segment = tl.load(segment_ids + rows, mask=row_mask, other=-1).to(tl.int64)
    q = _load_rows(queries, rows, row_mask, tl.arange(0, BLOCK_K)[None, :], E)
    if STORE_SCORES:
        begins_here = tl.load(cu_queries + segment, mask=row_mask, other=0) >= tile * BLOCK_M
        has_next = (rows + 1 < Q) & (rows + 1 < (tile + 1) * BLOCK_M)
        is_last = row_mask & (segment != tl.load(segment_ids + rows + 1, mask=has_next, other=-1))
    for document in tl.range(first_document, tl.minimum(first_document + group, M)):
        start = tl.load(cu_documents + document).to(tl.int64)
        end = tl.load(cu_documents + document + 1).to(tl.int64)
        needed = True
        if not STORE_SCORES:
            weight = tl.load(grad + segment * M + document, mask=row_mask, other=0)
            needed = tl.sum((weight != 0).to(tl.int32), axis=0) > 0
        if needed:
            best, best_token = _best(
                queries, q, rows, row_mask, documents, start, end, E, K, STORE_ARGMAX,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PRECISION,
            )  # fmt: skip
            if STORE_SCORES:
                best = tl.where(end - start > longest, float("nan"), best)
                score, _ = tl.associative_scan((best, segment), 0, _add_within)
                tl.store(scores + segment * M + document, score, mask=is_last & begins_here)
                tile_of_row = tl.full([BLOCK_M], tile, tl.int64)
                tl.store(carry + tile_of_row * M + document, score, mask=is_last & (begins_here == 0))
            if STORE_ARGMAX:
                tl.store(argmax + document * Q + rows, best_token.to(tl.uint16), mask=row_mask)


@jit(do_not_specialize=["M"])
def maxsim_carry_kernel(carry, cu_queries, scores, M, BLOCK_M: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Add the sums of the later tiles to the score of every query that spans several tiles of rows."""
    query = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_queries + query).to(tl.int64) // BLOCK_M
    last = (tl.load(cu_queries + query + 1).to(tl.int64) - 1) // BLOCK_M
    documents = tl.program_id(1) * DOCUMENTS + tl.arange(0, DOCUMENTS)
    if last > first:
        score = tl.load(scores + query * M + documents, mask=documents < M, other=0)
        for tile in tl.range(first + 1, last + 1):
            score += tl.load(carry + tile * M + documents, mask=documents < M, other=0)
        tl.store(scores + query * M + documents, score, mask=documents < M)


@jit(do_not_specialize=["longest"])
def maxsim_paired_kernel(
    queries, cu_queries, documents, cu_documents, scores, argmax, longest,
    E: tl.constexpr, K: tl.constexpr, STORE_ARGMAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    first_row, end_row = tl.load(cu_queries + pair).to(tl.int64), tl.load(cu_queries + pair + 1).to(tl.int64)
    start, end = tl.load(cu_documents + pair).to(tl.int64), tl.load(cu_documents + pair + 1).to(tl.int64)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start_m in tl.range(first_row, end_row, BLOCK_M):
        rows = start_m + tl.arange(0, BLOCK_M)
        row_mask = rows < end_row
        q = _load_rows(queries, rows, row_mask, tl.arange(0, BLOCK_K)[None, :], E)
        best, best_token = _best(
            queries, q, rows, row_mask, documents, start, end, E, K, STORE_ARGMAX,
            BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PRECISION,
        )  # fmt: skip
        best = tl.where(end - start > longest, float("nan"), best)
        total += tl.where(row_mask, best, 0.0)
        if STORE_ARGMAX:
            tl.store(argmax + rows, best_token.to(tl.uint16), mask=row_mask)
    tl.store(scores + pair, tl.sum(total, axis=0))


@jit(do_not_specialize=["Q", "M"])
def maxsim_grad_queries_kernel(
    grad, segment_ids, documents, cu_documents, argmax, grad_queries, Q, M,
    E: tl.constexpr, K: tl.constexpr, PAIRED: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    segment = tl.load(segment_ids + row).to(tl.int64)
    k = tl.arange(0, K)[None, :]
    total = tl.zeros([DOCUMENTS, K], tl.float32)
    for first in tl.range(segment if PAIRED else 0, segment + 1 if PAIRED else M, DOCUMENTS):
        document = first + tl.arange(0, DOCUMENTS).to(tl.int64)
        inside = document < (segment + 1 if PAIRED else M)
        weight = tl.load(grad + (document if PAIRED else segment * M + document), mask=inside, other=0)
        # "Not zero" instead of "greater than zero", so that a NaN is passed on.
        has_grad = inside & (weight != 0)
        if tl.sum(has_grad.to(tl.int32), axis=0) > 0:
            token = tl.load(argmax + document * (0 if PAIRED else Q) + row, mask=has_grad, other=0).to(tl.int64)
            start = tl.load(cu_documents + document, mask=has_grad, other=0).to(tl.int64)
            end = tl.load(cu_documents + document + 1, mask=has_grad, other=0)
            # An empty document has no token that could have matched.
            d = _load_rows(documents, start + token, has_grad & (start + token < end), k, E)
            total += weight[:, None] * d.to(tl.float32)
    tl.store(grad_queries + row * E + k, tl.sum(total, axis=0)[None, :], mask=k < E)


@jit(do_not_specialize=["Q", "M", "chunks"])
def maxsim_grad_documents_kernel(
    grad, segment_ids, queries, cu_queries, argmax, cu_documents, grad_documents, Q, M, chunks,
    E: tl.constexpr, K: tl.constexpr, PAIRED: tl.constexpr, ADD: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    document = (tl.program_id(0) // chunks).to(tl.int64)
    start, end = tl.load(cu_documents + document).to(tl.int64), tl.load(cu_documents + document + 1).to(tl.int64)
    first_row, end_row = 0, Q
    if PAIRED:
        first_row, end_row = tl.load(cu_queries + document), tl.load(cu_queries + document + 1)
    k = tl.arange(0, K)[None, :]
    for first in tl.range(start + tl.program_id(0) % chunks * TOKENS, end, chunks * TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        token_mask = (tokens[:, None] < end) & (k < E)
        total = tl.zeros([TOKENS, K], tl.float32)
        if ADD:
            total += tl.load(grad_documents + tokens[:, None] * E + k, mask=token_mask, other=0)
        for start_m in tl.range(first_row, end_row, ROWS):
            rows = start_m + tl.arange(0, ROWS)
            row_mask = rows < end_row
            segment = tl.load(segment_ids + rows, mask=row_mask, other=0).to(tl.int64)
            weight = tl.load(grad + (segment if PAIRED else segment * M + document), mask=row_mask, other=0)
            has_grad = row_mask & (weight != 0)
            token = tl.load(argmax + (0 if PAIRED else document * Q) + rows, mask=has_grad, other=0).to(tl.int64)
            matched = has_grad & (token >= first - start) & (token < first - start + TOKENS)
            if tl.sum(matched.to(tl.int32), axis=0) > 0:
                q = _load_rows(queries, rows, matched, k, E)
                is_match = matched[None, :] & (token[None, :] == (tokens - start)[:, None])
                if q.dtype == tl.float16:
                    # Divided by the largest, so that weights of any size are in the range of float16.
                    peak = tl.max(tl.abs(weight), axis=0)
                    share = tl.where(is_match, (weight / peak)[None, :], 0.0).to(q.dtype)
                    total += peak * tl.dot(share, q, input_precision=PRECISION)
                else:
                    share = tl.where(is_match, weight[None, :], 0.0).to(q.dtype)
                    total = tl.dot(share, q, total, input_precision=PRECISION)
        tl.store(grad_documents + tokens[:, None] * E + k, total, mask=token_mask)
