"""A ragged batch: every real token in one row. And the checks of one that was not made by `pack`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from modernbert_kernels.dispatch import recorded

from .pytrees import pytree


@pytree("lengths", "max_seqlen", "padded_length")
@dataclass(frozen=True, eq=False)
class Packed:
    """The tokens of B sequences, one after another in one row of T, with no padding.

    `pack` and `Tokenizer` build and validate it; the encoder checks that its parts fit together. Split a result
    `x` `[T, ...]` into one tensor per sequence with `x.split(batch.lengths)`.

    Attributes:
        input_ids: `[T]` int64.
        positions: `[T]` int64 rotary positions; they restart at 0 in every sequence.
        cu_seqlens: `[B + 1]` int32, cumulative lengths from 0 to T.
        lengths: B lengths in tokens, on the host; empty where only the device knows them (`torch.export`, CUDA graphs).
        max_seqlen: the longest length, on the host.
        key_lengths: `[B]` int32 or None. Only the first `key_lengths[i]` rows of sequence i are visible as keys; the
            rest are query-only rows (ColBERT's unattended expansion tokens). None: every row is a key.
        padded_rows: `[T]` int64 or None. The place of each token in the flattened `[B * S]` input of `pack`.
        padded_length: S of that input.
        recorded_rows: `[B, S]` int64 or None, of a program that is recorded (`torch.export`, `torch.jit.trace`), which
            keeps padding: the row of each place of that input, and T for a place in padding.
    """

    input_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    max_seqlen: int
    key_lengths: Tensor | None = None
    padded_rows: Tensor | None = None
    padded_length: int | None = None
    recorded_rows: Tensor | None = None

    def __len__(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str | int | None, *, non_blocking: bool = False) -> Packed:
        """The same batch with its tensors on `device`; None: where they are."""
        if device is None:
            return self
        device = torch.device(device)  # not a dtype, which would turn ids into floats
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Packed:
        """The same batch in memory from which a GPU copies while the CPU goes on; a `DataLoader` calls it too."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Packed:
        changed = {name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def select(self, indices: Sequence[int]) -> Packed:
        """The sequences named by `indices`, in that order, as a batch of their own."""
        rows, lengths = self.rows_of(indices), tuple(self.lengths[i] for i in indices)
        cu_seqlens = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device="cpu")
        return Packed(
            input_ids=self.input_ids[rows],
            positions=self.positions[rows],
            cu_seqlens=cu_seqlens.to(self.cu_seqlens.device),
            lengths=lengths,
            max_seqlen=max(lengths, default=0),
            key_lengths=None if self.key_lengths is None else self.key_lengths[list(indices)],
        )

    def rows_of(self, indices: Sequence[int]) -> Tensor:
        """`[n]` int64, the rows of the sequences named by `indices`, one sequence after another."""
        return rows_of(self.lengths, indices).to(self.input_ids.device)


def rows_of(lengths: Sequence[int], indices: Sequence[int]) -> Tensor:
    """`Packed.rows_of` on the CPU, of sequences with these lengths. An index may come several times."""
    length_B = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    chosen = torch.tensor(list(indices), dtype=torch.int64, device="cpu")
    length = length_B[chosen]
    # Every row is counted from the end of the rows before it, and moved to where its sequence begins.
    shift = (length_B.cumsum(0) - length_B)[chosen] - (length.cumsum(0) - length)
    return torch.arange(int(length.sum()), device="cpu") + torch.repeat_interleave(shift, length)


def check_rows(rows: Tensor, num_tokens: int) -> None:
    """Rows of a batch that are asked for; those on a GPU are trusted, as a look at them would wait for it."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"rows must be a tensor, got one {type(rows).__name__}")
    if rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows must be a vector of int32 or int64, got {rows.dtype} of shape {tuple(rows.shape)}")
    if not rows.is_cpu or rows.numel() == 0 or torch.compiler.is_compiling() or recorded():
        return
    if bool((rows.diff() <= 0).any()) or int(rows[0]) < 0 or int(rows[-1]) >= num_tokens:
        raise ValueError(f"rows must be increasing, from 0 to less than the {num_tokens} tokens of the batch")


def check_packed(batch: Packed) -> None:
    """Raise ValueError for a batch whose parts do not fit together: a kernel would read what belongs to no sequence.

    Numbers on a GPU are trusted, as a look at them would wait for it.
    """
    if torch.compiler.is_compiling() or recorded():
        return
    ends_B1 = batch.cu_seqlens
    if ends_B1.dim() != 1 or ends_B1.dtype not in (torch.int32, torch.int64) or not ends_B1.numel():
        shape = tuple(ends_B1.shape)
        raise ValueError(f"cu_seqlens of a Packed must be a vector of int32, got {ends_B1.dtype} of shape {shape}")
    tokens, count, lengths = batch.num_tokens, len(batch), tuple(batch.lengths)
    keys = batch.key_lengths
    if batch.input_ids.dim() != 1 or batch.positions.shape != batch.input_ids.shape:
        shapes = tuple(batch.input_ids.shape), tuple(batch.positions.shape)
        raise ValueError(f"input_ids and positions of a Packed must be [T], got shapes {shapes[0]} and {shapes[1]}")
    if keys is not None and keys.shape != (count,):
        raise ValueError(f"key_lengths of a Packed has shape {tuple(keys.shape)}, but there are {count} sequences")
    if batch.cu_seqlens.is_cpu:
        ends = batch.cu_seqlens.tolist()
        if ends[:1] != [0] or ends[-1] != tokens or ends != sorted(ends):
            raise ValueError(f"cu_seqlens of a Packed must rise from 0 to its {tokens} tokens, got {_shown(ends)}")
        found = tuple(end - start for start, end in pairwise(ends))
        if lengths not in ((), found):
            raise ValueError(f"lengths of a Packed are {_shown(lengths)}, but those of cu_seqlens {_shown(found)}")
        lengths = found
    if lengths and (len(lengths) != count or sum(lengths) != tokens or max(lengths) > batch.max_seqlen):
        raise ValueError(
            f"lengths of a Packed must be {count} numbers up to max_seqlen, which is {batch.max_seqlen}, in sum its "
            f"{tokens} tokens, got {_shown(lengths)}"
        )
    if keys is not None and keys.is_cpu and batch.cu_seqlens.is_cpu:
        for index, (key_length, length) in enumerate(zip(keys.tolist(), lengths, strict=True)):
            if not 0 <= key_length <= length:
                raise ValueError(
                    f"key_lengths[{index}] of a Packed is {key_length}, but the sequence has {length} tokens"
                )


def _shown(numbers: Sequence[int]) -> str:
    return str(list(numbers)) if len(numbers) < 10 else f"[{', '.join(map(str, numbers[:8]))}, ..., {numbers[-1]}]"
