"""Arguments that every backend accepts, and those that it refuses: strides, second derivatives, devices, switches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_calls import BFLOAT16, DEVICE, TRITON, cu, randn, rope
from torch import Tensor

import modernbert_kernels as ops
from modernbert_kernels import launch
from modernbert_kernels.reference import rotate_back

needs_triton = pytest.mark.skipif("triton" not in ops.attention.backends, reason="needs Triton")


def apart(x: Tensor) -> Tensor:
    """The same values, with others between them."""
    return torch.stack([x, x + 1], dim=-1)[..., 0]


BOUNDS, TABLES = cu([40, 0, 30]), rope([40, 30], 32)
STRIDED: dict[str, Any] = {
    "offsets of attention": (ops.attention, (randn(70, 3, 1, 32), BOUNDS, 40), {"rope": TABLES, "window": 3}),
    "keys of attention": (
        ops.attention,
        (randn(70, 3, 1, 32), BOUNDS, 40),
        {"rope": TABLES, "key_lengths": torch.tensor([9, 0, 4])},
    ),
    "tables of rotate_back": (rotate_back, randn(3, 70, 1, 32).unbind(), {"cos_TR": TABLES[0], "sin_TR": TABLES[1]}),
    "offsets of pool": (ops.pool, (randn(70, 8), BOUNDS, "mean"), {}),
    "rows of project_normalize": (ops.project_normalize, (randn(70, 8), randn(4, 8), None, torch.arange(5, 40)), {}),
    "offsets of maxsim": (ops.maxsim, (randn(70, 8), BOUNDS, randn(70, 8), BOUNDS), {}),
    "offsets of paired maxsim": (ops.maxsim, (randn(70, 8), BOUNDS, randn(70, 8), BOUNDS), {"paired": True}),
}


@TRITON
@pytest.mark.parametrize("name", STRIDED)
def test_integers_and_tables_may_be_strided(name: str) -> None:
    """The kernels read them without strides: rows of `project_normalize` and tables of `rotate_back` were misread."""
    op, arguments, options = STRIDED[name]
    place = lambda how: torch.utils._pytree.tree_map_only(Tensor, how, (arguments, options))  # noqa: E731
    packed, options_packed = place(lambda x: x.to(DEVICE))
    views, options_views = place(lambda x: apart(x.to(DEVICE)))
    run = op.backends["triton"]
    torch.testing.assert_close(run(*views, **options_views), run(*packed, **options_packed))


ONCE: dict[str, Any] = {
    "layer_norm": lambda x: ops.layer_norm.backends["triton"](x, x[0].detach(), None, 1e-5),
    "add_layer_norm": lambda x: ops.add_layer_norm.backends["triton"](x, x, x[0].detach(), None, 1e-5)[1],
    "embed_layer_norm": lambda x: ops.embed_layer_norm.backends["triton"](
        torch.arange(3, device=x.device), x, x[0].detach(), None, 1e-5
    ),
    "geglu": lambda x: ops.geglu.backends["triton"](x),
    "rotary": lambda x: ops.rotary.backends["triton"](x.view(5, 3, 1, 32), *on_device(*rope([5], 32))),
    "attention": lambda x: ops.attention.backends["triton"](
        x.view(5, 3, 1, 32), *on_device(cu([5])), 5, rope=on_device(*rope([5], 32))
    ),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy.backends["triton"](
        x, x.detach(), None, torch.arange(5, device=x.device)
    ),
    "pool": lambda x: ops.pool.backends["triton"](x, *on_device(cu([2, 3]))),
    "project_normalize": lambda x: ops.project_normalize.backends["triton"](x, x.detach()),
    "maxsim": lambda x: ops.maxsim.backends["triton"](x, cu([2, 3]), x.detach(), cu([2, 3])),
}


def on_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(DEVICE) for x in tensors)


@TRITON
@pytest.mark.parametrize("name", ONCE)
def test_a_second_derivative_is_refused(name: str) -> None:
    """It was zero, with a warning."""
    x = randn(5, 96).to(DEVICE).requires_grad_()
    (gradient,) = torch.autograd.grad(ONCE[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@TRITON
@pytest.mark.parametrize("name", [name for name in ONCE if name != "linear_cross_entropy"])
def test_inference_calls_no_autograd_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs as much as a launch, and keeps what only a backward pass reads."""
    x = randn(5, 96).to(DEVICE).requires_grad_()
    wanted = ONCE[name](x).detach()
    monkeypatch.setattr(torch.autograd.Function, "apply", lambda *_: pytest.fail("called"))
    with torch.no_grad():
        assert torch.equal(ONCE[name](x), wanted)


def accepts(op: ops.Op, *arguments: Any, **options: Any) -> bool:
    """Whether the triton backend would take the call if the tensors were on a GPU."""
    when = next(when for name, when, _ in op._choices if name == "triton")
    return when(*arguments, **options)


@needs_triton
def test_conditions_decline_what_the_kernels_would_get_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = ops.fused
    for module in (fused.attention, fused.geglu, fused.maxsim, fused.pool, fused.project_normalize):
        monkeypatch.setattr(module, "supported", lambda *_: True)
    qkv, x, (cos, sin) = randn(5, 3, 1, 32), randn(5, 8), rope([5], 32)
    assert accepts(ops.attention, qkv, cu([5]), 5, rope=(cos, sin))
    assert not accepts(ops.attention, qkv, cu([5]), 5, rope=(cos.clone().requires_grad_(), sin)), "no gradient for it"
    assert not accepts(ops.attention, qkv, cu([5]), 5, rope=(cos[:4], sin[:4]))
    assert accepts(ops.maxsim, x, cu([5]), x, cu([5]))
    assert not accepts(ops.maxsim, x, cu([5]), x[:, :7], cu([5]))
    assert accepts(ops.geglu, x)
    assert not accepts(ops.geglu, x[:, :7])
    assert not accepts(ops.geglu, x[None])
    assert not accepts(ops.geglu, x, "relu")
    assert accepts(ops.project_normalize, x, x)
    assert not accepts(ops.project_normalize, x[None], x)
    assert accepts(ops.pool, x, cu([5]))
    assert not accepts(ops.pool, x[None], cu([1]))


@needs_triton
def test_attention_refuses_tables_that_need_a_gradient() -> None:
    cos, sin = rope([5], 32)
    with pytest.raises(ValueError, match="need no gradient; use the reference"):
        ops.attention.backends["triton"](randn(5, 3, 1, 32), cu([5]), 5, rope=(cos.requires_grad_(), sin))


@pytest.fixture
def _switches() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"  # pyright: ignore


@pytest.mark.usefixtures("_switches")
@pytest.mark.parametrize(
    "switch",
    [
        lambda on: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32" if on else "ieee"),
        lambda on: setattr(torch.backends, "fp32_precision", "tf32" if on else "ieee"),
        lambda on: setattr(torch.backends.cuda.matmul, "allow_tf32", on),
        lambda on: torch.set_float32_matmul_precision("high" if on else "highest"),
    ],
    ids=["products", "everything", "older", "oldest"],
)
def test_precision_follows_every_switch(switch: Callable[[bool], None]) -> None:
    """`allow_tf32`, which was read, raises once one of the newer switches has been used."""
    for on in (True, False):
        switch(on)
        assert launch.precision(randn(1)) == ("tf32" if on else "ieee")
        assert launch.precision(randn(1, dtype=BFLOAT16)) == "ieee"


def test_tensors_of_two_devices_are_refused() -> None:
    """On two GPUs a kernel would read an illegal address, after which every call fails."""
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    assert launch.common_device([there, there]) == there
    with pytest.raises(ValueError, match=r"tensors are on cuda:0, cuda:1: move them to one device"):
        launch.common_device([here, there, here])
