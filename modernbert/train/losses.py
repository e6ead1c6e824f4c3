"""Losses over scores, and which to use when.

- `info_nce`: pairs, with or without mined negatives. `in_batch.in_batch_info_nce` is the same loss over the vectors of
  a batch whose score matrix does not fit, or of several ranks. Within `grad_cache` it is cached InfoNCE.
- `kl_distill`: n documents of each query with the scores of a better ranker, such as a cross-encoder. The last stage of
  mxbai-edge, answerai-colbert-small and GTE-ModernColBERT.
- `margin_mse`: the same data, if the teacher's scores are on the scale of the student's.
- `cosent`: pairs with graded labels, such as STS-B. With `vector_losses.angle_similarity` it is AnglE.
- `vector_losses` has those that need the vectors: distillation of a teacher's vectors, and Matryoshka.
- Classes of tokens and of texts belong to the heads: `MaskedLM.loss`, `SequenceClassifier`, `TokenClassifier`.

Scores come from `late_interaction.maxsim`, which pads nothing, or from a product of vectors. A loss is a mean over
queries, and 0 without any, so that `BatchLoss.count` is their number. `cosent` compares the pairs of a batch, so its
count is 1.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert_kernels.reference import Reduction

from ..late_interaction import Ragged, maxsim
from ..packed import rows_of


def info_nce(
    scores_BB: Tensor,
    groups_B: Tensor | None = None,
    *,
    negatives_BN: Tensor | None = None,
    temperature: float = 1.0,
    both_directions: bool = False,
    margin: float | None = None,
) -> Tensor:
    """Cross-entropy of each query over the documents of the batch: document i is query i's positive.

    Args:
        scores_BB: float, queries by documents.
        groups_B: int. Another pair's document is not a negative of a query whose group it shares. None: all differ.
        negatives_BN: float, scores of the queries with further documents, none of them a positive: the n mined
            negatives of each query, `[B, n]` as `n_way_scores` gives, or those of all queries, `[B, B * n]`. A score of
            -inf leaves one out.
        temperature: scores are divided by it. 1.0 for scores that are divided already.
        both_directions: the mean of this loss and that of each document over the queries of the batch.
        margin: a negative that scores more than this above the positive is left out, as it is likely a positive
            without a label (Qwen3-Embedding: 0.1 for cosines). In units of `scores_BB`. None: none is.

    Raises:
        ValueError: scores that are not square, another number of groups or of rows of negatives, or a temperature that
            is not a positive number.
    """
    if scores_BB.dim() != 2 or scores_BB.shape[0] != scores_BB.shape[1]:
        what = f"as many documents as queries, got shape {tuple(scores_BB.shape)}"
        raise ValueError(f"scores_BB must have {what}: give scores with further documents as negatives_BN")
    if groups_B is not None and groups_B.shape != scores_BB.shape[:1]:
        raise ValueError(
            f"groups_B must have one group for each of {len(scores_BB)} pairs, got {tuple(groups_B.shape)}"
        )
    if negatives_BN is not None and (negatives_BN.dim() != 2 or len(negatives_BN) != len(scores_BB)):
        raise ValueError(
            f"negatives_BN must have one row for each of {len(scores_BB)} queries, got {tuple(negatives_BN.shape)}"
        )
    positive_B = torch.arange(len(scores_BB), device=scores_BB.device)
    groups_B = None if groups_B is None else groups_B.to(scores_BB.device)
    same_BB = None if groups_B is None else groups_B[:, None] == groups_B
    loss_of = partial(softmax_loss, positive_B=positive_B, same_BM=same_BB, temperature=temperature, margin=margin)
    loss = loss_of(scores_BB if negatives_BN is None else torch.cat([scores_BB, negatives_BN], dim=1))
    return (loss + loss_of(scores_BB.T)) / 2 if both_directions else loss


def softmax_loss(
    scores_BN: Tensor,
    positive_B: Tensor,
    same_BM: Tensor | None = None,
    *,
    temperature: float = 1.0,
    margin: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Minus the log of the share that the positive has in the softmax of each row: what `info_nce` is made of.

    Args:
        scores_BN: float, all candidates of each row.
        positive_B: int64, the column of each row's positive.
        same_BM: bool or None, those of the first M columns that are not negatives of the row.
        temperature, margin: as in `info_nce`.
        reduction: "mean" or "sum" over rows, or "none", `[B]`.
    """
    check_temperature("temperature", temperature)
    scores_BN = scores_BN.to(torch.promote_types(scores_BN.dtype, torch.float32))
    if reduction == "mean" and not len(scores_BN):
        return scores_BN.sum()  # of no rows 0, as everywhere here, and not the NaN of a mean
    excluded_BN = torch.zeros_like(scores_BN, dtype=torch.bool)
    if same_BM is not None:
        excluded_BN[:, : same_BM.shape[1]] = same_BM
    if margin is not None:
        excluded_BN |= scores_BN.detach() > scores_BN.detach().gather(1, positive_B[:, None]) + margin
    excluded_BN.scatter_(1, positive_B[:, None], False)
    logits_BN = (scores_BN / temperature).masked_fill(excluded_BN, -math.inf)
    return F.cross_entropy(logits_BN, positive_B, reduction=reduction)


def kl_distill(
    scores_BB: Tensor, teacher_BB: Tensor, *, temperature: float = 1.0, teacher_temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) of each query's distribution over its documents, averaged over queries.

    The documents are those of the batch, or n of each query: `[B, n]`, as `n_way_scores` gives. Scores of a
    cross-encoder need another scale than sums of cosines. Two ways are in use: `min_max` of the teacher, or of both
    (answerai, mxbai, PyLate's `normalize_scores`), or a temperature on each side (sentence-transformers: 0.25).
    sentence-transformers multiplies by `temperature ** 2`, which is left to the caller here. The gradient goes to
    `scores_BB` only.

    Args:
        scores_BB, teacher_BB: float, `[B, N]`. The teacher may be on the CPU, where NaN in it is found.
        temperature, teacher_temperature: the scores of each are divided by it.

    Raises:
        ValueError: shapes that are not the same matrix, a score of the teacher that is not finite, or a temperature
            that is not a positive number.
    """
    scores_BB, teacher_BB = _checked("scores_BB", scores_BB, "teacher_BB", teacher_BB)
    check_temperature("temperature", temperature)
    check_temperature("teacher_temperature", teacher_temperature)
    if not len(scores_BB):
        return scores_BB.sum()
    student_BB = (scores_BB / temperature).log_softmax(dim=1)
    teacher_BB = (teacher_BB / teacher_temperature).log_softmax(dim=1)
    return F.kl_div(student_BB, teacher_BB, log_target=True, reduction="batchmean")


def margin_mse(scores_BN: Tensor, teacher_BN: Tensor) -> Tensor:
    """Mean squared error of the margins between the first document of each query, the positive, and its others.

    For teacher scores on the scale of the student's. With others, use `kl_distill`. (arXiv 2010.02666)

    Args:
        scores_BN, teacher_BN: float, n documents of each query, as `n_way_scores` gives. The teacher may be on the CPU,
            where NaN in it is found.

    Raises:
        ValueError: as in `kl_distill`, and scores of fewer than two documents.
    """
    scores_BN, teacher_BN = _checked("scores_BN", scores_BN, "teacher_BN", teacher_BN)
    if scores_BN.shape[1] < 2:
        raise ValueError(f"scores_BN must have a positive and a negative of each query, got {tuple(scores_BN.shape)}")
    if not len(scores_BN):
        return scores_BN.sum()
    return F.mse_loss(scores_BN[:, :1] - scores_BN[:, 1:], teacher_BN[:, :1] - teacher_BN[:, 1:])


def _checked(name: str, scores: Tensor, teacher_name: str, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or better on the device of the scores, the teacher without a graph."""
    if scores.dim() != 2 or scores.shape != teacher.shape:
        shapes = f"{name} has shape {tuple(scores.shape)}, {teacher_name} {tuple(teacher.shape)}"
        raise ValueError(f"{shapes}: both must be the same queries by the same documents")
    check_finite_rows(teacher_name, teacher)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return scores.to(dtype), teacher.detach().to(scores.device, dtype)


def check_finite_rows(name: str, values: Tensor) -> None:
    """Raise ValueError with the first row that has NaN or an infinity.

    Numbers on a GPU are trusted, as a look at them would wait for it.
    """
    if values.is_cpu and not bool((finite := values.isfinite()).all()):
        row = int((~finite).nonzero()[0, 0])
        raise ValueError(f"{name} is not finite in row {row}: leave out this text or query, or score it again")


def check_temperature(name: str, value: float) -> None:
    """Raise ValueError for what is not a positive, finite number."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def min_max(scores_BN: Tensor) -> Tensor:
    """Each row of scores moved and stretched to 0 to 1, as PyLate's `Distillation` does; equal scores give 0."""
    low_B1, high_B1 = scores_BN.amin(1, keepdim=True), scores_BN.amax(1, keepdim=True)
    return (scores_BN - low_B1) / (high_B1 - low_B1 + 1e-8)


def n_way_scores(queries: Ragged, documents: Ragged) -> Tensor:
    """`[B, n]`, MaxSim of each of B queries with n documents of its own. Differentiable, nothing is padded.

    Args:
        documents: B * n documents, the n of query 0 first.

    Raises:
        ValueError: a number of documents that is not a multiple of the number of queries.
    """
    count, rest = divmod(len(documents), max(1, len(queries)))
    if rest or not count or not len(queries):
        what = f"got {len(documents)} documents for {len(queries)} queries"
        raise ValueError(f"documents must hold the same number of documents for each query, {what}")
    lengths_B = queries.offsets.diff()
    rows = rows_of(lengths_B.tolist(), [query for query in range(len(queries)) for _ in range(count)])
    offsets = F.pad(lengths_B.repeat_interleave(count).cumsum(0), (1, 0))
    repeated = Ragged(queries.values.index_select(0, rows.to(queries.values.device)), offsets)
    return maxsim(repeated, documents, paired=True).unflatten(0, (len(queries), count))


def cosent(scores_B: Tensor, labels_B: Tensor, *, temperature: float = 0.05) -> Tensor:
    """`log(1 + sum of exp((s_i - s_j) / temperature))` over all i, j of which i has the lower label.

    For pairs with graded labels, of which only the order counts. Pairs of equal labels are not compared. The loss is of
    the batch as a whole: it is not a mean over its pairs. (sentence-transformers' `CoSENTLoss`, scale 20.)

    Args:
        scores_B: float, one similarity for each pair, such as a cosine or `vector_losses.angle_similarity`.
        labels_B: numbers, higher for more similar pairs. NaN is found on the CPU.

    Raises:
        ValueError: another number of labels than of scores, a label that is not finite, or a temperature that is not a
            positive number.
    """
    if scores_B.dim() != 1 or scores_B.shape != labels_B.shape:
        shapes = f"scores_B has shape {tuple(scores_B.shape)}, labels_B {tuple(labels_B.shape)}"
        raise ValueError(f"{shapes}: both must have one number for each pair")
    check_temperature("temperature", temperature)
    check_finite_rows("labels_B", labels_B)
    labels_B = labels_B.int() if labels_B.dtype is torch.bool else labels_B  # searchsorted takes no bool
    labels_B, order_B = labels_B.to(scores_B.device).sort()
    scores_B = scores_B.to(torch.promote_types(scores_B.dtype, torch.float32))[order_B] / temperature
    # Sums over all pairs of higher labels, without the matrix of pairs.
    higher_B = (-scores_B).flip(0).logcumsumexp(0).flip(0)
    higher_B = F.pad(higher_B, (0, 1), value=-math.inf)[torch.searchsorted(labels_B, labels_B, right=True)]
    return F.pad(scores_B + higher_B, (0, 1)).logsumexp(0)
