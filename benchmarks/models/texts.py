"""What is encoded: lengths of the ModernBERT paper, and token ids that every process draws for itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import inputs

DOCUMENTS = 8192
"""Of each set of the paper."""


def variable(count: int, *, mean: int, spread: int, longest: int) -> tuple[int, ...]:
    """The first lengths of a set of the ModernBERT paper: normal, clipped to [32, longest], seed 42."""
    generator = torch.Generator().manual_seed(42)
    drawn = torch.randn(max(count, DOCUMENTS), generator=generator)[:count] * spread + mean
    return tuple(drawn.round().clamp(32, longest).int().tolist())


LENGTHS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "fixed 512": lambda count: (512,) * count,
    "variable short": lambda count: variable(count, mean=256, spread=64, longest=512),
    "fixed 8192": lambda count: (8192,) * count,
    "variable long": lambda count: variable(count, mean=4096, spread=1024, longest=8192),
}
"""The four sets of the paper: how many documents, to their lengths."""

EIGHTH = 8
"""In a try-out on a CPU, long texts have this part of their length."""

WORDS = {
    "fixed 512": "512 tokens each",
    "variable short": "N(256, 64) tokens, clipped to [32, 512]",
    "fixed 8192": "8192 tokens each",
    "variable long": "N(4096, 1024) tokens, clipped to [32, 8192]",
}


def ids(place: int, length: int) -> Tensor:
    """Token ids of the text at `place`, uniform in [100, 16000) as in the paper: `[length]` int64."""
    return torch.randint(100, 16_000, (length,), generator=torch.Generator().manual_seed(place))


def cotangent(place: int, length: int, width: int) -> Tensor:
    """The gradient that flows back into the hidden states of the text at `place`: `[length, width]` float32."""
    drawn = torch.randn(length, width, generator=torch.Generator().manual_seed(place))
    # Rounded so that every dtype sees the same.
    return drawn.bfloat16().float()


def padded(lengths: Sequence[int], places: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Ids and attention mask `[B, S]` of these texts, right-padded; no mask where nothing is padded."""
    return inputs.padded([ids(place, lengths[place]) for place in places])


def in_set(name: str, count: int, *, short: bool = False) -> tuple[int, ...]:
    """Lengths of the first `count` documents of a set; `short` cuts those of long sets to an eighth."""
    lengths = LENGTHS[name](count)
    return tuple(max(1, length // EIGHTH) for length in lengths) if short and is_long(name) else lengths


def is_long(name: str) -> bool:
    return max(LENGTHS[name](1)) > 512


def words(name: str, *, short: bool = False) -> str:
    """A set in words."""
    return f"an eighth of {WORDS[name]}" if short and is_long(name) else WORDS[name]
