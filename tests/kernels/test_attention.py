"""Packed attention: the reference is the definition, every backend is as accurate as the reference."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import pytest
import torch
from kernel_calls import (
    DEVICE,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INTERPRETED,
    TRITON,
    assert_equal_in_float64,
    check,
    cu,
    fast,
    implementations,
    place,
    randn,
    rope,
)
from torch import Tensor
from torch.utils._pytree import tree_map_only

import modernbert_kernels as ops

MIXES = {
    "one": [1],
    "edges": [1, 2, 63, 64, 65, 129],
    "zero-length": [0, 5, 0, 0, 70, 0],
    "equal": [40, 40, 40],
    "long": [512, 1, 129],
}
# A long sequence takes seconds in the interpreter, and float16 has the tiles of bfloat16.
SLOW = {(FLOAT32, "long"), *((FLOAT16, mix) for mix in MIXES if mix != "edges")} if INTERPRETED else set()
CASES = [
    pytest.param(backend, dtype, mix, marks=getattr(pair, "marks", ()))
    for pair in implementations(ops.attention)
    for backend, dtype in [getattr(pair, "values", pair)]
    for mix in MIXES
    if (dtype, mix) not in SLOW
]


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


class OnlineSoftmax(torch.autograd.Function):
    """Attention with FlashAttention's gradient: the mean of a row's gradients is taken from its output.

    Where a row sees one key, its scores have no gradient, and this finds the rounding of two sums for it.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        scores = (torch.einsum("ihk,jhk->hij", q, k).float() * q.shape[-1] ** -0.5).masked_fill(~visible, -1e30)
        weights = scores.softmax(-1) * visible
        out = torch.einsum("hij,jhk->ihk", weights.to(v.dtype), v)
        ctx.save_for_backward(q, k, v, weights, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        q, k, v, weights, out = ctx.saved_tensors
        mean = (grad.float() * out.float()).sum(-1).T[..., None]
        dscores = weights * (torch.einsum("ihk,jhk->hij", grad, v).float() - mean)
        dscores = (dscores * q.shape[-1] ** -0.5).to(q.dtype)
        dq, dk = torch.einsum("hij,jhk->ihk", dscores, k), torch.einsum("hij,ihk->jhk", dscores, q)
        return dq, dk, torch.einsum("hij,ihk->jhk", weights.to(v.dtype), grad), None


def online(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options: Any) -> Tensor:
    """The formula of the triton backend in PyTorch: all tokens at once, and one mask."""
    window, keys = options["window"], options["key_lengths"]
    token = torch.arange(len(qkv))
    sequence = torch.bucketize(token, cu_seqlens[1:], right=True)
    visible = sequence[:, None] == sequence
    if window is not None:
        visible &= (token[:, None] - token).abs() <= window
    if keys is not None:
        visible &= (token < (cu_seqlens[:-1] + keys)[sequence])[None]
    return OnlineSoftmax.apply(*ops.rotary.reference(qkv, *options["rope"]).unbind(1), visible)


def check_attention(backend: str, *args: Any, **options: Any) -> None:
    check(ops.attention, backend, *args, plain=online if backend == "triton" else None, **options)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("window", [None, 1, 8, 64, 100])
def test_attention_reference_is_the_definition(mix: str, window: int | None) -> None:
    lengths = MIXES[mix]
    arguments = (randn(sum(lengths), 3, 2, 8, dtype=FLOAT64, scale=1.5), cu(lengths), max(lengths))
    options = {"rope": rope(lengths, 8), "window": window, "key_lengths": None}
    assert_equal_in_float64(ops.attention.reference, one_by_one, *arguments, **options)


@pytest.mark.parametrize(("backend", "dtype", "mix"), CASES)
@pytest.mark.parametrize("window", [None, 1, 8, 64, 100])
def test_attention_backend(backend: str, dtype: torch.dtype, mix: str, window: int | None) -> None:
    lengths = MIXES[mix]
    qkv = randn(sum(lengths), 3, 2, 32, dtype=dtype, scale=1.5)
    options = {"rope": rope(lengths, 32), "window": window, "key_lengths": None}
    check_attention(backend, qkv, cu(lengths), max(lengths), **options)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_attention_in_bfloat16_on_a_cpu(window: int | None, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products in bfloat16 and in float32; short texts of several lengths are one band."""
    monkeypatch.setattr("modernbert_kernels.cpu.attention.BFLOAT16_IS_FASTER", native)
    lengths = [3, 40, 0, 17, 1]
    qkv = randn(sum(lengths), 3, 2, 32, dtype=torch.bfloat16)
    check_attention("cpu", qkv, cu(lengths), 40, rope=rope(lengths, 32), window=window, key_lengths=None)


@pytest.mark.parametrize("by_head", [False, True])
def test_attention_of_long_sequences_at_inference(by_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SDPA, and head by head as on a processor where oneDNN is faster."""
    monkeypatch.setattr(ops.cpu.attention, "FASTER_THAN_MKL", by_head)
    lengths = [300, 300, 7]
    options = {"rope": rope(lengths, 32), "window": None, "key_lengths": None}
    check_attention("cpu", randn(607, 3, 2, 32), cu(lengths), 300, **options, gradients=False)


@pytest.mark.parametrize("keys", [None, [700, 0, 3, 257, 5]])
@pytest.mark.parametrize("window", [None, 3, 64, 257, 300, 600])
def test_attention_of_long_sequences_on_a_cpu(window: int | None, keys: list[int] | None) -> None:
    """Wide windows, and query-only rows, go block by block: edges within and between blocks, and no key in sight."""
    lengths = [700, 5, 513, 257, 302]
    qkv = randn(sum(lengths), 3, 2, 8, scale=1.5)
    key_lengths = None if keys is None else torch.tensor(keys, dtype=torch.int32)
    check_attention("cpu", qkv, cu(lengths), 700, rope=rope(lengths, 8), window=window, key_lengths=key_lengths)


@pytest.mark.parametrize(("window", "keys"), [(64, False), (1200, False), (2000, False), (64, True), (None, True)])
def test_masks_of_attention_are_linear_in_the_tokens(
    window: int | None, keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of 8,192 took more memory than a global layer: a mask of all tokens, each with the whole window."""
    cells: list[int] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        cells.append(0 if attn_mask is None else attn_mask.numel())
        return attend(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(ops.cpu.attention.F, "scaled_dot_product_attention", counted)
    length = 3000
    key_lengths = torch.tensor([20], dtype=torch.int32) if keys else None
    options = {"rope": rope([length], 8), "window": window, "key_lengths": key_lengths}
    with torch.inference_mode():
        ops.attention(randn(length, 3, 1, 8), cu([length]), length, **options)
    assert max(cells) <= 256 * length


@pytest.mark.parametrize("length", [256, 257, 300, 511, 700])
def test_attention_head_by_head_takes_few_shapes(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps memory for each new shape of a product: lengths are rounded up, and blocks are about equal."""
    shapes: set[tuple[int, ...]] = set()
    product = ops.cpu.attention.linear

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        shapes.add((*x.shape, *weight.shape))
        return product(x, weight)

    monkeypatch.setattr(ops.cpu.attention, "FASTER_THAN_MKL", True)
    monkeypatch.setattr(ops.cpu.attention, "linear", counted)
    counted.backends = product.backends  # pyright: ignore
    options = {"rope": rope([length], 32), "window": None, "key_lengths": None}
    check_attention("cpu", randn(length, 3, 2, 32), cu([length]), length, **options, gradients=False)
    assert len(shapes) <= 4
    assert all(rows <= 256 for rows, *_ in shapes)
    step = 16 if length < 512 else 32
    assert {columns for _, columns, *_ in shapes} == {32, -(-length // step) * step}


@TRITON
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("behind", [0, 46, 1000])
def test_triton_attention_of_rows_after_the_last_sequence(window: int | None, behind: int) -> None:
    """They see nothing. What was in memory after the offsets decided, and their gradients were NaN."""
    lengths, tokens = [14, 30], 44
    qkv, options = randn(tokens + 2, 3, 2, 32), {"window": window, "key_lengths": None}
    cu_seqlens = torch.tensor([0, 14, 44, behind], dtype=torch.int32, device=DEVICE)[:3]
    leaf = qkv.to(DEVICE).requires_grad_()
    tables = tuple(table.to(DEVICE) for table in rope([*lengths, 2], 32))
    out = ops.attention.backends["triton"](leaf, cu_seqlens, 30, rope=tables, **options)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
    real = qkv[:tokens].requires_grad_()
    wanted = ops.attention.reference(real, cu(lengths), 30, rope=rope(lengths, 32), **options)
    (expected,) = torch.autograd.grad(wanted.square().sum(), real)
    assert out[tokens:].eq(0).all()
    assert gradient[tokens:].eq(0).all()
    torch.testing.assert_close(out[:tokens].cpu(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient[:tokens].cpu(), expected, rtol=0, atol=1e-4)


@TRITON
@pytest.mark.parametrize(
    ("ends", "keys"),
    [
        ([0], None),
        ([0, 0, 0], None),
        ([0, 14, 60], None),
        ([0, 60, 44], None),
        ([-20, 14, 44], None),
        ([0, 14, 44], [20, 90]),
        ([0, 14, 44], [-3, 30]),
    ],
)
def test_triton_attention_reads_only_its_tokens(ends: list[int], keys: list[int] | None) -> None:
    """Whatever the offsets say: NaN around the tokens reaches no output and no gradient."""
    around = torch.full((200, 3, 2, 32), torch.nan)
    around[80:124] = randn(44, 3, 2, 32)
    leaf = around.to(DEVICE)[80:124].requires_grad_()
    offsets = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (ends, keys) if x is not None]
    tables = tuple(table.to(DEVICE) for table in rope([44], 32))
    for window in (None, 8):
        options = {"rope": tables, "window": window, "key_lengths": offsets[1] if keys else None}
        out = ops.attention.backends["triton"](leaf, offsets[0], 44, **options)
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
        assert out.isfinite().all()
        assert gradient.isfinite().all()


@TRITON
@pytest.mark.parametrize("window", [2**31 - 1, 2**63 - 1])
def test_triton_attention_of_a_window_without_an_end(window: int) -> None:
    """The row plus such a window overflowed, and no key was visible."""
    options = {"rope": rope([40, 3], 32), "key_lengths": None}
    arguments = (randn(43, 3, 1, 32), [40, 3])
    wanted = attend("triton", *arguments, window=None, **options)
    assert torch.equal(attend("triton", *arguments, window=window, **options), wanted)


@pytest.mark.parametrize(("backend", "dtype"), implementations(ops.attention))
@pytest.mark.parametrize("window", [None, 1, 8, 64])
def test_attention_with_rows_that_are_queries_only(backend: str, window: int | None, dtype: torch.dtype) -> None:
    """Rows without a visible key, because keys are too far away or missing, give zero, with zero gradients."""
    lengths, keys = [130, 40, 40, 7, 1, 0, 5], torch.tensor([3, 40, 17, 0, 1, 0, 4], dtype=torch.int32)
    qkv = randn(sum(lengths), 3, 2, 32, dtype=dtype, scale=1.5)
    options = {"rope": rope(lengths, 32), "window": window, "key_lengths": keys}
    check_attention(backend, qkv, cu(lengths), max(lengths), **options)
    for name in (backend, "reference"):
        with torch.no_grad():
            out = attend(name, qkv, lengths, **options)
        assert out[210:217].eq(0).all(), "the sequence without keys"
        assert window is None or out[3 + window : 130].eq(0).all(), "rows out of reach"
        assert out[: 3 + (window or 0)].ne(0).any(-1).all()


def attend(backend: str, qkv: Tensor, lengths: list[int], **options: Any) -> Tensor:
    """One call on the backend's device; the result is on the CPU."""
    qkv, cu_seqlens, options = tree_map_only(Tensor, lambda x: x.to(place(backend)), (qkv, cu(lengths), options))
    return ops.attention.backends[backend](qkv, cu_seqlens, max(lengths, default=0), **options).cpu()


def test_attention_reference_with_query_rows_is_the_definition() -> None:
    lengths, keys = [50, 40, 7, 1], torch.tensor([3, 40, 0, 1], dtype=torch.int32)
    qkv = randn(sum(lengths), 3, 2, 8, dtype=FLOAT64, scale=1.5)
    for window in (None, 4):
        options = {"rope": rope(lengths, 8), "window": window, "key_lengths": keys}
        assert_equal_in_float64(ops.attention.reference, one_by_one, qkv, cu(lengths), max(lengths), **options)


@pytest.mark.parametrize("backend", ["reference", *fast(ops.attention)])
def test_attention_of_no_token(backend: str) -> None:
    qkv, options = randn(0, 3, 2, 32), {"rope": rope([0], 32), "window": 8}
    for lengths in ([], [0], [0, 0]):
        assert attend(backend, qkv, lengths, **options).shape == (0, 2, 32)


@pytest.mark.parametrize("backend", ["reference", *fast(ops.attention)])
@pytest.mark.parametrize("window", [None, 8, 64])
def test_attention_stays_inside_its_sequence(backend: str, window: int | None) -> None:
    """The values of one sequence do not change a bit of the others, nor of their gradients."""
    lengths, others = [63, 3, 70], [*range(63), *range(66, 136)]
    qkv = randn(136, 3, 2, 32)
    loud = qkv.clone()
    loud[63:66] = 1e6

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_()
        out = attend(backend, x, lengths, rope=rope(lengths, 32), window=window)
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
    for name in ops.attention.backends.keys() - {"reference"}:
        with pytest.raises(ValueError, match="dropout"):
            ops.attention.backends[name](qkv, cu([64]), 64, rope=rope([64], 8), dropout_p=0.25)


def test_the_mask_of_an_inference_pass_serves_a_training_pass() -> None:
    """The band mask was an inference tensor, which autograd refuses to save."""
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


@TRITON
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("window", [None, 16])
def test_triton_attention_of_every_head_width(width: int, window: int | None) -> None:
    lengths = [40, 3, 90]
    options = {"rope": rope(lengths, width), "window": window, "key_lengths": None}
    check_attention("triton", randn(133, 3, 3, width), cu(lengths), 90, **options)


@TRITON
def test_triton_attention_of_more_sequences_than_it_looks_through_at_a_time() -> None:
    """Hundreds of sequences of no token, one or few, so that a tile holds many of them and follows many others."""
    lengths = [0, 1, 0, 3, 2] * 61
    for window in (None, 1):
        options = {"rope": rope(lengths, 32), "window": window, "key_lengths": None}
        check_attention("triton", randn(sum(lengths), 3, 1, 32), cu(lengths), 3, **options)


@TRITON
def test_triton_attention_of_long_sequences_rotates_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers where keys are rotated once instead of in every tile."""
    monkeypatch.setattr(ops.fused.attention, "LONG", 50)
    lengths = [100, 7]
    options = {"rope": rope(lengths, 32), "window": None, "key_lengths": None}
    check_attention("triton", randn(107, 3, 2, 32), cu(lengths), 100, **options)


@TRITON
def test_triton_attention_takes_views_and_gives_the_same_bits_twice() -> None:
    lengths = [70, 30]
    wide = randn(100, 3, 4, 32).to(DEVICE).requires_grad_()
    options = {"rope": tuple(x.to(DEVICE) for x in rope(lengths, 32)), "window": 16}

    def run() -> tuple[Tensor, Tensor]:
        out = ops.attention.backends["triton"](wide[:, :, 1:3], cu(lengths).to(DEVICE), 70, **options)
        return out, torch.autograd.grad(out.square().sum(), wide)[0]

    first, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    expected = attend("reference", wide.detach().cpu()[:, :, 1:3], lengths, **options | {"rope": rope(lengths, 32)})
    torch.testing.assert_close(first[0].detach().cpu(), expected, rtol=0, atol=1e-5)
    assert not first[1][:, :, 0].any()


@pytest.mark.skipif("triton" not in ops.attention.backends, reason="needs Triton")
def test_triton_attention_refuses_other_widths_and_dtypes() -> None:
    for qkv in (randn(5, 3, 2, 16), randn(5, 3, 2, 32, dtype=FLOAT64)):
        with pytest.raises(ValueError, match=r"width 32, 64 or 128 in float32, bfloat16 or float16, not of width"):
            ops.attention.backends["triton"](qkv, cu([5]), 5, rope=rope([5], qkv.shape[-1]))


@TRITON
@pytest.mark.parametrize("query_rows", [False, True])
def test_triton_attention_keeps_the_rules_of_operators(query_rows: bool) -> None:
    lengths = torch.tensor([0, 20, 20, 31], dtype=torch.int32, device=DEVICE)
    keys = torch.tensor([3, 0, 11], dtype=torch.int32, device=DEVICE) if query_rows else None
    qkv, tables = torch.randn(31, 3, 2, 32, device=DEVICE), torch.rand(2, 31, 16, device=DEVICE)
    ranges = ops.token_ranges.reference(lengths, keys, 31)
    library = torch.ops.modernbert_kernels
    out, lse = library.attention_forward(qkv, ranges, *tables, 8, True, True)
    for keep in (True, False):
        torch.library.opcheck(library.attention_forward.default, (qkv, ranges, *tables, 8, True, keep))
    torch.library.opcheck(
        library.attention_backward.default, (qkv, ranges, *tables, out, lse, torch.rand_like(out), None, True)
    )


@TRITON
def test_triton_attention_reads_the_ranges_of_the_pass() -> None:
    """Layers share them: nothing is read from the offsets again. The same bits with and without, and in inference."""
    lengths, keys = [70, 0, 30], torch.tensor([30, 0, 30], dtype=torch.int32)
    qkv, cu_seqlens, keys = randn(100, 3, 2, 32).to(DEVICE), cu(lengths).to(DEVICE), keys.to(DEVICE)
    tables = tuple(x.to(DEVICE) for x in rope(lengths, 32))
    ranges = ops.token_ranges.backends["triton"](cu_seqlens, keys, 100)
    op = ops.attention.backends["triton"]
    nothing = torch.zeros_like(cu_seqlens), torch.zeros_like(keys)
    wanted = op(qkv, cu_seqlens, 70, rope=tables, window=9, key_lengths=keys)
    got = op(qkv, nothing[0], 70, rope=tables, window=9, key_lengths=nothing[1], ranges_3T=ranges)
    trained = op(qkv.requires_grad_(), cu_seqlens, 70, rope=tables, window=9, key_lengths=keys, ranges_3T=ranges)
    assert torch.equal(got, wanted)
    assert torch.equal(trained, wanted)


@TRITON
@pytest.mark.parametrize("window", [None, 20])
def test_triton_attention_of_blocks_that_are_not_masked(window: int | None) -> None:
    """Blocks inside of what all rows of a tile see, beside query-only rows and another sequence."""
    lengths, keys = [200, 150, 30], torch.tensor([200, 90, 30], dtype=torch.int32)
    options = {"rope": rope(lengths, 32), "window": window, "key_lengths": keys}
    check_attention("triton", randn(380, 3, 1, 32, scale=1.5), cu(lengths), 200, **options)


@pytest.mark.parametrize("backend", ["reference", *fast(ops.token_ranges)])
@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 5, 0, 0, 70, 0], [3] * 300, [1, 600]], ids=len)
def test_token_ranges(backend: str, keys: bool, lengths: list[int]) -> None:
    """From the definition, with two tokens after the last sequence; the offset behind the last one is not read."""
    key_lengths = [n // 2 for n in lengths] if keys else lengths
    rows, begin = [], 0
    for length, seen in zip(lengths, key_lengths, strict=True):
        rows += [[begin, begin + length, begin + seen]] * length
        begin += length
    wanted = torch.tensor([*rows, *[[begin] * 3] * 2], dtype=torch.int32).T
    offsets = torch.tensor([*cu(lengths).tolist(), 9999], dtype=torch.int32)[:-1]
    given = torch.tensor(key_lengths, dtype=torch.int32) if keys else None
    offsets, given = (x if x is None else x.to(place(backend)) for x in (offsets, given))
    got = ops.token_ranges.backends[backend](offsets, given, begin + 2)
    assert got.dtype == torch.int32
    assert torch.equal(got.cpu(), wanted)


def test_threads_keep_their_own_masks() -> None:
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


def test_local_layers_of_a_pass_share_one_mask() -> None:
    """It is made once for a batch, not once a layer; another batch has another one."""
    first = ops.cpu.attention._band_mask((40, 90), 8, torch.float32)
    assert ops.cpu.attention._band_mask((40, 90), 8, torch.float32) is first
    assert ops.cpu.attention._band_mask((90, 40), 8, torch.float32) is not first
