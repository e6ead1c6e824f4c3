"""A `Packed` whose parts do not fit together is refused at every entrance, before a kernel reads past its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from modernbert import Encoder, EncoderConfig, Packed, Session, pack
from modernbert.packed import check_packed

CONFIG = EncoderConfig(vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
BATCH = pack([[1] * 14, [2] * 30])


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def more_rows(batch: Packed) -> Packed:
    more = {name: torch.cat([getattr(batch, name), torch.zeros(2).long()]) for name in ("input_ids", "positions")}
    return replace(batch, **more)


WRONG: dict[str, tuple[Callable[[Packed], Packed], str]] = {
    "rows after the last sequence": (more_rows, r"cu_seqlens .* from 0 to its 46 tokens, got \[0, 14, 44\]"),
    "rows of no sequence": (lambda b: more_rows(replace(b, lengths=(), cu_seqlens=ints(0))), "from 0 to its 46"),
    "an end beyond": (lambda b: replace(b, cu_seqlens=ints(0, 14, 50), lengths=()), "from 0 to its 44 tokens"),
    "a start of its own": (lambda b: replace(b, cu_seqlens=ints(2, 14, 44), lengths=()), "from 0 to its 44 tokens"),
    "a fall": (lambda b: replace(b, cu_seqlens=ints(0, 60, 14, 44), lengths=()), "must rise"),
    "ends as fractions": (lambda b: replace(b, cu_seqlens=b.cu_seqlens.float()), "vector of int32, got torch.float32"),
    "no ends": (lambda b: replace(b, cu_seqlens=ints()), r"vector of int32, got torch.int32 of shape \(0,\)"),
    "ends in rows": (lambda b: replace(b, cu_seqlens=b.cu_seqlens[None]), r"vector of int32, .* of shape \(1, 3\)"),
    "other lengths": (lambda b: replace(b, lengths=(20, 24)), r"are \[20, 24\], but those of cu_seqlens \[14, 30\]"),
    "a longest that is not": (lambda b: replace(b, max_seqlen=29), "up to max_seqlen, which is 29"),
    "fewer positions": (lambda b: replace(b, positions=b.positions[:-1]), r"got shapes \(44,\) and \(43,\)"),
    "ids in rows": (lambda b: replace(b, input_ids=b.input_ids[:, None]), r"got shapes \(44, 1\) and \(44,\)"),
    "too many keys": (lambda b: replace(b, key_lengths=ints(14, 31)), r"key_lengths\[1\] of a Packed is 31"),
    "fewer than no key": (lambda b: replace(b, key_lengths=ints(-1, 30)), r"key_lengths\[0\] of a Packed is -1"),
    "keys of one": (lambda b: replace(b, key_lengths=ints(14)), r"has shape \(1,\), but there are 2 sequences"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_does_not_fit_is_refused(fault: str) -> None:
    change, words = WRONG[fault]
    encoder = Encoder(CONFIG).eval()
    calls: list[Any] = [encoder, Session(encoder), check_packed]
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call(change(BATCH))


def test_one_short_text_is_checked_too() -> None:
    """A Session has a way of its own for it."""
    session = Session(Encoder(CONFIG).eval())
    with pytest.raises(ValueError, match="from 0 to its 5 tokens"):
        session(more_rows(pack([[1, 2, 3]])))


@pytest.mark.parametrize(
    "batch",
    [
        pack([]),
        pack([[]]),
        pack([[1], [], [2, 3]]),
        replace(BATCH, lengths=()),
        replace(BATCH, lengths=[14, 30]),
        replace(BATCH, max_seqlen=1000),
        replace(BATCH, key_lengths=ints(0, 30)),
        replace(BATCH, cu_seqlens=BATCH.cu_seqlens.long()),
        pack(torch.ones(2, 3).long(), torch.tensor([[1, 1, 0], [0, 1, 0]])),
        BATCH.select([1, 0, 1]),
    ],
)
def test_what_fits_is_taken(batch: Packed) -> None:
    check_packed(batch)
    assert Encoder(CONFIG)(batch).isfinite().all()


def test_what_the_host_knows_is_checked_on_every_device() -> None:
    """Numbers on a GPU are trusted; a meta tensor has none that could be looked at."""
    check_packed(BATCH.to("meta"))
    for fault in ("rows after the last sequence", "a longest that is not", "fewer positions", "keys of one"):
        with pytest.raises(ValueError, match="of a Packed"):
            check_packed(WRONG[fault][0](BATCH).to("meta"))


def test_long_lists_are_shortened() -> None:
    with pytest.raises(ValueError, match=r"got \[0, 1, 2, 3, 4, 5, 6, 7, \.\.\., 40\]"):
        check_packed(replace(pack([[1]] * 40), input_ids=torch.zeros(41).long(), positions=torch.zeros(41).long()))


def test_rows_that_are_not_a_tensor_are_named() -> None:
    encoder = Encoder(CONFIG).eval()
    for call in (encoder, Session(encoder)):
        with pytest.raises(TypeError, match="rows must be a tensor, got one list"):
            call(BATCH, rows=[0, 14])  # pyright: ignore
