"""Texts of several requests as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from ..packing import Packed, Texts, Tokenized, Tokens


def join(parts: Sequence[Tokenized]) -> Tokenized:
    """The texts of all parts, in order, without their spans. The parts are of one kind, and there is at least one."""
    if len(parts) == 1:
        return parts[0]
    batches = [part.batch for part in parts]
    lengths = tuple(chain.from_iterable(batch.lengths for batch in batches))
    batch = Packed(
        input_ids=torch.cat([batch.input_ids for batch in batches]),
        positions=torch.cat([batch.positions for batch in batches]),
        cu_seqlens=torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device="cpu"),
        lengths=lengths,
        max_seqlen=max(lengths),
        key_lengths=_key_lengths(batches),
    )
    keeps = [part.keep for part in parts if isinstance(part, Tokens)]
    return Tokens(batch, torch.cat(keeps)) if keeps else Texts(batch)


def _key_lengths(batches: Sequence[Packed]) -> Tensor | None:
    """Those of all batches. Only queries with expansion have some: in the other texts every token is a key."""
    if all(batch.key_lengths is None for batch in batches):
        return None
    found = [
        torch.tensor(batch.lengths, dtype=torch.int32, device="cpu") if batch.key_lengths is None else batch.key_lengths
        for batch in batches
    ]
    return torch.cat(found)
