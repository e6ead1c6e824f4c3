"""MaxSim: the dense formula, ties, empty sides, and every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from kernel_calls import DEVICE, DTYPES, FLOAT16, FLOAT32, TRITON, cu, fast, implementations, randn
from torch import Tensor

import modernbert
import modernbert_kernels as ops


@pytest.mark.parametrize(("backend", "dtype"), implementations(ops.maxsim))
@pytest.mark.parametrize(
    ("queries", "documents"),
    [
        ([1] * 9, [1] * 30),
        ([2, 1, 7], [1, 2, 63, 64, 65, 129]),
        ([3, 0, 2], [5, 0, 0, 9]),
        ([0], [0]),
        ([0], [3]),
        ([31], [3000]),
    ],
)
def test_maxsim(backend: str, dtype: torch.dtype, queries: list[int], documents: list[int]) -> None:
    """Against the dense formula. Every fifth token is negative to a query; an empty document scores -inf."""

    def dense(q: Tensor, cu_q: Tensor, d: Tensor, cu_d: Tensor) -> Tensor:
        # Sums in float32 or better are part of the op.
        q, d = (x.to(torch.promote_types(x.dtype, FLOAT32)) for x in (q, d))
        longest = max(documents)
        similarity = torch.full((len(documents), sum(queries), longest + 1), float("-inf"), dtype=q.dtype)
        for i, (start, length) in enumerate(zip(cu_d.tolist(), documents, strict=False)):
            similarity[i, :, :length] = q @ d[start : start + length].T
        best = similarity.amax(-1)
        member = torch.repeat_interleave(torch.arange(len(queries)), cu_q.diff())
        return torch.zeros(len(documents), len(queries), dtype=q.dtype).index_add(1, member, best).T

    q, d = F.normalize(randn(sum(queries), 48), dim=-1), F.normalize(randn(sum(documents), 48), dim=-1)
    d[::5] = -q[:1].abs() * torch.rand(len(d[::5]), 1) if len(q) else 0
    offsets = cu(queries, torch.int64), cu(documents, torch.int64)
    run = lambda q, d, op: op(q, offsets[0], d, offsets[1])  # noqa: E731
    options = {"gradients": bool(sum(queries) and sum(documents))}
    implementation = ops.maxsim.backends[backend]
    got, truth = (lambda q, d: run(q, d, implementation)), (lambda q, d: run(q, d, dense))
    device = DEVICE if backend == "triton" else "cpu"
    assert_as_accurate(got, truth, q.to(dtype), d.to(dtype), device=device, **options)


@pytest.mark.parametrize("backend", ["reference", *fast(ops.maxsim)])
def test_maxsim_of_negative_similarities(backend: str) -> None:
    """Nothing is clamped at zero, as padding with zeros would do."""
    q, d = torch.ones(2, 4), -torch.ones(3, 4) * torch.tensor([[3.0], [1.0], [2.0]])
    device = DEVICE if backend == "triton" else "cpu"
    assert ops.maxsim.backends[backend](q.to(device), cu([2]), d.to(device), cu([3])).tolist() == [[-8.0]]


@pytest.mark.parametrize("backend", ["reference", *fast(ops.maxsim)])
@pytest.mark.parametrize("paired", [False, True])
def test_maxsim_gives_ties_to_the_first(backend: str, paired: bool) -> None:
    """Within a block of tokens and across blocks."""
    if backend == "cpu" and paired:
        pytest.skip("the cpu backend scores all pairs")
    device = DEVICE if backend == "triton" else "cpu"
    q, d = torch.ones(2, 4, device=device), torch.ones(142, 4, device=device)
    d[:7] = 0
    d.requires_grad_()
    ops.maxsim.backends[backend](q, cu([1, 1]), d, cu([140, 2]), paired=paired).sum().backward()
    assert d.grad is not None
    assert d.grad.nonzero()[:, 0].unique().tolist() == [7, 140]
    assert d.grad[[7, 140], 0].tolist() == [1, 1] if paired else [2, 2]


@pytest.mark.parametrize("backend", ["reference", *(name for name in fast(ops.maxsim) if name != "cpu")])
def test_maxsim_paired_needs_equal_numbers(backend: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (the reference has it from zip)
        ops.maxsim.backends[backend](randn(2, 4), cu([1, 1]), randn(3, 4), cu([1, 1, 1]), paired=True)


PAIRED = [
    *(("reference", dtype) for dtype in DTYPES),
    *(pytest.param("triton", dtype, marks=TRITON) for dtype in (FLOAT32, torch.bfloat16, FLOAT16)),
]


@pytest.mark.parametrize(("backend", "dtype"), PAIRED)
@pytest.mark.parametrize("queries", [[3, 0, 9, 1], [3, 0, 70, 1]])
def test_maxsim_paired_is_the_diagonal(backend: str, dtype: torch.dtype, queries: list[int]) -> None:
    offsets = [cu(x) for x in (queries, [5, 4, 64, 0])]
    paired = lambda q, d: ops.maxsim.backends[backend](q, offsets[0], d, offsets[1], paired=True)  # noqa: E731
    diagonal = lambda q, d: ops.maxsim.reference(q, offsets[0], d, offsets[1]).diagonal()  # noqa: E731
    device = DEVICE if backend == "triton" else "cpu"
    q, d = randn(sum(queries), 16, dtype=dtype), randn(73, 16, dtype=dtype)
    assert_as_accurate(paired, diagonal, q, d, device=device)


@pytest.mark.parametrize("block", [1, 50, 700])
def test_maxsim_in_small_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block edges fall anywhere, also inside of nothing: the same scores and gradients."""
    monkeypatch.setattr(ops.cpu.maxsim, "BLOCK", block)
    offsets = cu([3, 4]), cu([1, 30, 0, 64, 2, 2, 0])
    run = lambda op: lambda q, d: op(q, offsets[0], d, offsets[1])  # noqa: E731
    pair = run(ops.maxsim.backends["cpu"]), run(ops.maxsim.reference)
    assert_as_accurate(*pair, randn(7, 16), randn(99, 16))


@pytest.mark.parametrize("gradient", [False, True])
def test_maxsim_under_autocast_rounds_once(gradient: bool) -> None:
    """In bfloat16 the error stays within a rounding of each of the two factors and of the similarity."""
    q, d = (F.normalize(randn(9, 8), dim=-1).requires_grad_(gradient) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        scores = ops.maxsim(q, cu([5, 4]), d, cu([6, 3]))
    wanted = ops.maxsim.reference(q, cu([5, 4]), d, cu([6, 3]))
    assert scores.dtype == FLOAT32
    assert (scores - wanted).abs().max() <= 5 * 3 * 2**-8
    if gradient:
        weight = randn(2, 2)
        pairs = zip(*(torch.autograd.grad((x * weight).sum(), (q, d)) for x in (scores, wanted)), strict=True)
        for got, exact in pairs:
            assert got.dtype == FLOAT32
            assert (got - exact).norm() <= 3 * 2**-8 * exact.norm()


def triton(queries: list[int], documents: list[int], **options: bool) -> tuple[Any, Any]:
    """The triton backend and the reference as functions of the vectors."""
    pairs = [(op, cu(queries), cu(documents)) for op in (ops.maxsim.backends["triton"], ops.maxsim.reference)]
    return tuple(
        lambda q, d, op=op, a=a, b=b: op(q, a.to(q.device), d, b.to(q.device), **options) for op, a, b in pairs
    )


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=TRITON) for dtype in (FLOAT32, torch.bfloat16)])
def test_maxsim_triton_of_queries_of_any_length(dtype: torch.dtype) -> None:
    """Longer than a tile of rows, than two, and across the border of two."""
    run = triton([150, 1, 0, 130, 3, 1], [33, 1])
    assert_as_accurate(*run, randn(285, 16, dtype=dtype), randn(34, 16, dtype=dtype), device=DEVICE)


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=TRITON) for dtype in (FLOAT32, torch.bfloat16)])
@pytest.mark.parametrize("width", [7, 32, 64, 96, 128, 256])
def test_maxsim_triton_of_any_width(width: int, dtype: torch.dtype) -> None:
    q, d = (F.normalize(randn(rows, width), dim=-1).to(dtype) for rows in (9, 75))
    assert_as_accurate(*triton([4, 5], [3, 72]), q, d, device=DEVICE)


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=TRITON) for dtype in (FLOAT32, torch.bfloat16, FLOAT16)])
def test_maxsim_triton_finds_positions_again(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there are too many to store, in blocks that end within a query; pairs without a gradient are left out."""
    monkeypatch.setattr(ops.fused.maxsim, "ARGMAX_BYTES", 2 * 3 * 10)
    weight = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [-2.0, 0.0, 1e-3]])
    runs = triton([3, 9, 12], [5, 70, 33])
    weighted = [lambda q, d, run=run: run(q, d) * weight.to(q.device) for run in runs]
    assert_as_accurate(*weighted, randn(24, 48, dtype=dtype), randn(108, 48, dtype=dtype), device=DEVICE)


@pytest.mark.parametrize("kept", [pytest.param(kept, marks=TRITON) for kept in (True, False)])
def test_maxsim_triton_leaves_out_pairs_without_gradient(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents and queries that no gradient reaches are not read again, not even if they are full of NaN by now."""
    if not kept:
        monkeypatch.setattr(ops.fused.maxsim, "ARGMAX_BYTES", 1)
    run, reference = triton([3, 4, 5], [20, 30])
    q, d = randn(12, 32).to(DEVICE).requires_grad_(), randn(50, 32).to(DEVICE).requires_grad_()
    weight = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0]], device=DEVICE)
    scores, wanted = run(q, d), reference(q, d)
    wanted = torch.autograd.grad((wanted * weight).sum(), (q, d))
    d.data[20:] = q.data[7:] = float("nan")  # unseen by autograd
    torch.testing.assert_close(torch.autograd.grad((scores * weight).sum(), (q, d)), wanted)


@pytest.mark.parametrize("kept", [pytest.param(kept, marks=TRITON) for kept in (True, False)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_maxsim_triton_passes_bad_gradients_on(kept: bool, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient scaler has to see them."""
    if not kept:
        monkeypatch.setattr(ops.fused.maxsim, "ARGMAX_BYTES", 1)
    q, d = randn(7, 32).to(DEVICE).requires_grad_(), randn(50, 32).to(DEVICE).requires_grad_()
    triton([3, 4], [20, 30])[0](q, d).backward(torch.tensor([[1.0, 0.0], [0.0, bad]], device=DEVICE))
    assert q.grad is not None
    assert d.grad is not None
    assert q.grad[:3].isfinite().all()
    assert not q.grad[3:].isfinite().any()
    assert d.grad[:20].isfinite().all()
    assert not d.grad[20:].isfinite().all()


@pytest.mark.parametrize("paired", [pytest.param(paired, marks=TRITON) for paired in (False, True)])
def test_maxsim_triton_gives_nan_when_16_bits_are_too_few(paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.fused.maxsim, "LONGEST", 29)
    run, reference = triton([3, 4], [29, 30], paired=paired)
    q, d = randn(7, 32).to(DEVICE), randn(59, 32).to(DEVICE)
    torch.testing.assert_close(run(q, d), reference(q, d))
    assert run(q.requires_grad_(), d).isnan().any(dim=0).tolist() == ([False, True] if not paired else True)


@pytest.mark.parametrize("paired", [pytest.param(paired, marks=TRITON) for paired in (False, True)])
def test_maxsim_triton_takes_views_and_gives_the_same_bits_again(paired: bool) -> None:
    run, results = triton([30, 120], [70, 30], paired=paired)[0], []
    q, d = randn(150, 48).to(DEVICE), randn(100, 48).to(DEVICE)
    for view in (lambda x: x, lambda x: x.T.contiguous().T):
        leaves = [view(x).detach().requires_grad_() for x in (q, d)]
        scores = run(*leaves)
        results.append((scores, *torch.autograd.grad(scores.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("paired", [pytest.param(paired, marks=TRITON) for paired in (False, True)])
def test_maxsim_operators(paired: bool) -> None:
    """Their schemas and fake outputs are right."""
    library = torch.ops.modernbert_kernels
    vectors = randn(7, 32).to(DEVICE), cu([3, 4]).to(DEVICE), randn(9, 32).to(DEVICE), cu([4, 5]).to(DEVICE)
    for gradient in (False, True):
        torch.library.opcheck(library.maxsim_forward.default, (*vectors, paired, gradient))
    scores, places = library.maxsim_forward(*vectors, paired, True)
    for wanted in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(library.maxsim_backward.default, (*vectors, places, scores, paired, wanted))


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("paired", [pytest.param(paired, marks=TRITON) for paired in (False, True)])
def test_maxsim_computes_no_gradient_that_is_not_wanted(
    paired: bool, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen documents cost nothing: their half of the backward pass is the costly one."""
    if not stored:
        monkeypatch.setattr(ops.fused.maxsim, "ARGMAX_BYTES", 1)
    run = triton([3, 4], [4, 5], paired=paired)[0]
    q, d = randn(7, 32).to(DEVICE), randn(9, 32).to(DEVICE)
    launched: list[str] = []

    def watched(name: str) -> Any:
        kernel = getattr(ops.fused.maxsim, name)
        return type("Watched", (), {"__getitem__": lambda _, grid: launched.append(name) or kernel[grid]})()

    for name in ("maxsim_grad_queries_kernel", "maxsim_grad_documents_kernel"):
        monkeypatch.setattr(ops.fused.maxsim, name, watched(name))
    every = torch.autograd.grad(run(q.requires_grad_(), d.requires_grad_()).square().sum(), (q, d))
    for at, (leaf, part) in enumerate(((q, "queries"), (d, "documents"))):
        launched.clear()
        loss = run(*(x if x is leaf else x.detach() for x in (q, d))).square().sum()
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], every[at])
        assert set(launched) == {f"maxsim_grad_{part}_kernel"}


@pytest.mark.parametrize("paired", [pytest.param(paired, marks=TRITON) for paired in (False, True)])
def test_maxsim_is_one_graph(paired: bool) -> None:
    run = triton([3, 4], [4, 5], paired=paired)[0]
    q, d = randn(7, 32).to(DEVICE).requires_grad_(), randn(9, 32).to(DEVICE).requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, wanted = (torch.autograd.grad(f(q, d).square().sum(), (q, d)) for f in (compiled, run))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", ["reference", *fast(ops.maxsim)])
def test_top_k_by_every_backend(backend: str) -> None:
    """`modernbert.maxsim` keeps offsets on the host, wherever the vectors are."""
    device = DEVICE if backend == "triton" else "cpu"
    queries, documents = ([randn(n, 16).to(device) for n in lengths] for lengths in ([3, 2], [4, 0, 1, 9, 2]))
    documents[4] = documents[0].clone()
    everything = modernbert.maxsim(queries, documents)
    with ops.backend(backend):
        scores, places = modernbert.maxsim(queries, documents, top_k=3)
    torch.testing.assert_close(scores, everything.gather(1, places))
    assert torch.equal(places, everything.sort(dim=1, descending=True, stable=True).indices[:, :3])
