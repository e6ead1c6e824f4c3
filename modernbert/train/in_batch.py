"""InfoNCE over the vectors of a large batch, of one rank or of many, without the score matrix in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..late_interaction import Ragged, maxsim, token_blocks
from .losses import softmax_loss

Score = Callable[[Ragged, Ragged], Tensor]
Gather = Callable[[Tensor], Tensor]

ELEMENTS = 1 << 26
"""Query tokens times documents that are scored at a time."""


def in_batch_info_nce(
    queries: Ragged | Tensor,
    documents: Ragged | Tensor,
    groups_N: Tensor | None = None,
    *,
    temperature: float,
    both_directions: bool = False,
    margin: float | None = None,
    elements: int = ELEMENTS,
    gather: Gather | None = None,
    rank: int = 0,
) -> Tensor:
    """`info_nce` of B queries over N documents, scored block by block: document i < B is query i's positive.

    The other documents, the mined negatives, are negatives of all queries. With `gather`, the documents of all ranks are
    candidates of the queries of this rank, and the loss is the mean over this rank's.

    Gradients are computed with the loss, so that no block is scored twice, and memory holds one block: `elements`
    positions of maxima and the scores of its queries.

    Args:
        queries, documents: token vectors for MaxSim, or `[B, E]` and `[N, E]` for dot products.
        groups_N: int. A document is not a negative of a query if its group is that of the query's positive.
        temperature, both_directions, margin: as in `info_nce`.
        elements: the most query tokens times documents of a block.
        gather: rows of this rank to those of all ranks, in order of ranks, with a gradient; ranks may differ in
            numbers. Called once for vectors and once for whole numbers, and once more with `both_directions`.
        rank: the rank of this process in that order.

    Raises:
        ValueError: fewer documents than queries, or another number of groups.
    """
    raise NotImplementedError
