"""The least that a call must do: bytes that it reads and writes once, and operations of its matrix products.

These over time, and over what the machine can, are the share that a kernel reaches. What is small beside rows of tokens
(weights of a norm, statistics, cumulative lengths) is left out, and so is what a kernel moves more often than it must.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from benchmarks.kernels.cases import Case


class Work(NamedTuple):
    """Bytes and operations of the forward and of the backward pass; None is not stated."""

    forward_bytes: int | None
    backward_bytes: int | None
    forward_flops: int | None = None
    backward_flops: int | None = None

    def of(self, backward: bool) -> tuple[int | None, int | None]:
        """Bytes and operations of the forward pass, or of both passes."""
        if not backward:
            return self.forward_bytes, self.forward_flops
        pairs = ((self.forward_bytes, self.backward_bytes), (self.forward_flops, self.backward_flops))
        sums = [None if a is None or b is None else a + b for a, b in pairs]
        return sums[0], sums[1]


def work(case: Case) -> Work:
    return WORK[case.op.name](*case.args, **case.kwargs)


def _geglu(h_T2F: Tensor, activation: str) -> Work:
    """Reads h, writes half of it; reads h and the gradient of the half, writes the gradient of h."""
    return Work(h_T2F.nbytes * 3 // 2, h_T2F.nbytes * 5 // 2)


def _layer_norm(x_TD: Tensor, *_: object) -> Work:
    return Work(2 * x_TD.nbytes, 3 * x_TD.nbytes)


def _add_layer_norm(x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, *_: object) -> Work:
    """The gradients of x and delta are one tensor where they have one dtype."""
    normed = x_TD.numel() * weight_D.element_size()
    gradients = x_TD.nbytes + (0 if x_TD.dtype == delta_TD.dtype else delta_TD.nbytes)
    return Work(2 * x_TD.nbytes + delta_TD.nbytes + normed, 2 * x_TD.nbytes + normed + gradients)


def _embed_layer_norm(input_ids_T: Tensor, table_VD: Tensor, *_: object) -> Work:
    """The gradient of the table is dense."""
    rows = len(input_ids_T) * table_VD.shape[1] * table_VD.element_size()
    return Work(input_ids_T.nbytes + 2 * rows, input_ids_T.nbytes + 2 * rows + table_VD.nbytes)


def _rotary(qkv_T3HK: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, inplace: bool = False) -> Work:
    moved = 2 * qkv_T3HK.nbytes * (2 if inplace else 3) // 3 + cos_TR.nbytes + sin_TR.nbytes
    return Work(moved, moved)


def _rotary_table(positions_T: Tensor, *, theta: float, head_dim: int) -> Work:
    """Two tables of float32."""
    return Work(positions_T.nbytes + 4 * len(positions_T) * head_dim, None)


def _pool(x_TD: Tensor, cu_seqlens: Tensor, mode: str, *, normalize: bool = False) -> Work:
    """One row of each text is read, or all of them; the gradient has all rows, zeros too."""
    vectors = (len(cu_seqlens) - 1) * x_TD.shape[1] * x_TD.element_size()
    read = vectors if mode in ("cls", "last") else x_TD.nbytes
    return Work(read + vectors, vectors + x_TD.nbytes)


def _project_normalize(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None, rows_Q: Tensor | None = None
) -> Work:
    """Of the chosen rows; backward what they were projected to is read again, and the gradient of x has all rows."""
    chosen, (width, inner) = len(x_TD if rows_Q is None else rows_Q), weight_ED.shape
    size = x_TD.element_size()
    rows, vectors = chosen * inner * size, chosen * width * size
    flops = 2 * chosen * inner * width
    return Work(
        rows + weight_ED.nbytes + vectors, 2 * vectors + rows + x_TD.nbytes + 2 * weight_ED.nbytes, flops, 2 * flops
    )


def visible_pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key of one text that see each other."""
    side = length - 1 if window is None else min(window, length - 1)
    return length * (2 * side + 1) - side * (side + 1) if length else 0


def _attention(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    rope: tuple[Tensor, Tensor],
    window: int | None = None,
    key_lengths: Tensor | None = None,
) -> Work:
    """Two products for each visible pair, five backward: the scores once more, and four gradients."""
    if key_lengths is not None:
        raise ValueError("pairs of texts with query rows are not counted")
    _, _, heads, width = qkv_T3HK.shape
    offsets = cu_seqlens.tolist()
    pairs = sum(visible_pairs(end - start, window) for start, end in pairwise(offsets))
    product = 2 * heads * width * pairs
    out, tables = qkv_T3HK.nbytes // 3, sum(table.nbytes for table in rope)
    return Work(qkv_T3HK.nbytes + out + tables, 2 * qkv_T3HK.nbytes + 2 * out + tables, 2 * product, 5 * product)


def _maxsim(queries_QE: Tensor, cu_queries: Tensor, documents_NE: Tensor, cu_documents: Tensor) -> Work:
    """Of all pairs. Backward each query token meets one token of every document, twice."""
    (tokens, width), documents = queries_QE.shape, len(cu_documents) - 1
    scores = 4 * (len(cu_queries) - 1) * documents
    read = queries_QE.nbytes + documents_NE.nbytes
    flops = 2 * tokens * len(documents_NE) * width
    return Work(read + scores, 2 * read + scores, flops, 4 * tokens * documents * width)


def _linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor) -> Work:
    """Of the tokens with a target. Bytes are not stated: whoever keeps logits moves a hundred times the least."""
    product = 2 * int((targets_T >= 0).sum()) * weight_VD.numel()
    return Work(None, None, product, 2 * product)


WORK: dict[str, Callable[..., Work]] = {
    "geglu": _geglu,
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "embed_layer_norm": _embed_layer_norm,
    "rotary": _rotary,
    "rotary_table": _rotary_table,
    "pool": _pool,
    "project_normalize": _project_normalize,
    "attention": _attention,
    "maxsim": _maxsim,
    "linear_cross_entropy": _linear_cross_entropy,
}
