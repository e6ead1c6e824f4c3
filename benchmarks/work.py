"""The least that a pass through the encoder must do, the least time it takes, and what a GPU would make of it.

Operations are those of the matrix products, two for a multiplication and an addition: all linear layers, and the pairs
of tokens that see each other, so padding and hidden pairs do not count. Bytes are what each kernel of our encoder must
read and write once, weights included; everything is fused that `modernbert/encoder.py` fuses.

Backward every linear layer has two more products of the size of the first (3x in all), and attention five beside its
two (3.5x: the scores are computed again). Gradients of weights have their dtype. Heads, losses and optimizers do not
count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from benchmarks.clock import Rates
from benchmarks.inputs import LENGTHS, MEAN
from benchmarks.rows import Row, rounded
from benchmarks.worker import Job
from modernbert.config import PRESETS, EncoderConfig


class Datasheet(NamedTuple):
    """Of a GPU, per second.

    Attributes:
        bfloat16: operations of dense tensor cores that sum in float32.
        float32: operations without tensor cores. bytes: of its memory.
    """

    bfloat16: float
    float32: float
    bytes: float


DATASHEETS: dict[str, Datasheet] = {
    "NVIDIA H200": Datasheet(989.4e12, 66.9e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": Datasheet(989.4e12, 66.9e12, 3.35e12),
    "NVIDIA H100 PCIe": Datasheet(756e12, 51e12, 2.0e12),
    "NVIDIA B200": Datasheet(2250e12, 80e12, 8.0e12),
    "NVIDIA A100-SXM4-80GB": Datasheet(312e12, 19.5e12, 2.039e12),
    "NVIDIA A100 80GB PCIe": Datasheet(312e12, 19.5e12, 1.935e12),
    "NVIDIA A100-SXM4-40GB": Datasheet(312e12, 19.5e12, 1.555e12),
    "NVIDIA A100-PCIE-40GB": Datasheet(312e12, 19.5e12, 1.555e12),
    "NVIDIA L40S": Datasheet(362.05e12, 91.6e12, 864e9),
    "NVIDIA GeForce RTX 4090": Datasheet(165.2e12, 82.6e12, 1008e9),
    "NVIDIA GeForce RTX 5090": Datasheet(209.5e12, 104.8e12, 1792e9),
}
"""By the name that `torch.cuda.get_device_properties` gives.

From NVIDIA's datasheets and architecture papers: H100 and H200 Tensor Core GPU, Hopper architecture (sparse figures
halved), Blackwell architecture (B200 at 1,000 W), A100 Tensor Core GPU, L40S, Ada and RTX Blackwell GPU architecture.
"""


class Kernel(NamedTuple):
    """Work of one launch; `name` is its kind: "product", "local attention", "global attention", or the op."""

    name: str
    flops: int
    bytes: int


def visible_pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key of one text that see each other."""
    side = length - 1 if window is None else min(window, length - 1)
    return length * (2 * side + 1) - side * (side + 1) if length else 0


def flops(config: EncoderConfig, lengths: Sequence[int], *, backward: bool = False) -> int:
    """Operations of a pass over texts of these lengths, or of both passes; nothing elementwise."""
    return sum(kernel.flops for kernel in kernels(config, lengths, itemsize=2, backward=backward))


def least_seconds(
    config: EncoderConfig,
    lengths: Sequence[int],
    itemsize: int,
    flops_per_s: float,
    bytes_per_s: float,
    *,
    backward: bool = False,
) -> float:
    """The roofline: every kernel takes as long as its operations or its bytes, whichever takes longer.

    Args:
        itemsize: bytes of a parameter and of an activation.
    """
    each = kernels(config, lengths, itemsize, backward=backward)
    return sum(max(kernel.flops / flops_per_s, kernel.bytes / bytes_per_s) for kernel in each)


def kernels(config: EncoderConfig, lengths: Sequence[int], itemsize: int, *, backward: bool = False) -> list[Kernel]:
    """Every kernel of a forward pass in its order, then those of the backward pass if asked for."""
    T, D, F = sum(lengths), config.hidden_size, config.intermediate_size
    # float32 cosines and sines of the positions, whatever the model's dtype.
    tables, ids = 4 * T * config.head_dim, 8 * T
    rows = T * D * itemsize  # one row of the width for each token
    thetas = {config.rope_theta(layer) for layer in range(config.num_hidden_layers)}
    embedding = Kernel("embed_layer_norm", 0, ids + 2 * rows)
    norm = Kernel("add_layer_norm", 0, 4 * rows)
    geglu = Kernel("geglu", 0, 3 * T * F * itemsize)
    forward = [*[Kernel("rotary_table", 0, ids + tables)] * len(thetas), embedding]
    back: list[Kernel] = []
    for layer in range(config.num_hidden_layers):
        pairs = sum(visible_pairs(n, None if config.is_global(layer) else config.window) for n in lengths)
        kind = "global attention" if config.is_global(layer) else "local attention"
        seen = 2 * D * pairs  # operations of one product over what is seen, all heads
        wqkv, wo, wi, mlp_wo = (_product(T, *shape, itemsize) for shape in ((D, 3 * D), (D, D), (D, 2 * F), (F, D)))
        forward += [norm] if layer else []  # the embeddings are normed already
        forward += [wqkv, Kernel(kind, 2 * seen, 4 * rows + tables), wo, norm, wi, geglu, mlp_wo]
        # For attention: qkv, its gradient, the output and its gradient. For a norm: the sum, two gradients, their sum.
        back += [norm] if layer else []
        back += [Kernel(kind, 5 * seen, 8 * rows + tables), norm, Kernel("geglu", 0, 5 * T * F * itemsize)]
        # The gradients of input and weight: the same three matrices as forward, in either.
        back += [each for each in (wqkv, wo, wi, mlp_wo) for _ in range(2)]
    forward.append(norm)
    # The gradient of the embedding table is dense.
    back += [norm, Kernel("embed_layer_norm", 0, ids + 2 * rows + config.vocab_size * D * itemsize)]
    return forward + back if backward else forward


def _product(T: int, inner: int, outer: int, itemsize: int) -> Kernel:
    return Kernel("product", 2 * T * inner * outer, itemsize * (T * inner + T * outer + inner * outer))


def shares(config: EncoderConfig, job: Job, seconds: float, rates: Rates, dtype: torch.dtype, gpu: str | None) -> Row:
    """Operations per second of a pass, and their share of the rates of this run and of the datasheet."""
    known = {"backward": job.backward}
    done, sheet = flops(config, job.lengths, **known) / seconds, DATASHEETS.get(gpu or "")
    peak = getattr(sheet, str(dtype).removeprefix("torch."), None)

    def of_roofline(flops_per_s: float, bytes_per_s: float) -> float:
        return rounded(
            least_seconds(config, job.lengths, dtype.itemsize, flops_per_s, bytes_per_s, **known) / seconds, 100
        )

    return {
        "rates": {"copy_gb_per_s": rounded(rates.copy, 1e-9), "matmul_tflop_per_s": rounded(rates.matmul, 1e-12)},
        "tflop_per_s": rounded(done, 1e-12),
        "percent_of_matmul": rounded(done, 100 / rates.matmul),
        "percent_of_datasheet": rounded(done, 100 / peak) if peak else None,
        "percent_of_roofline": of_roofline(rates.matmul, rates.copy),
        "percent_of_datasheet_roofline": of_roofline(peak, sheet.bytes) if peak and sheet else None,
    }


PRODUCTS, COPY, ATTENTION, GAP = 0.80, 0.90, 0.50, 1e-6
"""Assumed shares of the datasheet's rates: products and attention of the tensor cores', and copies of the memory's (on
an H200 a large product reached 0.797, a copy 0.896; attention is a guess); seconds between two kernels in a graph."""


def projected_seconds(config: EncoderConfig, lengths: Sequence[int], sheet: Datasheet) -> float:
    """Of a forward pass in bfloat16 in a graph."""

    def seconds(kernel: Kernel) -> float:
        share = ATTENTION if kernel.name.endswith("attention") else PRODUCTS
        return max(kernel.flops / sheet.bfloat16 / share, kernel.bytes / sheet.bytes / COPY) + GAP

    return sum(map(seconds, kernels(config, lengths, itemsize=2)))


def show_roofline(gpu: str) -> None:
    """Thousand tokens a second of every preset and set of lengths: the bound of the datasheet, and a projection."""
    sheet = DATASHEETS[gpu]
    print(f"Projected, not measured: {gpu}, bfloat16, forward, thousand tokens/s (bound by the datasheet / projected).")
    assumed = (
        f"products {PRODUCTS:.0%}, attention {ATTENTION:.0%} of the tensor cores' rate, {COPY:.0%} of the memory's"
    )
    print(f"Assumed: {assumed}, {1e6 * GAP:g} us between kernels.")
    for model, config in PRESETS.items():
        cells = []
        for name, make in LENGTHS.items():
            lengths = make(65_536 // MEAN[name])
            bound = least_seconds(config, lengths, 2, sheet.bfloat16, sheet.bytes)
            each = (sum(lengths) / seconds / 1e3 for seconds in (bound, projected_seconds(config, lengths, sheet)))
            cells.append(f"{name} {' / '.join(f'{one:,.0f}' for one in each)} (projected)")
        print(f"{model}: {'; '.join(cells)}")
