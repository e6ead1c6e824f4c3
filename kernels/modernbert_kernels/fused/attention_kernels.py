"""The kernels of attention over packed tokens, local and global, forward and backward.

A program owns a tile of consecutive packed tokens of one head, whatever sequences they belong to: short sequences share
a tile, and no sequence leaves a ragged one. What a token sees is an interval of packed tokens, the intersection of its
sequence with its window; the interval is the whole mask. q and k are rotated as they are loaded. The backward pass has
one program for every tile of queries (dq) and one for every tile of keys (dk, dv), so that nothing is added from two
sides; both undo the rotation in registers and write their part of packed dqkv.

Softmax is FlashAttention's (arXiv 2205.14135, 2307.08691): one pass over the keys with a running maximum, kept as the
logarithm of the sum for the backward pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

SEQUENCES = tl.constexpr(256)
"""Sequences that a program looks through at a time for those of its tile."""

FAR = tl.constexpr(1 << 30)
"""A number of tokens that is never reached, and can be added to another one."""

LN_2 = tl.constexpr(0.6931471805599453)
"""`scale` turns scores into exponents of two; the derivative is that of the exponential function."""


@triton.jit
def _reach(rows, first_row, behind, cu_seqlens, key_lengths, B, window, OF_KEYS: tl.constexpr):
    """The intervals of packed tokens that the rows of a tile see, and one that holds them all.

    A query sees keys; with `OF_KEYS` a key sees the queries that see it.
    """
    last_row = behind - 1
    # The sequences of the first and of the last row: as many as end before them.
    sequence, last = 0, 0
    for start in tl.range(0, B, SEQUENCES):
        number = start + tl.arange(0, SEQUENCES)
        end = tl.load(cu_seqlens + 1 + number, mask=number < B, other=FAR)
        sequence += tl.sum((end <= first_row).to(tl.int32))
        last += tl.sum((end <= last_row).to(tl.int32))
    start = tl.maximum(tl.load(cu_seqlens + sequence), first_row - window)
    stop = tl.minimum(tl.load(cu_seqlens + last + 1), last_row + window + 1)
    owner = sequence + tl.zeros_like(rows)
    for number in tl.range(sequence, last):
        owner += (tl.load(cu_seqlens + 1 + number) <= rows).to(tl.int32)
    inside = rows < behind
    begin = tl.load(cu_seqlens + owner, mask=inside, other=0)
    end = tl.load(cu_seqlens + owner + 1, mask=inside, other=0)
    if key_lengths is not None:
        keys_end = begin + tl.load(key_lengths + owner, mask=inside, other=0)
        end = tl.where(rows < keys_end, end, 0) if OF_KEYS else keys_end
    return tl.maximum(begin, rows - window), tl.minimum(end, rows + window + 1), start, stop


@triton.jit
def _halves(x, rows, cos, sin, inside, stride, R: tl.constexpr, ROTATE: tl.constexpr):
    """Rows of q or k as their two halves, rotated in float32 and rounded once."""
    columns = tl.arange(0, R)[None, :]
    rows, inside = rows.to(tl.int64)[:, None], inside[:, None]
    a = tl.load(x + rows * stride + columns, mask=inside, other=0.0)
    b = tl.load(x + rows * stride + R + columns, mask=inside, other=0.0)
    if ROTATE:
        dtype: tl.constexpr = a.dtype
        c = tl.load(cos + rows * R + columns, mask=inside, other=0.0)
        s = tl.load(sin + rows * R + columns, mask=inside, other=0.0)
        a, b = a.to(tl.float32), b.to(tl.float32)
        a, b = (a * c - b * s).to(dtype), (b * c + a * s).to(dtype)
    return a, b


@triton.jit
def _store_rotated_back(x, a, b, rows, cos, sin, inside, stride, R: tl.constexpr):
    """The gradient of what `_halves` loads, from the gradient of what it gives."""
    columns = tl.arange(0, R)[None, :]
    rows, inside = rows.to(tl.int64)[:, None], inside[:, None]
    c = tl.load(cos + rows * R + columns, mask=inside, other=0.0)
    s = tl.load(sin + rows * R + columns, mask=inside, other=0.0)
    tl.store(x + rows * stride + columns, a * c + b * s, mask=inside)
    tl.store(x + rows * stride + R + columns, b * c - a * s, mask=inside)


@triton.jit
def _products(a1, a2, b1, b2, PRECISION: tl.constexpr):
    """Every row of `a` with every row of `b`, both in halves."""
    return tl.dot(a2, tl.trans(b2), tl.dot(a1, tl.trans(b1), input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def _between(columns, low, high):
    """Which columns lie in the interval of each row."""
    return (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])


@triton.jit(do_not_specialize=["T", "B", "window"])
def attention_forward_kernel(
    qkv,
    cu_seqlens,
    key_lengths,
    cos,
    sin,
    out,
    lse,
    T,
    B,
    window,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    OWN: tl.constexpr,
    VISIT: tl.constexpr,
    ROTATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    R: tl.constexpr = K // 2
    stride: tl.constexpr = 3 * H * K
    head = tl.program_id(1)
    first_row = tl.program_id(0) * OWN
    rows = first_row + tl.arange(0, OWN)
    inside = rows < T
    behind = tl.minimum(first_row + OWN, T)
    low, high, start, stop = _reach(rows, first_row, behind, cu_seqlens, key_lengths, B, window, False)
    q, k, v = qkv + head * K, qkv + (H + head) * K, qkv + (2 * H + head) * K
    q1, q2 = _halves(q, rows, cos, sin, inside, stride, R, ROTATE)
    columns = tl.arange(0, K)[None, :]
    largest = tl.full([OWN], -1e30, tl.float32)
    total = tl.zeros([OWN], tl.float32)
    result = tl.zeros([OWN, K], tl.float32)
    for at in tl.range(start, stop, VISIT):
        keys = at + tl.arange(0, VISIT)
        known = keys < stop
        k1, k2 = _halves(k, keys, cos, sin, known, stride, R, ROTATE)
        scores = _products(q1, q2, k1, k2, PRECISION)
        visible = _between(keys, low, high)
        scores = tl.where(visible, scores * scale, -1e30)
        larger = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen nothing yet has the maximum of what it does not see.
        weights = tl.where(visible, tl.exp2(scores - larger[:, None]), 0.0)
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v + keys.to(tl.int64)[:, None] * stride + columns, mask=known[:, None], other=0.0)
        result = tl.dot(weights.to(values.dtype), values, result * shrink[:, None], input_precision=PRECISION)
        largest = larger
    seen = total > 0
    result = result / tl.where(seen, total, 1.0)[:, None]
    tl.store(out + rows.to(tl.int64)[:, None] * (H * K) + head * K + columns, result, mask=inside[:, None])
    # Infinite where nothing is seen, so that the backward pass finds probabilities of zero.
    logarithm = tl.where(seen, largest + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
    tl.store(lse + head.to(tl.int64) * T + rows, logarithm, mask=inside)


@triton.jit(do_not_specialize=["T", "B", "window"])
def attention_dq_kernel(
    qkv,
    cu_seqlens,
    key_lengths,
    cos,
    sin,
    out,
    lse,
    dout,
    delta,
    dqkv,
    T,
    B,
    window,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    OWN: tl.constexpr,
    VISIT: tl.constexpr,
    ROTATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    R: tl.constexpr = K // 2
    stride: tl.constexpr = 3 * H * K
    head = tl.program_id(1)
    first_row = tl.program_id(0) * OWN
    rows = first_row + tl.arange(0, OWN)
    inside = rows < T
    behind = tl.minimum(first_row + OWN, T)
    low, high, start, stop = _reach(rows, first_row, behind, cu_seqlens, key_lengths, B, window, False)
    q, k, v = qkv + head * K, qkv + (H + head) * K, qkv + (2 * H + head) * K
    q1, q2 = _halves(q, rows, cos, sin, inside, stride, R, ROTATE)
    columns = tl.arange(0, K)[None, :]
    at_out = rows.to(tl.int64)[:, None] * (H * K) + head * K + columns
    grad = tl.load(dout + at_out, mask=inside[:, None], other=0.0)
    given = tl.load(out + at_out, mask=inside[:, None], other=0.0)
    mean = tl.sum(grad.to(tl.float32) * given.to(tl.float32), 1)
    tl.store(delta + head.to(tl.int64) * T + rows, mean, mask=inside)
    logarithm = tl.load(lse + head.to(tl.int64) * T + rows, mask=inside, other=float("inf"))
    dq1 = tl.zeros([OWN, R], tl.float32)
    dq2 = tl.zeros([OWN, R], tl.float32)
    for at in tl.range(start, stop, VISIT):
        keys = at + tl.arange(0, VISIT)
        known = keys < stop
        k1, k2 = _halves(k, keys, cos, sin, known, stride, R, ROTATE)
        scores = _products(q1, q2, k1, k2, PRECISION)
        visible = _between(keys, low, high)
        weights = tl.where(visible, tl.exp2(scores * scale - logarithm[:, None]), 0.0)
        values = tl.load(v + keys.to(tl.int64)[:, None] * stride + columns, mask=known[:, None], other=0.0)
        dweights = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
        dscores = (weights * (dweights - mean[:, None])).to(k1.dtype)
        dq1 = tl.dot(dscores, k1, dq1, input_precision=PRECISION)
        dq2 = tl.dot(dscores, k2, dq2, input_precision=PRECISION)
    scale = scale * LN_2
    _store_rotated_back(dqkv + head * K, dq1 * scale, dq2 * scale, rows, cos, sin, inside, stride, R)


@triton.jit(do_not_specialize=["T", "B", "window"])
def attention_dkv_kernel(
    qkv,
    cu_seqlens,
    key_lengths,
    cos,
    sin,
    lse,
    dout,
    delta,
    dqkv,
    T,
    B,
    window,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    OWN: tl.constexpr,
    VISIT: tl.constexpr,
    ROTATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    R: tl.constexpr = K // 2
    stride: tl.constexpr = 3 * H * K
    head = tl.program_id(1)
    first_row = tl.program_id(0) * OWN
    rows = first_row + tl.arange(0, OWN)
    inside = rows < T
    behind = tl.minimum(first_row + OWN, T)
    low, high, start, stop = _reach(rows, first_row, behind, cu_seqlens, key_lengths, B, window, True)
    q, k, v = qkv + head * K, qkv + (H + head) * K, qkv + (2 * H + head) * K
    k1, k2 = _halves(k, rows, cos, sin, inside, stride, R, ROTATE)
    columns = tl.arange(0, K)[None, :]
    values = tl.load(v + rows.to(tl.int64)[:, None] * stride + columns, mask=inside[:, None], other=0.0)
    dk1 = tl.zeros([OWN, R], tl.float32)
    dk2 = tl.zeros([OWN, R], tl.float32)
    dv = tl.zeros([OWN, K], tl.float32)
    for at in tl.range(start, stop, VISIT):
        queries = at + tl.arange(0, VISIT)
        known = queries < stop
        q1, q2 = _halves(q, queries, cos, sin, known, stride, R, ROTATE)
        scores = _products(k1, k2, q1, q2, PRECISION)
        logarithm = tl.load(lse + head.to(tl.int64) * T + queries, mask=known, other=float("inf"))
        visible = _between(queries, low, high)
        weights = tl.where(visible, tl.exp2(scores * scale - logarithm[None, :]), 0.0)
        at_out = queries.to(tl.int64)[:, None] * (H * K) + head * K + columns
        grad = tl.load(dout + at_out, mask=known[:, None], other=0.0)
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dweights = tl.dot(values, tl.trans(grad), input_precision=PRECISION)
        mean = tl.load(delta + head.to(tl.int64) * T + queries, mask=known, other=0.0)
        dscores = (weights * (dweights - mean[None, :])).to(q1.dtype)
        dk1 = tl.dot(dscores, q1, dk1, input_precision=PRECISION)
        dk2 = tl.dot(dscores, q2, dk2, input_precision=PRECISION)
    scale = scale * LN_2
    _store_rotated_back(dqkv + (H + head) * K, dk1 * scale, dk2 * scale, rows, cos, sin, inside, stride, R)
    dv_at = dqkv + (2 * H + head) * K + rows.to(tl.int64)[:, None] * stride + columns
    tl.store(dv_at, dv, mask=inside[:, None])
