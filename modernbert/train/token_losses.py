"""Losses over classes of tokens and of texts.

- `masked_lm`: pretraining. Needs no logits in memory, and only the masked rows.
- `token_cross_entropy`: a label for each token, with tokens that have none, such as those inside of a word.
- `text_loss`: one class of a text, several, or a number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import modernbert_kernels as ops

IGNORED = -100
"""Label of a token that has none, as in Hugging Face's data."""


def masked_lm(
    x_QD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_Q: Tensor, *, z_loss: float = 0.0
) -> Tensor:
    """Mean cross-entropy of the masked tokens, without their logits in memory; 0 without any.

    The logits are `x W^T + b` of the masked rows alone: `x_QD` is what the head makes of `model(batch, rows=rows_Q)`,
    `weight_VD` the decoder or the tied table. `BatchLoss.count` is Q.

    Args:
        labels_Q: int64, the tokens that were masked.
        z_loss: factor of `log(sum of exp(logits)) ** 2`, which keeps logits small; Ettin and ModernBERT use none.

    Raises:
        ValueError: another number of labels than of rows.
    """
    if labels_Q.shape != x_QD.shape[:1]:
        raise ValueError(f"labels_Q must have a label for each of {len(x_QD)} rows, got {tuple(labels_Q.shape)}")
    return ops.linear_cross_entropy(x_QD, weight_VD, bias_V, labels_Q, z_loss=z_loss)


def token_cross_entropy(logits_TC: Tensor, labels_T: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens with a label; 0 without any, where Hugging Face gives NaN.

    `BatchLoss.count` is the number of labelled tokens.

    Args:
        labels_T: int64, the class of each token, or -100.

    Raises:
        ValueError: another number of labels than of tokens.
    """
    if logits_TC.dim() != 2 or labels_T.shape != logits_TC.shape[:1]:
        shapes = f"logits_TC has shape {tuple(logits_TC.shape)}, labels_T {tuple(labels_T.shape)}"
        raise ValueError(f"{shapes}: labels_T must have a label for each token")
    logits_TC = logits_TC.to(torch.promote_types(logits_TC.dtype, torch.float32))
    total = F.cross_entropy(logits_TC, labels_T, ignore_index=IGNORED, reduction="sum")
    return total / (labels_T != IGNORED).sum().clamp(min=1)


def text_loss(logits_BC: Tensor, labels: Tensor) -> Tensor:
    """The loss of Hugging Face's sequence classifiers, chosen by the labels.

    - int64 `[B]`: one class of each text, cross-entropy.
    - float `[B, C]`: several classes of each text, 1 or 0, binary cross-entropy.
    - float `[B]`, with C = 1: a number, mean squared error.

    Raises:
        ValueError: other labels.
    """
    logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
    count, classes = logits_BC.shape
    if not labels.is_floating_point() and labels.shape == (count,):
        return F.cross_entropy(logits_BC, labels)
    if labels.is_floating_point() and classes == 1 and labels.shape == (count,):
        return F.mse_loss(logits_BC[:, 0], labels.to(logits_BC.dtype))
    if labels.is_floating_point() and labels.shape == logits_BC.shape:
        return F.binary_cross_entropy_with_logits(logits_BC, labels.to(logits_BC.dtype))
    raise ValueError(
        f"labels must be int64 [{count}], or float [{count}, {classes}], or float [{count}] of one column, got "
        f"{labels.dtype} of shape {tuple(labels.shape)}"
    )
