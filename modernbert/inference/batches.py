"""Which texts share a forward pass: sorted by length, packed to a token budget, cut between sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..packing import Packed

CPU_TOKENS = 2048
"""Tokens of a micro-batch on a CPU: activations of one layer stay in the cache (measured by `benchmarks cpu`)."""

FEWEST_TOKENS = 256
"""A micro-batch of a CPU is not made smaller than this, so that its matrix products stay efficient."""

SHARES = 4
"""Micro-batches for each caller at least, so that none waits long for the last one."""

GPU_TOKENS = 65_536
"""Tokens of a batch on a GPU at most: enough rows to fill every GEMM of the small models."""


def plan(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Group texts of similar length: lists of indices, longest first, of at most `tokens` tokens each.

    A text longer than `tokens` is a batch of its own. Every index comes once.
    """
    batches: list[list[int]] = []
    filled = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or filled + lengths[index] > tokens:
            batches.append([])
            filled = 0
        batches[-1].append(index)
        filled += lengths[index]
    return batches


def micro_batches(batch: Packed, tokens: int) -> list[Packed]:
    """Cut a batch between sequences into parts of about `tokens` tokens, in order.

    A sequence longer than `tokens` is a part of its own.
    """
    if batch.num_tokens <= tokens:
        return [batch]
    cuts, filled = [0], 0
    for index, length in enumerate(batch.lengths):
        if filled and filled + length > tokens:
            cuts.append(index)
            filled = 0
        filled += length
    cuts.append(len(batch))
    return [batch.select(range(start, stop)) for start, stop in pairwise(cuts)]


def split_rows(rows_Q: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Increasing rows of a batch as rows of its parts, which have `sizes` tokens."""
    starts = list(accumulate(sizes, initial=0))
    cuts = torch.searchsorted(rows_Q, torch.tensor(starts, dtype=rows_Q.dtype, device=rows_Q.device)).tolist()
    return [rows_Q[first:last] - start for (first, last), start in zip(pairwise(cuts), starts[:-1], strict=True)]


def token_budget(device: torch.device, width: int, total: int, callers: int) -> int:
    """Tokens of one forward pass when `total` are to be encoded.

    On a CPU the callers share the work; on a GPU a batch is the most, up to `GPU_TOKENS`, whose products fill all
    processors evenly.
    """
    if device.type == "cpu":
        return min(CPU_TOKENS, max(FEWEST_TOKENS, total // (SHARES * callers))) if callers > 1 else CPU_TOKENS
    if device.type != "cuda":
        return GPU_TOKENS
    wave = full_wave(torch.cuda.get_device_properties(device).multi_processor_count, width)
    return max(1, GPU_TOKENS // wave) * wave


def full_wave(processors: int, width: int, tile: int = 128) -> int:
    """The fewest rows of a product `width` wide whose square tiles give every processor the same number."""
    across = -(-width // tile)
    return tile * processors // math.gcd(across, processors)
