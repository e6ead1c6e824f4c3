"""Ragged batches: every real token of the batch in one row, and the only place that knows about padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate
from numbers import Integral
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert_kernels.dispatch import recorded

from .late_interaction import Ragged
from .masks import check_ids, check_mask, check_padded, check_runs, is_whole
from .packed import Packed as Packed
from .packed import rows_of
from .pytrees import pytree

Span = tuple[int, int] | None
"""Characters `start` to `stop` of a text; None for a token without text of its own."""


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
        spans = [self.spans[i] for i in indices if self.spans]
        truncated = tuple(self.truncated[i] for i in indices if self.truncated)
        return Tokens(self.batch.select(indices), self.keep[rows_of(self.batch.lengths, indices)], spans, truncated)

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
    check_ids(input_ids, vocab_size, lengths)
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
        if joined.dim() == 1 and is_whole(joined) and bool not in set(map(type, flat)):
            return joined
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass  # one of them is not a number, or too large
    wanted = "token ids must be integers below 2**63"
    for index, ids in enumerate(sequences):
        for place, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, Integral) or not -(2**63) <= token < 2**63:
                raise TypeError(f"sequences[{index}][{place}] is {token!r:.60}, but {wanted}")
    raise TypeError(wanted)


def _pack_padded(
    ids_BS: Tensor,
    attention_mask: Tensor | None,
    query_mask: Tensor | None,
    position_ids: Tensor | None,
    vocab_size: int | None,
) -> Packed:
    check_padded(ids_BS, attention_mask, query_mask, position_ids)
    batch_size, padded_length = ids_BS.shape
    if query_mask is None and has_no_padding(attention_mask):
        return _pack_full(ids_BS, position_ids, vocab_size)
    for name, mask in (("attention_mask", attention_mask), ("query_mask", query_mask)):
        if mask is not None:
            check_mask(name, mask)
    keys_BS = torch.ones_like(ids_BS, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    real_BS = keys_BS if query_mask is None else keys_BS | (query_mask != 0)
    check_runs(keys_BS, real_BS)

    length_B = real_BS.sum(1)
    lengths = tuple(length_B.tolist())
    rows_T = real_BS.flatten().nonzero().squeeze(1)
    input_ids = ids_BS.flatten()[rows_T]
    check_ids(input_ids, vocab_size, lengths)
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


def _pack_full(ids_BS: Tensor, position_ids: Tensor | None, vocab_size: int | None) -> Packed:
    """`_pack_padded` of a batch without padding, in a few operations: they are a tenth of the time of a short text."""
    batch_size, length = ids_BS.shape
    lengths, device = (length,) * batch_size, ids_BS.device
    check_ids(ids_BS.flatten(), vocab_size, lengths)
    positions = torch.arange(length, device=device) if position_ids is None else position_ids
    return Packed(
        input_ids=ids_BS.flatten().long(),
        positions=positions.expand(batch_size, length).flatten().long(),
        cu_seqlens=torch.arange(batch_size + 1, dtype=torch.int32, device=device) * length,
        lengths=lengths,
        max_seqlen=max(lengths, default=0),
        padded_rows=torch.arange(batch_size * length, device=device),
        padded_length=length,
    )


def has_no_padding(mask_BS: Tensor | None) -> bool:
    return mask_BS is None or bool((mask_BS == 1).all())


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
