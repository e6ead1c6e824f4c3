"""Losses over classes: masked LM without logits, tokens without a label, and the three kinds of labels of a text."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForSequenceClassificationLoss, ForTokenClassification

from modernbert.train.token_losses import masked_lm, text_loss, token_cross_entropy


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_masked_lm_is_the_mean_cross_entropy_of_the_masked_rows(z_loss: float) -> None:
    x, weight, bias = torch.randn(6, 8).double(), torch.randn(20, 8).double(), torch.randn(20).double()
    labels, leaves = torch.randint(20, (6,)), [x, weight, bias]
    logits = F.linear(*(leaf.requires_grad_() for leaf in leaves))
    wanted = F.cross_entropy(logits, labels) + z_loss * logits.logsumexp(1).square().mean()
    got = masked_lm(x, weight, bias, labels, z_loss=z_loss)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_masked_lm_without_any_masked_token_is_zero() -> None:
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    loss = masked_lm(x, weight, None, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_tokens_without_a_label_do_not_count() -> None:
    logits, labels = torch.randn(7, 3).double().requires_grad_(), torch.tensor([0, -100, 2, 1, -100, -100, 1])
    got, wanted = token_cross_entropy(logits, labels), ForTokenClassification(logits, labels, _Config(3))
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (got, wanted)))


def test_a_batch_without_labels_is_zero_and_not_nan() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = token_cross_entropy(logits, torch.full((4,), -100))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


class _Config(nn.Module):
    """What Hugging Face's losses read of a config."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.num_labels, self.problem_type = num_labels, None


@pytest.mark.parametrize(
    ("classes", "labels"),
    [(3, torch.tensor([0, 2, 1, 1])), (3, torch.randint(2, (4, 3)).float()), (1, torch.randn(4)), (1, torch.ones(4, 1))],
)
def test_the_loss_of_a_text_is_that_of_hugging_face(classes: int, labels: Tensor) -> None:
    logits = torch.randn(4, classes, requires_grad=True)
    config = _Config(classes)
    if classes == 1 and labels.dim() == 2:
        config.problem_type = "multi_label_classification"
    wanted = ForSequenceClassificationLoss(labels, logits, config)
    got = text_loss(logits, labels)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (got, wanted)))


def test_wrong_labels_are_named() -> None:
    for labels in (torch.zeros(4, 3, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), torch.zeros(4), None):
        labels = torch.zeros(4, 2) if labels is None else labels
        with pytest.raises(ValueError, match=r"labels must be int64 \[4\], or float \[4, 3\]"):
            text_loss(torch.zeros(4, 3), labels)
    with pytest.raises(ValueError, match=r"labels_Q must have a label for each of 6 rows, got \(5,\)"):
        masked_lm(torch.zeros(6, 8), torch.zeros(20, 8), None, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"logits_TC has shape \(4, 3\), labels_T \(3,\)"):
        token_cross_entropy(torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64))
