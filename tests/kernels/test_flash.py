"""The FlashAttention adapters: units, argument names and gradients, with stand-ins for the kernels without a GPU.

A stand-in has the signature of the real function (torch checks its own schema) and computes what FlashAttention
documents: windows with both ends included, counted from the last query and the last key, in plain float64.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate
from kernel_calls import FLOAT16, FLOAT64, cu, randn, rope
from torch import Tensor

import modernbert_kernels as ops
from modernbert_kernels import flash
from modernbert_kernels.flash import packages

MIXES = {"one": [1], "edges": [1, 2, 63, 65, 9], "zero-length": [0, 5, 0, 0, 40, 0]}


def attend(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, left: int | None, right: int | None
) -> tuple[Tensor, Tensor]:
    """What FlashAttention computes: the output and the logarithm of each row's sum, +inf where a row sees nothing."""
    outputs, sums = [], []
    for rows, columns, scores in spans(q, k, cu_q, cu_k, left, right):
        lse = scores.logsumexp(-1).nan_to_num(neginf=float("inf"))
        outputs.append(torch.einsum("hij,jhk->ihk", (scores - lse[..., None]).exp(), v[columns]))
        sums.append(lse)
        assert len(outputs[-1]) == rows.stop - rows.start
    return torch.cat(outputs), torch.cat(sums, dim=1)


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, *window: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients, as it makes them of `out` and `lse`; what no sequence holds is not written, here NaN."""
    dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, k, v))
    for rows, columns, scores in spans(q, k, cu_q, cu_k, *window):
        weights = (scores - lse[:, rows, None]).exp()
        mean = (dout[rows] * out[rows]).sum(-1).T[..., None]
        dscores = weights * (torch.einsum("ihk,jhk->hij", dout[rows], v[columns]) - mean) * q.shape[-1] ** -0.5
        dq[rows] = torch.einsum("hij,jhk->ihk", dscores, k[columns])
        dk[columns] = torch.einsum("hij,ihk->jhk", dscores, q[rows])
        dv[columns] = torch.einsum("hij,ihk->jhk", weights, dout[rows])
    return dq, dk, dv


def spans(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, left: int | None, right: int | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """For each sequence its queries, its keys and their scores, -inf outside the window."""
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        distance = torch.arange(k1 - k0) - (torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0))
        seen = torch.ones_like(distance, dtype=torch.bool)
        if left is not None and left >= 0:
            seen &= distance >= -left
        if right is not None and right >= 0:
            seen &= distance <= right
        scores = torch.einsum("ihk,jhk->hij", q[q0:q1], k[k0:k1]) * q.shape[-1] ** -0.5
        yield slice(q0, q1), slice(k0, k1), scores.masked_fill(~seen, float("-inf"))


# As of flash-attn 2.8.4, flash-attn-3 3.0 and flash-attn-4 of August 2026, up to the arguments about other features.
SIGNATURES: dict[str, Any] = {
    "flash_attn.flash_attn_interface._flash_attn_varlen_forward": (
        lambda q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0: None
    ),
    "flash_attn.flash_attn_interface._flash_attn_varlen_backward": (
        lambda dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False: None
    ),
    "flash_attn_interface._flash_attn_forward": (
        lambda q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0: None
    ),
    "flash_attn_interface._flash_attn_backward": (
        lambda dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0: None
    ),
    "flash_attn.cute.interface._flash_attn_fwd": (
        lambda q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False,
        softcap=None, window_size_left=None, window_size_right=None, return_lse=False: None
    ),
    "flash_attn.cute.interface._flash_attn_bwd": (
        lambda q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None: None
    ),
}  # fmt: skip


def stand_in(name: str) -> Any:
    """A function with the signature of the package's that takes no feature but ours, and computes with `attend`."""
    signature, fourth = inspect.signature(SIGNATURES[name]), ".cute." in name
    module, function = name.rsplit(".", 1)
    (row,) = (row for row in packages.PACKAGES.values() if row.module == module)
    expected = row.calls[function][0], set(row.calls[function][1])

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        assert (len(args), set(kwargs)) == expected, "what `_takes` looks for"
        bound.apply_defaults()
        a = bound.arguments
        width = a["q"].shape[-1]
        assert a["softmax_scale"] in ((None, width**-0.5) if fourth else (width**-0.5,))
        assert not any((a.get("causal"), a.get("is_causal"), a.get("dropout_p"), a["softcap"]))
        assert fourth or a["window_size_left"] is not None, "generations 2 and 3 take integers"
        where = (a["cu_seqlens_q"], a["cu_seqlens_k"], a["window_size_left"], a["window_size_right"])
        for bounds, longest in ((where[0], a["max_seqlen_q"]), (where[1], a["max_seqlen_k"])):
            assert bounds.dtype == torch.int32
            assert bounds.diff().max() <= longest
        if "dout" not in a:
            out, lse = attend(a["q"], a["k"], a["v"], *where)
            assert not fourth or a["return_lse"]
            return out, lse, None, None
        lse = a["lse"] if fourth else a["softmax_lse"]
        found = attend_backward(a["dout"], a["q"], a["k"], a["v"], a["out"], lse, *where)
        if fourth:
            return found
        for name, value in zip(("dq", "dk", "dv"), found, strict=True):
            a[name].copy_(value)
        return torch.empty(0)

    call.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return call


@pytest.fixture
def forget_installed() -> Iterator[None]:
    """What is installed is looked up once in a process: for a test that changes it, also before and after."""
    packages._installed.cache_clear()
    yield
    packages._installed.cache_clear()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for the three packages, and for the kernels of torch."""
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for path in SIGNATURES:
        module, function = path.rsplit(".", 1)
        if not hasattr(sys.modules.get(module), "stand_in"):
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
            sys.modules[module].stand_in = True  # pyright: ignore
        setattr(sys.modules[module], function, stand_in(path))

    def torch_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        cu_q, cu_k, _, _, dropout, causal, _ = rest
        assert not any((dropout, causal))
        out, lse = attend(q, k, v, cu_q, cu_k, options.get("window_size_left"), options.get("window_size_right"))
        return out, lse, torch.empty(2), torch.empty(0), torch.empty(0)

    def torch_backward(*args: Any, **options: Any) -> Any:
        tensors, (cu_q, cu_k, _, _, dropout, causal) = args[:6], args[6:12]
        assert not any((dropout, causal))
        return attend_backward(*tensors, cu_q, cu_k, options.get("window_size_left"), options.get("window_size_right"))

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", torch_forward, "CPU")
    library.impl("_flash_attention_backward", torch_backward, "CPU")
    yield
    library._destroy()


def attention(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend with this row of the table, whatever would be chosen."""
    monkeypatch.setattr(packages, "choose", lambda *args, **options: name)
    return ops.attention.backends["flash"]


def call(lengths: list[int], window: int | None, keys: str | None, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    fewer = {"none": [0] * len(lengths), "half": [(n + 1) // 2 for n in lengths], "all": lengths}
    arguments = (randn(sum(lengths), 3, 2, 16, dtype=dtype), cu(lengths), max(lengths))
    key_lengths = None if keys is None else torch.tensor(fewer[keys], dtype=torch.int32)
    return arguments, {"rope": rope(lengths, 16), "window": window, "key_lengths": key_lengths}


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("window", "keys"), [(None, None), (0, None), (7, None), (64, None), (None, "half"), (None, "none"), (None, "all")]
)
@pytest.mark.parametrize("name", packages.PACKAGES)
def test_units_and_arguments(
    name: str, window: int | None, keys: str | None, mix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 the adapters with stand-ins give the op: windows, key lengths, scale, rows outside of sequences."""
    arguments, options = call(MIXES[mix], window, keys, FLOAT64)
    found = []
    for op in (attention(name, monkeypatch), ops.attention.reference):
        qkv = arguments[0].clone().requires_grad_()
        out = op(qkv, *arguments[1:], **options)
        found.append((out, *torch.autograd.grad(out, qkv, torch.linspace(-1, 1, out.numel()).view_as(out).double())))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("stand_ins")
def test_its_operators_keep_the_rules() -> None:
    lengths, tables = cu([20, 0, 11]), torch.rand(2, 31, 8)
    keys = torch.tensor([3, 0, 11], dtype=torch.int32)
    qkv, library = randn(31, 3, 2, 16), torch.ops.modernbert_kernels
    for key_lengths in (None, keys):
        call = (lengths, key_lengths), (20, None, "flash2")
        out, lse = flash.flash_forward(qkv, *call[0], *call[1])
        torch.library.opcheck(library.flash_forward.default, (qkv, *call[0], *call[1]))
        saved = (torch.rand_like(out), qkv, *call[0], *tables, out, lse)
        torch.library.opcheck(library.flash_backward.default, (*saved, *call[1]))


def test_a_window_with_key_lengths_is_counted_from_the_other_end() -> None:
    """Why `choose` refuses it: four queries, two keys and a window of 1 see other keys than ours."""
    q, k, v = (torch.eye(4, dtype=FLOAT64)[:, None] for _ in range(3))
    out, _ = attend(q, k[:2], v[:2], cu([4]), cu([2]), 1, 1)
    assert [row.nonzero()[:, 0].tolist() for row in out[:, 0]] == [[], [0], [0, 1], [0, 1]]
    options = {"rope": rope([4], 4), "window": 1, "key_lengths": torch.tensor([2])}
    ours = ops.attention.reference(torch.stack([q, k, v], 1), cu([4]), 4, **options)
    assert [row.nonzero()[:, 0].tolist() for row in ours[:, 0]] == [[0, 1], [0, 1], [1], []]


@pytest.mark.usefixtures("forget_installed", "stand_ins")
@pytest.mark.parametrize(
    ("arch", "installed", "wanted"),
    [
        ((8, 0), {"torch": True, "flash-attn": "2.8.3", "flash-attn-4": "4.0.0b36"}, ("torch", "flash2")),
        ((8, 9), {"torch": False, "flash-attn": "2.8.3"}, ("flash2",)),
        ((8, 9), {"torch": False, "flash-attn": "2.6.3"}, ()),
        ((9, 0), {"torch": True, "flash-attn-3": "3.0.0b1", "flash-attn-4": "4.0.0"}, ("flash3", "flash4", "torch")),
        ((10, 3), {"torch": True, "flash-attn-3": "3.0.0", "flash-attn-4": "4.0.0b36"}, ("flash4", "torch")),
        ((12, 0), {"torch": True, "flash-attn-4": "4.0.0b36"}, ("torch",)),
        ((7, 5), {"torch": True, "flash-attn": "2.8.3"}, ()),
    ],
)
def test_usable(arch: Any, installed: dict[str, Any], wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise packages.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(packages.metadata, "version", version)
    monkeypatch.setattr(packages, "arch", lambda device: 10 * arch[0] + arch[1])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: installed["torch"])
    assert packages.usable(torch.device("cuda", 0)) == wanted


# Without defaults, and with one window: builds of flash-attn-3 from before 17 November 2025, all of them 3.0.0b1.
OLD: dict[str, Any] = {
    "flash_attn_interface._flash_attn_forward": lambda q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k,
    cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos,
    rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1): None,
    "flash_attn_interface._flash_attn_backward": lambda dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k,
    sequed_q, sequed_k, max_seqlen_q, max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1): None,
    "flash_attn.cute.interface._flash_attn_fwd": lambda q, k, v, cu_seqlens_q=None, cu_seqlens_k=None: None,
    "flash_attn.flash_attn_interface._flash_attn_varlen_forward": None,
}  # fmt: skip


@pytest.mark.usefixtures("forget_installed", "stand_ins")
@pytest.mark.parametrize("path", OLD)
def test_a_package_that_takes_other_arguments_is_left_out(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call was a TypeError for every long global layer, and nothing falls back."""
    (name,) = (name for name, row in packages.PACKAGES.items() if row.module == path.rsplit(".", 1)[0])
    monkeypatch.setattr(packages.metadata, "version", lambda _: "4.0.0")
    assert packages.installed(name)
    packages._installed.cache_clear()
    module, function = path.rsplit(".", 1)
    monkeypatch.setattr(sys.modules[module], function, OLD[path])
    assert not packages.installed(name)


def test_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "usable", lambda device: ("flash3", "torch"))
    qkv, lengths = randn(5, 3, 2, 16, dtype=FLOAT16), torch.tensor([5])
    bounds = cu([5])

    def rule(qkv: Tensor = qkv, bounds: Tensor = bounds, **options: Any) -> str | None:
        return packages.choose(qkv, bounds, 5, rope=rope([5], 16), **options)

    assert rule() == rule(window=2) == rule(key_lengths=lengths) == rule(qkv.bfloat16()) == "flash3"
    assert rule(window=2, key_lengths=lengths) is None
    assert rule(dropout_p=0.1) is None
    assert rule(qkv.float()) is None
    assert rule(qkv[..., :12]) is None
    assert rule(randn(5, 3, 1, 192, dtype=FLOAT16)) is None
    learned = [table.requires_grad_() for table in rope([5], 16)]
    assert packages.choose(qkv, bounds, 5, rope=(learned[0], learned[1])) is None
    assert rule(qkv[:0], cu([0])) is None
    assert rule(bounds=cu([5], torch.int64)) is None
    monkeypatch.setattr(packages, "usable", lambda device: ())
    assert rule() is None


def test_it_takes_long_sequences_without_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton, it takes every call that it can."""
    monkeypatch.setattr(packages, "usable", lambda device: ("torch",))
    qkv, angles = randn(2000, 3, 1, 32, dtype=FLOAT16), rope([2000], 32)
    takes = lambda length, **options: flash._accepts(qkv, cu([2000]), length, rope=angles, **options)  # noqa: E731
    monkeypatch.setitem(ops.attention.backends, "triton", ops.attention.reference)
    assert takes(2000)
    assert not takes(1024)
    assert not takes(2000, window=64)
    monkeypatch.delitem(ops.attention.backends, "triton")
    assert takes(1024)
    assert takes(1024, window=64)
    assert not takes(1024, dropout_p=0.5)


def test_it_refuses_what_it_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"no FlashAttention takes this call: torch.float32 on cpu, head width 32"):
        ops.attention.backends["flash"](randn(5, 3, 1, 32), cu([5]), 5, rope=rope([5], 32))


def test_a_compiler_may_ask() -> None:
    """The rule traces; no FlashAttention is usable on the CPU."""
    qkv, bounds, angles = randn(5, 3, 2, 16, dtype=FLOAT16), cu([5]), rope([5], 16)

    def asks(qkv: Tensor) -> Tensor:
        return qkv * 2 if packages.choose(qkv, bounds, 5, rope=angles) is None else qkv

    assert torch.equal(torch.compile(asks, fullgraph=True, backend="eager")(qkv), qkv * 2)


@pytest.mark.usefixtures("forget_installed", "stand_ins")
def test_a_compiler_reads_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant for it: a look-up of a distribution cannot be traced."""

    def version(name: str) -> str:
        assert not torch.compiler.is_dynamo_compiling(), "traced"
        return "3.0.0"

    monkeypatch.setattr(packages.metadata, "version", version)

    def asks(x: Tensor) -> Tensor:
        return x * 2 if packages.installed("flash3") else x

    torch._dynamo.reset()
    x = randn(3)
    assert torch.equal(torch.compile(asks, fullgraph=True, backend="eager")(x), x * 2)


@pytest.mark.usefixtures("stand_ins")
def test_one_compilation_serves_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest length was a constant of the graph, so each batch of long texts was compiled again."""
    op, compiled = attention("torch", monkeypatch), []

    def run(qkv: Tensor, bounds: Tensor, longest: int, angles: tuple[Tensor, Tensor]) -> Tensor:
        return op(qkv, bounds, longest, rope=angles)

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fast = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for length in (1030, 1100, 2000):
        x, bounds, angles = randn(length, 3, 1, 16, dtype=FLOAT64), cu([length - 7, 7]), rope([length - 7, 7], 16)
        assert torch.equal(fast(x, bounds, length - 7, angles), run(x, bounds, length - 7, angles))
    assert len(compiled) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("mix", [*MIXES, "long"])
@pytest.mark.parametrize(("window", "keys"), [(None, None), (7, None), (64, None), (None, "half"), (None, "none")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT16])
@pytest.mark.parametrize("name", packages.PACKAGES)
def test_on_the_gpu(
    name: str, dtype: torch.dtype, window: int | None, keys: str | None, mix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in packages.usable(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(f"{name} is not installed, or not for this GPU")
    arguments, options = call({**MIXES, "long": [512, 1, 700]}[mix], window, keys, dtype)
    arguments = (randn(len(arguments[0]), 3, 2, 64, dtype=dtype), *arguments[1:])
    options["rope"] = (torch.ones(len(arguments[0]), 32), torch.zeros(len(arguments[0]), 32))
    assert_as_accurate(attention(name, monkeypatch), ops.attention.reference, *arguments, device="cuda", **options)
