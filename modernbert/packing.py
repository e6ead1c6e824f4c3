"""Ragged batches: every real token of the batch in one row, and the only place that knows about padding."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from numbers import Integral
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert_kernels.dispatch import recorded

from .late_interaction import Ragged
from .pytrees import pytree

Span = tuple[int, int] | None
"""Characters `start` to `stop` of a text; None for a token without text of its own."""


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
        return _select(self, indices, _rows_of(self.lengths, indices))

    def rows_of(self, indices: Sequence[int]) -> Tensor:
        """`[n]` int64, the rows of the sequences named by `indices`, one sequence after another."""
        return _rows_of(self.lengths, indices).to(self.input_ids.device)


@pytree("spans", "truncated")
@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenised queries or documents, which `ColBERT` turns into a `Ragged`.

    Attributes:
        batch: what the encoder sees, on any device.
        keep: `[T]` bool on the CPU, the rows that are scored.
        spans: per text and row, the characters of the caller's text, None for [CLS], prefix, [SEP], [MASK]; empty where
            they were not asked for.
        truncated: per text, the tokens of it that were cut off, as far as they were looked at; empty: none of any text.

    Raises:
        ValueError: `keep` is not a bool for each token of the batch, or not on the CPU.
    """

    batch: Packed
    keep: Tensor
    spans: Sequence[Sequence[Span]] = ()
    truncated: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        keep, wanted = self.keep, (self.batch.num_tokens,)
        if keep.dtype is not torch.bool or keep.shape != wanted or not keep.is_cpu:
            what = f"{keep.dtype} of shape {tuple(keep.shape)} on {keep.device}"
            raise ValueError(f"keep of Tokens must be bool {list(wanted)} on the CPU, got {what}")

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def rows(self) -> Tensor | None:
        """`[Q]` int64 on the device of the batch, the rows that are scored, as the model takes them; None: all."""
        if bool(self.keep.all()):
            return None
        return self.keep.nonzero().squeeze(1).to(self.batch.input_ids.device, non_blocking=True)

    @property
    def offsets(self) -> Tensor:
        """`[N + 1]` int64: the scored rows of text i are `offsets[i]` to `offsets[i + 1]` of all scored rows."""
        ends = list(accumulate(self.batch.lengths, initial=0))
        return F.pad(self.keep.cumsum(0), (1, 0))[torch.tensor(ends, device="cpu")]

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Tokens:
        """The same texts with their batch on `device`. What a loop over texts needs stays on the CPU."""
        return replace(self, batch=self.batch.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Tokens:
        """The same texts in memory from which a GPU copies while the CPU goes on; a `DataLoader` calls it too."""
        return replace(self, batch=self.batch.pin_memory())

    def select(self, indices: Sequence[int]) -> Tokens:
        """The texts named by `indices`, in that order."""
        rows = _rows_of(self.batch.lengths, indices)
        spans = [self.spans[i] for i in indices if self.spans]
        truncated = tuple(self.truncated[i] for i in indices if self.truncated)
        return Tokens(_select(self.batch, indices, rows), self.keep[rows], spans, truncated)

    def ragged(self, x_TE: Tensor) -> Ragged:
        """The scored rows of the model's output for all of `batch`. Differentiable."""
        return Ragged(x_TE[self.keep.to(x_TE.device)], self.offsets)


@pytree("truncated")
@dataclass(frozen=True, eq=False)
class Texts:
    """Tokenised texts of which each becomes one vector, in the place of the `Tokens` of late interaction.

    Attributes:
        batch: what the encoder sees, on any device.
        truncated: per text, the tokens of it that were cut off, as far as they were looked at.
    """

    batch: Packed
    truncated: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def rows(self) -> None:
        """None: the model chooses what it reads."""
        return None

    @property
    def offsets(self) -> Tensor:
        """`[B + 1]` int64: text i has the row i of the result."""
        return torch.arange(len(self) + 1, device="cpu")

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Texts:
        return replace(self, batch=self.batch.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Texts:
        return replace(self, batch=self.batch.pin_memory())

    def select(self, indices: Sequence[int]) -> Texts:
        """The texts named by `indices`, in that order."""
        return Texts(self.batch.select(indices), tuple(self.truncated[i] for i in indices if self.truncated))


Tokenized: TypeAlias = Tokens | Texts


def pack(
    sequences: Sequence[Sequence[int]] | Tensor,
    attention_mask: Tensor | None = None,
    *,
    query_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    vocab_size: int | None = None,
) -> Packed:
    """Drop the padding of a `[B, S]` batch, or join B lists of token ids, into one row of real tokens.

    Args:
        sequences: `[B, S]` integer tensor, or B sequences of token ids of any lengths (0 included), which give a batch
            on the CPU.
        attention_mask: `[B, S]`, 1 at real tokens and 0 in padding, which may be left, right, or on both sides. None:
            no padding.
        query_mask: `[B, S]`, 1 at query-only rows: they see the real tokens of their sequence, and no token sees them.
            They must follow the real tokens.
        position_ids: `[B, S]` integers, rotary positions. None: 0, 1, 2, ... from the first token of each sequence.
        vocab_size: if given, ids on the CPU must lie in `0 <= id < vocab_size`.

    Raises:
        ValueError: a mask with holes or with other numbers than 0 and 1 (such as an additive one), query-only rows in
            front of real tokens, shapes or devices that disagree, ids out of range.
        TypeError: ids or positions that are not integers, masks that are not tensors, a sequence that is not one.
    """
    if isinstance(sequences, Tensor):
        if recorded():
            return _pack_recorded(sequences, attention_mask, query_mask, position_ids)
        arguments = (sequences, attention_mask, query_mask, position_ids, vocab_size)
        if torch.compiler.is_compiling():
            return in_front_of_graph(_pack_padded, *arguments)
        return _pack_padded(*arguments)
    if attention_mask is not None or query_mask is not None or position_ids is not None:
        raise ValueError("masks and position_ids belong to a padded [B, S] tensor; lists of ids carry no padding")
    sequences = list_of_sequences("sequences", sequences)
    lengths = tuple(len(ids) for ids in sequences)
    input_ids = _joined_ids(sequences)
    _check_ids(input_ids, vocab_size, lengths)
    positions = [torch.arange(length, device="cpu") for length in lengths] or [input_ids]
    return Packed(
        input_ids=input_ids.long(),
        positions=positions[0] if len(positions) == 1 else torch.cat(positions),
        cu_seqlens=torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device="cpu"),
        lengths=lengths,
        max_seqlen=max(lengths, default=0),
    )


def unpack(values: Tensor, batch: Packed) -> Tensor:
    """Put packed rows `[T, ...]` back into a padded `[B, S, ...]` tensor, zero where there is no token.

    Rows return to their places if `batch` was packed from a padded tensor; a batch of lists comes back
    right-padded. Differentiable; keeps dtype and device.
    """
    if batch.recorded_rows is not None:
        padding = values.new_zeros(1, *values.shape[1:])
        return torch.cat([values, padding])[batch.recorded_rows]
    if values.shape[0] != batch.num_tokens:
        raise ValueError(f"values has {values.shape[0]} rows, the batch has {batch.num_tokens} tokens")
    rows, length = batch.padded_rows, batch.padded_length
    if rows is None or length is None:
        length = batch.max_seqlen
        lengths = torch.tensor(batch.lengths, dtype=torch.int64, device="cpu")
        sequence = torch.repeat_interleave(torch.arange(len(batch), device="cpu"), lengths)
        within = torch.arange(batch.num_tokens, device="cpu") - batch.cu_seqlens.cpu()[sequence]
        rows = (sequence * length + within).to(values.device)
    padded = values.new_zeros(len(batch), length, *values.shape[1:])
    return padded.index_put_((rows // length, rows % length), values)


def padded_ids(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """`[B, S]` token ids of a padded caller: those given, or zeros in the shape of the embeddings `[B, S, D]`."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass either input_ids or inputs_embeds")
    if isinstance(input_ids, Tensor):
        return input_ids
    if input_ids is not None:
        todo = ": a model takes its `batch`, and its `rows` by name" if isinstance(input_ids, Tokens) else ""
        raise TypeError(f"input_ids must be a [B, S] tensor, got one {type(input_ids).__name__}{todo}")
    assert inputs_embeds is not None
    return torch.zeros(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)


def list_of_sequences(name: str, sequences: Iterable[Sequence[int]]) -> list[Sequence[int]]:
    """The sequences of token ids as a list.

    Raises:
        TypeError: what would be read as something else, with its index: a number, text, bytes, a dict, a set.
    """
    if not isinstance(sequences, Iterable) or isinstance(sequences, (str, bytes, Mapping, Set)):
        todo = ": a model takes its `batch`, and its `rows` by name" if isinstance(sequences, Tokens) else ""
        raise TypeError(f"{name} must be a list of lists of token ids, got one {type(sequences).__name__}{todo}")
    sequences = list(sequences)
    for index, ids in enumerate(sequences):
        if isinstance(ids, (str, bytes, bytearray, Mapping, Set)) or not hasattr(ids, "__len__"):
            raise TypeError(f"{name}[{index}] must be a list of token ids, got {type(ids).__name__} {ids!r:.60}")
    return sequences


def _joined_ids(sequences: Sequence[Sequence[int]]) -> Tensor:
    """`[T]`, the ids of all sequences. Raises TypeError with the place of the first that is not an id."""
    flat = [token for ids in sequences for token in ids]
    try:
        joined = torch.tensor(flat, device="cpu") if flat else torch.zeros(0, dtype=torch.int64, device="cpu")
        if joined.dim() == 1 and _is_whole(joined) and bool not in set(map(type, flat)):
            return joined
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass  # one of them is not a number, or too large
    wanted = "token ids must be integers below 2**63"
    for index, ids in enumerate(sequences):
        for place, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, Integral) or not -(2**63) <= token < 2**63:
                raise TypeError(f"sequences[{index}][{place}] is {token!r:.60}, but {wanted}")
    raise TypeError(wanted)


def _rows_of(lengths: Sequence[int], indices: Sequence[int]) -> Tensor:
    """`Packed.rows_of`, on the CPU."""
    length_B = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    chosen = torch.tensor(list(indices), dtype=torch.int64, device="cpu")
    length = length_B[chosen]
    # Every row is counted from the end of the rows before it, and moved to where its sequence begins.
    shift = (length_B.cumsum(0) - length_B)[chosen] - (length.cumsum(0) - length)
    return torch.arange(int(length.sum()), device="cpu") + torch.repeat_interleave(shift, length)


def _select(batch: Packed, indices: Sequence[int], rows: Tensor) -> Packed:
    rows = rows.to(batch.input_ids.device)
    lengths = tuple(batch.lengths[i] for i in indices)
    cu_seqlens = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device="cpu")
    return Packed(
        input_ids=batch.input_ids[rows],
        positions=batch.positions[rows],
        cu_seqlens=cu_seqlens.to(batch.cu_seqlens.device),
        lengths=lengths,
        max_seqlen=max(lengths, default=0),
        key_lengths=None if batch.key_lengths is None else batch.key_lengths[list(indices)],
    )


def _pack_padded(
    ids_BS: Tensor,
    attention_mask: Tensor | None,
    query_mask: Tensor | None,
    position_ids: Tensor | None,
    vocab_size: int | None,
) -> Packed:
    check_padded(ids_BS, attention_mask, query_mask, position_ids)
    batch_size, padded_length = ids_BS.shape
    for name, mask in (("attention_mask", attention_mask), ("query_mask", query_mask)):
        if mask is not None:
            _check_mask(name, mask)
    keys_BS = torch.ones_like(ids_BS, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    real_BS = keys_BS if query_mask is None else keys_BS | (query_mask != 0)
    _check_runs(keys_BS, real_BS)

    length_B = real_BS.sum(1)
    lengths = tuple(length_B.tolist())
    rows_T = real_BS.flatten().nonzero().squeeze(1)
    input_ids = ids_BS.flatten()[rows_T]
    _check_ids(input_ids, vocab_size, lengths)
    cu_seqlens = F.pad(length_B.cumsum(0), (1, 0)).int()
    if position_ids is None:
        sequence_T = torch.repeat_interleave(torch.arange(batch_size, device=rows_T.device), length_B)
        positions = torch.arange(rows_T.shape[0], device=rows_T.device) - cu_seqlens[sequence_T]
    else:
        positions = position_ids.expand(batch_size, padded_length).flatten()[rows_T]
    return Packed(
        input_ids=input_ids.long(),
        positions=positions.long(),
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        max_seqlen=max(lengths, default=0),
        key_lengths=None if query_mask is None else keys_BS.sum(1).int(),
        padded_rows=rows_T,
        padded_length=padded_length,
    )


@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
def in_front_of_graph(run: Callable[..., Packed], *arguments: object, **options: object) -> Packed:
    """The batch that `run` makes, in front of the compiled graph: each look at the numbers in masks would end a graph.

    Sizes that every batch changes are open from the first one on.
    """
    batch = run(*arguments, **options)
    for tensor in (batch.input_ids, batch.positions, batch.padded_rows, batch.cu_seqlens, batch.key_lengths):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return batch


def _pack_recorded(
    ids_BS: Tensor, attention_mask: Tensor | None, query_mask: Tensor | None, position_ids: Tensor | None
) -> Packed:
    """`_pack_padded` where a program is recorded: no shape depends on a value.

    Each sequence has S rows: its keys, its query-only rows, and then its padding, which is query-only too. Ids and the
    numbers in masks are not checked.
    """
    check_padded(ids_BS, attention_mask, query_mask, position_ids)
    for name, mask in (("attention_mask", attention_mask), ("query_mask", query_mask)):
        if mask is not None and mask.is_floating_point():
            raise ValueError(f"{name} is {mask.dtype}: record with a mask of integers or of bool")
    batch_size, length = ids_BS.shape
    keys_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    keys_BS = keys_BS if attention_mask is None else (attention_mask != 0).expand_as(ids_BS)
    real_BS = keys_BS if query_mask is None else keys_BS | (query_mask != 0)

    # A stable partition by counting, as exporters know no stable sort. It keeps keys in front of query-only rows.
    count_BS = real_BS.long().cumsum(1)
    place_BS = torch.arange(length, device=ids_BS.device).expand_as(ids_BS)
    real_B1 = real_BS.sum(1, keepdim=True)
    rank_BS = torch.where(real_BS, count_BS - 1, real_B1 + place_BS - count_BS)
    order_BS = torch.zeros_like(rank_BS).scatter(1, rank_BS, place_BS)
    first_B1 = torch.arange(batch_size, device=ids_BS.device)[:, None] * length
    positions_BS = place_BS if position_ids is None else position_ids.expand_as(ids_BS).gather(1, order_BS)
    return Packed(
        input_ids=ids_BS.gather(1, order_BS).flatten().long(),
        positions=positions_BS.flatten().long(),
        cu_seqlens=torch.arange(batch_size + 1, device=ids_BS.device, dtype=torch.int32) * length,
        lengths=(),
        max_seqlen=length,
        key_lengths=keys_BS.sum(1).int(),
        padded_rows=(first_B1 + order_BS).flatten(),
        padded_length=length,
        recorded_rows=torch.where(real_BS, first_B1 + rank_BS, batch_size * length),
    )


def check_padded(
    ids_BS: Tensor, attention_mask: Tensor | None, query_mask: Tensor | None, position_ids: Tensor | None
) -> None:
    """Raise ValueError or TypeError for shapes, devices and dtypes that do not fit together; looks at no value."""
    if ids_BS.dim() != 2:
        raise ValueError(f"input_ids must be [batch, length], got shape {tuple(ids_BS.shape)}")
    length = ids_BS.shape[1]
    others = {"attention_mask": attention_mask, "query_mask": query_mask, "position_ids": position_ids}
    for name, tensor in others.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            continue  # a shape is a tensor there, and `expand_as` refuses what does not fit
        shapes = [ids_BS.shape, (length,), (1, length)] if name == "position_ids" else [ids_BS.shape]
        if tensor.shape not in shapes:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, input_ids {tuple(ids_BS.shape)}: they must be equal "
                "(prepared 3-D or 4-D masks are not supported)"
            )
        if tensor.device != ids_BS.device:
            raise ValueError(f"{name} is on {tensor.device}, input_ids on {ids_BS.device}: move one")
    if position_ids is not None and not _is_whole(position_ids):
        raise TypeError(f"position_ids must be integers, got {position_ids.dtype}")


def _check_mask(name: str, mask_BS: Tensor) -> None:
    """A mask holds 0 and 1. An additive one, with -inf in padding, would be read as its reverse."""
    wrong_BS = (mask_BS != 0) & (mask_BS != 1)
    if wrong_BS.any():
        row, column = wrong_BS.nonzero()[0].tolist()
        raise ValueError(f"{name} of sequence {row} has {mask_BS[row, column].item()}: pass 1 at tokens, 0 elsewhere")
    if mask_BS.is_floating_point() and mask_BS.numel() and not mask_BS.any():
        raise ValueError(f"{name} is {mask_BS.dtype} and 0 everywhere, as an additive mask: pass 1 at tokens")


def _check_runs(keys_BS: Tensor, real_BS: Tensor) -> None:
    """Each row of both masks must be one run of ones, and the runs must start together."""
    starts = [F.pad(mask_BS, (1, 0))[:, :-1] < mask_BS for mask_BS in (keys_BS, real_BS)]
    for name, starts_BS in zip(("attention_mask", "attention_mask | query_mask"), starts, strict=True):
        holed_B = starts_BS.sum(1) > 1
        if holed_B.any():
            raise ValueError(
                f"{name} of sequence {int(holed_B.nonzero()[0])} has holes: real tokens must be adjacent. Distances "
                "and rotary positions would be ambiguous; drop the masked tokens from input_ids instead"
            )
    wrong_B = (starts[0] & ~starts[1]).any(1)
    if wrong_B.any():
        raise ValueError(f"query_mask of sequence {int(wrong_B.nonzero()[0])} marks rows in front of the real tokens")


def _check_ids(ids: Tensor, vocab_size: int | None, lengths: Sequence[int]) -> None:
    if not _is_whole(ids):
        raise TypeError(f"token ids must be integers, got {ids.dtype}")
    if not ids.is_cpu or ids.numel() == 0:
        return
    low, high = map(int, torch.aminmax(ids.long()))  # not of every unsigned dtype
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        wrong = low if low < 0 else high
        limit = "" if vocab_size is None else f" (vocabulary size {vocab_size})"
        place, ends = int((ids == wrong).nonzero()[0]), list(accumulate(lengths, initial=0))
        index = bisect_right(ends, place) - 1
        raise ValueError(
            f"sequence {index}, token {place - ends[index]}: token id {wrong} is out of range{limit}: does the "
            "tokenizer belong to this checkpoint, or do added tokens need encoder.resize_token_embeddings(len)?"
        )


def _is_whole(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype is torch.bool)


def check_rows(rows: Tensor, num_tokens: int) -> None:
    """Rows of a batch that are asked for; those on a GPU are trusted, as a look at them would wait for it."""
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
