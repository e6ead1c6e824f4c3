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
from typing import Any, NamedTuple

from benchmarks.clock import Rates
from benchmarks.rows import rounded
from modernbert import EncoderConfig


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


SHARES = (
    *("tflop_per_s", "percent_of_matmul", "percent_of_datasheet"),
    *("percent_of_roofline", "percent_of_datasheet_roofline"),
)


def shares(
    of_pass: tuple[EncoderConfig, Sequence[int], int, bool] | None,
    seconds: float = 1.0,
    rates: Rates = Rates(1.0, 1.0),
    dtype: str = "float32",
    gpu: str | None = None,
) -> dict[str, Any]:
    """Operations per second, and their share of the rates of this run and of the datasheet; all None without a pass.

    Args:
        of_pass: config, lengths, itemsize, and whether it goes backward.
    """
    if of_pass is None:
        return dict.fromkeys(SHARES)
    config, lengths, itemsize, backward = of_pass
    done = flops(config, lengths, backward=backward) / seconds
    sheet = DATASHEETS.get(gpu or "")
    peak = getattr(sheet, dtype, None)

    def of_roofline(flops_per_s: float, bytes_per_s: float) -> float:
        least = least_seconds(config, lengths, itemsize, flops_per_s, bytes_per_s, backward=backward)
        return rounded(least / seconds, 100)

    found = (
        rounded(done, 1e-12),
        rounded(done, 100 / rates.matmul),
        None if peak is None else rounded(done, 100 / peak),
        of_roofline(rates.matmul, rates.copy),
        None if peak is None or sheet is None else of_roofline(peak, sheet.bytes),
    )
    return dict(zip(SHARES, found, strict=True))
