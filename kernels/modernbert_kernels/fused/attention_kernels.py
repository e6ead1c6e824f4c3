"""The kernels of attention over packed tokens, local and global, forward and backward.

A program owns a tile of consecutive packed tokens of one head, whatever sequences they belong to. So short sequences
share a tile, and only the last tile of the batch is partly empty. What a token sees is an interval of packed tokens,
the intersection of its sequence with its window; the interval is the whole mask, and a block that every row sees is not
masked. q and k are rotated as they are loaded. The backward pass has a program for every tile of queries (dq) and one
for every tile of keys (dk, dv), so that no sum has two writers. Both rotate their gradients back in registers and write
their part of packed dqkv.

Softmax is FlashAttention's (arXiv 2205.14135, 2307.08691), and so are the names: one pass over the keys with a running
maximum `m_i` and sum `l_i`; the backward pass reads their log-sum-exp `lse`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .jit import jit

LN_2 = tl.constexpr(0.6931471805599453)
"""`scale` makes scores exponents of two. Their derivative has this factor."""


@triton.jit
def _visible_range(ranges, rows, row_mask, first_row, T, window, OF_KEYS: tl.constexpr):
    """`[low, high)`, the packed tokens that each row of a tile sees; `start` to `stop`, which holds them all; and
    `all_start` to `all_stop`, which every query sees.

    A query sees keys. With `OF_KEYS` the rows are keys, and a key sees the queries that see it. Where sequences begin
    and end grows with the rows, and so do `low` and `high` of queries: the first and the last row have the extremes.
    """
    begins, ends, key_ends = ranges, ranges + T, ranges + 2 * T
    if not OF_KEYS:
        ends = key_ends
    last_row = tl.minimum(first_row + rows.shape[0], T) - 1
    start = tl.maximum(tl.load(begins + first_row), first_row - window)
    stop = tl.minimum(tl.load(ends + last_row), last_row + window + 1)
    all_start = tl.maximum(tl.load(begins + last_row), last_row - window)
    all_stop = tl.minimum(tl.load(ends + first_row), first_row + window + 1)
    low = tl.maximum(tl.load(begins + rows, mask=row_mask, other=0), rows - window)
    high = tl.minimum(tl.load(ends + rows, mask=row_mask, other=0), rows + window + 1)
    if OF_KEYS:
        # A row that is not a key is seen by no query.
        high = tl.where(rows < tl.load(key_ends + rows, mask=row_mask, other=0), high, 0)
    return low, high, start, stop, all_start, all_stop


@triton.jit
def _load_rotated(x, rows, cos, sin, row_mask, stride, R: tl.constexpr, ROTATE: tl.constexpr):
    """Rows of q or k as their two halves, rotated in float32 and rounded once."""
    columns = tl.arange(0, R)[None, :]
    rows, row_mask = rows.to(tl.int64)[:, None], row_mask[:, None]
    a = tl.load(x + rows * stride + columns, mask=row_mask, other=0.0)
    b = tl.load(x + rows * stride + R + columns, mask=row_mask, other=0.0)
    if ROTATE:
        dtype: tl.constexpr = a.dtype
        c = tl.load(cos + rows * R + columns, mask=row_mask, other=0.0)
        s = tl.load(sin + rows * R + columns, mask=row_mask, other=0.0)
        a, b = a.to(tl.float32), b.to(tl.float32)
        a, b = (a * c - b * s).to(dtype), (b * c + a * s).to(dtype)
    return a, b


@triton.jit
def _store_rotated_back(x, a, b, rows, cos, sin, row_mask, stride, R: tl.constexpr):
    """Store the gradient of what `_load_rotated` reads, from `a` and `b`, the gradients of what it returns."""
    columns = tl.arange(0, R)[None, :]
    rows, row_mask = rows.to(tl.int64)[:, None], row_mask[:, None]
    c = tl.load(cos + rows * R + columns, mask=row_mask, other=0.0)
    s = tl.load(sin + rows * R + columns, mask=row_mask, other=0.0)
    tl.store(x + rows * stride + columns, a * c + b * s, mask=row_mask)
    tl.store(x + rows * stride + R + columns, b * c - a * s, mask=row_mask)


@triton.jit
def _dot_halves(a1, a2, b1, b2, PRECISION: tl.constexpr):
    """`a b^T`, both in halves."""
    return tl.dot(a2, tl.trans(b2), tl.dot(a1, tl.trans(b1), input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def _between(columns, low, high):
    """Which columns are in the interval of each row."""
    return (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])


@jit(do_not_specialize=["T", "window"])
def attention_forward_kernel(
    qkv,
    ranges,
    cos,
    sin,
    out,
    lse,
    T,
    window,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROTATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    R: tl.constexpr = K // 2
    stride: tl.constexpr = 3 * H * K
    # The heads of a tile follow one another: together they read whole rows of qkv, and share the tables.
    head = tl.program_id(0) % H
    first_row = tl.program_id(0) // H * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < T
    low, high, start, stop, all_start, all_stop = _visible_range(ranges, rows, row_mask, first_row, T, window, False)
    q, k, v = qkv + head * K, qkv + (H + head) * K, qkv + (2 * H + head) * K
    q1, q2 = _load_rotated(q, rows, cos, sin, row_mask, stride, R, ROTATE)
    columns = tl.arange(0, K)[None, :]
    m_i = tl.full([BLOCK_M], -1e30, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, K], tl.float32)
    for start_n in tl.range(start, stop, BLOCK_N):
        keys = start_n + tl.arange(0, BLOCK_N)
        key_mask = keys < stop
        k1, k2 = _load_rotated(k, keys, cos, sin, key_mask, stride, R, ROTATE)
        scores = _dot_halves(q1, q2, k1, k2, PRECISION)
        if (start_n < all_start) | (start_n + BLOCK_N > all_stop):
            scores = tl.where(_between(keys, low, high), scores, float("-inf"))
        # Finite for a row without a visible key so far, so that its probabilities are zero and not NaN.
        m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        v_block = tl.load(v + keys.to(tl.int64)[:, None] * stride + columns, mask=key_mask[:, None], other=0.0)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
    sees_keys = l_i > 0
    acc = acc / tl.where(sees_keys, l_i, 1.0)[:, None]
    tl.store(out + rows.to(tl.int64)[:, None] * (H * K) + head * K + columns, acc, mask=row_mask[:, None])
    if lse is not None:
        # Infinite for a row without a visible key, so that the backward pass finds probabilities of zero.
        lse_i = tl.where(sees_keys, m_i + tl.log2(tl.where(sees_keys, l_i, 1.0)), float("inf"))
        tl.store(lse + head.to(tl.int64) * T + rows, lse_i, mask=row_mask)


@jit(do_not_specialize=["T", "window"])
def attention_dq_kernel(
    qkv,
    ranges,
    cos,
    sin,
    out,
    lse,
    dout,
    delta,
    dqkv,
    T,
    window,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROTATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    R: tl.constexpr = K // 2
    stride: tl.constexpr = 3 * H * K
    # The heads of a tile follow one another: together they read whole rows of qkv, and share the tables.
    head = tl.program_id(0) % H
    first_row = tl.program_id(0) // H * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < T
    low, high, start, stop, all_start, all_stop = _visible_range(ranges, rows, row_mask, first_row, T, window, False)
    q, k, v = qkv + head * K, qkv + (H + head) * K, qkv + (2 * H + head) * K
    q1, q2 = _load_rotated(q, rows, cos, sin, row_mask, stride, R, ROTATE)
    columns = tl.arange(0, K)[None, :]
    out_offsets = rows.to(tl.int64)[:, None] * (H * K) + head * K + columns
    do = tl.load(dout + out_offsets, mask=row_mask[:, None], other=0.0)
    o = tl.load(out + out_offsets, mask=row_mask[:, None], other=0.0)
    delta_i = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + head.to(tl.int64) * T + rows, delta_i, mask=row_mask)
    lse_i = tl.load(lse + head.to(tl.int64) * T + rows, mask=row_mask, other=float("inf"))
    dq1 = tl.zeros([BLOCK_M, R], tl.float32)
    dq2 = tl.zeros([BLOCK_M, R], tl.float32)
    for start_n in tl.range(start, stop, BLOCK_N):
        keys = start_n + tl.arange(0, BLOCK_N)
        key_mask = keys < stop
        k1, k2 = _load_rotated(k, keys, cos, sin, key_mask, stride, R, ROTATE)
        scores = _dot_halves(q1, q2, k1, k2, PRECISION)
        if (start_n < all_start) | (start_n + BLOCK_N > all_stop):
            scores = tl.where(_between(keys, low, high), scores, float("-inf"))
        p = tl.exp2(scores * scale - lse_i[:, None])
        v_block = tl.load(v + keys.to(tl.int64)[:, None] * stride + columns, mask=key_mask[:, None], other=0.0)
        dp = tl.dot(do, tl.trans(v_block), input_precision=PRECISION)
        ds = (p * (dp - delta_i[:, None])).to(k1.dtype)
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
        dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
    scale = scale * LN_2
    _store_rotated_back(dqkv + head * K, dq1 * scale, dq2 * scale, rows, cos, sin, row_mask, stride, R)


@jit(do_not_specialize=["T", "window"])
def attention_dkv_kernel(
    qkv,
    ranges,
    cos,
    sin,
    lse,
    dout,
    delta,
    dqkv,
    T,
    window,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROTATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    R: tl.constexpr = K // 2
    stride: tl.constexpr = 3 * H * K
    # The heads of a tile follow one another: together they read whole rows of qkv, and share the tables.
    head = tl.program_id(0) % H
    first_row = tl.program_id(0) // H * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < T
    low, high, start, stop, _, _ = _visible_range(ranges, rows, row_mask, first_row, T, window, True)
    q, k, v = qkv + head * K, qkv + (H + head) * K, qkv + (2 * H + head) * K
    k1, k2 = _load_rotated(k, rows, cos, sin, row_mask, stride, R, ROTATE)
    columns = tl.arange(0, K)[None, :]
    v_block = tl.load(v + rows.to(tl.int64)[:, None] * stride + columns, mask=row_mask[:, None], other=0.0)
    dk1 = tl.zeros([BLOCK_M, R], tl.float32)
    dk2 = tl.zeros([BLOCK_M, R], tl.float32)
    dv = tl.zeros([BLOCK_M, K], tl.float32)
    for start_n in tl.range(start, stop, BLOCK_N):
        queries = start_n + tl.arange(0, BLOCK_N)
        query_mask = queries < stop
        q1, q2 = _load_rotated(q, queries, cos, sin, query_mask, stride, R, ROTATE)
        scores = _dot_halves(k1, k2, q1, q2, PRECISION)
        lse_i = tl.load(lse + head.to(tl.int64) * T + queries, mask=query_mask, other=float("inf"))
        # Every block is masked, and after the exponential: this kernel has no registers left before sm_90.
        p = tl.where(_between(queries, low, high), tl.exp2(scores * scale - lse_i[None, :]), 0.0)
        out_offsets = queries.to(tl.int64)[:, None] * (H * K) + head * K + columns
        do = tl.load(dout + out_offsets, mask=query_mask[:, None], other=0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v_block, tl.trans(do), input_precision=PRECISION)
        delta_i = tl.load(delta + head.to(tl.int64) * T + queries, mask=query_mask, other=0.0)
        ds = (p * (dp - delta_i[None, :])).to(q1.dtype)
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)
    scale = scale * LN_2
    _store_rotated_back(dqkv + (H + head) * K, dk1 * scale, dk2 * scale, rows, cos, sin, row_mask, stride, R)
    dv_pointers = dqkv + (2 * H + head) * K + rows.to(tl.int64)[:, None] * stride + columns
    tl.store(dv_pointers, dv, mask=row_mask[:, None])
