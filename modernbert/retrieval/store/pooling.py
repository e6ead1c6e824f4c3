"""Pooled tokens: one row in the place of several that are alike."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...late_interaction import Ragged, cluster_means, token_clusters


def pooled(vectors: Ragged, spans_N2: Tensor, factor: int) -> tuple[Ragged, Tensor]:
    """`pool_tokens` of each passage, and the characters that a row now stands for: those of its most similar token."""
    if factor == 1:
        return vectors, spans_N2
    rows, chosen = [], []
    for x_NE, spans in zip(vectors, spans_N2.split(vectors.offsets.diff().tolist()), strict=True):
        cluster_N = token_clusters(x_NE, factor)
        rows.append(cluster_means(x_NE, cluster_N))
        similarity_N = (x_NE * rows[-1][cluster_N]).sum(1)
        # A token without characters, such as [SEP], only if the cluster has no other.
        order = np.lexsort((-similarity_N.numpy(), (spans[:, 1] == 0).numpy(), cluster_N.numpy()))
        first = np.unique(cluster_N.numpy()[order], return_index=True)[1]
        chosen.append(spans[torch.from_numpy(order[first])])
    return Ragged.from_list(rows), torch.cat(chosen)
