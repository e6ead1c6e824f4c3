"""The commonest wrong inputs: the error names the argument and the index."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from modernbert import Ragged, maxsim, pack
from modernbert.late_interaction import pool_tokens
from modernbert_kernels import pool

GOOD = [torch.randn(5, 16), torch.randn(2, 16)]

WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "padded": (
        torch.randn(2, 8, 16),
        TypeError,
        r"NAME must be a Ragged or a list of \[n, E\] tensors, got one tensor of shape \(2, 8, 16\): .* padding",
    ),
    "one matrix": (
        torch.randn(8, 16),
        TypeError,
        r"NAME must be .* got one tensor of shape \(8, 16\): put it in a list",
    ),
    "one vector": (torch.randn(16), TypeError, r"NAME must be .* got one tensor of shape \(16,\)"),
    "an array": (np.zeros((2, 8, 16), np.float32), TypeError, "NAME must be .* got one ndarray"),
    "nothing": (None, TypeError, "NAME must be .* got one NoneType"),
    "a text": ("a text", TypeError, "NAME must be .* got one str"),
    "texts": (["a text"], TypeError, r"NAME\[0\] must be a tensor \[n, E\], got str"),
    "by name": ({"a": GOOD[0]}, TypeError, "NAME must be .* got one dict"),
    "an array among them": (
        [*GOOD, np.zeros((1, 16))],
        TypeError,
        r"NAME\[2\] must be a tensor \[n, E\], got ndarray: torch.from_numpy",
    ),
    "a list among them": ([GOOD[0], [[1.0]]], TypeError, r"NAME\[1\] must be a tensor \[n, E\], got list"),
    "vectors": ([torch.randn(16)], ValueError, r"NAME\[0\] must be \[n, E\], got shape \(16,\)"),
    "a vector among them": ([*GOOD, torch.randn(16)], ValueError, r"NAME\[2\] must be .* got shape \(16,\)"),
    "padded ones": ([torch.randn(1, 5, 16)], ValueError, r"NAME\[0\] must be \[n, E\], got shape \(1, 5, 16\)"),
    "another width": ([*GOOD, torch.randn(1, 8)], ValueError, r"NAME\[2\] must be \[n, 16\] as NAME\[0\] is, got"),
    "another device": ([*GOOD, GOOD[0].to("meta")], ValueError, r"NAME\[2\] is on meta, NAME\[0\] on cpu: move one"),
    "token ids": (
        [torch.ones(3, 16, dtype=torch.int64)],
        ValueError,
        "NAME must be vectors of floats, got torch.int64",
    ),
}


@pytest.mark.parametrize("place", ["queries", "documents"])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("kind", WRONG)
def test_maxsim(kind: str, place: str, paired: bool) -> None:
    value, error, words = WRONG[kind]
    arguments: dict[str, Any] = {"queries": GOOD, "documents": GOOD} | {place: value}
    with pytest.raises(error, match=words.replace("NAME", place)):
        maxsim(**arguments, paired=paired)


@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind != "token ids"])
def test_from_list(kind: str) -> None:
    value, error, words = WRONG[kind]
    with pytest.raises(error, match=words.replace("NAME", "matrices")):
        Ragged.from_list(value)


def test_lists_and_generators_are_right_inputs() -> None:
    wanted = maxsim(GOOD, GOOD)
    assert torch.equal(maxsim(tuple(GOOD), (x for x in GOOD)), wanted)  # pyright: ignore
    half = maxsim([x.half() for x in GOOD], GOOD)
    torch.testing.assert_close(half, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("values", "offsets", "words"),
    [
        ([[1.0]], torch.tensor([0, 1]), "values of a Ragged must be a tensor, got list: Ragged.from_list"),
        (np.zeros((1, 2)), torch.tensor([0, 1]), "values of a Ragged must be a tensor, got ndarray"),
        (torch.zeros(1, 2), [0, 1], "offsets of a Ragged must be a tensor, got list"),
        (torch.zeros(1, 2), None, "offsets of a Ragged must be a tensor, got NoneType"),
    ],
)
def test_ragged(values: Any, offsets: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        Ragged(values, offsets)


@pytest.mark.parametrize("index", ["0", 1.0, None, [0]])
def test_an_index_of_a_ragged(index: Any) -> None:
    with pytest.raises(TypeError, match="takes the index of a text or a slice, got"):
        Ragged.from_list(GOOD)[index]


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (Ragged.from_list(GOOD), TypeError, r"x_NE must be a tensor \[n, E\], got Ragged: pool_documents"),
        (GOOD, TypeError, "got list"),
        (np.zeros((4, 16)), TypeError, "got ndarray"),
        (
            torch.zeros(2, 4, 16),
            ValueError,
            r"must be floats \[n, E\] on the CPU, got torch.float32 of shape \(2, 4, 16\)",
        ),
        (torch.zeros(16), ValueError, r"of shape \(16,\)"),
        (torch.zeros(4, 16, dtype=torch.int64), ValueError, "got torch.int64"),
        (torch.zeros(4, 16, device="meta"), ValueError, "on meta"),
    ],
)
def test_pool_tokens(x: Any, error: type[Exception], words: str) -> None:
    pytest.importorskip("scipy")
    with pytest.raises(error, match=words):
        pool_tokens(x, 2)


def test_a_mode_of_pool() -> None:
    with pytest.raises(ValueError, match="mode must be cls, last, mean, max, got 'avg'"):
        pool(torch.randn(3, 4), torch.tensor([0, 3], dtype=torch.int32), "avg")


@pytest.mark.parametrize("token", [1.0, "1", None, 2**63, True, [1], np.float32(1)])
def test_the_place_of_a_wrong_id(token: Any) -> None:
    with pytest.raises(TypeError, match=r"sequences\[1\]\[2\] is .*, but token ids must be integers below 2\*\*63"):
        pack([[1, 2], [3, 4, token, 5], []])


@pytest.mark.parametrize("sequences", [[[1, 2], [], [3, 50]], torch.tensor([[1, 2], [1, 1], [3, 50]])])
def test_the_place_of_an_id_out_of_range(sequences: Any) -> None:
    with pytest.raises(ValueError, match="sequence 2, token 1: token id 50 is out of range"):
        pack(sequences, vocab_size=50)


def test_ids_of_any_kind_are_right_inputs() -> None:
    wanted = [1, 2, 3]
    for sequences in (
        [[1, 2], [3]],
        [np.array([1, 2]), (3,)],
        [torch.tensor([1, 2]), [3]],
        [range(1, 3), [np.int32(3)]],
    ):
        assert pack(sequences).input_ids.tolist() == wanted
