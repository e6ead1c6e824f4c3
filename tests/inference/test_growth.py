"""Memory does not grow with use: oneDNN keeps some for each new shape of a product, so few shapes reach it.

With `--sweep` the resident memory itself is measured over 3,000 batches of random sizes, in a process for each case.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import modernbert_kernels as ops
from modernbert import ColBERT, Session, maxsim, pack
from modernbert_kernels.cpu import linear

MB_OF_A_SHAPE = 0.6
"""Measured: what oneDNN keeps, and the freed memory around it."""


@pytest.fixture(scope="module")
def colbert() -> ColBERT:
    return ColBERT.default()


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """The shapes of products that oneDNN is given, as on a processor with AVX-512."""
    if not linear.AVAILABLE:
        pytest.skip("PyTorch is built without oneDNN")
    seen: set[tuple[int, ...]] = set()
    product = linear.pointwise

    def counted(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        # The rows of a weight that is opaque are read from its size, as those of any.
        seen.add((*x.shape, *weight.shape))
        return product(x, weight, *rest)

    monkeypatch.setattr(linear, "pointwise", counted)
    for module in (ops.cpu.linear, ops.cpu.attention):
        monkeypatch.setattr(module, "FASTER_THAN_MKL", True)
    return seen


def random_batch(rand: random.Random, longest: int) -> list[list[int]]:
    return [[5] * rand.randrange(3, longest) for _ in range(rand.randrange(1, 9))]


@pytest.mark.parametrize("longest", [64, 600])
@pytest.mark.parametrize("prepare", [lambda model: model, Session], ids=["plain", "session"])
def test_few_shapes_of_a_model(
    prepare: Callable[[ColBERT], Callable[..., Tensor]], longest: int, colbert: ColBERT, shapes: set[tuple[int, ...]]
) -> None:
    """Five kinds of products, 16 numbers of rows an octave, and two products for each length of dense attention."""
    model, rand = prepare(colbert), random.Random(0)
    batches = 40 if longest == 64 else 8
    with torch.inference_mode():
        for _ in range(batches):
            model(pack(random_batch(rand, longest)))
    seen = len(shapes)
    assert seen
    octaves = 8 if longest == 64 else 10
    assert seen <= 5 * 16 * octaves
    with torch.inference_mode():  # the same numbers of tokens in other places bring nothing new
        rand.seed(0)
        for _ in range(batches):
            model(pack(random_batch(rand, longest)))
    assert len(shapes) == seen


def test_few_shapes_of_maxsim(shapes: set[tuple[int, ...]]) -> None:
    """500 different searches were 1,000 shapes, which is half a gigabyte."""
    rand, corpus = random.Random(0), torch.randn(4000, 16)
    for _ in range(500):
        queries = [torch.randn(rand.randrange(3, 64), 16) for _ in range(rand.randrange(1, 20))]
        maxsim(queries, list(corpus[: rand.randrange(20, 4000)].split(150)))
    assert 0 < len(shapes) <= 8 * 4 * 9
    assert len(shapes) * MB_OF_A_SHAPE < 200


def test_maxsim_by_onednn_gives_its_numbers(shapes: set[tuple[int, ...]]) -> None:
    for lengths in ([3], [100, 40], [1] * 300, [0, 129, 0]):
        queries = [torch.randn(length, 16) for length in lengths]
        documents = [torch.randn(length, 16) for length in (1, 0, 77, 300, 5)]
        wanted = ops.maxsim.reference(
            torch.cat(queries),
            torch.tensor([0, *lengths]).cumsum(0),
            torch.cat(documents),
            torch.tensor([0, 1, 1, 78, 378, 383]),
        )
        torch.testing.assert_close(maxsim(queries, documents), wanted, rtol=1e-5, atol=1e-4)
    assert shapes


CASES = ["plain", "plain avx512", "session", "session avx512", "queries", "search", "tokenizer"]

SWEEP = """
import gc, random, sys
from pathlib import Path
import torch
import modernbert_kernels as ops
from modernbert import ColBERT, Session, maxsim, pack

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmRSS"))

torch.set_num_threads(1)
case, batches = sys.argv[1], int(sys.argv[2])
if "avx512" in case or case == "search":
    for module in (ops.cpu.linear, ops.cpu.attention):
        module.FASTER_THAN_MKL = True
model, rand = ColBERT.default(), random.Random(0)
session, corpus = Session(model), torch.nn.functional.normalize(torch.randn(20_000, model.dim), dim=1)
words = ["owl", "glacier", "energy", "peace", "x", "storms", "unbelievable", "2024"]

def ids(longest):
    return [5] * rand.randrange(3, longest)

def batch():
    if case.startswith("plain"):
        model(pack([ids(224) for _ in range(rand.randrange(1, 9))]))
    elif case.startswith("session"):
        session(pack([ids(224) for _ in range(rand.randrange(1, 9))]))
    elif case == "queries":
        session(pack([ids(64)]))
    elif case == "search":
        queries = [torch.randn(rand.randrange(3, 64), model.dim) for _ in range(rand.randrange(1, 5))]
        maxsim(queries, list(corpus[: rand.randrange(200, 20_000)].split(150)), top_k=10)
    else:
        count = rand.randrange(1, 9)
        texts = [" ".join(rand.choices(words, k=rand.randrange(1, 300))) for _ in range(count)]
        model.tokenizer([f"{text} {rand.random()}" for text in texts])

with torch.inference_mode():
    for index in range(batches):
        batch()
        if index == 99:
            gc.collect()
            before = resident()
gc.collect()
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case", CASES)
def test_resident_memory(case: str, request: pytest.FixtureRequest) -> None:
    """After 3,000 batches of random sizes it is at most 100 MB above that after 100."""
    if not request.config.getoption("--sweep"):
        pytest.skip("takes minutes: pytest --sweep, as make check does")
    run = [sys.executable, "-c", SWEEP, case, "3000"]
    grown = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert grown <= 100, f"{case}: {grown} MB"
