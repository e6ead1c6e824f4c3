"""The specification: every op of ModernBERT and of late interaction in plain, differentiable PyTorch.

Dimension key: T tokens of the batch, B sequences, S longest sequence, D width, H heads, K head width, R = K / 2,
F MLP width, E late-interaction width, Q and N tokens of all queries and of all documents.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Op

Reduction = Literal["mean", "sum", "none"]


def _lengths(cu_seqlens: Tensor) -> list[int]:
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise ValueError("torch.jit.trace would keep the lengths of its example: leave this op out of what is traced")
    return cu_seqlens.diff().tolist()


@Op
def linear(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """`x W^T + b`, `[T, D]` to `[T, F]`."""
    return F.linear(x_TD, weight_FD, bias_F)


@Op
def layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension; statistics in float32 or better."""
    return F.layer_norm(x_TD, weight_D.shape, weight_D, bias_D, eps)


@Op
def add_layer_norm(
    x_TD: Tensor,
    delta_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`(x + delta, layer_norm(x + delta))`: the residual stream and its norm, both `[T, D]`.

    `x` may be float32 where `delta` and the weights are not: the stream stays float32. The norm has this dtype, by
    default the weight's.
    """
    x_TD = x_TD + delta_TD
    bias_D = None if bias_D is None else bias_D.to(x_TD.dtype)
    y_TD = F.layer_norm(x_TD, weight_D.shape, weight_D.to(x_TD.dtype), bias_D, eps)
    return x_TD, y_TD.to(weight_D.dtype if dtype is None else dtype)


@Op
def embed_layer_norm(
    input_ids_T: Tensor, table_VD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> Tensor:
    """Gather rows of the embedding table and normalise them, `[T]` to `[T, D]`."""
    return F.layer_norm(F.embedding(input_ids_T, table_VD), weight_D.shape, weight_D, bias_D, eps)


@Op
def geglu(h_T2F: Tensor, activation: str = "gelu") -> Tensor:
    """`activation(first half) * second half`, `[T, 2F]` to `[T, F]`; "gelu" is the exact erf form, or "silu"."""
    if activation not in ("gelu", "silu"):
        raise ValueError(f'activation must be "gelu" or "silu", got {activation!r}')
    a_TF, gate_TF = h_T2F.chunk(2, dim=-1)
    return (F.gelu(a_TF) if activation == "gelu" else F.silu(a_TF)) * gate_TF


@Op
def rotary_table(positions_T: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, `[T, K / 2]` each, in float32 whatever the model's dtype (RoFormer, 3.2.2).

    Args:
        positions_T: int64 or int32.
    """
    exponent_R = torch.arange(0, head_dim, 2, device=positions_T.device).float() / head_dim
    angle_TR = positions_T.float()[:, None] * (1.0 / theta**exponent_R)
    return angle_TR.cos(), angle_TR.sin()


@Op
def rotary(qkv_T3HK: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, inplace: bool = False) -> Tensor:
    """Rotate q and k of packed qkv (half-split pairs `(d, d + K/2)`); v passes. Float32 maths, one rounding.

    `inplace` overwrites `qkv_T3HK` and returns it.
    """
    a_T2HR, b_T2HR = qkv_T3HK[:, :2].chunk(2, dim=-1)
    cos_T11R, sin_T11R = cos_TR[:, None, None], sin_TR[:, None, None]
    rotated = torch.cat([a_T2HR * cos_T11R - b_T2HR * sin_T11R, b_T2HR * cos_T11R + a_T2HR * sin_T11R], dim=-1)
    rotated_T3HK = torch.cat([rotated.to(qkv_T3HK.dtype), qkv_T3HK[:, 2:]], dim=1)
    return qkv_T3HK.copy_(rotated_T3HK) if inplace else rotated_T3HK


@Op
def rotate_back(dq_THK: Tensor, dk_THK: Tensor, dv_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """The gradient of packed qkv before `rotary`, `[T, 3, H, K]`, from the gradients of rotated q and k, and of v."""
    return rotary.reference(torch.stack([dq_THK, dk_THK, dv_THK], dim=1), cos_TR, -sin_TR)


@Op
def token_ranges(cu_seqlens: Tensor, key_lengths: Tensor | None, num_tokens: int) -> Tensor:
    """Where the sequence of each token begins and ends, and where its keys end: packed tokens, `[3, T]` int32.

    For a token after the last sequence, all three are the end of that. `attention` computes it where it is not given.
    """
    token_T = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    segment_T = torch.bucketize(token_T, cu_seqlens[1:], right=True)
    bounds = torch.cat([cu_seqlens, cu_seqlens[-1:]])
    begin_T, end_T = bounds[segment_T], bounds[segment_T + 1]
    keys_T = end_T if key_lengths is None else begin_T + F.pad(key_lengths, (0, 1))[segment_T]
    return torch.stack([begin_T, end_T, keys_T]).to(torch.int32)


@Op
def attention(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    rope: tuple[Tensor, Tensor],
    window: int | None = None,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    ranges_3T: Tensor | None = None,
) -> Tensor:
    """Bidirectional softmax attention inside each packed sequence, `[T, 3, H, K]` unrotated to `[T, H, K]`.

    Query i sees key j of its own sequence iff `|i - j| <= window` (None: no limit) and j is among the first
    `key_lengths` rows (None: all). A row without a visible key gives zero. Scale `K ** -0.5`.

    Args:
        cu_seqlens: `[B + 1]` int32. max_seqlen: longest sequence, a host integer.
        rope: cos and sin, `[T, K / 2]` float32.
        ranges_3T: what `token_ranges` gives for these sequences, for backends that read it: once for all layers.
    """
    num_tokens = qkv_T3HK.shape[0]
    traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if not traced and num_tokens == 0:  # a trace would keep the answer
        return qkv_T3HK[:, 0]
    position_S = torch.arange(max_seqlen, device=qkv_T3HK.device)
    rows_BS = (cu_seqlens[:-1, None] + position_S).clamp(max=num_tokens - 1)
    # Not unflatten: the older ONNX exporter would keep the sizes of its example.
    qkv_BS3HK = rotary(qkv_T3HK, *rope).index_select(0, rows_BS.flatten()).view(*rows_BS.shape, *qkv_T3HK.shape[1:])
    q_BHSK, k_BHSK, v_BHSK = qkv_BS3HK.permute(2, 0, 3, 1, 4).unbind()
    key_lengths = cu_seqlens.diff() if key_lengths is None else key_lengths
    visible_B1SS = (position_S < key_lengths[:, None])[:, None, None, :]
    if window is not None:
        visible_B1SS = visible_B1SS & ((position_S[:, None] - position_S).abs() <= window)
    visible_B1SS = visible_B1SS.expand(-1, 1, max_seqlen, -1)
    out_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=visible_B1SS, dropout_p=dropout_p)
    token_T = torch.arange(num_tokens, device=qkv_T3HK.device, dtype=cu_seqlens.dtype)
    sequence_T = torch.bucketize(token_T, cu_seqlens[1:], right=True)
    row_T = sequence_T * max_seqlen + token_T - cu_seqlens[sequence_T]
    return out_BHSK.transpose(1, 2).flatten(0, 1).index_select(0, row_T)


@Op
def maxsim(
    queries_QE: Tensor, cu_queries: Tensor, documents_NE: Tensor, cu_documents: Tensor, *, paired: bool = False
) -> Tensor:
    """Late interaction: for each query token the best document token, summed over the query. Float32 or better.

    All pairs gives `[number of queries, number of documents]`; `paired` scores query i with document i. Ties go to
    the lowest index in the gradient. An empty document scores -inf with every query that has a token; an empty query
    scores 0.
    """
    dtype = torch.promote_types(queries_QE.dtype, torch.float32)
    queries = queries_QE.to(dtype).split(_lengths(cu_queries))
    documents = documents_NE.to(dtype).split(_lengths(cu_documents))

    def score(query_QE: Tensor, document_NE: Tensor) -> Tensor:
        if len(document_NE) == 0:
            return query_QE.new_full((len(query_QE),), float("-inf")).sum()
        return (query_QE @ document_NE.T).max(dim=1).values.sum()

    if paired:
        return torch.stack([score(q, d) for q, d in zip(queries, documents, strict=True)])
    return torch.stack([torch.stack([score(q, d) for d in documents]) for q in queries])


@Op
def project_normalize(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None, rows_Q: Tensor | None = None
) -> Tensor:
    """`x W^T + b`, every row divided by its norm (or by 1e-12, if that is more): `[T, D]` to `[T, E]`.

    `rows_Q`, int64, selects the rows that are returned, `[Q, E]`; None returns all.
    """
    x_TD = x_TD if rows_Q is None else x_TD.index_select(0, rows_Q)
    return F.normalize(linear(x_TD, weight_ED, bias_E), dim=-1)


@Op
def pool(x_TD: Tensor, cu_seqlens: Tensor, mode: str = "cls", *, normalize: bool = False) -> Tensor:
    """One row for each packed sequence, `[T, D]` to `[B, D]`: its first ("cls"), "last", "mean" or "max".

    `normalize` divides it by its norm. An empty sequence gives zero. Sums in float32 or better, one rounding.
    """
    rows = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)).split(_lengths(cu_seqlens))
    how = {
        "cls": lambda x: x[0],
        "last": lambda x: x[-1],
        "mean": lambda x: x.mean(0),
        "max": lambda x: x.max(0).values,
    }
    if mode not in how:
        raise ValueError(f"mode must be {', '.join(how)}, got {mode!r}")
    pooled = [how[mode](x_SD) if len(x_SD) else x_SD.new_zeros(x_SD.shape[1]) for x_SD in rows]
    pooled_BD = torch.stack(pooled) if pooled else x_TD[:0]
    return (F.normalize(pooled_BD, dim=-1) if normalize else pooled_BD).to(x_TD.dtype)


@Op
def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    *,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`lse - logit[target] + z_loss * lse ** 2` of each token with a target, where lse is the log of the sum of the
    exponentials of the token's logits `x W^T + b`. In float32 (or float64).

    Args:
        targets_T: int64, the class of each token; negative where a token has none.
        reduction: "mean" or "sum" over the tokens with a target, a scalar, 0 without any; "none", `[T]`, 0 for a token
            without a target.
        label_smoothing: the share of `logit[target]` that the mean over all logits of the token takes, from 0 to 1.

    Raises:
        ValueError: another `reduction`, or a `label_smoothing` outside of 0 to 1.
    """
    check_loss(reduction, label_smoothing)
    chosen = targets_T >= 0
    logits = F.linear(x_TD[chosen], weight_VD, bias_V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = logits.logsumexp(dim=-1)
    wanted = logits.gather(1, targets_T[chosen, None])[:, 0]
    if label_smoothing:  # 0 times the logit of an excluded class, which is -inf, would be NaN
        wanted = (1 - label_smoothing) * wanted + label_smoothing * logits.mean(dim=-1)
    loss = lse - wanted + z_loss * lse.square()
    if reduction == "none":
        return torch.zeros_like(targets_T, dtype=loss.dtype).masked_scatter(chosen, loss)
    return loss.sum() / (max(1, len(loss)) if reduction == "mean" else 1)


def check_loss(reduction: str, label_smoothing: float) -> None:
    """Raise ValueError for what `linear_cross_entropy` does not take."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing!r}")
