"""How much arithmetic a token takes, and how much a device can do: the two sides of model FLOP utilisation (MFU).

MFU counts the FLOPs that the model needs, not those that were spent: what is computed again, by gradient checkpointing
or by GradCache, does not count.
"""

from __future__ import annotations

import re
import time
from typing import NamedTuple

import torch

from ..config import EncoderConfig

PUBLISHED = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Dense bfloat16 TFLOP/s of the data sheets. The first row whose words are in the name of a device counts."""


class Peak(NamedTuple):
    """What a device can do: FLOP/s, and where the number comes from."""

    flops: float
    source: str


class Utilisation(NamedTuple):
    """What MFU is computed from."""

    flops_per_token: float
    peak: Peak

    def share(self, tokens_per_second: float) -> float:
        """MFU of one rank, 0 to 1."""
        return tokens_per_second * self.flops_per_token / self.peak.flops


def flops_per_token(config: EncoderConfig, *, length: float, decoded: float = 0.0) -> float:
    """FLOPs of a token in training, forward and backward, where sequences have `length` tokens on average.

    `6 * N + 12 * D * keys`, summed over layers: N are the weights of the matrices, each of which is multiplied once
    forward and twice backward, with 2 FLOPs for a product and its sum. Scores and values are two products of width D
    with each key that a token sees: all of its sequence in a global layer, the window in a local one. Embeddings are
    looked up, and norms and activations are not matrices, so they count as nothing.

    Args:
        length: the mean over tokens, so that long sequences count more: sum of squares over sum of lengths.
        decoded: the share of tokens that a decoder scores over the vocabulary, such as 0.3 in masked language models.
            A dense layer in front of it is left out.
    """
    width = config.hidden_size
    matrices = 4 * width * width + 3 * width * config.intermediate_size
    keys = 0.0
    for layer in range(config.num_hidden_layers):
        keys += length if config.is_global(layer) else min(length, 2 * config.window + 1)
    decoder = decoded * width * config.vocab_size
    return 6 * (config.num_hidden_layers * matrices + decoder) + 12 * width * keys


def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The published rate of a known device in bfloat16; otherwise the rate of a matrix product, measured now."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, rate in PUBLISHED.items():
            if re.search(rf"\b{known}\b", name):
                return Peak(1e12 * rate, f"published for {known}")
    return Peak(matmul_rate(device, dtype), f"measured matrix product in {str(dtype).removeprefix('torch.')}")


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of some: well below a second of work."""
    size, repeats = (8192, 10) if device.type == "cuda" else (1024, 4)
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
