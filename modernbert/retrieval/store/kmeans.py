"""K-means over token vectors."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import modernbert_kernels as ops

ROUNDS = 4
"""Iterations. More of them cost as much as more centroids."""

SIMILARITIES = 1 << 20
"""Similarities to centroids computed at a time: 4 MB of float32."""


def kmeans(x_NE: Tensor, count: int) -> Tensor:
    """Spherical k-means: `[count, E]` unit vectors, at most one for each token. The tokens must be in random order."""
    centroids_KE = F.normalize(x_NE[:count].float())
    for _ in range(ROUNDS):
        sums_KE = torch.zeros_like(centroids_KE).index_add_(0, nearest(x_NE, centroids_KE), x_NE.float())
        # A centroid without tokens keeps its position.
        centroids_KE = torch.where(sums_KE.any(1, keepdim=True), F.normalize(sums_KE), centroids_KE)
    return centroids_KE


def nearest(x_NE: Tensor, centroids_KE: Tensor, bias_K: Tensor | None = None) -> Tensor:
    """`[N]` int64: the centroid with the largest product, plus `bias_K`. NumPy's argmax is several times as fast."""
    size = 1 << max(1, SIMILARITIES // len(centroids_KE)).bit_length() - 1
    nearest_N = np.empty(len(x_NE), np.int64)
    for start, block_NE in zip(range(0, len(x_NE), size), x_NE.split(size), strict=False):
        ops.linear(block_NE.float(), centroids_KE, bias_K).numpy().argmax(1, out=nearest_N[start : start + size])
    return torch.from_numpy(nearest_N)
