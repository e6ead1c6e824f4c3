"""Our losses equal those of sentence-transformers 6.2, values and gradients, in float64.

Their losses get a model that hands on vectors, so that both sides see the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.multi_vector_encoder import losses as multi
from sentence_transformers.sentence_transformer import losses as dense
from torch import Tensor, nn

from modernbert import Ragged, maxsim
from modernbert.train.in_batch import in_batch_info_nce
from modernbert.train.losses import cosent, info_nce, kl_distill, margin_mse, n_way_scores
from modernbert.train.vector_losses import angle_similarity, embedding_l2, matryoshka

B, E = 7, 12


class Vectors(nn.Module):
    """A model of sentence-transformers whose input are its vectors already."""

    def forward(self, features: dict[str, Any], task: str | None = None) -> dict[str, Any]:
        return dict(features)

    def get_embedding_dimension(self) -> int:
        return E


def fake() -> Any:
    return Vectors()


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def compare(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *leaves: Tensor, limit: float = 1e-12) -> None:
    """Value and gradients, to the rounding of float64: the two add up in another order."""
    results = []
    for loss in (ours, theirs):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        value = loss(*own)
        results.append([value.detach(), *torch.autograd.grad(3 * value, own)])
    assert results[1][0].abs() > 1e-3
    for got, wanted in zip(*results, strict=True):
        assert got.dtype is torch.float64
        torch.testing.assert_close(got, wanted.double(), rtol=limit, atol=limit)


def columns(loss: nn.Module, labels: Tensor | None = None) -> Callable[..., Tensor]:
    return lambda *leaves: loss([{"sentence_embedding": leaf} for leaf in leaves], labels)


def cosines(x_BE: Tensor, y_NE: Tensor) -> Tensor:
    return F.normalize(x_BE, dim=1) @ F.normalize(y_NE, dim=1).T


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("both", [False, True])
def test_info_nce(negatives: int, both: bool) -> None:
    """`MultipleNegativesRankingLoss`, and the mean of its directions."""
    directions = ("query_to_doc", "doc_to_query") if both else ("query_to_doc",)
    options = {"directions": directions, "partition_mode": "per_direction" if both else "joint"}
    theirs = dense.MultipleNegativesRankingLoss(fake(), scale=20.0, **options)

    def ours(q: Tensor, d: Tensor, *mined: Tensor) -> Tensor:
        further = cosines(q, torch.cat(mined)) if mined else None
        return info_nce(cosines(q, d), negatives_BN=further, temperature=0.05, both_directions=both)

    def by_blocks(q: Tensor, *documents: Tensor) -> Tensor:
        q, d = F.normalize(q, dim=1), F.normalize(torch.cat(documents), dim=1)
        return in_batch_info_nce(q, d, temperature=0.05, both_directions=both, elements=60)

    leaves = [vectors(B, E) for _ in range(2 + negatives)]
    compare(ours, columns(theirs), *leaves)
    compare(by_blocks, columns(theirs), *leaves)


@pytest.mark.parametrize(
    "labels",
    [torch.rand(B), torch.tensor([0, 1, 2, 1, 0, 2, 2]), torch.tensor([False, True] * 3 + [True])],
    ids=["all differ", "ties", "two classes"],
)
def test_cosent_and_angle(labels: Tensor) -> None:
    leaves = vectors(B, E), vectors(B, E)
    ours = lambda x, y: cosent(F.cosine_similarity(x, y), labels, temperature=0.05)  # noqa: E731
    compare(ours, columns(dense.CoSENTLoss(fake()), labels), *leaves)
    ours = lambda x, y: cosent(angle_similarity(x, y), labels, temperature=0.05)  # noqa: E731
    compare(ours, columns(dense.AnglELoss(fake()), labels), *leaves)


def test_angle_of_an_odd_width() -> None:
    leaves, labels = (vectors(B, 5), vectors(B, 5)), torch.rand(B)
    ours = lambda x, y: cosent(angle_similarity(x, y), labels, temperature=0.1)  # noqa: E731
    compare(ours, columns(dense.AnglELoss(fake(), scale=10.0), labels), *leaves)


@pytest.mark.parametrize("negatives", [1, 4])
def test_margin_mse(negatives: int) -> None:
    labels = vectors(B, negatives + 1)
    ours = lambda q, *d: margin_mse(torch.stack([(q * x).sum(1) for x in d], 1), labels)  # noqa: E731
    leaves = [vectors(B, E) for _ in range(negatives + 2)]
    compare(ours, columns(dense.MarginMSELoss(fake()), labels), *leaves)


def test_kl_with_temperatures() -> None:
    """Theirs is multiplied by the square of the student's temperature."""
    labels = vectors(B, 5)
    theirs = dense.DistillKLDivLoss(fake(), student_temperature=0.5, teacher_temperature=2.0)

    def ours(q: Tensor, *d: Tensor) -> Tensor:
        scores = torch.stack([(q * x).sum(1) for x in d], dim=1)
        return kl_distill(scores, labels, temperature=0.5, teacher_temperature=2.0) * 0.5**2

    compare(ours, columns(theirs, labels), *[vectors(B, E) for _ in range(6)])


def test_embedding_distillation() -> None:
    teacher = vectors(B, E)
    theirs = dense.EmbedDistillLoss(fake(), distance_metric="l2")
    compare(lambda x: embedding_l2(x, teacher), columns(theirs, teacher), vectors(B, E))


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_matryoshka(weights: list[float] | None) -> None:
    model = fake()
    inner = dense.MultipleNegativesRankingLoss(model, scale=20.0)
    theirs = dense.MatryoshkaLoss(model, inner, [12, 4, 7], weights)
    ours = partial(matryoshka, lambda q, d: info_nce(q @ d.T, temperature=0.05), widths=[12, 4, 7], weights=weights)
    compare(ours, columns(theirs), vectors(B, E), vectors(B, E))


# Late interaction: they pad, and sum similarities up in float32 whatever the vectors are. We do neither.
FLOAT32 = 1e-5  # of logits of up to 12, whose rounding step is 1e-6


def padded(leaf: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    """`[tokens, E]` as their padded features."""
    rows = nn.utils.rnn.pad_sequence(list(F.normalize(leaf, dim=1).split(lengths)), batch_first=True)
    mask = torch.arange(rows.shape[1]) < torch.tensor(lengths)[:, None]
    return {"token_embeddings": rows, "attention_mask": mask.long()}


def ragged(leaf: Tensor, lengths: list[int]) -> Ragged:
    return Ragged.from_list(list(F.normalize(leaf, dim=1).split(lengths)))


QUERIES, DOCUMENTS = [3, 1, 6], [4, 9, 1, 2, 5, 5, 7, 1, 3]


@pytest.mark.parametrize("loss", ["kl", "margin"])
def test_n_way_late_interaction(loss: str) -> None:
    """n documents of each query; their columns are the first of each query, the second, the third."""
    labels = vectors(3, 3)
    if loss == "kl":
        theirs = multi.MultiVectorDistillKLDivLoss(fake(), student_temperature=0.5, teacher_temperature=2.0)
        ours = lambda s: kl_distill(s, labels, temperature=0.5, teacher_temperature=2.0) * 0.5**2  # noqa: E731
    else:
        theirs, ours = multi.MultiVectorMarginMSELoss(fake()), partial(margin_mse, teacher_BN=labels)

    def their_loss(q: Tensor, d: Tensor) -> Tensor:
        documents = d.split(DOCUMENTS)
        columns = [padded(torch.cat(documents[k::3]), DOCUMENTS[k::3]) for k in range(3)]
        return theirs([padded(q, QUERIES), *columns], labels)

    our_loss = lambda q, d: ours(n_way_scores(ragged(q, QUERIES), ragged(d, DOCUMENTS)))  # noqa: E731
    compare(our_loss, their_loss, vectors(sum(QUERIES), E), vectors(sum(DOCUMENTS), E), limit=FLOAT32)


def test_in_batch_late_interaction() -> None:
    """Three documents of each query: a positive and two negatives, which are negatives of all queries."""
    theirs = multi.MultiVectorMultipleNegativesRankingLoss(fake(), scale=2.0)

    def their_loss(q: Tensor, d: Tensor) -> Tensor:
        documents = d.split(DOCUMENTS)
        columns = [padded(torch.cat(documents[3 * k : 3 * k + 3]), DOCUMENTS[3 * k : 3 * k + 3]) for k in range(3)]
        return theirs([padded(q, QUERIES), *columns], None)

    def ours(q: Tensor, d: Tensor) -> Tensor:
        scores = maxsim(ragged(q, QUERIES), ragged(d, DOCUMENTS))
        return info_nce(scores[:, :3], negatives_BN=scores[:, 3:], temperature=0.5)

    def by_blocks(q: Tensor, d: Tensor) -> Tensor:
        return in_batch_info_nce(ragged(q, QUERIES), ragged(d, DOCUMENTS), temperature=0.5, elements=20)

    for loss in (ours, by_blocks):
        compare(loss, their_loss, vectors(sum(QUERIES), E), vectors(sum(DOCUMENTS), E), limit=FLOAT32)
