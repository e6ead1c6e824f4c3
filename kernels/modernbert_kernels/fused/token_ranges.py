"""Where the sequence of each token begins and ends: read by every program of attention, and written once a pass."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..launch import contiguous, on_gpu, operator
from ..reference import token_ranges
from .jit import jit

TOKENS = 256
"""Tokens of a program of 4 warps, 2 for each thread."""


@jit(do_not_specialize=["T", "B", "steps"])
def token_ranges_kernel(cu_seqlens, key_lengths, ranges, T, B, steps, TOKENS: tl.constexpr):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    # The number of sequences that end before each token, by bisection.
    segment = tl.zeros_like(tokens)
    high = segment + B
    for _ in tl.range(0, steps):
        middle = (segment + high) // 2
        is_before = tl.load(cu_seqlens + 1 + middle, mask=middle < B, other=T) <= tokens
        segment = tl.where(is_before, middle + 1, segment)
        high = tl.where(is_before, high, middle)
    # Whatever the offsets are, no range reaches out of the batch.
    total = tl.minimum(tl.maximum(tl.load(cu_seqlens + B).to(tl.int32), 0), T)
    has_segment = (tokens < T) & (segment < B)
    begin = tl.load(cu_seqlens + segment, mask=has_segment, other=0).to(tl.int32)
    end = tl.load(cu_seqlens + segment + 1, mask=has_segment, other=0).to(tl.int32)
    begin = tl.where(has_segment, tl.minimum(tl.maximum(begin, 0), total), total)
    end = tl.where(has_segment, tl.minimum(tl.maximum(end, begin), total), total)
    key_end = end
    if key_lengths is not None:
        keys = tl.load(key_lengths + segment, mask=has_segment, other=0).to(tl.int32)
        key_end = tl.minimum(begin + tl.maximum(keys, 0), end)
    tl.store(ranges + tokens, begin, mask=tokens < T)
    tl.store(ranges + T + tokens, end, mask=tokens < T)
    tl.store(ranges + 2 * T + tokens, key_end, mask=tokens < T)


def _empty(cu_seqlens: Tensor, key_lengths: Tensor | None, num_tokens: int) -> Tensor:
    return cu_seqlens.new_empty(3, num_tokens, dtype=torch.int32)


@operator("token_ranges(Tensor cu_seqlens, Tensor? key_lengths, SymInt num_tokens) -> Tensor", fake=_empty)
def token_ranges_forward(cu_seqlens: Tensor, key_lengths: Tensor | None, num_tokens: int) -> Tensor:
    ranges_3T, B = _empty(cu_seqlens, key_lengths, num_tokens), len(cu_seqlens) - 1
    if num_tokens:
        grid, steps = (-(-num_tokens // TOKENS),), B.bit_length()
        token_ranges_kernel[grid](cu_seqlens, key_lengths, ranges_3T, num_tokens, B, steps, TOKENS, num_warps=4)
    return ranges_3T


@token_ranges.register("triton", when=lambda cu_seqlens, key_lengths, num_tokens: on_gpu(cu_seqlens))
def token_ranges_triton(cu_seqlens: Tensor, key_lengths: Tensor | None, num_tokens: int) -> Tensor:
    """`token_ranges` in one kernel; same arguments and result, and ranges within the batch for any offsets."""
    return token_ranges_forward(cu_seqlens.contiguous(), contiguous(key_lengths), num_tokens)
