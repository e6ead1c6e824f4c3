import math

import pytest
import torch

from modernbert import Ragged
from modernbert.train.losses import cosent, info_nce, kl_distill, margin_mse, min_max, n_way_scores
from modernbert.train.vector_losses import embedding_l2


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


def by_definition(scores, excluded, temperature, positive=None):
    """InfoNCE in float64 and in plain Python: the mean of each row's `log(sum exp) - positive`."""
    losses = []
    for i, row in enumerate(scores.tolist()):
        target = i if positive is None else positive[i]
        kept = [x / temperature for j, x in enumerate(row) if j == target or not excluded[i][j]]
        losses.append(math.log(sum(map(math.exp, kept))) - row[target] / temperature)
    return sum(losses) / len(losses)


NONE = [[False] * 99] * 99


@pytest.mark.parametrize("columns", [3, 12, 0])
def test_mined_negatives_are_further_columns(columns):
    """The n of each query, those of all queries, and none."""
    scores, negatives = torch.randn(4, 4).double(), torch.randn(4, columns).double()
    wanted = by_definition(torch.cat([scores, negatives], 1), NONE, 0.1)
    assert info_nce(scores, negatives_BN=negatives, temperature=0.1).item() == pytest.approx(wanted, rel=1e-12)


def test_both_directions_are_the_mean_of_both():
    """A document's direction has no mined negatives, and the groups of the other."""
    scores, negatives, groups = torch.randn(4, 4).double(), torch.randn(4, 2).double(), torch.tensor([1, 2, 1, 4])
    same = [[i != j and groups[i] == groups[j] for j in range(6) if j < 4] + [False] * 2 for i in range(4)]
    wanted = by_definition(torch.cat([scores, negatives], 1), same, 0.5) + by_definition(scores.T, same, 0.5)
    got = info_nce(scores, groups, negatives_BN=negatives, temperature=0.5, both_directions=True)
    assert got.item() == pytest.approx(wanted / 2, rel=1e-12)


@pytest.mark.parametrize("margin", [0.5, 0.0, -0.5])
def test_likely_positives_are_left_out_and_get_no_gradient(margin):
    """In both directions, mined negatives too, in units of the scores, whatever the temperature."""
    scores = torch.randn(5, 5).double().requires_grad_()
    negatives = torch.randn(5, 3).double().requires_grad_()
    every = torch.cat([scores, negatives], 1).detach()
    above = [[bool(x > row[i] + margin) for x in row] for i, row in enumerate(every)]
    below = [[bool(x > row[i] + margin) for x in row] for i, row in enumerate(scores.detach().T)]
    assert 0 < sum(map(sum, above)) < 35
    wanted = by_definition(every, above, 0.2) + by_definition(scores.detach().T, below, 0.2)
    loss = info_nce(scores, negatives_BN=negatives, temperature=0.2, margin=margin, both_directions=True)
    assert loss.item() == pytest.approx(wanted / 2, rel=1e-12)
    loss.backward()
    assert scores.grad is not None
    assert negatives.grad is not None
    for i in range(5):
        for j in range(3):
            assert (negatives.grad[i, j] == 0) == above[i][5 + j]
        for j in range(5):
            if i != j:
                assert (scores.grad[i, j] == 0) == (above[i][j] and below[j][i])


def test_half_precision_scores_are_summed_in_float32():
    scores = torch.randn(64, 64).bfloat16()
    assert info_nce(scores, temperature=0.02).dtype is torch.float32
    torch.testing.assert_close(info_nce(scores, temperature=0.02), info_nce(scores.float(), temperature=0.02))


def test_min_max_and_kl_are_pylates():
    """PyLate 1.6, `losses/distillation.py` with `normalize_scores`, in its own formula."""
    scores, teacher = torch.randn(6, 16, requires_grad=True), torch.randn(6, 16).mul(9)
    low, high = scores.min(dim=1, keepdim=True).values, scores.max(dim=1, keepdim=True).values
    theirs = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)(
        torch.nn.functional.log_softmax((scores - low) / (high - low + 1e-8), dim=-1),
        torch.nn.functional.log_softmax(min_max(teacher), dim=-1),
    )
    ours = kl_distill(min_max(scores), min_max(teacher))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    grads = [torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads)
    assert min_max(torch.tensor([[2.0, 4.0, 3.0], [1.0, 1.0, 1.0]])).tolist() == [[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]


def test_temperatures_of_each_side():
    student, teacher = torch.randn(4, 7).double(), torch.randn(4, 7).double()
    p, q = (teacher / 0.25).softmax(1), (student / 2.0).softmax(1)
    got = kl_distill(student, teacher, temperature=2.0, teacher_temperature=0.25)
    torch.testing.assert_close(got, (p * (p / q).log()).sum(1).mean())


@pytest.mark.parametrize("count", [1, 3])
def test_n_way_scores_are_those_of_each_query_with_its_own(count):
    """Ragged on both sides; gradients of a repeated query add up."""
    queries = [torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (3, 1, 5)]
    documents = [torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 1, 9, 2, 2, 7, 3, 1, 6)]
    documents = documents[: 3 * count]
    got = n_way_scores(Ragged.from_list(queries), Ragged.from_list(documents))
    wanted = [
        [(queries[i] @ d.T).max(1).values.sum() for d in documents[i * count : (i + 1) * count]] for i in range(3)
    ]
    wanted = torch.stack([torch.stack(row) for row in wanted])
    torch.testing.assert_close(got, wanted)
    weight = torch.randn(3, count).double()
    for mine, theirs in zip(
        torch.autograd.grad((got * weight).sum(), [*queries, *documents]),
        torch.autograd.grad((wanted * weight).sum(), [*queries, *documents]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_teacher_scores_that_are_not_numbers_are_named_by_their_row():
    teacher = torch.zeros(4, 3)
    teacher[2, 1] = math.nan
    for loss in (kl_distill, margin_mse):
        with pytest.raises(ValueError, match=r"not finite in row 2"):
            loss(torch.zeros(4, 3), teacher)
    teacher[2, 1] = math.inf
    with pytest.raises(ValueError, match=r"teacher_BB is not finite in row 2"):
        kl_distill(torch.zeros(4, 3), teacher)
    with pytest.raises(ValueError, match=r"labels_B is not finite in row 1"):
        cosent(torch.zeros(2), torch.tensor([0.0, math.nan]))


def test_other_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"negatives_BN must have one row for each of 8 queries, got \(4, 2\)"):
        info_nce(torch.zeros(8, 8), negatives_BN=torch.zeros(4, 2))
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be a positive number"):
            info_nce(torch.zeros(8, 8), temperature=temperature)
        with pytest.raises(ValueError, match="teacher_temperature must be a positive number"):
            kl_distill(torch.zeros(8, 8), torch.zeros(8, 8), teacher_temperature=temperature)
        with pytest.raises(ValueError, match="temperature must be a positive number"):
            cosent(torch.zeros(8), torch.zeros(8), temperature=temperature)
    for teacher in (torch.zeros(8, 1), torch.zeros(8), torch.zeros(8, 4)):  # lists of the wrong length
        with pytest.raises(ValueError, match=r"scores_BN has shape \(8, 3\), teacher_BN"):
            margin_mse(torch.zeros(8, 3), teacher)
    with pytest.raises(ValueError, match="a positive and a negative"):
        margin_mse(torch.zeros(8, 1), torch.zeros(8, 1))
    with pytest.raises(ValueError, match=r"scores_B has shape \(8,\), labels_B \(7,\)"):
        cosent(torch.zeros(8), torch.zeros(7))
    vectors = Ragged.from_list([torch.zeros(2, 4)] * 7)
    for queries in (vectors[:2], vectors[:0]):
        with pytest.raises(ValueError, match="same number of documents for each query, got 7 documents"):
            n_way_scores(queries, vectors)


def test_the_loss_of_an_empty_batch_is_0_with_a_graph():
    """A rank whose last batch has no pair takes part in the step, and a NaN would stop the run."""
    leaves = []

    def empty(*shape):
        leaves.append(torch.zeros(shape, requires_grad=True))
        return leaves[-1]

    losses = [
        info_nce(empty(0, 0)),
        info_nce(empty(0, 0), both_directions=True, negatives_BN=empty(0, 3)),
        kl_distill(empty(0, 3), torch.zeros(0, 3)),
        margin_mse(empty(0, 3), torch.zeros(0, 3)),
        cosent(empty(0), torch.zeros(0)),
        embedding_l2(empty(0, 4), torch.zeros(0, 4)),
    ]
    torch.stack(losses).sum().backward()
    assert [loss.item() for loss in losses] == [0] * len(losses)
    assert all(leaf.grad is not None for leaf in leaves)
