"""Which backend of an op runs: the forced one, the first that accepts, else the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import modernbert_kernels as ops
from modernbert_kernels import reference
from modernbert_kernels.dispatch import ORDER


def test_backend_forces_one() -> None:
    calls = []
    op = ops.Op(lambda x: calls.append("reference") or x)
    op.register("fancy", when=lambda x: x > 0)(lambda x: calls.append("fancy") or x)
    op.register("newest", when=lambda x: x > 10)(lambda x: calls.append("newest") or x)
    for x in (20, 5, -5):
        op(x)
    assert calls == ["newest", "fancy", "reference"]
    calls.clear()
    with ops.backend("reference"):
        op(20)
        with ops.backend("fancy"):
            op(-5)
        op(5)
    op(5)
    assert calls == ["reference", "fancy", "reference", "fancy"]


@pytest.mark.parametrize(
    "registered", [("cpu", "mine", "triton", "flash", "newest"), ("flash", "mine", "newest", "triton", "cpu")]
)
def test_the_table_orders_backends_and_others_come_first(registered: tuple[str, ...]) -> None:
    def attention() -> str:
        return "reference"

    op = ops.Op(attention)
    for name in registered:
        op.register(name, when=lambda: True)(lambda name=name: name)
    found = []
    for _ in registered:
        found.append(op())
        op._choices = op._choices[1:]
    assert found == ["newest", "mine", "flash", "triton", "cpu"]


def test_the_table_names_every_backend_of_ours() -> None:
    of_ours = [value for value in vars(reference).values() if isinstance(value, ops.Op)]
    assert ORDER.keys() == {op.name for op in of_ours}
    for op in of_ours:
        assert set(op.backends) - {"reference"} <= set(ORDER[op.name]), op
        if "triton" in ops.attention.backends and "onednn" in ops.linear.backends:
            assert set(ORDER[op.name]) < set(op.backends), op


def test_a_forced_backend_that_an_op_lacks_is_its_reference() -> None:
    x = torch.randn(5, 8)
    with ops.backend("onednn" if "onednn" in ops.linear.backends else "reference"):
        assert torch.equal(ops.layer_norm(x, torch.ones(8), None, 1e-5), F.layer_norm(x, (8,)))


def test_an_unknown_backend_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"no op has a backend 'cuda9'; there are .*cpu.*reference"),
        ops.backend("cuda9"),
    ):
        pass
    assert ops.attention.name == "attention"
    with pytest.raises(ValueError, match="already registered"):
        ops.attention.register("cpu", when=lambda *_, **__: True)(ops.attention.reference)


def test_an_error_ends_the_forced_backend() -> None:
    with pytest.raises(RuntimeError, match="on purpose"), ops.backend("reference"):
        raise RuntimeError("on purpose")
    calls = []
    op = ops.Op(lambda: calls.append("reference"))
    op.register("fancy", when=lambda: True)(lambda: calls.append("fancy"))
    op()
    assert calls == ["fancy"]
