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
    """
    same_BB = (groups_B[:, None] == groups_B).fill_diagonal_(False)
    target_B = torch.arange(len(scores_BB), device=scores_BB.device)
    return F.cross_entropy(scores_BB.masked_fill(same_BB, float("-inf")), target_B)


def kl_distill(scores_BB: Tensor, teacher_BB: Tensor) -> Tensor:
    """KL(teacher || student) of each query's distribution over the batch's documents, averaged over queries.

    Both are logits, divided by their temperatures already. The gradient goes to `scores_BB` only.
    """
    teacher_BB = teacher_BB.detach().log_softmax(dim=1)
    return F.kl_div(scores_BB.log_softmax(dim=1), teacher_BB, log_target=True, reduction="batchmean")
