"""Masked-language modelling: which tokens of a batch are hidden, and what the model reads in their place."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..packing import Packed
from ..tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Masked:
    """A batch in which some tokens are hidden.

    Attributes:
        batch: what the model reads.
        rows_Q: int64, increasing: the rows of `batch` that are predicted, for `model(batch, rows=rows_Q)`.
        labels_Q: int64, the ids that were there.
    """

    batch: Packed
    rows_Q: Tensor
    labels_Q: Tensor

    def to(self, device: torch.device | str | int | None, *, non_blocking: bool = False) -> Masked:
        """The same batch with its tensors on `device`; None: where they are."""
        if device is None:
            return self
        rows, labels = (x.to(device, non_blocking=non_blocking) for x in (self.rows_Q, self.labels_Q))
        return Masked(self.batch.to(device, non_blocking=non_blocking), rows, labels)

    def pin_memory(self) -> Masked:
        """The same batch in memory from which a GPU copies while the CPU goes on; a `DataLoader` calls it too."""
        return Masked(self.batch.pin_memory(), self.rows_Q.pin_memory(), self.labels_Q.pin_memory())


@dataclass(frozen=True)
class Masking:
    """A rule for hiding tokens. Of those that are chosen, 80 % become [MASK], 10 % a random token, 10 % stay.

    `as_trained` is how ModernBERT was trained, `hugging_face` how transformers' `DataCollatorForLanguageModeling`
    does it.

    Attributes:
        share: the probability of each token to be chosen: 0.3 in ModernBERT's training, 0.15 in its evaluation.
        mask_token_id: the id of [MASK].
        protected: ids that are never chosen.
        vocab_size: random tokens are drawn from all ids below it; None: from 0 to the largest id of the batch after
            [MASK] was put in, as ModernBERT's trainer does.
    """

    share: float
    mask_token_id: int
    protected: tuple[int, ...] = ()
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}, but must be above 0 and at most 1")

    @classmethod
    def as_trained(cls, share: float, tokenizer: Tokenizer) -> Masking:
        """Special tokens are chosen as any other."""
        return cls(share, _mask_token(tokenizer))

    @classmethod
    def hugging_face(cls, share: float, tokenizer: Tokenizer) -> Masking:
        """Special tokens are never chosen, and random tokens are drawn from the whole vocabulary."""
        t = tokenizer
        special = (t.cls_token_id, t.sep_token_id, t.pad_token_id, t.mask_token_id, t.unk_token_id)
        protected = tuple(sorted({token for token in special if token is not None}))
        return cls(share, _mask_token(t), protected, t.vocab_size)

    def __call__(self, batch: Packed, seed: int | tuple[int, ...]) -> Masked:
        """Hide tokens of a batch on the CPU: the same ones for the same batch and seed.

        At least one token is chosen, so that a mean over them exists; if all are protected, none is.
        """
        rng, ids = np.random.default_rng(seed), batch.input_ids.numpy()
        draw = rng.random(len(ids))
        if self.protected:
            draw[np.isin(ids, self.protected)] = 1
        rows = np.flatnonzero(draw < self.share)
        if not len(rows) and draw.min(initial=1) < 1:
            rows = np.array([draw.argmin()])
        fate = rng.random(len(rows))
        read = ids.copy()
        read[rows[fate < 0.8]] = self.mask_token_id
        changed = rows[(fate >= 0.8) & (fate < 0.9)]
        largest = read.max(initial=0) + 1 if self.vocab_size is None else self.vocab_size
        read[changed] = rng.integers(0, largest, len(changed))
        return Masked(
            replace(batch, input_ids=torch.from_numpy(read)), torch.from_numpy(rows), torch.from_numpy(ids[rows])
        )


def _mask_token(tokenizer: Tokenizer) -> int:
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token, which masked-language modelling needs")
    return tokenizer.mask_token_id
