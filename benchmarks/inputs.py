"""What is encoded: token ids with the lengths of the paper, and the padded batches that peers need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Ids = list[list[int]]
Batch = tuple[Tensor, Tensor | None, list[int]]  # ids [B, S], attention mask [B, S] or None, each row's place


def paper_lengths(count: int) -> list[int]:
    """The variable lengths of the ModernBERT paper: N(256, 64) clipped to [32, 512], seed 42."""
    return normal_lengths(count, mean=256, low=32, high=512)


def normal_lengths(count: int, *, mean: float, low: int, high: int) -> list[int]:
    generator = torch.Generator().manual_seed(42)
    return (torch.randn(count, generator=generator) * 64 + mean).round().clamp(low, high).int().tolist()


def random_ids(lengths: Sequence[int]) -> Ids:
    """Token ids uniform in [100, 16000), as in the paper."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(100, 16_000, (length,), generator=generator).tolist() for length in lengths]


def batched(sequences: Ids, size: int, *, by_length: bool = False) -> list[Batch]:
    """Right-padded batches of `size` sequences; those in which nothing is padded have no mask."""
    places = list(range(len(sequences)))
    if by_length:
        places.sort(key=lambda place: len(sequences[place]))
    batches: list[Batch] = []
    for start in range(0, len(places), size):
        rows = places[start : start + size]
        ids = torch.zeros(len(rows), max(len(sequences[row]) for row in rows), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(rows):
            ids[at, : len(sequences[row])] = torch.tensor(sequences[row])
            mask[at, : len(sequences[row])] = 1
        batches.append((ids, None if bool(mask.all()) else mask, rows))
    return batches


def real_rows(outputs: Sequence[Tensor], batches: Sequence[Batch]) -> Tensor:
    """The rows `[T, D]` of real tokens in padded `[B, S, D]` outputs, in the order of the sequences."""
    pieces: dict[int, Tensor] = {}
    for output, (ids, mask, rows) in zip(outputs, batches, strict=True):
        lengths = [ids.shape[1]] * len(rows) if mask is None else mask.sum(1).tolist()
        for at, row in enumerate(rows):
            pieces[row] = output[at, : lengths[at]]
    return torch.cat([pieces[row] for row in sorted(pieces)])
