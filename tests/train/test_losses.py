import math

import pytest
import torch

from modernbert.train.losses import info_nce, kl_distill


def test_info_nce_is_minus_log_softmax_of_the_positive():
    scores = torch.tensor([[2.0, 1.0, -1.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0]])
    by_hand = -sum(row[i] - math.log(sum(math.exp(x) for x in row)) for i, row in enumerate(scores.tolist())) / 3
    assert info_nce(scores, torch.tensor([0, 1, 2])).item() == pytest.approx(by_hand, rel=1e-6)


def test_info_nce_ignores_documents_of_the_same_group():
    """Pairs 0 and 2 share a group: the document of one is not a negative for the query of the other."""
    torch.manual_seed(0)
    scores = torch.randn(3, 3, requires_grad=True)
    loss = info_nce(scores, torch.tensor([5, 1, 5]))
    s = scores.tolist()
    rows = [(s[0][0], [s[0][0], s[0][1]]), (s[1][1], s[1]), (s[2][2], [s[2][1], s[2][2]])]
    by_hand = sum(math.log(sum(math.exp(x) for x in row)) - positive for positive, row in rows) / 3
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    loss.backward()
    assert scores.grad is not None
    assert scores.grad[0, 2] == 0
    assert scores.grad[2, 0] == 0


def test_kl_distill_by_definition():
    torch.manual_seed(0)
    student, teacher = (
        torch.randn(4, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(4, 4, dtype=torch.float64),
    )
    p, q = teacher.softmax(1), student.softmax(1)
    torch.testing.assert_close(kl_distill(student, teacher), (p * (p / q).log()).sum(1).mean())
    (grad,) = torch.autograd.grad(kl_distill(student, teacher), student)
    torch.testing.assert_close(grad, (q - p) / 4)
    assert kl_distill(teacher, teacher).abs() < 1e-12


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"scores_BB must have as many documents as queries, got shape \(8, 24\)"):
        info_nce(torch.zeros(8, 24), torch.arange(8))
    with pytest.raises(ValueError, match=r"got shape \(8,\)"):
        info_nce(torch.zeros(8), torch.arange(8))
    with pytest.raises(ValueError, match=r"groups_B must have one group for each of 8 pairs, got \(24,\)"):
        info_nce(torch.zeros(8, 8), torch.arange(24))
    for teacher in (torch.zeros(8, 1), torch.zeros(8), torch.zeros(1, 8)):  # which would be broadcast
        with pytest.raises(ValueError, match=r"scores_BB has shape \(8, 8\), teacher_BB"):
            kl_distill(torch.zeros(8, 8), teacher)
