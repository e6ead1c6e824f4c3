"""torch's built-in FlashAttention behind transformers' attention interface, so that no package has to be built for it.

Registered are an attention function and a mask function under one name, `NAME`. The mask function does once per forward
pass what transformers' own FlashAttention does in every layer: it finds the real tokens of a padded batch. Flattened
batches (all texts in one row, as sentence-transformers makes them) bring `cu_seq_lens_q` and `max_length_q` along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "varlen_of_torch"  # without the word "flash", by which transformers would look for a package

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, int | None, float], Tensor]
"""q, k, v `[T, H, K]`, cumulative lengths `[B + 1]` int32, the longest, neighbours per side or None, scale; returns
`[T, H, K]`."""


class Real(NamedTuple):
    """Where the real tokens of a padded batch `[B, S]` stand, flattened; their cumulative lengths; the longest."""

    rows: Tensor
    cu_seqlens: Tensor
    longest: int


def flash_of_torch(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cu_seqlens: Tensor, longest: int, window: int | None, scale: float
) -> Tensor:
    """The kernel that comes with torch for CUDA, in float16 and bfloat16."""
    bounds = (cu_seqlens, cu_seqlens, longest, longest)
    switches = {"dropout_p": 0.0, "is_causal": False, "return_debug_mask": False}
    windows = {"window_size_left": window, "window_size_right": window}
    return torch.ops.aten._flash_attention_forward(q_THK, k_THK, v_THK, *bounds, **switches, scale=scale, **windows)[0]


def real_tokens(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Real | None:
    """The mask function: None where nothing is padded."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    lengths_B = attention_mask.sum(1, dtype=torch.int32)
    cu_seqlens = F.pad(lengths_B.cumsum(0, dtype=torch.int32), (1, 0))
    return Real(attention_mask.flatten().nonzero().flatten(), cu_seqlens, int(lengths_B.max()))


def attention(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    """The attention function around a kernel. Its module says the window as transformers does: neighbours plus one."""

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Real | None,
        *,
        scaling: float,
        sliding_window: int | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        size, heads, length, width = query.shape
        q, k, v = (x.transpose(1, 2).reshape(size * length, heads, width) for x in (query, key, value))
        window = None if sliding_window is None else sliding_window - 1
        if attention_mask is not None:
            rows, cu_seqlens, longest = attention_mask
            real = kernel(q[rows], k[rows], v[rows], cu_seqlens, longest, window, scaling)
            out = real.new_zeros(size * length, heads, width).index_copy(0, rows, real)
        elif cu_seq_lens_q is not None and max_length_q is not None:
            out = kernel(q, k, v, cu_seq_lens_q, max_length_q, window, scaling)
        else:
            ends = torch.arange(0, (size + 1) * length, length, dtype=torch.int32, device=query.device)
            out = kernel(q, k, v, ends, length, window, scaling)
        return out.view(size, length, heads, width), None

    return attend


def register(kernel: Kernel = flash_of_torch) -> str:
    """Make it known to transformers; the name for `attn_implementation`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention(kernel))
    AttentionMaskInterface.register(NAME, real_tokens)
    return NAME
