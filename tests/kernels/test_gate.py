"""The gates of tests and benchmarks see one dead row, tile, head or sequence in results of real sizes.

Without a GPU: the result of a reference, rounded to bfloat16, stands for that of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from kernel_calls import BFLOAT16, cu, randn, rope
from torch import Tensor

import modernbert_kernels as ops
from benchmarks import ops as kernels
from benchmarks.clock import Refused
from benchmarks.gate import worst_row

EPS = torch.finfo(BFLOAT16).eps
HEADS, LENGTHS = 3, [8192, 1, 3000, *[32] * 80]


@pytest.fixture(scope="module")
def attended() -> tuple[Tensor, Tensor]:
    """Local attention over a long text, one token, another text and 160 queries; and the same in bfloat16."""
    torch.manual_seed(0)
    qkv, tables = randn(sum(LENGTHS), 3, HEADS, 64), rope(LENGTHS, 64)
    truth = ops.attention(qkv, cu(LENGTHS), max(LENGTHS), rope=tables, window=64).double()
    return truth, truth.bfloat16()


def kill(*place: Any) -> Callable[[Tensor], None]:
    def change(out: Tensor) -> None:
        out[place] = 0

    return change


DEATHS = {
    "the last row": kill(-1),
    "a row of one head": kill(5000, 2),
    "a tile of one head": kill(slice(8128, 8192), 1),
    "a tile": kill(slice(-64, None)),
    "a head": kill(slice(None), 2),
    "a sequence of one token": kill(8192),
    "a query": kill(slice(11_193, 11_225)),
    "a query of one head": kill(slice(11_193, 11_225), 0),
    "a NaN": lambda out: out[77, 0, :1].fill_(torch.nan),
}
DEATHS["two rows in the places of each other"] = lambda out: out.__setitem__([700, 701], out[[701, 700]])


def test_a_result_as_good_as_the_plain_one_passes(attended: tuple[Tensor, Tensor]) -> None:
    truth, plain = attended
    assert_accurate((truth * (1 + EPS / 4)).bfloat16(), plain, truth)


@pytest.mark.parametrize("death", DEATHS)
def test_a_dead_part_is_seen(death: str, attended: tuple[Tensor, Tensor]) -> None:
    truth, plain = attended
    broken = plain.clone()
    DEATHS[death](broken)
    with pytest.raises(AssertionError, match="off by"):
        assert_accurate(broken, plain, truth)


def test_the_worst_row_is_named(attended: tuple[Tensor, Tensor]) -> None:
    truth, plain = attended
    broken = plain.clone()
    broken[5000, 2] = 0
    assert str(worst_row(broken, plain, truth, EPS)).startswith("row (5000, 2) is off by")
    with pytest.raises(AssertionError, match=r"row \(5000, 2\)"):
        assert_accurate(broken, plain, truth)


def test_a_row_is_seen_that_the_whole_tensor_hides() -> None:
    """One of 16,384 rows is less than a rounding step of the tensor: the gate of benchmarks accepted it."""
    task = kernels.Task("geglu", ops.geglu, (randn(16_384, 2 * 64, dtype=BFLOAT16), "gelu"))
    known = kernels.truth_of(task, False)
    assert kernels.check(kernels.Way("whole", ops.geglu.reference), task, False, *known)

    def broken(h: Tensor, activation: str) -> Tensor:
        y = ops.geglu.reference(h, activation)
        y[-1] = 0
        return y

    kernels.difference(broken(*task.args), known[0][0], known[1][0])  # by the tensor alone it is right
    with pytest.raises(Refused, match=r"of result 0, row \(16383,\) is off by"):
        kernels.check(kernels.Way("broken", broken), task, False, *known)


@pytest.mark.parametrize("shape", [(), (7,), (7, 1), (2, 3, 5)])
def test_tensors_of_any_shape_have_rows(shape: tuple[int, ...]) -> None:
    truth = torch.rand(shape, dtype=torch.float64) + 1
    assert worst_row(truth.bfloat16(), truth.bfloat16(), truth, EPS).is_right
    broken = truth.clone()
    broken.view(-1)[-1] = torch.nan
    worst = worst_row(broken, truth.bfloat16(), truth, EPS)
    assert not worst.is_right
    assert worst.row == tuple(n - 1 for n in (shape[:-1] if len(shape) > 1 else shape))
