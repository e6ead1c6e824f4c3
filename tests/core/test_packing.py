"""pack, unpack, Packed and Ragged: what goes in comes out, padding never does, wrong input is named."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modernbert.late_interaction import Ragged
from modernbert.packing import Packed, pack, unpack

LENGTHS = [3, 1, 0, 5, 2]


def lists(lengths: list[int] = LENGTHS) -> list[list[int]]:
    return [[100 * i + j for j in range(n)] for i, n in enumerate(lengths)]


def padded(side: str, length: int = 6) -> tuple[Tensor, Tensor]:
    """The same sequences in a `[B, S]` tensor with 7777 as padding, and their attention mask."""
    ids, mask = torch.full((len(LENGTHS), length), 7777), torch.zeros(len(LENGTHS), length, dtype=torch.int64)
    for row, sequence in enumerate(lists()):
        start = {"left": length - len(sequence), "right": 0, "both": (length - len(sequence)) // 2}[side]
        ids[row, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, start : start + len(sequence)] = 1
    return ids, mask


def assert_holds(batch: Packed, sequences: list[list[int]]) -> None:
    lengths = [len(ids) for ids in sequences]
    assert [x.tolist() for x in batch.input_ids.split(batch.lengths)] == sequences
    assert [x.tolist() for x in batch.positions.split(batch.lengths)] == [list(range(n)) for n in lengths]
    assert batch.cu_seqlens.tolist() == list(accumulate(lengths, initial=0))
    assert (batch.lengths, batch.max_seqlen) == (tuple(lengths), max(lengths, default=0))
    assert (len(batch), batch.num_tokens) == (len(lengths), sum(lengths))
    assert batch.input_ids.dtype == batch.positions.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("lengths", [LENGTHS, [], [0], [0, 0], [1], [7]])
def test_pack_lists(lengths: list[int]) -> None:
    batch = pack(lists(lengths))
    assert_holds(batch, lists(lengths))
    assert batch.key_lengths is None


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_padding_is_dropped(side: str, dtype: torch.dtype) -> None:
    """Padding ids are never read: 7777 is beyond the vocabulary that is checked."""
    ids, mask = padded(side)
    assert_holds(pack(ids, mask.to(dtype), vocab_size=500), lists())
    assert_holds(pack(ids.int(), mask.to(dtype), vocab_size=500), lists())


def test_without_a_mask_every_token_is_real() -> None:
    assert_holds(pack(torch.tensor([[1, 2, 3], [4, 5, 6]])), [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (2, 0)])
def test_empty_tensors(shape: tuple[int, int]) -> None:
    """`[2, 0]`, a batch of two empty sequences, crashed in `argmax`."""
    for mask in (None, torch.ones(shape)):
        batch = pack(torch.zeros(shape, dtype=torch.int64), mask)
        assert_holds(batch, [[] for _ in range(shape[0])])
        assert unpack(torch.zeros(0, 4), batch).shape == (*shape, 4)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("trailing", [(), (4,), (2, 3)])
def test_unpack_puts_rows_back(side: str, trailing: tuple[int, ...]) -> None:
    ids, mask = padded(side)
    batch = pack(ids, mask)
    values = torch.randn(batch.num_tokens, *trailing, dtype=torch.float64, requires_grad=True)
    restored = unpack(values, batch)
    assert restored.shape == (*ids.shape, *trailing)
    assert restored.dtype == values.dtype
    assert torch.equal(restored[mask.bool()], values)
    assert restored[~mask.bool()].eq(0).all()
    weight = torch.randn_like(restored)
    (restored * weight).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, weight[mask.bool()])
    assert torch.equal(unpack(batch.input_ids, batch), ids * mask)


def test_unpack_of_lists_pads_right() -> None:
    batch = pack(lists())
    ids, mask = padded("right", max(LENGTHS))
    assert torch.equal(unpack(batch.input_ids, batch), ids * mask)
    assert unpack(torch.zeros(0, 4), pack([])).shape == (0, 0, 4)
    assert unpack(torch.zeros(0, 4), pack([[], []])).shape == (2, 0, 4)


def test_unpack_refuses_rows_of_another_batch() -> None:
    with pytest.raises(ValueError, match="10 rows, the batch has 11 tokens"):
        unpack(torch.zeros(10, 4), pack(lists()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_position_ids(side: str) -> None:
    ids, mask = padded(side)
    positions = torch.arange(ids.numel()).view_as(ids)
    assert torch.equal(pack(ids, mask, position_ids=positions).positions, positions[mask.bool()])
    shared = torch.arange(6) + 40
    for given in (shared, shared[None]):
        got = pack(ids, mask, position_ids=given).positions
        assert torch.equal(got, shared.expand_as(ids)[mask.bool()])


def test_query_rows_follow_the_keys() -> None:
    """The rows stay in one sequence, with running positions; `key_lengths` says how many of them are keys."""
    ids = torch.arange(1, 13).view(3, 4)
    keys = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    queries = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 1, 0]])
    batch = pack(ids, keys, query_mask=queries)
    assert_holds(batch, [[1, 2, 3, 4], [6, 7, 8], [10, 11]])
    assert batch.key_lengths is not None
    assert batch.key_lengths.tolist() == [2, 2, 0]
    assert batch.key_lengths.dtype == torch.int32
    assert torch.equal(unpack(batch.input_ids, batch), ids * (keys | queries))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[1, 1, 1, 1], [1, 0, 1, 1]], "attention_mask of sequence 1 has holes"),
        ([[1, 0, 0, 1], [1, 1, 1, 1]], "attention_mask of sequence 0 has holes"),
        ([[1, 1, 1], [1, 1, 1]], r"attention_mask has shape \(2, 3\), input_ids \(2, 4\)"),
        ([[[1, 1, 1, 1]], [[1, 1, 1, 1]]], "prepared 3-D or 4-D masks are not supported"),
    ],
)
def test_wrong_masks_are_refused(mask: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack(torch.ones(2, 4, dtype=torch.int64), torch.tensor(mask))


@pytest.mark.parametrize(
    ("keys", "queries", "words"),
    [
        ([1, 1, 0, 0], [0, 0, 0, 1], r"attention_mask \| query_mask of sequence 0 has holes"),
        ([0, 0, 1, 1], [1, 1, 0, 0], "query_mask of sequence 0 marks rows in front of the real tokens"),
        ([1, 0, 1, 1], [0, 1, 0, 0], "attention_mask of sequence 0 has holes"),
    ],
)
def test_wrong_query_masks_are_refused(keys: list[int], queries: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack(torch.ones(1, 4, dtype=torch.int64), torch.tensor([keys]), query_mask=torch.tensor([queries]))


@pytest.mark.parametrize(
    ("sequences", "limit", "words"),
    [
        ([[1, 2], [50]], 50, r"token id 50 is out of range \(vocabulary size 50\)"),
        ([[1, -2], [3]], 50, "token id -2 is out of range"),
        ([[1, -2], [3]], None, "token id -2 is out of range:"),
    ],
)
def test_ids_out_of_range_are_named(sequences: list[list[int]], limit: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack(sequences, vocab_size=limit)
    with pytest.raises(ValueError, match=words):
        pack(torch.tensor([[x for ids in sequences for x in ids]]), vocab_size=limit)


@pytest.mark.parametrize(
    "sequences", [*[[[token]] for token in (1.0, "1", None, 2**63, True)], [[1, 2.5]], torch.ones(1, 2)]
)
def test_ids_that_are_no_integers_are_refused(sequences: list | Tensor) -> None:
    with pytest.raises(TypeError, match="token ids must be integers"):
        pack(sequences)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\[batch, length\], got shape \(3,\)"):
        pack(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"position_ids has shape \(2, 3\), input_ids \(2, 4\)"):
        pack(torch.ones(2, 4, dtype=torch.int64), position_ids=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="carry no padding"):
        pack([[1, 2]], torch.ones(1, 2))


@pytest.mark.parametrize(
    ("sequences", "words"),
    [
        ([1, 2], r"sequences\[0\] must be a list of token ids, got int"),
        ([[1], None], r"sequences\[1\] must be a list of token ids, got NoneType"),
        ([[1], "ab"], r"sequences\[1\] must be a list of token ids, got str"),
        ([b"ab"], r"sequences\[0\] must be a list of token ids, got bytes"),
        ([{1, 2}], r"sequences\[0\] must be a list of token ids, got set"),
        ([iter([1])], r"sequences\[0\] must be a list of token ids, got list_iterator"),
        ({"input_ids": [[1]]}, "got one dict"),
        ("ab", "got one str"),
        (7, "got one int"),
        ([[[1, 2], [3, 4]]], "must be integers"),
        ([[[1], [3, 4]]], "must be integers"),
        ([[True, 2]], "must be integers"),
        ([np.array([1.5])], "must be integers"),
        ([np.array([True])], "must be integers"),
    ],
)
def test_sequences_are_lists_of_ids(sequences: Any, words: str) -> None:
    """A nested list made a two-dimensional batch, bytes and truth values were read as ids."""
    with pytest.raises(TypeError, match=words):
        pack(sequences)


def test_other_sequences_of_ids() -> None:
    for sequences in (
        ((1, 2), (3,)),
        iter([[1, 2], [3]]),
        [np.array([1, 2]), range(3, 4)],
        [torch.tensor([1, 2]), [3]],
    ):
        assert_holds_ids(pack(sequences), [[1, 2], [3]])  # pyright: ignore
    for dtype in (torch.uint8, torch.uint16, torch.int32, torch.int64):
        assert_holds_ids(pack(torch.tensor([[1, 2], [3, 4]], dtype=dtype), vocab_size=5), [[1, 2], [3, 4]])


def assert_holds_ids(batch: Packed, sequences: list[list[int]]) -> None:
    assert batch.input_ids.dtype is torch.int64
    assert [x.tolist() for x in batch.input_ids.split(batch.lengths)] == sequences


@pytest.mark.parametrize("name", ["attention_mask", "query_mask"])
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.tensor([[0.0, 0.0, float("-inf")], [0.0, 0.0, 0.0]]), "of sequence 0 has -inf: pass 1 at tokens"),
        (torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -3e38]]), "of sequence 1 has -"),
        (torch.zeros(2, 3), "0 everywhere, as an additive mask"),
        (torch.tensor([[1, 1, 0], [1, 2, 2]]), "of sequence 1 has 2"),
        (torch.tensor([[1, -1, 0], [1, 1, 1]]), "of sequence 0 has -1"),
        (torch.full((2, 3), float("nan")), "of sequence 0 has nan"),
        (torch.tensor([[0.5, 0.0, 0.0], [1.0, 1.0, 1.0]]), "of sequence 0 has 0.5"),
    ],
)
def test_masks_hold_zeros_and_ones(name: str, mask: Tensor, words: str) -> None:
    """An additive mask was read as its reverse, and numbers of segments as one segment."""
    ids = torch.arange(6).view(2, 3)
    masks = {"attention_mask": torch.zeros(2, 3, dtype=torch.int64), name: mask}
    with pytest.raises(ValueError, match=f"{name} (of|is) .*{words.removeprefix('of ')}"):
        pack(ids, **masks)


def test_masks_and_positions_of_other_kinds() -> None:
    ids, mask = padded("right")
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16):
        assert_holds(pack(ids, mask.to(dtype)), lists())
    for wrong in (mask.tolist(), mask.numpy()):
        for name in ("attention_mask", "query_mask", "position_ids"):
            with pytest.raises(TypeError, match=f"{name} must be a tensor, got"):
                pack(ids, **{name: wrong})
    for dtype in (torch.float32, torch.float64, torch.bool):
        with pytest.raises(TypeError, match="position_ids must be integers"):
            pack(ids, position_ids=torch.zeros(ids.shape, dtype=dtype))
    with pytest.raises(ValueError, match="attention_mask is on meta, input_ids on cpu"):
        pack(ids, mask.to("meta"))


def test_select_takes_sequences_in_any_order() -> None:
    sequences = lists()
    assert_holds(pack(sequences).select([3, 0, 2, 3]), [sequences[i] for i in (3, 0, 2, 3)])
    assert_holds(pack(sequences).select([]), [])
    keys = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    batch = pack(torch.arange(8).view(2, 4), keys, query_mask=1 - keys, position_ids=torch.arange(10, 14))
    part = batch.select([1])
    assert part.key_lengths is not None
    assert (part.key_lengths.tolist(), part.positions.tolist()) == ([1], [10, 11, 12, 13])


def test_packed_moves_pickles_and_copies() -> None:
    batch = pack(*padded("left"))
    assert all(x.is_meta for x in vars(batch.to("meta")).values() if isinstance(x, Tensor))
    for twin in (batch.to("cpu"), pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch)):
        assert_holds(twin, lists())
        assert torch.equal(unpack(twin.input_ids, twin), unpack(batch.input_ids, batch))


def test_ragged_gives_one_matrix_per_text() -> None:
    matrices = [torch.randn(n, 3) for n in LENGTHS]
    ragged = Ragged.from_list(matrices)
    assert ragged.offsets.tolist() == list(accumulate(LENGTHS, initial=0))
    assert len(ragged) == len(list(ragged)) == 5
    for got in (list(ragged), [ragged[i] for i in range(5)], [ragged[i - 5] for i in range(5)]):
        assert all(torch.equal(a, b) for a, b in zip(got, matrices, strict=True))
    for part in (slice(1, 4), slice(-2, None), slice(None), slice(3, 1), slice(9, 20)):
        got, wanted = ragged[part], matrices[part]
        assert isinstance(got, Ragged)
        assert int(got.offsets[0]) == 0
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    for index in (5, -6):
        with pytest.raises(IndexError, match="of 5"):
            ragged[index]
    with pytest.raises(ValueError, match="contiguous"):
        ragged[::2]
    assert len(Ragged.from_list([])) == 0


@pytest.mark.parametrize("kind", [pickle.dumps, copy.deepcopy, "save"])
def test_parts_of_a_ragged_are_saved_alone(kind: Any) -> None:
    """A row that was saved brought all texts with it."""
    ragged = Ragged.from_list([torch.randn(5, 8) for _ in range(400)])

    def size(part: Tensor | Ragged) -> int:
        if kind is copy.deepcopy:
            twin = copy.deepcopy(part)
            return (twin if isinstance(twin, Tensor) else twin.values).untyped_storage().nbytes()
        if kind is pickle.dumps:
            return len(pickle.dumps(part))
        file = io.BytesIO()
        torch.save(part, file)
        return len(file.getvalue())

    for part in (ragged[3], ragged[-1], next(iter(ragged)), ragged[2:4], ragged[399:]):
        assert size(part) < 4000
    assert size(ragged) >= 400 * 5 * 8 * 4
    twin = pickle.loads(pickle.dumps(ragged[2:4]))
    assert torch.equal(twin.values, ragged.values[10:20])
    assert twin.offsets.tolist() == [0, 5, 10]


@pytest.mark.parametrize(
    ("values", "offsets", "words"),
    [
        (torch.zeros(6, 2), torch.tensor([0, 2, 5]), "increase from 0 to its 6 rows, got 0 to 5"),
        (torch.zeros(6, 2), torch.tensor([1, 6]), "got 1 to 6"),
        (torch.zeros(6, 2), torch.tensor([0, 7, 6]), "in another order"),
        (torch.zeros(6, 2), torch.tensor([0, 6], dtype=torch.int32), "must be int64"),
        (torch.zeros(6, 2), torch.zeros(0, dtype=torch.int64), "must be int64"),
        (torch.zeros(6, 2), torch.tensor([[0, 6]]), "must be int64"),
        (torch.zeros(6), torch.tensor([0, 6]), r"must be \[n, E\], got shape \(6,\)"),
    ],
)
def test_wrong_ragged(values: Tensor, offsets: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Ragged(values, offsets)


def test_wrong_matrices() -> None:
    with pytest.raises(TypeError, match=r"matrices\[1\] must be a tensor \[n, E\], got ndarray"):
        Ragged.from_list([torch.zeros(1, 2), np.zeros((1, 2))])  # pyright: ignore
    with pytest.raises(ValueError, match=r"matrices\[0\] must be \[n, E\], got shape \(2,\)"):
        Ragged.from_list([torch.zeros(2)])
    with pytest.raises(ValueError, match=r"matrices\[1\] must be \[n, 2\] as matrices\[0\] is, got shape \(1, 3\)"):
        Ragged.from_list([torch.zeros(1, 2), torch.zeros(1, 3)])
