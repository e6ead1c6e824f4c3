"""What is encoded: token ids with the lengths of the paper, and the padded batches that peers need."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

ASSETS = Path(__file__).parents[1] / "modernbert" / "assets"

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


def groups(lengths: Sequence[int], size: int, *, by_length: bool = False) -> list[list[int]]:
    """Places in batches of `size`, as they come or length-sorted."""
    places = list(range(len(lengths)))
    if by_length:
        places.sort(key=lambda place: lengths[place])
    return [places[start : start + size] for start in range(0, len(places), size)]


def padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Ids and attention mask `[B, S]` of a right-padded batch; no mask where nothing is padded."""
    ids_BS = nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    mask_BS = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in texts], batch_first=True)
    return ids_BS, None if bool(mask_BS.all()) else mask_BS


def batched(sequences: Ids, size: int, *, by_length: bool = False) -> list[Batch]:
    """Right-padded batches of `size` sequences; those in which nothing is padded have no mask."""
    batches = groups(list(map(len, sequences)), size, by_length=by_length)
    return [(*padded([torch.tensor(sequences[row]) for row in rows]), rows) for rows in batches]


def real_rows(outputs: Sequence[Tensor], batches: Sequence[Batch]) -> Tensor:
    """The rows `[T, D]` of real tokens in padded `[B, S, D]` outputs, in the order of the sequences."""
    pieces: dict[int, Tensor] = {}
    for output, (ids, mask, rows) in zip(outputs, batches, strict=True):
        lengths = [ids.shape[1]] * len(rows) if mask is None else mask.sum(1).tolist()
        for at, row in enumerate(rows):
            pieces[row] = output[at, : lengths[at]]
    return torch.cat([pieces[row] for row in sorted(pieces)])


def demo_passages(count: int) -> list[str]:
    """The first paragraphs of the demo corpus, again from the start where it has no more; blanks are stripped."""
    with gzip.open(ASSETS / "demo" / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        known = [json.loads(line)["text"].strip() for line in lines]
    return [known[at % len(known)] for at in range(count)]
