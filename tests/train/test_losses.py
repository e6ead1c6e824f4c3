import math

import pytest
import torch
import torch.nn.functional as F

import modernbert_kernels as ops
from modernbert.train.losses import all_pairs_maxsim, info_nce, kl_distill


def unit_rows(*lengths: int, width: int = 8, dtype=torch.float64) -> torch.Tensor:
    return F.normalize(torch.randn(sum(lengths), width, dtype=dtype), dim=-1).requires_grad_()


def offsets(lengths) -> torch.Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


@pytest.mark.parametrize(
    ("query_lengths", "document_lengths"),
    [((1,), (1,)), ((3, 1), (2, 5)), ((7, 2, 150, 11), (4, 1, 9))],
    ids=["one", "two", "more query rows than a block"],
)
def test_maxsim_equals_the_reference_op(query_lengths, document_lengths):
    """Values and both gradients to float32 rounding (the result is float32); negative similarities too."""
    torch.manual_seed(0)
    queries, documents = unit_rows(*query_lengths), unit_rows(*document_lengths)
    with torch.no_grad():
        documents[: document_lengths[0]] = -queries[0].abs() * torch.sign(queries[0])  # a document that nothing matches
    weight = torch.randn(len(query_lengths), len(document_lengths))
    results = []
    for score in (
        lambda: all_pairs_maxsim(queries, query_lengths, documents, document_lengths),
        lambda: ops.maxsim.reference(queries, offsets(query_lengths), documents, offsets(document_lengths)),
    ):
        scores = score()
        results.append((scores, *torch.autograd.grad((scores * weight).sum(), (queries, documents))))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_maxsim_under_autocast_rounds_once():
    """In bfloat16 the error stays within a rounding of each of the two factors and of the similarity."""
    torch.manual_seed(0)
    queries, documents = unit_rows(5, 4, dtype=torch.float32), unit_rows(6, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        scores = all_pairs_maxsim(queries, (5, 4), documents, (6, 3))
    wanted = ops.maxsim.reference(queries, offsets((5, 4)), documents, offsets((6, 3)))
    assert scores.dtype == torch.float32
    assert (scores - wanted).abs().max() <= 5 * 3 * 2**-8
    grads = torch.autograd.grad(scores.sum(), (queries, documents))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]


def test_info_nce_is_minus_log_softmax_of_the_positive():
    scores = torch.tensor([[2.0, 1.0, -1.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0]])
    by_hand = -sum(row[i] - math.log(sum(math.exp(x) for x in row)) for i, row in enumerate(scores.tolist())) / 3
    assert info_nce(scores, torch.tensor([0, 1, 2])).item() == pytest.approx(by_hand, rel=1e-6)


def test_info_nce_ignores_documents_of_the_same_group():
    """Pairs 0 and 2 share a group: the document of one is no negative for the query of the other."""
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
