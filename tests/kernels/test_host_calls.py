"""The host's work in inference: no more calls than were committed, and launches of the right binary."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from kernel_calls import BFLOAT16, FLOAT32, INTERPRETED, randn

import modernbert_kernels as ops
from modernbert import Encoder, pack
from modernbert.config import EncoderConfig
from modernbert_kernels import launch

pytestmark = [
    pytest.mark.skipif(not find_spec("triton"), reason="needs Triton, which has no wheel for this platform"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter has no launches"),
]

FRAMES, C_CALLS = 168, 79
"""Of a layer by tests/kernels/host_calls.py, with torch 2.13 and Triton 3.7. They were 297 and 217 when every launch
went through Triton's and torch's dispatchers."""


@pytest.fixture
def stub() -> Iterator[Any]:
    """A driver whose launches do nothing."""
    import host_calls

    with torch.inference_mode(), host_calls.pretended() as found:
        yield found


def test_a_layer_makes_no_more_calls_than_before() -> None:
    import host_calls

    counts = host_calls.layer_counts()
    assert counts.launches == 4
    assert counts.frames <= 1.1 * FRAMES
    assert counts.c_calls <= 1.1 * C_CALLS


def launched(stub: Any, *args: Any) -> list[tuple[Any, ...]]:
    stub.launches.clear()
    ops.geglu(*args)
    return list(stub.launches)


def arguments(launch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of the kernel: the last of a launch; in Triton 3.6 all that begin with the first tensor."""
    if isinstance(launch[-1], tuple):
        return launch[-1]
    return launch[next(at for at, one in enumerate(launch) if isinstance(one, torch.Tensor)) :]


def test_a_binary_is_found_for_what_it_was_compiled_for(stub: Any) -> None:
    """Everything that Triton compiles another binary for: dtype, alignment, constants; but not the number of rows."""
    memory = randn(4000)
    h = memory[:256].view(4, 64)
    calls = {
        "first": (h,),
        "of more rows": (memory[:512].view(8, 64),),
        "unaligned": (memory[1:257].view(4, 64),),
        "of another dtype": (h.to(BFLOAT16),),
        "of another activation": (h, "silu"),
        "of another width": (memory[:256].view(2, 128),),
    }
    binaries = {}
    for name, args in calls.items():
        (once,), (again,) = launched(stub, *args), launched(stub, *args)
        assert once[0] == again[0], name
        # The grid and, last, the arguments of the kernel.
        assert once[1:4] == again[1:4], name
        (pointer, *rest), (pointer_again, *rest_again) = arguments(once), arguments(again)
        assert pointer is pointer_again is args[0], name
        assert rest[1:] == rest_again[1:], name
        binaries[name] = once[0]
    assert binaries.pop("of more rows") == binaries["first"]
    assert len(set(binaries.values())) == len(binaries)


def test_optional_tensors_have_binaries_of_their_own(stub: Any) -> None:
    x, weight, bias = randn(4, 64), randn(64), randn(64)
    found = []
    for arguments in ((x, weight, None, 1e-5), (x, weight, bias, 1e-5), (x, weight, None, 1e-6)):
        stub.launches.clear()
        ops.layer_norm(*arguments)
        found.append(stub.launches[0][0])
    assert found[0] == found[2] != found[1]


def test_the_key_of_numbers() -> None:
    """A number of 64 bits and, where Triton specializes it, a multiple of 16 and 1 have binaries of their own."""
    from modernbert_kernels.fused.geglu import geglu_forward_kernel
    from modernbert_kernels.fused.linear_cross_entropy import scale_kernel

    x = randn(16)

    def keys(kernel: Any, args: tuple[Any, ...], place: int, numbers: tuple[int, ...]) -> set[Any]:
        return {kernel.key((*args[:place], number, *args[place + 1 :]), 4, 3) for number in numbers}

    assert len(keys(geglu_forward_kernel, (x, x, 5, 64, False, 4, 64), 2, (1, 5, 16, 1 << 30, 1 << 31))) == 2
    assert len(keys(scale_kernel, (x, x, x, 5, 2048), 3, (1, 5, 7, 16, 32, 1 << 31))) == 4


def test_compilers_and_modes_see_the_operators() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return torch.zeros(1)

    class Mine(torch.Tensor):
        pass

    called = []

    @launch.operator("seen_by_modes(Tensor x) -> Tensor", fake=torch.empty_like)
    def run(x: torch.Tensor) -> torch.Tensor:
        called.append(type(x))
        return x + 1

    x = torch.ones(2)
    assert run(x).sum() == 4
    assert torch.compile(run, fullgraph=True, backend="eager")(x).sum() == 4
    with Log():
        run(x)
    assert "modernbert_kernels.seen_by_modes.default" in seen
    assert run(x.as_subclass(Mine)).sum() == 4


SMALL = EncoderConfig(vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(SMALL).eval()


BATCH = pack([[1, 2, 3], [4] * 9, [5]])


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Tensors that products were added to, with tensors of the CPU taken for those of a GPU."""
    found, addmm = [], torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda x, a, b: (found.append(x), addmm(x, a, b))[1])
    with ops.backend("reference"):
        yield found


@pytest.mark.parametrize("rows", [None, BATCH.cu_seqlens[:-1]])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_products_are_added_to_the_stream(encoder: Encoder, rows: Any, dtype: Any, added: list[Any]) -> None:
    """With one rounding less: against float64, the error is at most that of the sum of a rounded product."""
    encoder.to(dtype)
    truth = Encoder(SMALL).double().eval()
    truth.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        got, exact = encoder(BATCH, rows=rows), truth(BATCH, rows=rows)
        assert len(added) == 2 * (2 * SMALL.num_hidden_layers - 1)  # both encoders, and not the first of each
        assert got.dtype == dtype
        for layer in encoder.layers:
            layer.register_forward_hook(lambda *_: None)
        plain = encoder(BATCH, rows=rows)
        assert len(added) == 2 * (2 * SMALL.num_hidden_layers - 1)
    error = lambda x: (x.double() - exact).square().mean().sqrt()  # noqa: E731
    assert error(got) <= 1.1 * error(plain) + torch.finfo(dtype).eps * exact.square().mean().sqrt() / 8


def test_products_are_not_added_where_others_look(encoder: Encoder, added: list[Any]) -> None:
    """In training, under autocast, with hooks, adapters, and weights of another class."""
    encoder(BATCH)
    with torch.no_grad():
        encoder.train()(BATCH)
        encoder.eval()
        torch.set_autocast_enabled("cuda", True)
        try:
            encoder(BATCH)
        finally:
            torch.set_autocast_enabled("cuda", False)
        assert not added
        seen = []
        handle = encoder.layers[1].register_forward_hook(lambda _, __, out: seen.append((out[0], out[0].clone())))
        encoder(BATCH)
        handle.remove()
        norm: Any = encoder.layers[1].mlp_norm
        handle = norm.register_forward_hook(lambda _, given, __: seen.append((given[0], given[0].clone())))
        encoder(BATCH)
        assert len(seen) == 2
        assert all(torch.equal(*pair) for pair in seen)
        handle.remove()
        layer: Any = encoder.layers[2]
        layer.mlp.Wo = torch.nn.Sequential(layer.mlp.Wo)
        added.clear()
        encoder(BATCH)
        assert len(added) == 2 * 3 - 1


def test_hidden_states_are_not_overwritten(encoder: Encoder, added: list[Any]) -> None:
    from modernbert.integrations.states import hidden_states

    with torch.no_grad():
        got = hidden_states(encoder, BATCH)
    assert added
    for one, wanted in zip(got, hidden_states(encoder, BATCH), strict=True):
        torch.testing.assert_close(one, wanted.detach(), rtol=1e-5, atol=1e-5)
