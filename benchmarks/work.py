"""The least that a pass through the encoder must do, and the least time it takes.

Operations are those of the matrix products, two for a multiplication and an addition: all linear layers, and the pairs
of tokens that see each other, so padding and hidden pairs do not count. Bytes are what each kernel of our encoder must
read and write once, weights included; everything is fused that `modernbert/encoder.py` fuses.

Losses and optimizers do not count, heads where a job has their operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks.clock import Rates
from benchmarks.inputs import SETS
from benchmarks.rows import Row, rounded
from benchmarks.worker import Job
from modernbert.config import PRESETS, EncoderConfig


class Datasheet(NamedTuple):
    """Of a GPU, per second: operations of dense bfloat16 tensor cores that sum in float32, and bytes of its memory."""

    flops: float
    bytes: float


DATASHEETS: dict[str, Datasheet] = {
    "NVIDIA H200": Datasheet(989.4e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": Datasheet(989.4e12, 3.35e12),
    "NVIDIA B200": Datasheet(2250e12, 8.0e12),
    "NVIDIA A100-SXM4-80GB": Datasheet(312e12, 2.039e12),
    "NVIDIA GeForce RTX 4090": Datasheet(165.2e12, 1008e9),
    "NVIDIA GeForce RTX 5090": Datasheet(209.5e12, 1792e9),
}
"""From NVIDIA's datasheets and architecture papers (sparse figures halved, B200 at 1,000 W)."""


class Kernel(NamedTuple):
    """Work of one launch; `name` is its kind: "product", "local attention", "global attention", or the op."""

    name: str
    flops: int
    bytes: int


def visible_pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key of one text that see each other."""
    side = length - 1 if window is None else min(window, length - 1)
    return length * (2 * side + 1) - side * (side + 1) if length else 0


def kernels(config: EncoderConfig, lengths: Sequence[int], itemsize: int) -> Iterator[Kernel]:
    """Every kernel of a forward pass in its order; `itemsize` is the bytes of a parameter and of an activation."""
    T, D, F = sum(lengths), config.hidden_size, config.intermediate_size
    # float32 cosines and sines of the positions, whatever the model's dtype.
    tables, ids = 4 * T * config.head_dim, 8 * T
    rows = T * D * itemsize  # one row of the width for each token

    def product(inner: int, outer: int) -> Kernel:
        return Kernel("product", 2 * T * inner * outer, itemsize * (T * inner + T * outer + inner * outer))

    for _ in {config.rope_theta(layer) for layer in range(config.num_hidden_layers)}:
        yield Kernel("rotary_table", 0, ids + tables)
    yield Kernel("embed_layer_norm", 0, ids + 2 * rows)
    for layer in range(config.num_hidden_layers):
        if layer:  # the embeddings are normed already
            yield Kernel("add_layer_norm", 0, 4 * rows)
        kind, window = ("global attention", None) if config.is_global(layer) else ("local attention", config.window)
        yield product(D, 3 * D)
        yield Kernel(kind, 4 * D * sum(visible_pairs(n, window) for n in lengths), 4 * rows + tables)
        yield product(D, D)
        yield Kernel("add_layer_norm", 0, 4 * rows)
        yield product(D, 2 * F)
        yield Kernel("geglu", 0, 3 * T * F * itemsize)
        yield product(F, D)
    yield Kernel("add_layer_norm", 0, 4 * rows)


def flops(config: EncoderConfig, lengths: Sequence[int], *, backward: bool = False) -> int:
    """Operations of a pass over texts of these lengths, or of both passes; nothing elementwise.

    Backward every linear layer has two more products of the size of the first (3x in all), and attention five beside
    its two (3.5x: the scores are computed again).
    """
    each = list(kernels(config, lengths, itemsize=2))
    products = sum(kernel.flops for kernel in each if kernel.name == "product")
    attention = sum(kernel.flops for kernel in each) - products
    return 3 * products + 7 * attention // 2 if backward else products + attention


def least_seconds(
    config: EncoderConfig, lengths: Sequence[int], itemsize: int, flops_per_s: float, bytes_per_s: float
) -> float:
    """The roofline: every kernel of a forward pass takes as long as its operations or its bytes, which takes longer."""
    each = kernels(config, lengths, itemsize)
    return sum(max(kernel.flops / flops_per_s, kernel.bytes / bytes_per_s) for kernel in each)


def shares(config: EncoderConfig, job: Job, seconds: float, rates: Rates, dtype: torch.dtype) -> Row:
    """Operations per second of a pass, and their share of what this machine reached in this run."""
    done = (flops(config, job.lengths, backward=job.backward) + job.head_flops) / seconds
    least = least_seconds(config, job.lengths, dtype.itemsize, rates.matmul, rates.copy)
    return {
        "rates": {"copy_gb_per_s": rounded(rates.copy, 1e-9), "matmul_tflop_per_s": rounded(rates.matmul, 1e-12)},
        "tflop_per_s": rounded(done, 1e-12),
        "percent_of_matmul": rounded(done, 100 / rates.matmul),
        "percent_of_roofline": None if job.backward else rounded(least / seconds, 100),
    }


def show_roofline(gpu: str) -> None:
    """Thousand tokens a second of every preset and set of lengths, as the datasheet bounds them."""
    sheet = DATASHEETS[gpu]
    print(f"Projected, not measured: what the datasheet of {gpu} allows, bfloat16, forward, thousand tokens/s.")
    for model, config in PRESETS.items():
        cells = []
        for name, documents in SETS.items():
            lengths = documents.first(65_536 // documents.mean)
            seconds = least_seconds(config, lengths, 2, sheet.flops, sheet.bytes)
            cells.append(f"{name} {sum(lengths) / seconds / 1e3:,.0f} (projected)")
        print(f"{model}: {'; '.join(cells)}")
