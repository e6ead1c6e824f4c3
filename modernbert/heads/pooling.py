"""Rows of tokens to one row for each text, as the poolings of sentence-transformers and of Hugging Face's classifiers.

Only the first `key_lengths` rows of a text count: query-only rows are under the mask of a padded caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import modernbert_kernels as ops
from modernbert_kernels.dispatch import recorded

from ..packing import Packed


def encode_and_pool(encoder: nn.Module, batch: Packed, modes: Sequence[str]) -> Tensor:
    """B texts to `[B, D]`, or to `[B, n D]` for n modes side by side.

    For the first or last token alone, the last layer computes only these rows. A text without tokens gives zeros.
    Under `torch.compile` each text must have a token.
    """
    if len(modes) == 1 and modes[0] in ROWS and _each_has_a_token(batch):
        return encoder(batch, rows=ROWS[modes[0]](batch))
    x_TD = encoder(batch)
    return torch.cat([POOLINGS[mode](x_TD, batch) for mode in modes], dim=-1)


def _each_has_a_token(batch: Packed) -> bool:
    if torch.compiler.is_compiling() or recorded():
        return True  # a look at the lengths would make them constants of the program
    if batch.key_lengths is not None:
        return batch.key_lengths.is_cpu and bool(batch.key_lengths.all()) and min(batch.lengths, default=1) > 0
    return bool(batch.lengths) and min(batch.lengths) > 0


def _first(batch: Packed) -> Tensor:
    return batch.cu_seqlens[:-1]


def _last(batch: Packed) -> Tensor:
    return batch.cu_seqlens[:-1] + _counts(batch) - 1


def _counts(batch: Packed) -> Tensor:
    """`[B]`, the rows of each text that count."""
    return batch.cu_seqlens.diff() if batch.key_lengths is None else batch.key_lengths


def places(batch: Packed) -> tuple[Tensor, Tensor]:
    """Of each token its text, and its place in it from 0, `[T]` each."""
    token_T = torch.arange(batch.num_tokens, device=batch.cu_seqlens.device, dtype=batch.cu_seqlens.dtype)
    text_T = torch.bucketize(token_T, batch.cu_seqlens[1:], right=True)
    return text_T, token_T - batch.cu_seqlens[text_T]


def _pool(x_TD: Tensor, batch: Packed, mode: str) -> Tensor:
    if batch.key_lengths is None:
        return ops.pool(x_TD, batch.cu_seqlens, mode)
    text_T, place_T = places(batch)
    counted_T = place_T < batch.key_lengths[text_T]
    ends = torch.nn.functional.pad(batch.key_lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return ops.pool(x_TD[counted_T], ends, mode)


def _mean(x_TD: Tensor, batch: Packed) -> Tensor:
    if not (torch.compiler.is_compiling() or recorded()):
        return _pool(x_TD, batch, "mean")
    # In tensor operations alone: the lengths of a text are not constants of the program.
    text_T, place_T = places(batch)
    count_B = _counts(batch)
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    weight_T = (place_T < count_B[text_T]).to(dtype)
    sum_BD = torch.zeros(len(batch), x_TD.shape[1], dtype=dtype, device=x_TD.device)
    sum_BD = sum_BD.index_add(0, text_T, x_TD.to(dtype) * weight_T[:, None])
    return (sum_BD / count_B.clamp(min=1)[:, None]).to(x_TD.dtype)


def _mean_sqrt(x_TD: Tensor, batch: Packed) -> Tensor:
    mean_BD = _mean(_wide(x_TD), batch)
    return (mean_BD * _counts(batch).to(mean_BD.dtype).sqrt()[:, None]).to(x_TD.dtype)


def _weighted_mean(x_TD: Tensor, batch: Packed) -> Tensor:
    """Weights 1, 2, 3, ... from the first token on. Their mean is (n + 1) / 2."""
    weight_T1 = (places(batch)[1] + 1)[:, None]
    mean_BD = _mean(_wide(x_TD) * weight_T1, batch)
    return (mean_BD * 2 / (_counts(batch).to(mean_BD.dtype) + 1)[:, None]).to(x_TD.dtype)


def _wide(x_TD: Tensor) -> Tensor:
    return x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))


ROWS: dict[str, Callable[[Packed], Tensor]] = {"cls": _first, "lasttoken": _last}
POOLINGS: dict[str, Callable[[Tensor, Packed], Tensor]] = {
    "cls": lambda x_TD, batch: _pool(x_TD, batch, "cls"),
    "max": lambda x_TD, batch: _pool(x_TD, batch, "max"),
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": lambda x_TD, batch: _pool(x_TD, batch, "last"),
}
"""By the names of sentence-transformers, in the order in which it joins several."""
