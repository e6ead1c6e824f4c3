"""Questions about how layers are put together, and how many tokens a batch should have."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import modernbert_kernels as ops
from benchmarks.kernels.calls import Task, Way
from benchmarks.kernels.cases import randn
from benchmarks.kernels.peers import plain
from benchmarks.kernels.work import Work
from modernbert.inference.encode import full_wave

EPS = 1e-5


def questions(device: torch.device, tokens: int) -> Iterator[Task]:
    yield from residual(device, tokens)
    yield chain(device, tokens)
    yield waves(device)
    yield gap(device)


def residual(device: torch.device, tokens: int) -> Iterator[Task]:
    """The sum of the residual stream inside of the product (beta = 1), by itself, or inside of the next norm."""
    for inner, width in ((768, 768), (1152, 768), (2624, 1024)):
        x, stream = (randn(tokens, n, dtype=torch.bfloat16, device=str(device)) for n in (inner, width))
        product = randn(width, inner, dtype=torch.bfloat16, device=str(device), scale=inner**-0.5)
        norm = randn(width, dtype=torch.bfloat16, device=str(device))

        def in_norm(stream: Tensor, x: Tensor, product: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
            return ops.add_layer_norm(stream, F.linear(x, product), norm, None, EPS)

        def in_product(stream: Tensor, x: Tensor, product: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
            total = torch.addmm(stream, x, product.T)
            return total, ops.layer_norm(total, norm, None, EPS)

        def apart(stream: Tensor, x: Tensor, product: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
            total = stream + F.linear(x, product)
            return total, ops.layer_norm(total, norm, None, EPS)

        ways = (
            Way("mm, add_layer_norm", in_norm),
            Way("addmm, layer_norm", in_product),
            Way("mm, add, layer_norm", apart),
        )
        what = f"A product {inner} to {width}, the residual sum and the next norm, {tokens:,} tokens"
        flops = 2 * tokens * inner * width
        yield Task(what, (stream, x, product, norm), {}, plain(in_norm), ways, Work(None, None, flops, 2 * flops))


def chain(device: torch.device, tokens: int, layers: int = 4) -> Task:
    """Norm, product, GeGLU, product, over and over: in chunks whose rows stay in the cache, or all tokens at once."""
    width, inner = 768, 1152
    x, delta = randn(2, tokens, width, dtype=torch.bfloat16, device=str(device))
    shapes = ((width,), (2 * inner, width), (width, inner))
    weights = [randn(*s, dtype=torch.bfloat16, device=str(device), scale=s[-1] ** -0.5) for s in shapes * layers]

    def whole(x: Tensor, delta: Tensor, *weights: Tensor) -> Tensor:
        for at in range(0, len(weights), 3):
            norm, up, down = weights[at : at + 3]
            x, y = ops.add_layer_norm(x, delta, norm, None, EPS)
            delta = F.linear(ops.geglu(F.linear(y, up)), down)
        return x + delta

    def chunked(rows: int) -> Callable[..., Tensor]:
        def call(x: Tensor, delta: Tensor, *weights: Tensor) -> Tensor:
            parts = [whole(*part, *weights) for part in zip(x.split(rows), delta.split(rows), strict=True)]
            return torch.cat(parts)

        return call

    sizes = [size for size in (2048, 2816, 4096, 5632, 8192) if size < tokens]
    ways = (Way("all at once", whole), *(Way(f"chunks of {size:,}", chunked(size)) for size in sizes))
    what = f"{layers} MLPs of ModernBERT-base, {tokens:,} tokens"
    flops = layers * 2 * tokens * 3 * width * inner
    args = (x, delta, *weights)
    return Task(what, args, {}, plain(whole), ways, Work(None, None, flops), passes=(False,))


def waves(device: torch.device) -> Task:
    """One product 768 to 768 with full and with other waves of tiles of 128 x 128: read its TFLOP/s, not its time."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    full = full_wave(processors, 768)
    sizes = sorted({size for wave in (full, 2 * full) for size in (wave - 256, wave, wave + 256)} | {16_384})
    x = randn(max(sizes), 768, dtype=torch.bfloat16, device=str(device))
    weight = randn(768, 768, dtype=torch.bfloat16, device=str(device), scale=768**-0.5)

    def first(rows: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, weight: F.linear(x[:rows], weight)

    def way(rows: int) -> Way:
        call = first(rows)
        moved = 2 * (2 * rows * 768 + 768 * 768)
        settings = "full waves" if rows % full == 0 else ""
        done = Work(moved, None, 2 * rows * 768 * 768)
        return Way(f"{rows:,} tokens", call, settings, reference=call, work=done)

    ways, what = tuple(map(way, sizes)), f"A product 768 to 768 on {processors} processors"
    # So many copies that the fewest rows find nothing in the cache either.
    touched = 2 * min(sizes) * 768
    return Task(what, (x, weight), {}, first(0), ways, passes=(False,), touched=touched)


def gap(device: torch.device, kernels: int = 200) -> Task:
    """Dependent kernels of one element: what lies between two of them, in a graph and without one."""

    def chained(x: Tensor) -> Tensor:
        for _ in range(kernels):
            x = x + 1
        return x

    ways = (
        Way("in a graph", chained, f"each of {kernels} kernels", repeats=kernels),
        Way("launched", chained, f"each of {kernels} kernels", repeats=kernels, graph=False),
    )
    x = randn(1, dtype=torch.float32, device=str(device))
    return Task("The least kernel in a chain", (x,), {}, chained, ways, passes=(False,))
