"""Rotary embedding: it rotates pairs, every backend as accurately as the reference, in place or into a copy."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate, results
from kernel_calls import BFLOAT16, DEVICE, FLOAT16, FLOAT32, FLOAT64, TRITON, check, fast, implementations, randn, rope

import modernbert_kernels as ops
from modernbert_kernels.reference import rotate_back


def test_rotary_rotates_pairs() -> None:
    """Rotation keeps lengths, leaves v alone, and makes q k depend on the distance only."""
    cos, sin = rope([50], 16)
    qkv = randn(1, 3, 2, 16, dtype=FLOAT64).expand(50, -1, -1, -1)
    for op in (ops.rotary.reference,):
        out = op(qkv, cos, sin)
        torch.testing.assert_close(out[:, :2].norm(dim=-1), qkv[:, :2].norm(dim=-1), rtol=1e-6, atol=0)
        assert torch.equal(out[:, 2], qkv[:, 2])
        scores = torch.einsum("ihk,jhk->hij", out[:, 0], out[:, 1])
        for distance in (-3, 0, 7):
            diagonal = scores.diagonal(distance, 1, 2)
            torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal), rtol=0, atol=1e-5)
        assert scores.std() > 0.1


@pytest.mark.parametrize(("backend", "dtype"), implementations(ops.rotary))
@pytest.mark.parametrize(
    ("lengths", "heads", "width"),
    [([0], 2, 32), ([1], 1, 64), ([5, 0, 58], 3, 32), ([40, 23], 4, 64), ([9], 2, 128), ([7], 5, 12)],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_rotary_backend(
    backend: str, lengths: list[int], heads: int, width: int, inplace: bool, dtype: torch.dtype
) -> None:
    # The call gets a copy to overwrite, as leaves are not overwritten.
    call = lambda op: lambda qkv, **rope: op(qkv.clone() if inplace else qkv, inplace=inplace, **rope)  # noqa: E731
    cos, sin = rope(lengths, width)
    qkv = randn(sum(lengths), 3, heads, width, dtype=dtype)
    pair = call(ops.rotary.backends[backend]), call(ops.rotary.reference)
    assert_as_accurate(*pair, qkv, device=DEVICE, cos_TR=cos, sin_TR=sin)


@pytest.mark.parametrize("backend", fast(ops.rotary))
@pytest.mark.parametrize("layout", ["whole", "view", "gaps"])
def test_rotary_in_place_is_where_it_was(backend: str, layout: str) -> None:
    """The argument holds the result, memory around it is unchanged, and gradients pass; with views too."""
    cos, sin = (x.to(DEVICE) for x in rope([9], 32))
    leaf = randn(9, 2, 3, 2, 32).to(DEVICE).requires_grad_()
    view = {
        "whole": lambda x: x[:, 1].contiguous(),
        "view": lambda x: x[:, 1].flatten(1).clone().view(9, 3, 2, 32),
        "gaps": lambda x: (x + 0)[:, 1],
    }[layout]
    wanted = ops.rotary.reference(leaf[:, 1], cos, sin)
    qkv, cotangent = view(leaf), torch.randn_like(wanted)
    before, given = qkv._version, cotangent.clone()
    out = ops.rotary.backends[backend](qkv, cos, sin, inplace=True)
    assert out.data_ptr() == qkv.data_ptr()
    assert qkv._version > before, "autograd must see that what others saved has changed"
    torch.testing.assert_close(qkv, wanted)
    assert torch.equal(out[:, 2], leaf[:, 1, 2])
    if layout == "gaps":
        assert torch.equal(qkv._base[:, 0], leaf[:, 0])
    grads = (torch.autograd.grad(y, leaf, cotangent, retain_graph=True)[0] for y in (qkv, wanted))
    torch.testing.assert_close(*grads)
    assert torch.equal(cotangent, given), "a gradient is not ours to overwrite"


@TRITON
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_separate_gradients_are_rotated_back_and_packed(dtype: torch.dtype) -> None:
    cos, sin = rope([9, 40], 32)
    check(rotate_back, "triton", *randn(3, 49, 5, 32, dtype=dtype), gradients=False, cos_TR=cos, sin_TR=sin)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
@pytest.mark.parametrize("backend", fast(ops.rotary))
def test_rotary_leaves_infinities_of_v_alone(backend: str) -> None:
    qkv = randn(9, 3, 2, 32)
    qkv[:, 2] = torch.inf
    out = ops.rotary.backends[backend](*(x.to(DEVICE) for x in (qkv, *rope([9], 32))))
    assert out[:, 2].eq(torch.inf).all()
    assert out[:, :2].isfinite().all()


@pytest.mark.parametrize("backend", fast(ops.rotary))
@pytest.mark.parametrize("inplace", [False, True])
def test_rotary_backend_compiled_and_again(backend: str, inplace: bool) -> None:
    table = dict(zip(("cos_TR", "sin_TR"), rope([9], 32), strict=True))
    op = ops.rotary.backends[backend]
    function = lambda qkv, **rope: op(2 * qkv.transpose(2, 3), inplace=inplace, **rope)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    qkv = randn(9, 3, 32, 2)
    first, *others = (results(run, (qkv,), table, FLOAT32, device=DEVICE) for run in (function, function, compiled))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
