"""Every backend of every op against its reference: values, every gradient, three dtypes, awkward sizes."""

from __future__ import annotations

import math
import threading
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, results
from torch import Tensor

import modernbert_kernels as ops

FLOAT32, BFLOAT16, FLOAT64 = DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def fast(op: ops.Op) -> list[str]:
    return [name for name in op.backends if name != "reference"]


def randn(*shape: int, dtype: torch.dtype = FLOAT32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def cu(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=dtype)


def assert_equal_in_float64(reference: Any, definition: Any, *args: Any, **kwargs: Any) -> None:
    """Two ways of writing one formula: outputs and gradients agree to float64's rounding."""
    got, wanted = (results(op, args, kwargs, FLOAT64) for op in (reference, definition))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


# linear, norms, GeGLU


@pytest.mark.parametrize("backend", fast(ops.linear))
@pytest.mark.parametrize(("tokens", "width", "out"), [(0, 64, 96), (1, 64, 96), (63, 33, 7), (300, 256, 768)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_backend(backend: str, tokens: int, width: int, out: int, bias: bool) -> None:
    """The onednn backend is for float32 and inference; it says so when it is forced to do more."""
    x, weight = randn(tokens, width), randn(out, width, scale=width**-0.5)
    arguments = (x, weight, randn(out)) if bias else (x, weight)
    assert_as_accurate(ops.linear.backends[backend], ops.linear.reference, *arguments, gradients=False)
    with pytest.raises(ValueError, match="no gradient"):
        ops.linear.backends[backend](x, weight.requires_grad_())


def test_linear_backend_takes_views() -> None:
    """Rows of a wider matrix and a transposed weight are what callers really pass."""
    x, weight = randn(40, 128)[:, 32:96], randn(64, 48).T
    for name in fast(ops.linear):
        assert_as_accurate(ops.linear.backends[name], ops.linear.reference, x, weight, gradients=False)


def normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias


def activated(h: Tensor, activation: str) -> Tensor:
    a, gate = h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]
    return (a * 0.5 * (1 + torch.erf(a / math.sqrt(2))) if activation == "gelu" else a * torch.sigmoid(a)) * gate


IDS = {tokens: torch.arange(tokens) * 7 % 11 for tokens in (0, 1, 63, 300)}


def rowwise(tokens: int, dtype: torch.dtype) -> dict[str, tuple[ops.Op, Any, Any, tuple[Any, ...]]]:
    """Per case: the op, how it is called, its formula, the arguments."""
    x, delta, weight, bias, table, h = (
        randn(*shape, dtype=dtype) for shape in ((tokens, 96), (tokens, 96), (96,), (96,), (11, 96), (tokens, 96))
    )
    ids, eps = IDS[tokens], 1e-5
    plain, gather = (lambda op: op), (lambda op: lambda *args: op(ids, *args))
    summed = lambda x, d, *rest: (x + d, normed(x + d, *rest))  # noqa: E731
    looked_up = lambda table, *rest: normed(table[ids], *rest)  # noqa: E731
    return {
        "layer_norm": (ops.layer_norm, plain, normed, (x, weight, None, eps)),
        "layer_norm bias": (ops.layer_norm, plain, normed, (x, weight, bias, eps)),
        "add_layer_norm": (ops.add_layer_norm, plain, summed, (x, delta, weight, None, eps)),
        "add_layer_norm bias": (ops.add_layer_norm, plain, summed, (x, delta, weight, bias, eps)),
        "embed_layer_norm": (ops.embed_layer_norm, gather, looked_up, (table, weight, None, eps)),
        "embed_layer_norm bias": (ops.embed_layer_norm, gather, looked_up, (table, weight, bias, eps)),
        "geglu": (ops.geglu, plain, activated, (h, "gelu")),
        "geglu silu": (ops.geglu, plain, activated, (h, "silu")),
    }


@pytest.mark.parametrize("tokens", [0, 1, 63, 300])
@pytest.mark.parametrize("case", rowwise(0, FLOAT32))
def test_rowwise_op(tokens: int, case: str) -> None:
    """The reference is the formula (float64), and every backend is as accurate as the reference."""
    op, call, formula, arguments = rowwise(tokens, FLOAT64)[case]
    assert_equal_in_float64(call(op.reference), formula, *arguments)
    for dtype in DTYPES:
        op, call, formula, arguments = rowwise(tokens, dtype)[case]
        for name in fast(op):
            assert_as_accurate(call(op.backends[name]), call(op.reference), *arguments)


# Attention

MIXES = {
    "one": [1],
    "edges": [1, 2, 63, 64, 65, 129],
    "zero-length": [0, 5, 0, 0, 70, 0],
    "equal": [40, 40, 40],
    "long": [512, 1, 129],
}


def rope(lengths: list[int], head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    positions = torch.cat([torch.arange(n) for n in lengths]).float()
    angle = positions[:, None] / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    return angle.cos(), angle.sin()


def one_by_one(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    rope: Any,
    window: int | None,
    key_lengths: Tensor | None,
) -> Tensor:
    """Attention from its definition: a loop over sequences and one matrix of scores for each."""
    outputs, bounds = [qkv[:0, 0]], cu_seqlens.tolist()
    for i, (start, stop) in enumerate(pairwise(bounds)):
        cos, sin = (torch.cat([x[start:stop]] * 2, -1)[:, None].to(qkv.dtype) for x in rope)
        q, k, v = qkv[start:stop].unbind(1)
        q, k = (x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (q, k))
        scores = torch.einsum("ihk,jhk->hij", q, k) * q.shape[-1] ** -0.5
        place = torch.arange(stop - start)
        visible = (place < (stop - start if key_lengths is None else key_lengths[i]))[None]
        if window is not None:
            visible = visible & ((place[:, None] - place).abs() <= window)
        visible = visible.expand(stop - start, -1)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0)
        outputs.append(torch.einsum("hij,jhk->ihk", weights, v))
    return torch.cat(outputs)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("window", [None, 1, 8, 64, 100])
def test_attention_reference_is_the_definition(mix: str, window: int | None) -> None:
    lengths = MIXES[mix]
    arguments = (randn(sum(lengths), 3, 2, 8, dtype=FLOAT64, scale=1.5), cu(lengths), max(lengths))
    options = {"rope": rope(lengths, 8), "window": window, "key_lengths": None}
    assert_equal_in_float64(ops.attention.reference, one_by_one, *arguments, **options)


@pytest.mark.parametrize("backend", fast(ops.attention))
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("window", [None, 1, 8, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_backend(backend: str, mix: str, window: int | None, dtype: torch.dtype) -> None:
    lengths = MIXES[mix]
    qkv = randn(sum(lengths), 3, 2, 16, dtype=dtype, scale=1.5)
    options = {"rope": rope(lengths, 16), "window": window, "key_lengths": None}
    implementation = ops.attention.backends[backend]
    assert_as_accurate(implementation, ops.attention.reference, qkv, cu(lengths), max(lengths), **options)


@pytest.mark.parametrize("backend", fast(ops.attention))
@pytest.mark.parametrize("window", [None, 1, 8, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_rows_that_are_queries_only(backend: str, window: int | None, dtype: torch.dtype) -> None:
    """Among them rows that see nothing, because keys are too far or missing: zero, with zero gradients."""
    lengths, keys = [130, 40, 40, 7, 1, 0, 5], torch.tensor([3, 40, 17, 0, 1, 0, 4], dtype=torch.int32)
    qkv = randn(sum(lengths), 3, 2, 16, dtype=dtype, scale=1.5)
    options = {"rope": rope(lengths, 16), "window": window, "key_lengths": keys}
    implementation = ops.attention.backends[backend]
    assert_as_accurate(implementation, ops.attention.reference, qkv, cu(lengths), max(lengths), **options)
    for op in (implementation, ops.attention.reference):
        out = op(qkv, cu(lengths), max(lengths), **options)
        assert out[210:217].eq(0).all(), "the sequence without keys"
        assert window is None or out[3 + window : 130].eq(0).all(), "rows out of reach"
        assert out[: 3 + (window or 0)].ne(0).any(-1).all()


def test_attention_reference_with_query_rows_is_the_definition() -> None:
    lengths, keys = [50, 40, 7, 1], torch.tensor([3, 40, 0, 1], dtype=torch.int32)
    qkv = randn(sum(lengths), 3, 2, 8, dtype=FLOAT64, scale=1.5)
    for window in (None, 4):
        options = {"rope": rope(lengths, 8), "window": window, "key_lengths": keys}
        assert_equal_in_float64(ops.attention.reference, one_by_one, qkv, cu(lengths), max(lengths), **options)


@pytest.mark.parametrize("backend", ops.attention.backends)
def test_attention_of_no_token(backend: str) -> None:
    qkv, options = randn(0, 3, 2, 16), {"rope": rope([0], 16), "window": 8}
    for lengths in ([], [0], [0, 0]):
        out = ops.attention.backends[backend](qkv, cu(lengths), 0, **options)
        assert out.shape == (0, 2, 16)


@pytest.mark.parametrize("backend", ops.attention.backends)
@pytest.mark.parametrize("window", [None, 8, 64])
def test_attention_stays_inside_its_sequence(backend: str, window: int | None) -> None:
    """Whatever one sequence holds, the others are the same to the last bit, and so are their gradients."""
    lengths, others = [63, 3, 70], [*range(63), *range(66, 136)]
    qkv = randn(136, 3, 2, 16)
    loud = qkv.clone()
    loud[63:66] = 1e6

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_()
        out = ops.attention.backends[backend](x, cu(lengths), 70, rope=rope(lengths, 16), window=window)
        return out[others], torch.autograd.grad(out[others].square().sum(), x)[0][others]

    for got, wanted in zip(run(loud), run(qkv), strict=True):
        assert torch.equal(got, wanted)


def test_attention_dropout_is_of_the_probabilities() -> None:
    """Every row keeps its expectation, and a constant value is scaled by whole numbers of kept keys."""
    qkv = torch.zeros(64, 3, 1, 8)
    qkv[:, 2] = 1
    out = ops.attention(qkv, cu([64]), 64, rope=rope([64], 8), dropout_p=0.25)[:, 0, 0]
    kept = out * 0.75 * 64
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-4)
    assert kept.std() > 1
    assert abs(out.mean() - 1) < 0.05
    for name in fast(ops.attention):
        with pytest.raises(ValueError, match="dropout"):
            ops.attention.backends[name](qkv, cu([64]), 64, rope=rope([64], 8), dropout_p=0.25)


def test_the_mask_of_an_inference_pass_serves_a_training_pass() -> None:
    """The cached band mask was an inference tensor, which autograd refuses to save."""
    lengths = [77, 11]
    qkv, options = randn(88, 3, 1, 8), {"rope": rope(lengths, 8), "window": 9}
    with torch.inference_mode():
        ops.attention(qkv, cu(lengths), 77, **options)
    qkv.requires_grad_()
    ops.attention(qkv, cu(lengths), 77, **options).sum().backward()
    assert qkv.grad is not None


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("query_rows", [False, True])
def test_opaque_attention_keeps_the_rules(window: int | None, query_rows: bool) -> None:
    """torch's own check: schema, fake tensors, autograd registration, tracing with open shapes."""
    qkv, cos, sin = torch.randn(51, 3, 2, 8, requires_grad=True), torch.rand(51, 4), torch.rand(51, 4)
    cu_seqlens = torch.tensor([0, 40, 40, 51], dtype=torch.int32)
    keys = torch.tensor([3, 0, 11], dtype=torch.int32) if query_rows else None
    arguments = (qkv, cu_seqlens, 40, cos, sin, window, keys)
    torch.library.opcheck(torch.ops.modernbert_kernels.attention_cpu.default, arguments)


def test_rotary_turns_pairs() -> None:
    """Rotation keeps lengths, leaves v alone, and makes q k depend on the distance only."""
    cos, sin = rope([50], 16)
    qkv = randn(1, 3, 2, 16, dtype=FLOAT64).expand(50, -1, -1, -1)
    for op in ops.rotary.backends.values():
        out = op(qkv, cos, sin)
        torch.testing.assert_close(out[:, :2].norm(dim=-1), qkv[:, :2].norm(dim=-1), rtol=1e-6, atol=0)
        assert torch.equal(out[:, 2], qkv[:, 2])
        scores = torch.einsum("ihk,jhk->hij", out[:, 0], out[:, 1])
        for distance in (-3, 0, 7):
            diagonal = scores.diagonal(distance, 1, 2)
            torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal), rtol=0, atol=1e-5)
        assert scores.std() > 0.1


def test_threads_share_the_mask_cache() -> None:
    """Many threads, different lengths at once: every result is that of its own lengths."""
    mixes = [[70 + i, 30, 90 - i] for i in range(12)]
    inputs = [randn(sum(mix), 3, 1, 8) for mix in mixes]
    run = lambda i: ops.attention(inputs[i], cu(mixes[i]), max(mixes[i]), rope=rope(mixes[i], 8), window=6)  # noqa: E731
    wanted, got = [run(i) for i in range(12)], [torch.empty(0)] * 12

    def work(i: int) -> None:
        for _ in range(3):
            got[i] = run(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


# MaxSim


@pytest.mark.parametrize("backend", ops.maxsim.backends)
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
@pytest.mark.parametrize("dtype", DTYPES)
def test_maxsim(backend: str, queries: list[int], documents: list[int], dtype: torch.dtype) -> None:
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
    assert_as_accurate(got, truth, q.to(dtype), d.to(dtype), **options)


def test_maxsim_of_negative_similarities() -> None:
    """Nothing is clamped at zero, as padding with zeros would do."""
    q, d = torch.ones(2, 4), -torch.ones(3, 4) * torch.tensor([[3.0], [1.0], [2.0]])
    for op in ops.maxsim.backends.values():
        assert op(q, cu([2]), d, cu([3])).tolist() == [[-8.0]]


@pytest.mark.parametrize("backend", ops.maxsim.backends)
def test_maxsim_gives_ties_to_the_first(backend: str) -> None:
    q, d = torch.ones(1, 4, requires_grad=True), torch.ones(6, 4, requires_grad=True)
    ops.maxsim.backends[backend](q, cu([1]), d, cu([4, 2])).sum().backward()
    assert d.grad is not None
    assert d.grad[:, 0].tolist() == [1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_maxsim_paired_is_the_diagonal(dtype: torch.dtype) -> None:
    lengths = [3, 0, 9, 1], [5, 4, 64, 0]
    offsets = [cu(x) for x in lengths]
    paired = lambda q, d: ops.maxsim(q, offsets[0], d, offsets[1], paired=True)  # noqa: E731
    diagonal = lambda q, d: ops.maxsim.reference(q, offsets[0], d, offsets[1]).diagonal()  # noqa: E731
    assert_as_accurate(paired, diagonal, randn(13, 16, dtype=dtype), randn(73, 16, dtype=dtype))


@pytest.mark.parametrize("block", [1, 50, 700])
def test_maxsim_in_small_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block edges fall anywhere, also inside of nothing: the same scores and gradients."""
    monkeypatch.setattr(ops.cpu.maxsim, "BLOCK", block)
    offsets = cu([3, 4]), cu([1, 30, 0, 64, 2, 2, 0])
    run = lambda op: lambda q, d: op(q, offsets[0], d, offsets[1])  # noqa: E731
    pair = run(ops.maxsim.backends["cpu"]), run(ops.maxsim.reference)
    assert_as_accurate(*pair, randn(7, 16), randn(99, 16))
