"""Linear, norms and GeGLU: the reference is the formula, every backend is as accurate as the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accuracy import assert_accurate, assert_as_accurate, results
from kernel_calls import (
    BFLOAT16,
    DEVICE,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    TRITON,
    assert_equal_in_float64,
    cu,
    fast,
    implementations,
    randn,
    rope,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import modernbert_kernels as ops


@pytest.mark.parametrize("backend", [name for name in ops.linear.backends if name != "reference"])
@pytest.mark.parametrize(("tokens", "width", "out"), [(0, 64, 96), (1, 64, 96), (63, 33, 7), (300, 256, 768)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_backend(backend: str, tokens: int, width: int, out: int, bias: bool) -> None:
    """The onednn backend is for float32 and inference; it raises when it is forced to do more."""
    x, weight = randn(tokens, width), randn(out, width, scale=width**-0.5)
    arguments = (x, weight, randn(out)) if bias else (x, weight)
    assert_as_accurate(ops.linear.backends[backend], ops.linear.reference, *arguments, gradients=False)
    with pytest.raises(ValueError, match="no gradient"):
        ops.linear.backends[backend](x, weight.requires_grad_())


def test_linear_backend_takes_views() -> None:
    """Rows of a wider matrix and a transposed weight are what callers really pass."""
    x, weight = randn(40, 128)[:, 32:96], randn(64, 48).T
    for name in ops.linear.backends:
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
    plain, gather = (lambda op: op), (lambda op: lambda *args: op(ids.to(args[0].device), *args))
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


ROWWISE = [
    pytest.param(case, *getattr(pair, "values", pair), marks=getattr(pair, "marks", ()))
    for case, (op, *_) in rowwise(0, FLOAT32).items()
    for pair in implementations(op)
]


@pytest.mark.parametrize("tokens", [0, 1, 63, 300])
@pytest.mark.parametrize("case", rowwise(0, FLOAT32))
def test_rowwise_reference_is_the_formula(tokens: int, case: str) -> None:
    op, call, formula, arguments = rowwise(tokens, FLOAT64)[case]
    assert_equal_in_float64(call(op.reference), formula, *arguments)


@pytest.mark.parametrize("tokens", [0, 1, 63, 300])
@pytest.mark.parametrize(("case", "backend", "dtype"), ROWWISE)
def test_rowwise_backend(tokens: int, case: str, backend: str, dtype: torch.dtype) -> None:
    op, call, _, arguments = rowwise(tokens, dtype)[case]
    assert_as_accurate(call(op.backends[backend]), call(op.reference), *arguments, device=DEVICE)


@pytest.mark.parametrize("backend", fast(ops.layer_norm))
@pytest.mark.parametrize("width", [1, 33, 256, 768, 1024, 1792])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_norms_of_any_width(backend: str, width: int, dtype: torch.dtype) -> None:
    x, delta, table, weight, bias = (randn(*n, width, dtype=dtype) for n in ((5,), (5,), (3,), (), ()))
    ids = torch.tensor([2, 0, 2, 2, 0], device=DEVICE)
    gather = lambda op: lambda *args: op(ids.to(args[0].device), *args)  # noqa: E731
    for op, call, arguments in (
        (ops.add_layer_norm, lambda op: op, (x, delta)),
        (ops.embed_layer_norm, gather, (table,)),
    ):
        pair = call(op.backends[backend]), call(op.reference)
        assert_as_accurate(*pair, *arguments, weight, bias, 1e-5, device=DEVICE)


@pytest.mark.skipif("triton" not in ops.layer_norm.backends, reason="needs Triton")
@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=TRITON) for dtype in (FLOAT32, BFLOAT16)])
@pytest.mark.parametrize("programs", [1, 2, 5])
def test_norm_gradients_by_programs_that_walk(dtype: torch.dtype, programs: int, monkeypatch: Any) -> None:
    """Few programs for many rows, as on a GPU with many more; the last tile is short."""
    monkeypatch.setattr(ops.fused.layer_norm_kernels, "_programs", lambda device, warps: programs)
    for width in (96, 500):
        arguments = [randn(*n, width, dtype=dtype) for n in ((61,), (61,), (), ())]
        op = ops.add_layer_norm
        assert_as_accurate(op.backends["triton"], op.reference, *arguments, 1e-5, device=DEVICE)


STREAMS = [(FLOAT32, BFLOAT16, BFLOAT16), (FLOAT32, FLOAT16, FLOAT16), (FLOAT32, BFLOAT16, FLOAT32)]


@pytest.mark.parametrize("backend", fast(ops.add_layer_norm))
@pytest.mark.parametrize("dtypes", [*STREAMS, (BFLOAT16, FLOAT32, BFLOAT16)])
@pytest.mark.parametrize("bias", [False, True])
def test_add_layer_norm_of_two_dtypes(backend: str, dtypes: tuple[torch.dtype, ...], bias: bool) -> None:
    """A float32 stream: it stays float32, the norm takes the dtype of its weight, gradients those of the arguments."""
    x_dtype, delta_dtype, dtype = dtypes
    arguments = randn(40, 96, dtype=x_dtype), randn(40, 96, dtype=delta_dtype), randn(96, dtype=dtype)
    arguments += (randn(96, dtype=dtype),) if bias else ()

    def run(op: Any, exact: bool, device: str) -> list[Tensor]:
        leaves = [(x.double() if exact else x).to(device, copy=True).requires_grad_() for x in arguments]
        outputs = op(*leaves, *(() if bias else (None,)), 1e-5)
        cotangents = [x.cos() for x in arguments[:2]]
        loss = sum((y.double() * g.to(device)).sum() for y, g in zip(outputs, cotangents, strict=True))
        return [x.detach().cpu() for x in (*outputs, *torch.autograd.grad(loss, leaves))]

    op = ops.add_layer_norm
    got, plain = run(op.backends[backend], False, DEVICE), run(op.reference, False, "cpu")
    for i, truth in enumerate(run(op.reference, True, "cpu")):
        assert_accurate(got[i], plain[i], truth, f"{i}")


@pytest.mark.parametrize("backend", fast(ops.add_layer_norm))
@pytest.mark.parametrize("used", [0, 1])
def test_add_layer_norm_of_which_one_output_is_used(backend: str, used: int) -> None:
    arguments = randn(9, 96), randn(9, 96), randn(96), randn(96), 1e-5
    half = lambda op: lambda *args: op(*args)[used]  # noqa: E731
    op = ops.add_layer_norm
    assert_as_accurate(half(op.backends[backend]), half(op.reference), *arguments, device=DEVICE)


@pytest.mark.parametrize("backend", ["reference", *fast(ops.add_layer_norm)])
def test_add_layer_norm_of_a_dtype_that_is_asked_for(backend: str) -> None:
    """Under autocast: a float32 stream and float32 weights, and a norm that is only multiplied, in bfloat16."""
    x, delta, weight = (y.to(DEVICE) for y in (randn(9, 96), randn(9, 96, dtype=BFLOAT16), randn(96)))
    leaves = [y.requires_grad_() for y in (x, delta, weight)]
    op = ops.add_layer_norm.backends[backend]
    found = []
    for run in (lambda: op(*leaves, None, 1e-5, BFLOAT16), lambda: op(*leaves, None, 1e-5)):
        s, y = run()
        y = y.to(BFLOAT16)
        assert s.dtype == FLOAT32
        found.append([s, y, *torch.autograd.grad((y.float() * y.detach().cos().float()).sum() + s.sum(), leaves)])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other), "the same roundings as with a copy in that dtype"


FROZEN = {
    "layer_norm": (lambda op: op, lambda: (randn(9, 96), randn(96), randn(96), 1e-5)),
    "add_layer_norm": (
        lambda op: lambda *args: op(*args)[1],
        lambda: (randn(9, 96), randn(9, 96), randn(96), randn(96), 1e-5),
    ),
    "embed_layer_norm": (
        lambda op: lambda *args: op(torch.arange(9, device=args[0].device) % 4, *args),
        lambda: (randn(4, 96), randn(96), randn(96), 1e-5),
    ),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=TRITON) for name in FROZEN])
def test_norms_compute_no_gradient_that_is_not_wanted(name: str) -> None:
    """A frozen table had a dense gradient, and a frozen norm that of its weight."""
    call, make = FROZEN[name]
    run, arguments = call(getattr(ops, name).backends["triton"]), make()
    leaves = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    cotangent = randn(9, 96).to(DEVICE)

    def grads(*wanted: Tensor) -> tuple[tuple[Tensor, ...], set[tuple[str, tuple[int, ...]]]]:
        for x in tensors:
            x.requires_grad_(any(x is y for y in wanted))
        out = run(*leaves)
        with Calls() as calls:
            found = torch.autograd.grad(out, wanted, cotangent)
        return found, calls.made

    every, _ = grads(*tensors)
    for at, x in enumerate(tensors):
        (one,), made = grads(x)
        assert torch.equal(one, every[at])
        is_parameter = x.dim() == 1
        wanted = {(0,), (1, 96)} if is_parameter else {(9, 96), (0, 96)}
        assert {shape for name, shape in made if name == "modernbert_kernels.norm_backward"} == wanted
        assert not (is_parameter and any("embedding" in name for name, _ in made))


class Calls(TorchDispatchMode):
    """The operators that are called, with the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[str, tuple[int, ...]]] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        name = str(operation).removesuffix(".default")
        self.made |= {(name, tuple(x.shape)) for x in tree_flatten(found)[0] if isinstance(x, Tensor)}
        return found


def strided(x: Any) -> Any:
    """The same numbers with a gap after each, and their gradient with gaps too."""
    return torch.stack([x, x.detach()], -1)[..., 0] if isinstance(x, Tensor) else x


@pytest.mark.parametrize(("case", "backend", "dtype"), [one for one in ROWWISE if one.values[2] is FLOAT32])
def test_rowwise_backend_takes_views(case: str, backend: str, dtype: torch.dtype) -> None:
    op, call, _, arguments = rowwise(63, dtype)[case]

    def views(op: Any) -> Any:
        def run(*args: Any) -> tuple[Tensor, ...]:
            outputs = call(op)(*map(strided, args))
            # Cotangents come as columns.
            return tuple(y.T for y in (outputs if isinstance(outputs, tuple) else (outputs,)))

        return run

    assert_as_accurate(views(op.backends[backend]), views(op.reference), *arguments, device=DEVICE)


@pytest.mark.parametrize(("case", "backend", "dtype"), [one for one in ROWWISE if one.values[2] is BFLOAT16])
def test_rowwise_backend_compiled_and_again(case: str, backend: str, dtype: torch.dtype) -> None:
    """One graph, and the same bits in every run."""
    op, call, _, arguments = rowwise(63, dtype)[case]
    function = call(op.backends[backend])
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    first, *others = (results(run, arguments, {}, dtype, device=DEVICE) for run in (function, function, compiled))
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)


def operator_calls() -> dict[str, list[tuple[Any, ...]]]:
    """Per operator of torch: arguments that take each of its branches."""
    x, dy, ds, weight, stats = randn(9, 96), randn(9, 96), randn(9, 96), randn(96), randn(2, 9).abs()
    ids, half, turn = torch.arange(9) % 4, torch.bfloat16, (randn(9, 3, 2, 32), *rope([9], 32))
    return {
        "geglu_forward": [(x, "gelu")],
        "geglu_backward": [(x, dy[:, :48].contiguous(), "silu")],
        "norm_forward": [(x, None, None, weight, weight, 1e-5, FLOAT32, True),
                         (x, ids, None, weight, None, 1e-5, half, False),
                         (x, None, dy.to(half), weight.to(half), None, 1e-5, half, True)],
        "norm_backward": [(dy, None, x, None, weight, stats, [True, True, True], None),
                          (dy, ds, x, ids, weight, stats, [True, False, False], half),
                          (dy, None, x, None, weight, stats, [False, False, True], None)],
        "rotary": [(*turn, False), (*turn, True)],
        "rotary_": [turn],
        "rotate_back": [(*turn[0].unbind(1), *turn[1:])],
        "token_ranges": [(cu([4, 0, 5]), None, 9), (cu([4, 0, 5]), cu([2, 1])[:3], 9)],
    }  # fmt: skip


@pytest.mark.skipif("triton" not in ops.layer_norm.backends, reason="needs Triton")
@pytest.mark.parametrize("name", [pytest.param(name, marks=TRITON) for name in operator_calls()])
def test_rowwise_operator_keeps_the_rules(name: str) -> None:
    """Its schema is right, and so are the shapes, dtypes and strides of its fake outputs."""
    for arguments in operator_calls()[name]:
        moved = tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments)
        torch.library.opcheck(getattr(torch.ops.modernbert_kernels, name).default, moved)


@pytest.mark.skipif("triton" not in ops.layer_norm.backends, reason="needs Triton")
def test_rowwise_backends_refuse_what_they_would_get_wrong() -> None:
    x, weight, qkv, table = randn(5, 96), randn(96), randn(5, 3, 2, 32), rope([5], 32)
    norm, add, embed, turn = (
        op.backends["triton"] for op in (ops.layer_norm, ops.add_layer_norm, ops.embed_layer_norm, ops.rotary)
    )
    ids = torch.zeros(5, dtype=torch.int64)
    for call in (
        lambda: norm(x.double(), weight.double(), None, 1e-5),
        lambda: norm(x.bfloat16(), weight, None, 1e-5),
        lambda: norm(x, weight, weight.bfloat16(), 1e-5),
        lambda: norm(x, weight[:95], None, 1e-5),
        lambda: norm(randn(2, 5000), randn(5000), None, 1e-5),
        lambda: add(x.bfloat16(), x.bfloat16(), weight, None, 1e-5),
        lambda: add(x.bfloat16(), x.half(), weight, None, 1e-5),
        lambda: add(x, x[:1], weight, None, 1e-5),
        lambda: embed(ids, x.bfloat16(), weight, None, 1e-5),
        lambda: turn(qkv.double(), *table),
        lambda: turn(qkv, *(t.bfloat16() for t in table)),
        lambda: turn(qkv, table[0].requires_grad_(), table[1]),
        lambda: turn(qkv[:4], *table),
    ):
        with pytest.raises(ValueError, match="use the reference"):
            call()


def test_geglu_knows_two_activations() -> None:
    for name in ("relu", "gelu_new"):
        with pytest.raises(ValueError, match=rf'activation must be "gelu" or "silu", got \'{name}\''):
            ops.geglu(randn(3, 8), name)
