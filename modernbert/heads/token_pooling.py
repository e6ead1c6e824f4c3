"""Hierarchical token pooling: fewer vectors per document by merging similar ones (arXiv 2409.14683)."""

from __future__ import annotations

import torch
from torch import Tensor


def pool_tokens(x_NE: Tensor, factor: int, protected: int = 1) -> Tensor:
    """Cluster the rows of one document to about one in `factor` and average each cluster, as PyLate 1.6 does.

    The first `protected` rows ([CLS]) stay as they are and stay in front. Ward linkage on cosine distances; means
    are not normalised again.

    Args:
        x_NE: `[n, E]` float32 unit vectors on the CPU.

    Raises:
        ValueError: `factor` below 1. ModuleNotFoundError: scipy is missing.
    """
    if factor < 1:
        raise ValueError(f"pool_factor must be at least 1, got {factor}")
    try:
        from scipy.cluster.hierarchy import fcluster, linkage
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('token pooling needs scipy: pip install "modernbert[retrieval]"') from error
    kept, rest = x_NE[:protected], x_NE[protected:]
    clusters = max(len(rest) // factor, 1)
    if clusters >= len(rest):
        return x_NE
    distance = 1 - rest @ rest.T
    upper = torch.triu_indices(len(rest), len(rest), offset=1)
    tree = linkage(distance[upper[0], upper[1]].numpy(), method="ward")
    labels = torch.from_numpy(fcluster(tree, t=clusters, criterion="maxclust")).long() - 1
    count = torch.bincount(labels)
    means = torch.zeros(len(count), x_NE.shape[1]).index_add_(0, labels, rest) / count[:, None]
    return torch.cat([kept, means[count > 0]])
