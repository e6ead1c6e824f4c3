"""Losses over the vectors of texts, and which to use when.

- `DistillationHead`: the vectors of a teacher for single texts, without any pairs (third stage of mxbai-edge).
- `angle_similarity`: `cosent(angle_similarity(x_BE, y_BE), labels_B)` is AnglE, for pairs with graded labels, where the
  gradient of cosines near 1 vanishes.
- `matryoshka`: any loss over vectors, so that the first columns of a vector serve alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..late_interaction import Ragged
from .losses import check_finite_rows


def angle_similarity(x_BE: Tensor, y_BE: Tensor) -> Tensor:
    """`[B]`, the absolute difference of angles in complex space of pairs of vectors (AnglE, arXiv 2309.12871).

    The halves of a vector are its real and imaginary part. A vector of odd width gets a zero. As
    sentence-transformers' `pairwise_angle_sim`.

    Raises:
        ValueError: shapes that are not the same matrix.
    """
    if x_BE.dim() != 2 or x_BE.shape != y_BE.shape:
        raise ValueError(f"x_BE has shape {tuple(x_BE.shape)}, y_BE {tuple(y_BE.shape)}: give pairs of vectors")
    odd = x_BE.shape[1] % 2
    x_BE, y_BE = (F.normalize(F.pad(v_BE, (0, odd)), dim=1) for v_BE in (x_BE, y_BE))
    (a, b), (c, d) = x_BE.chunk(2, dim=1), y_BE.chunk(2, dim=1)
    return ((x_BE * y_BE).sum(1) + (b * c - a * d).sum(1)).abs()


class DistillationHead(nn.Module):
    """L2 distance to a teacher's vectors through two layers that are thrown away afterwards (SiLU between them).

    `loss = head(vectors_BD, teacher_BE)`. Train it together with the model, and save the model alone. The middle is as
    wide as the teacher's vectors; that of mxbai-edge is not published.
    """

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, teacher_width), nn.SiLU(), nn.Linear(teacher_width, teacher_width))

    def forward(self, x_BD: Tensor, teacher_BE: Tensor) -> Tensor:
        """Scalar, the mean distance.

        Raises:
            ValueError: another number of teacher vectors than of texts, or another width, or one that is not finite.
        """
        return embedding_l2(self.layers(x_BD), teacher_BE)


def embedding_l2(x_BE: Tensor, teacher_BE: Tensor) -> Tensor:
    """Mean length of the differences between two sets of vectors, in float32 or better. The teacher may be on the CPU.

    Raises:
        ValueError: shapes that are not the same matrix, or a vector of the teacher that is not finite.
    """
    if x_BE.dim() != 2 or x_BE.shape != teacher_BE.shape:
        shapes = f"x_BE has shape {tuple(x_BE.shape)}, teacher_BE {tuple(teacher_BE.shape)}"
        raise ValueError(f"{shapes}: the teacher must have one vector for each text, of the width of the head")
    check_finite_rows("teacher_BE", teacher_BE)
    dtype = torch.promote_types(x_BE.dtype, torch.float32)
    distances_B = (x_BE.to(dtype) - teacher_BE.detach().to(x_BE.device, dtype)).norm(dim=1)
    return distances_B.mean() if len(distances_B) else distances_B.sum()


def matryoshka(
    loss: Callable[..., Tensor],
    *vectors: Ragged | Tensor,
    widths: Sequence[int],
    weights: Sequence[float] | None = None,
) -> Tensor:
    """The sum of `loss` over the first columns of the vectors, normalised again (arXiv 2205.13147).

    `partial(matryoshka, loss, widths=(64, 128))` is a loss over the same vectors; `grad_cache` takes it too.

    Args:
        loss: called with vectors of each width in place of `vectors`.
        vectors: `[B, E]`, or the token vectors of texts.
        widths: columns to keep; include E for whole vectors.
        weights: factor of the loss of each width; None: 1 each, as sentence-transformers.

    Raises:
        ValueError: no width, a width that vectors do not have, or another number of weights.
    """
    weights = [1.0] * len(widths) if weights is None else weights
    if not widths or len(weights) != len(widths):
        raise ValueError(f"widths must be given, with a weight for each, got {list(widths)} and {list(weights)}")
    losses = [w * loss(*(_first_columns(v, width) for v in vectors)) for width, w in zip(widths, weights, strict=True)]
    return torch.stack(losses).sum()


def _first_columns(vectors: Ragged | Tensor, width: int) -> Ragged | Tensor:
    if isinstance(vectors, Ragged):
        return Ragged(_first_columns_of(vectors.values, width), vectors.offsets)
    return _first_columns_of(vectors, width)


def _first_columns_of(x_TE: Tensor, width: int) -> Tensor:
    if not 1 <= width <= x_TE.shape[1]:
        raise ValueError(f"widths must be from 1 to the {x_TE.shape[1]} columns of the vectors, got {width}")
    return F.normalize(x_TE[:, :width], dim=1)
