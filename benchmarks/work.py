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
from benchmarks.rows import Row, rounded
from benchmarks.worker import Job
from modernbert.config import EncoderConfig


class Kernel(NamedTuple):
    """Work of one launch: the layer or the op that it belongs to, and its pass."""

    name: str
    backward: bool
    flops: int
    bytes: int


def visible_pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key of one text that see each other."""
    side = length - 1 if window is None else min(window, length - 1)
    return length * (2 * side + 1) - side * (side + 1) if length else 0


def kernels(
    config: EncoderConfig, lengths: Sequence[int], itemsize: int, *, training: bool = False
) -> Iterator[Kernel]:
    """Every kernel of a pass of the encoder on a GPU, in its order; `itemsize` is the bytes of an activation.

    In inference parameters have the same dtype, and products add to the stream where `encoder.Layer` lets them. In
    training both passes count: parameters and the stream are float32, and a product casts its weight and its gradient.
    """
    T, D, F, K = sum(lengths), config.hidden_size, config.intermediate_size, config.head_dim
    exact = 4 if training else itemsize
    # float32 cosines and sines of the positions, whatever the model's dtype; three bounds of each token.
    tables, ids, rows, stream = 4 * T * K, 8 * T, T * D * itemsize, T * D * exact

    def both(name: str, flops: tuple[int, int], moved: tuple[int, int]) -> Iterator[Kernel]:
        for backward in (False, True)[: 1 + training]:
            yield Kernel(name, backward, flops[backward], moved[backward])

    def product(name: str, inner: int, outer: int, added: bool = False) -> Iterator[Kernel]:
        flops, weight, moved = 2 * T * inner * outer, inner * outer, itemsize * T * (inner + outer)
        of_weight = (8, 10) if training else (itemsize, 0)
        moved = (moved + added * rows + of_weight[0] * weight, 2 * moved + of_weight[1] * weight)
        yield from both(f"{name}, added" if added else name, (flops, 2 * flops), moved)

    def norm(name: str) -> Iterator[Kernel]:
        # With the sum, one more is read and one more written. Backward the sum is there already.
        yield from both(name, (0, 0), ((2 if "add" in name else 1) * (stream + rows), 3 * stream + rows))

    yield Kernel("token_ranges", False, 0, 12 * T)
    for _ in {config.rope_theta(layer) for layer in range(config.num_hidden_layers)}:
        yield Kernel("rotary_table", False, 0, ids + tables)
    yield from both("embed_layer_norm", (0, 0), (ids + 2 * stream, 2 * stream + config.vocab_size * D * exact))
    for layer in range(config.num_hidden_layers):
        added, first = not training, layer == 0
        if not first:  # the embeddings are normed already
            yield from norm("layer_norm" if added else "add_layer_norm")
        kind, window = ("global attention", None) if config.is_global(layer) else ("local attention", config.window)
        scores = 2 * D * sum(visible_pairs(length, window) for length in lengths)
        yield from product("Wqkv", D, 3 * D)
        # Backward five products beside the two: the scores are computed again.
        yield from both(kind, (2 * scores, 5 * scores), (4 * rows + tables, 8 * rows + tables))
        yield from product("attention Wo", D, D, added and not first)
        yield from norm("layer_norm" if added and not first else "add_layer_norm")
        yield from product("Wi", D, 2 * F)
        yield from both("geglu", (0, 0), (3 * T * F * itemsize, 5 * T * F * itemsize))
        yield from product("MLP Wo", F, D, added)
    yield from norm("add_layer_norm" if training else "layer_norm")


def flops(config: EncoderConfig, lengths: Sequence[int], *, backward: bool = False) -> int:
    """Operations of a pass over texts of these lengths, or of both passes; nothing elementwise."""
    return sum(kernel.flops for kernel in kernels(config, lengths, itemsize=2, training=backward))


def least_seconds(
    config: EncoderConfig, lengths: Sequence[int], itemsize: int, flops_per_s: float, bytes_per_s: float
) -> float:
    """The roofline: every kernel of a forward pass takes as long as its operations or its bytes, which takes longer."""
    each = kernels(config, lengths, itemsize)
    return sum(max(kernel.flops / flops_per_s, kernel.bytes / bytes_per_s) for kernel in each)


def shares(config: EncoderConfig, job: Job, seconds: float, rates: Rates, dtype: torch.dtype) -> Row:
    """Operations per second of a pass, and their share of what this machine reached in this run."""
    done = flops(config, job.lengths, backward=job.backward) + job.head_flops
    least = least_seconds(config, job.lengths, dtype.itemsize, rates.matmul, rates.copy)
    more: Row = {"percent_of_matmul": rounded(done / seconds, 100 / rates.matmul)}
    return reached(seconds, rates, done, least=None if job.backward else least) | more


def reached(seconds: float, rates: Rates, flops: int, nbytes: int = 0, *, least: float | None = None) -> Row:
    """Operations and bytes per second, and their shares of the rates of a product and a copy.

    Args:
        least: seconds that the roofline allows; of one kernel, for which it is the longer of both.
    """
    least = max(flops / rates.matmul, nbytes / rates.copy) if nbytes else least
    return {
        "rates": {"copy_gb_per_s": rounded(rates.copy, 1e-9), "matmul_tflop_per_s": rounded(rates.matmul, 1e-12)},
        "gb_per_s": rounded(nbytes / seconds, 1e-9) if nbytes else None,
        "tflop_per_s": rounded(flops / seconds, 1e-12) if flops else None,
        "percent_of_roofline": None if least is None else rounded(least / seconds, 100),
    }
