"""Exact late-interaction scores of ragged queries and documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

import modernbert_kernels as ops

from .pytrees import pytree

TOKENS = 1 << 20
"""Document tokens scored before the running top-k is merged: memory of `top_k` grows with this, not the corpus."""


@pytree()
@dataclass(frozen=True, eq=False)
class Ragged:
    """One matrix per text, stored as one tensor: iterating gives one `[n_i, E]` tensor per text.

    A matrix is a copy, and a slice is a view. Both are pickled without the other texts.

    Attributes:
        values: `[n, E]`, the rows of all texts one after another.
        offsets: `[N + 1]` int64 on the CPU; text i owns rows `offsets[i]` to `offsets[i + 1]`.

    Raises:
        TypeError: something in the place of a tensor.
        ValueError: values that are not a matrix, or offsets that do not increase from 0 to n.
    """

    values: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, Tensor):
                todo = ": Ragged.from_list takes a list of matrices" if isinstance(value, Sequence) else ""
                raise TypeError(f"{name} of a Ragged must be a tensor, got {type(value).__name__}{todo}")
        if self.values.dim() != 2:
            raise ValueError(f"values of a Ragged must be [n, E], got shape {tuple(self.values.shape)}")
        offsets = self.offsets
        if offsets.dtype is not torch.int64 or offsets.dim() != 1 or not len(offsets) or not offsets.is_cpu:
            what = f"{offsets.dtype} of shape {tuple(offsets.shape)} on {offsets.device}"
            raise ValueError(f"offsets of a Ragged must be int64 [N + 1] on the CPU, got {what}")
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last != len(self.values) or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"offsets of a Ragged must increase from 0 to its {len(self.values)} rows, got {first} to {last}"
                + (" in another order" if (first, last) == (0, len(self.values)) else "")
            )

    @classmethod
    def from_list(cls, matrices: Sequence[Tensor]) -> Ragged:
        """Join `[n_i, E]` tensors; an empty list needs no width and gives `[0, 0]`.

        Raises:
            TypeError: something that is not a list of tensors, such as one padded tensor.
            ValueError: one that is not a matrix, or has another width or device than the first.
        """
        return cls(*_joined("matrices", matrices))

    def to(self, device: torch.device | str | int | None, *, non_blocking: bool = False) -> Ragged:
        """The same matrices on `device`; `offsets` stay on the CPU. None: where they are. Differentiable."""
        if device is None:
            return self
        return Ragged(self.values.to(torch.device(device), non_blocking=non_blocking), self.offsets)

    def pin_memory(self) -> Ragged:
        """The same matrices in memory from which a GPU copies while the CPU goes on; a `DataLoader` calls it too."""
        return Ragged(self.values.pin_memory(), self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[Tensor]:
        return map(Tensor.clone, self.values.split(self.offsets.diff().tolist()))

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Ragged: ...
    def __getitem__(self, index: int | slice) -> Tensor | Ragged:
        if not isinstance(index, (slice, Integral)):
            raise TypeError(f"a Ragged takes the index of a text or a slice, got {type(index).__name__}")
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError("a Ragged takes contiguous slices only: build a new one with Ragged.from_list")
            offsets = self.offsets[start : max(start, stop) + 1]
            return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])
        if not -len(self) <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        index %= len(self)
        return self.values[self.offsets[index] : self.offsets[index + 1]].clone()

    def __reduce__(self) -> tuple[type[Ragged], tuple[Tensor, Tensor]]:
        """Pickled without the rest of the memory of which `values` may be a view."""
        return Ragged, (_alone(self.values), _alone(self.offsets))


def _joined(name: str, matrices: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The values and the offsets of `[n_i, E]` tensors. Raises what `Ragged.from_list` does, with the name."""
    wanted = f"{name} must be a Ragged or a list of [n, E] tensors"
    if isinstance(matrices, Tensor):
        padded = "give the rows of each text without its padding, which would be scored"
        todo = "put it in a list" if matrices.dim() == 2 else padded
        raise TypeError(f"{wanted}, got one tensor of shape {tuple(matrices.shape)}: {todo}")
    if isinstance(matrices, (str, bytes, Mapping, Set, np.ndarray)) or not isinstance(matrices, Iterable):
        raise TypeError(f"{wanted}, got one {type(matrices).__name__}")
    matrices = list(matrices)
    for index, matrix in enumerate(matrices):
        if not isinstance(matrix, Tensor):
            todo = ": torch.from_numpy makes one of it" if isinstance(matrix, np.ndarray) else ""
            raise TypeError(f"{name}[{index}] must be a tensor [n, E], got {type(matrix).__name__}{todo}")
        if matrix.dim() != 2 or matrix.shape[1] != matrices[0].shape[1]:
            shape = "[n, E]" if not index else f"[n, {matrices[0].shape[1]}] as {name}[0] is"
            raise ValueError(f"{name}[{index}] must be {shape}, got shape {tuple(matrix.shape)}")
        if matrix.device != matrices[0].device:
            raise ValueError(f"{name}[{index}] is on {matrix.device}, {name}[0] on {matrices[0].device}: move one")
    lengths = torch.tensor([0, *map(len, matrices)], device="cpu")
    values = torch.cat(matrices) if matrices else torch.zeros(0, 0, dtype=torch.float32, device="cpu")
    return values, lengths.cumsum(0)


def _alone(x: Tensor) -> Tensor:
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


def is_count(value: object) -> bool:
    """Whether it is a whole number of 1 or more, of Python or numpy; `True` is not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def check_count(name: str, value: int) -> None:
    """Raise ValueError with the name for what `is_count` refuses."""
    if not is_count(value):
        raise ValueError(f"{name} must be at least 1 and a whole number, got {value!r:.80}")


@overload
def maxsim(
    queries: Ragged | Sequence[Tensor],
    documents: Ragged | Sequence[Tensor],
    *,
    paired: bool = ...,
    top_k: None = None,
) -> Tensor: ...
@overload
def maxsim(
    queries: Ragged | Sequence[Tensor],
    documents: Ragged | Sequence[Tensor],
    *,
    paired: Literal[False] = ...,
    top_k: int,
) -> tuple[Tensor, Tensor]: ...


def maxsim(
    queries: Ragged | Sequence[Tensor],
    documents: Ragged | Sequence[Tensor],
    *,
    paired: bool = False,
    top_k: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum over query tokens of the largest dot product with a document token (ColBERT, section 3.3).

    Exact and without padding; differentiable in both arguments unless `top_k` is given. Scores are float32, or
    float64 for float64 vectors. An empty document scores -inf, so it ranks last; an empty query scores 0.

    Args:
        queries, documents: `Ragged`, or lists of `[n_i, E]` tensors, of B queries and N documents.
        paired: score query i with document i only.
        top_k: return the best k documents of each query, in memory that does not grow with N times B.

    Returns:
        `[B, N]`; `[B]` if `paired`; `(scores [B, k], indices [B, k])` if `top_k`, best first, ties by lower index,
        k at most N.

    Raises:
        TypeError: an argument that is not a `Ragged` or a list of tensors, such as one padded tensor; with the index.
        ValueError: vectors that are not of floats, widths or devices that disagree, a different number of queries and
            documents in `paired`, a `top_k` that is not a whole number from 1, or a score that is NaN with `top_k`,
            which has no place in a ranking.
    """
    queries, documents = _vectors("queries", queries), _vectors("documents", documents)
    if queries.values.device != documents.values.device:
        raise ValueError(f"queries are on {queries.values.device}, documents on {documents.values.device}: move one")
    if len(queries) and len(documents) and queries.values.shape[1:] != documents.values.shape[1:]:
        raise ValueError(
            f"queries have width {queries.values.shape[1]}, documents {documents.values.shape[1]}: were they encoded "
            "by the same model?"
        )
    if paired and len(queries) != len(documents):
        raise ValueError(f"paired scores need equal numbers, got {len(queries)} queries, {len(documents)} documents")
    if top_k is not None:
        if paired or not is_count(top_k):
            what = "top_k must be at least 1 and without paired, and a whole number"
            raise ValueError(f"{what}, got top_k={top_k!r:.80}, paired={paired}")
        return _top_k(queries, documents, min(top_k, len(documents)))
    if not len(queries) or not len(documents):
        return queries.values.new_zeros(0 if paired else (len(queries), len(documents)), dtype=torch.float32)
    return ops.maxsim(queries.values, queries.offsets, documents.values, documents.offsets, paired=paired)


@torch.no_grad()
def _top_k(queries: Ragged, documents: Ragged, k: int) -> tuple[Tensor, Tensor]:
    best = torch.zeros(len(queries), 0, dtype=torch.float32, device=queries.values.device)
    index = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.values.device)
    for first, last in token_blocks(documents.offsets, TOKENS):
        scores = maxsim(queries, documents[first:last])
        places = torch.arange(first, last, device=scores.device).expand_as(scores)
        best, index = torch.cat([best, scores], dim=1), torch.cat([index, places], dim=1)
        # A stable sort keeps the lower index first among equal scores; topk promises no order.
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, index = best[:, :k], index.gather(1, order[:, :k])
    wrong = best[:, :1].isnan().nonzero()  # NaN is sorted before all numbers
    if len(wrong):
        query = int(wrong[0, 0])
        raise ValueError(f"query {query} and document {int(index[query, 0])} score NaN: one has a vector with NaN")
    return best, index


def token_blocks(offsets: Tensor, tokens: int) -> Iterator[tuple[int, int]]:
    """Consecutive texts of at most `tokens` tokens together, as `first, last`: texts `first` to `last - 1`.

    `offsets` are those of a `Ragged`. A text longer than `tokens` is a block of its own.
    """
    first = 0
    while first < len(offsets) - 1:
        budget = offsets[first] + tokens
        last = max(first + 1, int(torch.searchsorted(offsets, budget, right=True)) - 1)
        yield first, last
        first = last


def _vectors(name: str, vectors: Ragged | Sequence[Tensor]) -> Ragged:
    """An argument of `maxsim` as a Ragged. Raises what `maxsim` does."""
    ragged = vectors if isinstance(vectors, Ragged) else Ragged(*_joined(name, vectors))
    if not ragged.values.is_floating_point():
        raise ValueError(f"{name} must be vectors of floats, got {ragged.values.dtype}: encode the texts first")
    return ragged


def pool_tokens(x_NE: Tensor, factor: int, protected: int = 1) -> Tensor:
    """Cluster the rows of one document to about one in `factor` and average each cluster, as PyLate 1.6 does.

    The first `protected` rows ([CLS]) stay as they are and stay in front. Ward linkage on cosine distances; means
    are not normalised again.

    Args:
        x_NE: `[n, E]` float32 unit vectors on the CPU.

    Raises:
        TypeError: `x_NE` is not a tensor.
        ValueError: it is not a matrix of floats on the CPU, or `factor` is not a whole number from 1.
        ModuleNotFoundError: scipy is missing.
    """
    check_pool_factor(factor)
    if not isinstance(x_NE, Tensor):
        raise TypeError(f"x_NE must be a tensor [n, E], got {type(x_NE).__name__}: pool_documents takes a Ragged")
    if x_NE.dim() != 2 or not x_NE.is_floating_point() or not x_NE.is_cpu:
        what = f"{x_NE.dtype} of shape {tuple(x_NE.shape)} on {x_NE.device}"
        raise ValueError(f"x_NE must be floats [n, E] on the CPU, got {what}")
    return cluster_means(x_NE, token_clusters(x_NE, factor, protected))


def token_clusters(x_NE: Tensor, factor: int, protected: int = 1) -> Tensor:
    """`[n]` int64: the row of `pool_tokens` that each row becomes a part of."""
    rest = x_NE[protected:]
    clusters = max(len(rest) // factor, 1)
    if clusters >= len(rest):
        return torch.arange(len(x_NE), device="cpu")
    fcluster, linkage = _ward()
    distance = (1 - rest @ rest.T).clamp(min=0)  # scipy refuses the -1e-7 of equal rows
    upper = torch.triu_indices(len(rest), len(rest), offset=1, device="cpu")
    tree = linkage(distance[upper[0], upper[1]].numpy(), method="ward")
    labels = torch.from_numpy(fcluster(tree, t=clusters, criterion="maxclust")).unique(return_inverse=True)[1]
    return torch.cat([torch.arange(protected, device="cpu"), protected + labels])


def cluster_means(x_NE: Tensor, cluster_N: Tensor) -> Tensor:
    """The mean of the rows of each cluster."""
    count = torch.bincount(cluster_N)
    return x_NE.new_zeros(len(count), x_NE.shape[1]).index_add_(0, cluster_N, x_NE) / count[:, None]


def pool_documents(documents: Ragged, factor: int) -> Ragged:
    """`pool_tokens` of each document; a factor of 1 leaves them as they are."""
    return documents if factor == 1 else Ragged.from_list([pool_tokens(x_NE, factor) for x_NE in documents])


def check_pool_factor(factor: int) -> None:
    """Raise what `pool_tokens` raises, before any text is encoded."""
    check_count("pool_factor", factor)
    if factor > 1:
        _ward()


def _ward() -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
    try:
        from scipy.cluster.hierarchy import fcluster, linkage
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('token pooling needs scipy: pip install "modernbert[retrieval]"') from error
    return fcluster, linkage
