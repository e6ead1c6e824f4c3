"""Linear + cross-entropy over the tokens with a target: values, every gradient, chunks, memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_calls import (
    DEVICE,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    TRITON,
    assert_equal_in_float64,
    check,
    fast,
    implementations,
    randn,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import modernbert_kernels as ops

BACKENDS = fast(ops.linear_cross_entropy)
IMPLEMENTATIONS = [one for one in implementations(ops.linear_cross_entropy) if one != ("cpu", FLOAT64)]
"""In float64 the products of the reference, which is the truth, are as far from it as those of the backend."""
WIDTH = 24


def targets(tokens: int, classes: int, share: float) -> Tensor:
    """Random classes for about this share of the tokens, the first and the last class among them; -100 elsewhere."""
    chosen = torch.randint(classes, (tokens,))
    if tokens > 1:
        chosen[0], chosen[-1] = classes - 1, 0
    return torch.where(torch.rand(tokens) < share, chosen, -100)


def call(
    tokens: int, classes: int, share: float = 0.4, bias: bool = False, dtype: torch.dtype = FLOAT32
) -> tuple[Any, ...]:
    x, weight = randn(tokens, WIDTH, dtype=dtype), randn(classes, WIDTH, dtype=dtype, scale=0.5)
    return x, weight, randn(classes, dtype=dtype) if bias else None, targets(tokens, classes, share)


def plain(op: Any, chosen: Tensor, z_loss: float) -> Any:
    return lambda x, weight, bias: op(x, weight, bias, chosen, z_loss=z_loss)


def test_reference_is_torch_cross_entropy() -> None:
    x, weight, bias, chosen = call(63, 37, bias=True, dtype=FLOAT64)

    def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(x, weight, bias)[chosen >= 0]
        z = 0.1 * logits.logsumexp(1).square().mean()
        return F.cross_entropy(logits, chosen[chosen >= 0]) + z

    assert_equal_in_float64(plain(ops.linear_cross_entropy.reference, chosen, 0.1), definition, x, weight, bias)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_is_torch_cross_entropy_with_its_options(reduction: str, label_smoothing: float) -> None:
    """Values and gradients; tokens without a target are ignored as torch ignores -100."""
    x, weight, bias, chosen = call(63, 37, bias=True, dtype=FLOAT64)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    ours: Any = ops.linear_cross_entropy.reference

    def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), chosen, **options)

    assert_equal_in_float64(lambda *leaves: ours(*leaves, chosen, **options), definition, x, weight, bias)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("tokens", "classes", "share", "bias"),
    [(0, 37, 1.0, False), (1, 37, 1.0, True), (33, 1, 1.0, False), (33, 4097, 0.5, True), (20, 64, 0.0, True)],
)
@pytest.mark.parametrize(("backend", "dtype"), IMPLEMENTATIONS)
def test_reductions_and_smoothing(
    backend: str,
    dtype: torch.dtype,
    tokens: int,
    classes: int,
    share: float,
    bias: bool,
    reduction: str,
    label_smoothing: float,
) -> None:
    arguments = call(tokens, classes, share, bias, dtype)
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "z_loss": 0.01}
    check(ops.linear_cross_entropy, backend, *arguments, **options)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_without_any_target(backend: str) -> None:
    """As torch, but for its mean over nothing, which is NaN: it is 0, and so are all gradients."""
    run: Any = ops.linear_cross_entropy.backends[backend]
    x, weight, _, _ = (y if y is None else y.to(DEVICE) for y in call(4, 9))
    for reduction, wanted in (("mean", [0.0]), ("sum", [0.0]), ("none", [0.0] * 4)):
        leaf = x.clone().requires_grad_()
        loss = run(leaf, weight, None, torch.full((4,), -100, device=DEVICE), reduction=reduction, label_smoothing=0.1)
        loss.sum().backward()
        assert loss.flatten().tolist() == wanted
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_gradients_of_rows_live_in_float16(backend: str) -> None:
    """The backward pass is given 2e-5 for each row: times a probability, that is lost in float16."""
    x, weight, _, _ = call(64, 500, dtype=FLOAT16)
    x, weight, chosen, found = 64 * x, weight / 512, torch.arange(64), []
    for name, device, dtype in ((backend, DEVICE, FLOAT16), ("reference", "cpu", FLOAT64)):
        run: Any = ops.linear_cross_entropy.backends[name]
        leaf = weight.to(device, dtype).requires_grad_()
        losses = run(x.to(device, dtype), leaf, None, chosen.to(device), reduction="none")
        (gradient,) = torch.autograd.grad(2e-5 * losses.sum(), leaf)
        found.append(gradient[64:].cpu().double())  # of classes that are not a target: only probabilities
    got, truth = found
    assert (got - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": "batchmean"}, 'reduction must be "mean", "sum" or "none", got \'batchmean\''),
        ({"reduction": None}, "got None"),
        ({"label_smoothing": -0.1}, "label_smoothing must be from 0 to 1, got -0.1"),
        ({"label_smoothing": 1.5}, "got 1.5"),
        ({"label_smoothing": float("nan")}, "got nan"),
    ],
)
def test_wrong_options_are_named(backend: str, options: dict[str, Any], words: str) -> None:
    run: Any = ops.linear_cross_entropy.backends[backend]
    x, weight, _, chosen = (y if y is None else y.to(DEVICE) for y in call(4, 9))
    with pytest.raises(ValueError, match=words):
        run(x, weight, None, chosen, **options)


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize(
    ("tokens", "classes", "share", "bias"),
    [
        (0, 37, 1.0, False),
        (1, 37, 1.0, True),
        (63, 37, 0.4, True),
        (40, 1, 1.0, False),
        (40, 4096, 0.5, False),
        (33, 4097, 0.5, True),
        (5, 9001, 1.0, False),
        (50, 64, 0.0, True),
    ],
)
@pytest.mark.parametrize(("backend", "dtype"), IMPLEMENTATIONS)
def test_backend(
    backend: str, dtype: torch.dtype, tokens: int, classes: int, share: float, bias: bool, z_loss: float
) -> None:
    arguments = call(tokens, classes, share, bias, dtype)
    check(ops.linear_cross_entropy, backend, *arguments, z_loss=z_loss)


@pytest.mark.parametrize("chunk", [1, 7, 16])
@pytest.mark.parametrize(("backend", "dtype"), IMPLEMENTATIONS)
def test_chunks(backend: str, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every border between chunks, with chunks that divide the rows and chunks that do not."""
    from modernbert_kernels import cpu, fused

    monkeypatch.setattr(fused.linear_cross_entropy, "chunk_rows", lambda classes, itemsize: chunk)
    monkeypatch.setattr(cpu.linear_cross_entropy, "LOGITS", chunk * 101)
    for tokens in (14, 32, 33):
        check(ops.linear_cross_entropy, backend, *call(tokens, 101, 1.0, True, dtype), z_loss=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_views_and_tied_weights(backend: str) -> None:
    """Rows of a wider matrix, every second target, a transposed weight; and a table that is embedding and decoder."""
    _, weight, _, chosen = call(30, 50)
    wide, spread = randn(30, 2 * WIDTH), torch.stack([chosen, chosen], dim=1)
    check(ops.linear_cross_entropy, backend, wide[:, WIDTH:], weight.T.contiguous().T, None, spread[:, 0])
    ids = torch.arange(30) % 50

    def tied(name: str) -> Any:
        run = ops.linear_cross_entropy.backends[name]
        return lambda table: run(F.embedding(ids.to(table.device), table), table, None, chosen.to(table.device))

    found = []
    for name, dtype in ((backend, FLOAT32), ("reference", FLOAT64)):
        table = weight.to(DEVICE if name == backend else "cpu", dtype, copy=True).requires_grad_()
        tied(name)(table).backward()
        found.append(table.grad.cpu().double())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_excluded_classes(backend: str) -> None:
    """A bias of -inf takes classes out, a whole block of them too: no probability, no gradient, no NaN."""
    x, weight, bias, chosen = call(9, 5000, 1.0, bias=True)
    bias[:4500] = float("-inf")
    check(ops.linear_cross_entropy, backend, x, weight, bias, chosen.clamp(min=4500))


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_gradients_live_in_float16(backend: str) -> None:
    """A probability divided by the number of rows is lost in float16: the mean is taken after the products."""
    x, weight, _, _ = call(200, 2000, dtype=FLOAT16)
    weight, chosen, found = weight / 8, torch.arange(200), []
    for name, device, dtype in ((backend, DEVICE, FLOAT16), ("reference", "cpu", FLOAT64)):
        leaf = weight.to(device, dtype).requires_grad_()
        loss = ops.linear_cross_entropy.backends[name](x.to(device, dtype), leaf, None, chosen.to(device))
        (gradient,) = torch.autograd.grad(1024 * loss, leaf)
        found.append(gradient[200:].cpu().double())  # of classes that are not a target: only probabilities
    got, truth = found
    assert (got - truth).norm() < 1e-3 * truth.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_needs_a_gradient(backend: str) -> None:
    run: Any = ops.linear_cross_entropy.backends[backend]
    x, weight, bias, chosen = (y.to(DEVICE) for y in call(20, 33, bias=True))
    losses = [run(x, weight, bias, chosen)]
    grads = {}
    for name, leaf in (("x", x), ("weight", weight), ("bias", bias)):
        leaf.requires_grad_()
        losses.append(run(x, weight, bias, chosen))
        (grads[name],) = torch.autograd.grad(losses[-1], leaf)
        with torch.no_grad():
            losses.append(run(x, weight, bias, chosen))
        leaf.requires_grad_(False)
    for loss in losses:
        assert torch.equal(loss.detach(), losses[0])
    exact: Any = [y.detach().double().cpu().requires_grad_() for y in (x, weight, bias)]
    reference: Any = ops.linear_cross_entropy.reference
    wanted = torch.autograd.grad(reference(*exact, chosen.cpu()), exact)
    torch.testing.assert_close([y.cpu() for y in grads.values()], [y.float() for y in wanted], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same_bits(backend: str) -> None:
    op: Any = ops.linear_cross_entropy.backends[backend]

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        x, weight, _, chosen = call(40, 300)
        leaves = [y.to(DEVICE).requires_grad_() for y in (x, weight)]
        loss = op(*leaves, None, chosen.to(DEVICE), z_loss=0.01)
        return [loss, *torch.autograd.grad(loss, leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


class Peak(TorchDispatchMode):
    """Bytes of the storages that operations make and that are alive, at their most, not counting the inputs."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.alive = {x.untyped_storage()._cdata: 0 for x in inputs}
        self.peak = self.widest = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        for x in tree_flatten(found)[0]:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.alive:
                storage = x.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
                self.widest = max(self.widest, storage.nbytes())
        self.peak = max(self.peak, sum(self.alive.values()))
        return found


def allowed(tokens: int, width: int, classes: int, itemsize: int, chunk: int) -> int:
    """What the docstring of the kernels counts, with a hundredth for everything that has one number for each row."""
    gradients = itemsize * tokens * width + 4 * classes * (width + 1)
    return int(1.01 * (gradients + chunk * itemsize * (classes + 16 + 3 * width) + 64 * tokens))


@TRITON
def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more logits than a chunk, and no more memory than the formula; which for a large batch is half a GiB."""
    from modernbert_kernels.fused import linear_cross_entropy

    chunk = linear_cross_entropy.chunk_rows(50_368, 2)
    assert chunk == 2560
    assert allowed(65_536, 768, 50_368, 2, chunk) < 1 << 29
    monkeypatch.setattr(linear_cross_entropy, "chunk_rows", lambda classes, itemsize: 16)
    x, weight, bias, chosen = (y.to(DEVICE) for y in call(300, 1000, 0.5, bias=True))
    launcher = torch.ops.modernbert_kernels.linear_cross_entropy_forward.default
    with Peak(x, weight, bias, chosen) as found:
        launcher.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CPU if DEVICE == "cpu" else torch._C.DispatchKey.CUDA),
            *(x, weight, bias, chosen, 0.0, [True, True, True]),
        )
    assert found.widest <= 4 * 1000 * WIDTH
    assert 4 * 1000 * WIDTH < found.peak <= allowed(300, WIDTH, 1000, 4, 16)


def test_memory_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more logits than a block of rows: the gradient of the weight is the largest tensor."""
    from modernbert_kernels import cpu

    monkeypatch.setattr(cpu.linear_cross_entropy, "LOGITS", 16 * 1000)
    x, weight, bias, chosen = call(300, 1000, 0.5, bias=True)
    weight.requires_grad_()
    with Peak(x, weight, bias, chosen) as found:
        ops.linear_cross_entropy.backends["cpu"](x, weight, bias, chosen).backward()
    assert found.widest == 4 * 1000 * WIDTH


@TRITON
def test_a_target_that_is_not_a_class_makes_everything_nan() -> None:
    x, weight, _, _ = call(4, 5000)
    x, weight = (y.to(DEVICE).requires_grad_() for y in (x, weight))
    loss = ops.linear_cross_entropy.backends["triton"](x, weight, None, torch.tensor([1, -100, 5000, 2], device=DEVICE))
    loss.backward()
    assert loss.isnan()
    assert x.grad[2].isnan().all()
    assert weight.grad.isnan().all()
    assert x.grad[[0, 1, 3]].isfinite().all()


@TRITON
@pytest.mark.parametrize("wanted", [[True, True, True], [True, False, False], [False, False, False]])
def test_operators(wanted: list[bool]) -> None:
    x, weight, bias, chosen = (y.to(DEVICE) for y in call(20, 33, bias=True, dtype=FLOAT16))
    library = torch.ops.modernbert_kernels
    forward = library.linear_cross_entropy_forward.default
    backward = library.linear_cross_entropy_backward.default
    torch.library.opcheck(forward, (x, weight, bias, chosen, 0.1, wanted))
    torch.library.opcheck(backward, (weight, torch.tensor(0.5, device=DEVICE), FLOAT32))
    assert torch.Tag.cudagraph_unsafe in forward.tags, "the host waits, which cannot be captured"


@TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    """It raised, because autocast reached one of the products. All are in its dtype, and gradients in their own."""
    run: Any = ops.linear_cross_entropy.backends["triton"]
    x, weight, bias, chosen = (y.to(DEVICE) for y in call(20, 33, bias=True))
    leaves = [x.to(dtype).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    narrow = [y.detach().bfloat16().requires_grad_() for y in leaves]
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        loss = run(*leaves, chosen)
    wanted = run(*narrow, chosen)
    assert torch.equal(loss, wanted)
    for got, exact, leaf in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, narrow), leaves, strict=True
    ):
        assert got.dtype == leaf.dtype
        assert torch.equal(got, exact.to(leaf.dtype))


@TRITON
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiles(reduction: str) -> None:
    run: Any = ops.linear_cross_entropy.backends["triton"]
    x, weight, bias, chosen = (y.to(DEVICE) for y in call(20, 33, bias=True))
    found = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [y.clone().requires_grad_() for y in (x, weight, bias)]
        loss = function(*leaves, chosen, z_loss=0.1, reduction=reduction, label_smoothing=0.1)
        found.append([loss, *torch.autograd.grad(2 * loss.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
