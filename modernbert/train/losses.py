"""Losses over the scores of every query of a batch with every document of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(scores_BB: Tensor, groups_B: Tensor) -> Tensor:
    """Cross-entropy of each query over the documents of the batch: document i is query i's positive.

    Args:
        scores_BB: float, queries by documents, divided by the temperature already.
        groups_B: int. Another pair's document is not a negative of a query whose group it shares.

    Raises:
        ValueError: scores that are not square, or another number of groups.
    """
    if scores_BB.dim() != 2 or scores_BB.shape[0] != scores_BB.shape[1]:
        what = f"as many documents as queries, got shape {tuple(scores_BB.shape)}"
        raise ValueError(f"scores_BB must have {what}: with more documents, use torch.nn.functional.cross_entropy")
    if groups_B.shape != scores_BB.shape[:1]:
        raise ValueError(
            f"groups_B must have one group for each of {len(scores_BB)} pairs, got {tuple(groups_B.shape)}"
        )
    same_BB = (groups_B[:, None] == groups_B).fill_diagonal_(False)
    target_B = torch.arange(len(scores_BB), device=scores_BB.device)
    return F.cross_entropy(scores_BB.masked_fill(same_BB, float("-inf")), target_B)


def kl_distill(scores_BB: Tensor, teacher_BB: Tensor) -> Tensor:
    """KL(teacher || student) of each query's distribution over the batch's documents, averaged over queries.

    Both are logits, divided by their temperatures already. The gradient goes to `scores_BB` only.

    Raises:
        ValueError: shapes that are not the same matrix.
    """
    if scores_BB.dim() != 2 or scores_BB.shape != teacher_BB.shape:
        shapes = f"scores_BB has shape {tuple(scores_BB.shape)}, teacher_BB {tuple(teacher_BB.shape)}"
        raise ValueError(f"{shapes}: both must be the same queries by the same documents")
    teacher_BB = teacher_BB.detach().log_softmax(dim=1)
    return F.kl_div(scores_BB.log_softmax(dim=1), teacher_BB, log_target=True, reduction="batchmean")
