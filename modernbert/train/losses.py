"""Losses over the scores of every query of a batch with every document of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(scores_BB: Tensor, groups_B: Tensor) -> Tensor:
    """Cross-entropy of each query over the documents of the batch: document i is query i's positive.

    Args:
        scores_BB: float, queries by documents, divided by the temperature already.
        groups_B: int. Another pair's document is no negative of a query whose group it shares.
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


def all_pairs_maxsim(
    queries_QE: Tensor, query_lengths: Sequence[int], documents_NE: Tensor, document_lengths: Sequence[int]
) -> Tensor:
    """MaxSim of every query with every document of a batch, float32 `[queries, documents]`, differentiable.

    What the `maxsim` op computes, for training on a CPU, where both sides need gradients: documents are
    padded, and each block of query tokens costs one matrix product forward and two backward, in the dtype of
    autocast. Only the place of each maximum is kept in between. No document may be empty.
    """
    best_QB = _BestMatch.apply(queries_QE, documents_NE, tuple(document_lengths))
    owner_Q = torch.repeat_interleave(torch.arange(len(query_lengths)), torch.tensor(query_lengths))
    return best_QB.new_zeros(len(query_lengths), best_QB.shape[1]).index_add(0, owner_Q, best_QB)


class _BestMatch(torch.autograd.Function):
    """float32 `[Q, B]`: each query token's best similarity in each document; ties go to the first token."""

    BLOCK = 128  # query tokens at a time: the block of similarities stays near the cache

    @staticmethod
    def forward(ctx: Any, queries_QE: Tensor, documents_NE: Tensor, lengths: tuple[int, ...]) -> Tensor:  # pyright: ignore
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else queries_QE.dtype
        queries_QE, documents_NE = queries_QE.to(dtype), documents_NE.to(dtype)
        longest, length_B = max(lengths), torch.tensor(lengths)
        padded_BSE = torch.nn.utils.rnn.pad_sequence(list(documents_NE.split(lengths)), batch_first=True)
        # Padding repeats the first token, so that it can tie with a maximum but not exceed it.
        place_S = torch.arange(longest)
        padding_BS1 = (place_S >= length_B[:, None])[..., None]
        padded_BSE = torch.where(padding_BS1, padded_BSE[:, :1], padded_BSE)
        best, place = [], []
        for block_QE in queries_QE.split(_BestMatch.BLOCK):
            similarity_QBS = (block_QE @ padded_BSE.flatten(0, 1).T).unflatten(1, (len(lengths), longest))
            values_QB, places_QB = similarity_QBS.max(dim=2)
            best.append(values_QB.float())
            place.append(places_QB.where(places_QB < length_B, 0))
        ctx.save_for_backward(queries_QE, padded_BSE, torch.cat(place))
        ctx.lengths = lengths
        return torch.cat(best)

    @staticmethod
    def backward(ctx: Any, grad_QB: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        queries_QE, padded_BSE, place_QB = ctx.saved_tensors
        batch, longest, _ = padded_BSE.shape
        padded = padded_BSE.flatten(0, 1)
        grad_padded = torch.zeros(padded.shape)
        grad_queries = []
        for rows in range(0, len(queries_QE), _BestMatch.BLOCK):
            block = slice(rows, rows + _BestMatch.BLOCK)
            column_QB = place_QB[block] + torch.arange(batch) * longest
            weight_Qn = torch.zeros(len(column_QB), len(padded), dtype=padded.dtype)
            weight_Qn.scatter_(1, column_QB, grad_QB[block].to(padded.dtype))
            grad_queries.append((weight_Qn @ padded).float())
            grad_padded += weight_Qn.T @ queries_QE[block]
        real_BS = torch.arange(longest) < torch.tensor(ctx.lengths)[:, None]
        return torch.cat(grad_queries), grad_padded[real_BS.flatten()], None
