"""Under CUDA autocast every backend gives the dtypes of the reference: by fake tensors, without a GPU.

`torch.autocast("cpu")`, under which other tests run, keeps other ops in float32 than CUDA's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from hf_twin import TINY
from kernel_calls import BFLOAT16, FLOAT16, FLOAT32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import modernbert_kernels as ops
from modernbert import Encoder, Packed
from modernbert_kernels import launch

pytestmark = pytest.mark.skipif("triton" not in ops.attention.backends, reason="needs Triton")


@pytest.fixture
def fakes() -> Iterator[None]:
    """Tensors that have a device and no numbers, on a GPU that the kernels take. Autograd would need the real one."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad(), mock.patch.object(launch, "arch", return_value=90):
        yield


@contextmanager
def autocast_to(dtype: torch.dtype | None) -> Iterator[None]:
    """As `torch.autocast("cuda", dtype)`, which turns itself off where there is not a GPU."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


def encoder_and_batch() -> tuple[Encoder, Packed]:
    with torch.device("meta"):
        encoder = Encoder(TINY)
    batch = Packed(fake(8, dtype=torch.int64), fake(8, dtype=torch.int64), fake(3, dtype=torch.int32), (), 8)
    for module in encoder.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(fake(*weight.shape), requires_grad=False)
    return encoder.eval(), batch


def fake(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    return torch.empty(*shape, device="cuda", dtype=dtype)


def calls(parameters: torch.dtype, activations: torch.dtype, stream: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of each op in a model with these dtypes."""
    weight, x, rope = fake(64, dtype=parameters), fake(8, 64, dtype=activations), (fake(8, 16), fake(8, 16))
    qkv, cu = fake(8, 3, 2, 32, dtype=activations), fake(3, dtype=torch.int32)
    return {
        "layer_norm": (fake(8, 64, dtype=parameters), weight, None, 1e-5),
        "add_layer_norm": (fake(8, 64, dtype=stream), x, weight, None, 1e-5),
        "embed_layer_norm": (fake(8, dtype=torch.int64), fake(100, 64, dtype=parameters), weight, weight, 1e-5),
        "geglu": (x,),
        "rotary_table": (fake(8, dtype=torch.int64), 1e4, 32),
        "rotary": (qkv, *rope),
        "attention": (qkv, cu, 8, rope),
        "pool": (x, cu, "mean"),
        "project_normalize": (fake(8, 64, dtype=stream), fake(16, 64, dtype=parameters)),
        "maxsim": (x, cu, x, cu),
        "linear_cross_entropy": (x, fake(100, 64, dtype=parameters), None, fake(8, dtype=torch.int64)),
    }


def dtypes(name: str, backend: str, arguments: tuple[Any, ...]) -> list[torch.dtype]:
    named = {"rope": arguments[3]} if name == "attention" else {}
    found = getattr(ops, name).backends[backend](*arguments[: 3 if named else None], **named)
    return [x.dtype for x in (found if isinstance(found, tuple) else (found,))]


# What the references of some give. They index or read numbers, which fake tensors cannot do without a GPU.
PRODUCTS = {"project_normalize", "linear_cross_entropy"}
KNOWN: dict[str, Callable[..., list[torch.dtype]]] = {
    "rotary_table": lambda *_: [FLOAT32, FLOAT32],
    "rotary": lambda qkv, *_: [qkv.dtype],
    "attention": lambda qkv, *_: [qkv.dtype],
    "pool": lambda x, *_: [x.dtype],
    "maxsim": lambda *_: [FLOAT32],
    "linear_cross_entropy": lambda *_: [FLOAT32],
}


MODELS = [(FLOAT32, FLOAT32, FLOAT32), (FLOAT32, BFLOAT16, FLOAT32), (BFLOAT16, BFLOAT16, BFLOAT16)]


@pytest.mark.usefixtures("fakes")
def test_the_dtypes_of_the_reference() -> None:
    """`project_normalize` rounded late-interaction vectors to bfloat16 under autocast, and norms of bfloat16 too."""
    for model, dtype in product(MODELS, (None, BFLOAT16, FLOAT16)):
        with autocast_to(dtype):
            for name, arguments in calls(*model).items():
                tensors = [x for x in arguments if isinstance(x, Tensor) and x.is_floating_point()]
                if name in PRODUCTS and dtype is None and len({x.dtype for x in tensors}) > 1:
                    continue  # no dtype to multiply in
                wanted = KNOWN[name](*arguments) if name in KNOWN else dtypes(name, "reference", arguments)
                assert dtypes(name, "triton", arguments) == wanted, (name, model, dtype)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("autocast", [False, True])
def test_the_encoder_finds_the_sequences_once(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And hands them to each layer, where every program of attention had to find its own."""
    encoder, batch = encoder_and_batch()
    made: list[int] = []
    op = ops.token_ranges.backends["triton"]
    monkeypatch.setattr(ops.fused.attention, "token_ranges_triton", lambda *_: pytest.fail("in a layer"))
    monkeypatch.setitem(ops.token_ranges.backends, "triton", lambda *args: made.append(1) or op(*args))
    with ops.backend("triton"), autocast_to(BFLOAT16 if autocast else None):
        assert encoder(batch).dtype == FLOAT32
    assert made == [1]


@pytest.mark.usefixtures("fakes")
def test_a_norm_that_is_only_multiplied_is_not_copied_under_autocast() -> None:
    """It was written in float32, and cast: 12 copies a layer were 8 percent of a step."""
    encoder, batch = encoder_and_batch()
    given: list[torch.dtype] = []
    for layer in encoder.layers[1:]:
        for module in (layer.attn.Wqkv, layer.mlp.Wi):
            module.register_forward_pre_hook(lambda _, args: given.append(args[0].dtype))
    with ops.backend("triton"), autocast_to(BFLOAT16):
        encoder(batch)
    assert set(given) == {BFLOAT16}
    assert len(given) == 2 * (TINY.num_hidden_layers - 1)


@pytest.mark.usefixtures("fakes")
def test_other_gpus_are_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's say `cuda` too, and have capabilities such as 9.4."""
    assert launch.supported(fake(3))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not launch.supported(fake(3))


@pytest.mark.usefixtures("fakes")
def test_dropout_of_attention_is_not_slow_in_silence() -> None:
    """It takes the dense reference."""
    when = next(when for name, when, _ in ops.attention._choices if name == "triton")
    qkv, cu, _, rope = calls(FLOAT32, BFLOAT16, FLOAT32)["attention"]
    assert when(qkv, cu, 8, rope=rope)
    with pytest.warns(UserWarning, match=r"attention with dropout 0.1 runs without the fused kernels"):
        assert not when(qkv, cu, 8, rope=rope, dropout_p=0.1)
