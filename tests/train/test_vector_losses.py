"""Losses over vectors: the head that is thrown away, Matryoshka over token vectors, wrong arguments."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert import Ragged
from modernbert.train.in_batch import in_batch_info_nce
from modernbert.train.vector_losses import DistillationHead, angle_similarity, embedding_l2, matryoshka


def test_the_head_is_two_layers_with_silu_and_the_mean_distance() -> None:
    head = DistillationHead(6, 10).double()
    x, teacher = torch.randn(5, 6).double(), torch.randn(5, 10).double()
    weight = dict(head.named_parameters())
    h = F.linear(x, weight["layers.0.weight"], weight["layers.0.bias"])
    y = F.linear(h * torch.sigmoid(h), weight["layers.2.weight"], weight["layers.2.bias"])
    wanted = sum((a - b).square().sum().sqrt() for a, b in zip(y, teacher, strict=True)) / 5
    torch.testing.assert_close(head(x, teacher), wanted)


def test_the_head_learns_a_teacher_of_another_width() -> None:
    """Student and head together; the distance falls to a fraction."""
    x, teacher = torch.randn(32, 6), torch.randn(6, 10)
    student, head = torch.nn.Linear(6, 6), DistillationHead(6, 10)
    optimizer = torch.optim.Adam([*student.parameters(), *head.parameters()], lr=0.02)
    losses = []
    for _ in range(200):
        loss = head(student(x), torch.tanh(x @ teacher))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_the_distance_of_bfloat16_vectors_is_in_float32() -> None:
    x, teacher = torch.randn(5, 64).bfloat16(), torch.randn(5, 64)
    assert embedding_l2(x, teacher).dtype is torch.float32
    torch.testing.assert_close(embedding_l2(x, teacher), embedding_l2(x.float(), teacher))


def test_matryoshka_of_token_vectors_is_the_loss_of_cut_and_normalised_ones() -> None:
    queries, documents = (Ragged.from_list([torch.randn(n, 8) for n in lengths]) for lengths in ([2, 3], [4, 1]))
    loss = partial(in_batch_info_nce, temperature=0.5)

    def cut(vectors: Ragged, width: int) -> Ragged:
        return Ragged.from_list([F.normalize(rows[:, :width], dim=1) for rows in vectors])

    wanted = loss(cut(queries, 8), cut(documents, 8)) + 0.5 * loss(cut(queries, 3), cut(documents, 3))
    torch.testing.assert_close(matryoshka(loss, queries, documents, widths=(8, 3), weights=(1.0, 0.5)), wanted)


def test_wrong_arguments_are_named() -> None:
    x = torch.randn(3, 4)

    def loss(x: Tensor) -> Tensor:
        return x.sum()

    for widths in ([5], [4, 0], [-1]):
        with pytest.raises(ValueError, match="widths must be from 1 to the 4 columns of the vectors"):
            matryoshka(loss, x, widths=widths)
    for widths, weights in (([], None), ([4], [1.0, 2.0])):
        with pytest.raises(ValueError, match="widths must be given, with a weight for each"):
            matryoshka(loss, x, widths=widths, weights=weights)
    for y in (torch.randn(4), torch.randn(2, 4), torch.randn(3, 5)):
        with pytest.raises(ValueError, match=r"x_BE has shape \(3, 4\), y_BE"):
            angle_similarity(x, y)
        with pytest.raises(ValueError, match=r"x_BE has shape \(3, 4\), teacher_BE"):
            embedding_l2(x, y)
    y = torch.zeros(3, 4)
    y[1, 2] = torch.nan
    with pytest.raises(ValueError, match="teacher_BE is not finite in row 1"):
        embedding_l2(x, y)
