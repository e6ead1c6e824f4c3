"""The least that a pass through the encoder must do, and the least time it takes on a GPU: the roofline of a model.

Operations are those of the matrix products, two for a multiplication and an addition: all linear layers, and the pairs
of tokens that see each other, so that padding and what a window hides count for nothing. Bytes are what each kernel of
our encoder must read and write once, weights included; everything is fused that `modernbert/encoder.py` fuses.

Backward every linear layer has two more products of the size of the first (3x in all), and attention five beside its
two (3.5x: the scores are computed once more). Gradients of weights are written in the dtype of the weights. Heads,
losses and optimizers are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.kernels.work import visible_pairs
from modernbert.config import EncoderConfig


class Datasheet(NamedTuple):
    """What the maker says of a GPU, per second.

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


def datasheet(gpu_name: str | None) -> Datasheet | None:
    """What is known of this GPU; None for another one, and for a CPU."""
    return DATASHEETS.get(gpu_name or "")


class Kernel(NamedTuple):
    """Work that one launch does.

    Attributes:
        name: of its kind: "product", "local attention", "global attention", or the op.
    """

    name: str
    flops: int
    bytes: int


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
    """The roofline: every kernel takes as long as its operations or its bytes do, whichever is longer.

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
        products = [(D, 3 * D), (D, D), (D, 2 * F), (F, D)]
        wqkv, wo, wi, mlp_wo = (_product(T, *shape, itemsize) for shape in products)
        forward += [norm] if layer else []  # the embeddings are normed already
        forward += [wqkv, Kernel(kind, 2 * seen, 4 * rows + tables), wo, norm, wi, geglu, mlp_wo]
        # Of attention qkv, its gradient, the output and its gradient; of a norm the sum, two gradients and their sum.
        back += [norm] if layer else []
        back += [Kernel(kind, 5 * seen, 8 * rows + tables), norm, Kernel("geglu", 0, 5 * T * F * itemsize)]
        back += [each for shape in products for each in _product_backward(T, *shape, itemsize)]
    forward.append(norm)
    # The gradient of the embedding table is dense.
    back += [norm, Kernel("embed_layer_norm", 0, ids + 2 * rows + config.vocab_size * D * itemsize)]
    return forward + back if backward else forward


def _product(T: int, inner: int, outer: int, itemsize: int) -> Kernel:
    return Kernel("product", 2 * T * inner * outer, itemsize * (T * inner + T * outer + inner * outer))


def _product_backward(T: int, inner: int, outer: int, itemsize: int) -> list[Kernel]:
    """The gradient of the input from that of the output and the weight, and that of the weight from both sides.

    The three matrices are the same in either, as in the forward pass.
    """
    return [_product(T, inner, outer, itemsize)] * 2
