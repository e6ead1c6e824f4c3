"""Packed attention on the CPU: global layers by runs of equal length, local layers as one band, both through SDPA.

Memory is linear in the tokens: a wide window, and long sequences with query-only rows, go block by block of queries.
Differentiable by plain autograd. Under `torch.compile` it is one opaque op, because it branches on the lengths.
"""

from __future__ import annotations

import threading
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import attention, linear
from .linear import FASTER_THAN_MKL, row_step

BLOCK = 32
"""Queries of a block of the band, which sees BLOCK + 2 * window keys. The fastest of 32, 64 and 128: it wastes
least."""

PART = 2048
"""Queries of the band that inference rotates and pads at a time; a multiple of BLOCK."""

WIDEST = 256
"""The widest window of the band, whose mask has `BLOCK + 2 * window` numbers a query."""

ROWS = 256
"""Queries of a block that is not of the band: their scores stay in the cache."""

ONEDNN_LENGTH = 256
"""From this length on, inference runs dense attention head by head through oneDNN."""

BFLOAT16_IS_FASTER = torch.cpu._is_amx_tile_supported()
"""Whether SDPA multiplies bfloat16 in tiles of the processor (AMX): then it takes a third to a half of the time of
float32. Without them it takes 2.7 times as much (Zen 5, both passes)."""

_last = threading.local()
"""The band mask of this thread's last call, in `key` and `mask`: the local layers of a forward pass share it, and
nothing passes from one call of the op to the next. One mask a thread, freed with the thread."""


def _accepts(qkv_T3HK: Tensor, *_: object, dropout_p: float = 0.0, **__: object) -> bool:
    return qkv_T3HK.is_cpu and dropout_p == 0.0


@attention.register("cpu", when=_accepts)
def attention_cpu(
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
    """`attention` without dropout; same arguments and result."""
    if dropout_p:
        raise ValueError("the cpu backend of attention has no dropout; use the reference")
    if qkv_T3HK.shape[0] == 0:
        return qkv_T3HK[:, 0]
    run = _opaque if torch.compiler.is_compiling() else _attention
    arguments = (qkv_T3HK, cu_seqlens, max_seqlen, *rope, window, key_lengths)
    if not torch.is_autocast_enabled("cpu"):
        return run(*arguments)
    with torch.autocast("cpu", enabled=False):  # which would round what is computed in float32
        return run(*arguments)


def _attention(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cos_TR: Tensor,
    sin_TR: Tensor,
    window: int | None,
    key_lengths: Tensor | None,
) -> Tensor:
    dtype = qkv_T3HK.dtype
    if dtype is torch.float16 or (dtype is torch.bfloat16 and not BFLOAT16_IS_FASTER):
        qkv_T3HK = qkv_T3HK.float()
    ends = cu_seqlens.tolist()
    lengths = tuple(stop - start for start, stop in pairwise(ends))
    keys = None if key_lengths is None else key_lengths.tolist()
    if window is not None and max_seqlen <= window + 1:
        window = None
    if keys is None and window is not None and window <= WIDEST:
        out_THK = _band(qkv_T3HK, cos_TR, sin_TR, lengths, window)
    else:
        run = _runs if max_seqlen <= ROWS or (keys is None and window is None) else _blocks
        out_THK = run(*_rotate(qkv_T3HK, cos_TR, sin_TR), lengths, window, keys)
    return out_THK.to(dtype)


def _rotate(qkv_T3HK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary as one complex product. It interleaves the pairs, in q and in k alike, so q k^T is the same."""
    dtype = torch.promote_types(qkv_T3HK.dtype, torch.float32)
    qk_T2HK, v_T1HK = qkv_T3HK.split_with_sizes((2, 1), dim=1)
    angle_T11R = torch.complex(cos_TR.to(dtype), sin_TR.to(dtype)).unsqueeze(1).unsqueeze(1)
    rotated_T2HR = torch.complex(*qk_T2HK.to(dtype).chunk(2, dim=-1)).mul_(angle_T11R)
    q_THK, k_THK = torch.view_as_real(rotated_T2HR).flatten(-2).to(qkv_T3HK.dtype).unbind(1)
    return q_THK, k_THK, v_T1HK.squeeze(1)


def _runs(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    lengths: tuple[int, ...],
    window: int | None,
    key_lengths: list[int] | None,
) -> Tensor:
    """Dense attention, one SDPA call for each run of neighbouring sequences of equal length."""
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    parts = ((x,) for x in (q_THK, k_THK, v_THK))
    if len(runs) > 1:
        # One split instead of a slice per run: the gradient of a slice is a tensor of all T rows.
        parts = (x.split([length * count for length, count in runs]) for x in (q_THK, k_THK, v_THK))
    outputs, sequence = [], 0
    for (length, count), *qkv in zip(runs, *parts, strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        if key_lengths is None and length >= ONEDNN_LENGTH and _onednn_is_faster(q):
            out = torch.stack([_by_head(*one) for one in zip(q, k, v, strict=True)])
        elif key_lengths is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            visible = _visible(key_lengths[sequence : sequence + count], length, window)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
            out = out * visible.any(-1, keepdim=True)  # a row without a visible key gives zero
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        sequence += count
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _blocks(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    lengths: tuple[int, ...],
    window: int | None,
    key_lengths: list[int] | None,
) -> Tensor:
    """As `_runs`, but a block of ROWS queries of one sequence at a time, which sees only the keys near it."""
    near = None
    if window is not None:  # [i, j]: query i of a block and the key j places after the first that its query 0 may see
        row, key = torch.arange(ROWS, device="cpu"), torch.arange(ROWS + 2 * window, device="cpu")
        near = (row[:, None] + window - key).abs() <= window
    outputs = []
    parts = (x.split(lengths) for x in (q_THK, k_THK, v_THK))
    for keys, *qkv in zip(key_lengths or lengths, *parts, strict=True):
        q_HSK, k_HSK, v_HSK = (x.transpose(0, 1)[None] for x in qkv)
        for start in range(0, q_HSK.shape[2], ROWS):
            block = q_HSK[:, :, start : start + ROWS]
            rows = block.shape[2]
            first, last = (0, keys) if window is None else (max(0, start - window), min(start + rows + window, keys))
            if first >= last:
                outputs.append(block * 0)  # no visible key
                continue
            k, v = k_HSK[:, :, first:last], v_HSK[:, :, first:last]
            if near is None or window is None:
                outputs.append(F.scaled_dot_product_attention(block, k, v))
                continue
            shift = window - start
            visible = near[:rows, first + shift : last + shift]
            out = F.scaled_dot_product_attention(block, k, v, attn_mask=visible)
            outputs.append(out * visible.any(-1, keepdim=True))  # a row without a visible key gives zero
    return torch.cat([out.squeeze(0).transpose(0, 1) for out in outputs])


def _onednn_is_faster(q: Tensor) -> bool:
    """SDPA multiplies with MKL: without AVX-512 it is 1.5 times as fast as `_by_head` (AMD EPYC). It also trains."""
    training = torch.is_grad_enabled() and q.requires_grad
    return FASTER_THAN_MKL and "onednn" in linear.backends and q.dtype is torch.float32 and not training


def _by_head(q_HSK: Tensor, k_HSK: Tensor, v_HSK: Tensor) -> Tensor:
    """Dense attention of one sequence, `[H, S, K]`: two `linear` products for each head and block of queries.

    oneDNN keeps memory for each new shape. So the length is rounded up to a step, by keys that no query sees, and cut
    into blocks of about one size.
    """
    heads, length, width = q_HSK.shape
    fill = -length % row_step(length)
    q_HSK, k_HSK, v_HSK = (F.pad(x, (0, 0, 0, fill)) for x in (q_HSK, k_HSK, v_HSK))
    padded = length + fill
    rows_of_block = -(-padded // -(-padded // ROWS))
    out_SHK = q_HSK.new_empty(padded, heads, width)
    for head in range(heads):
        k_SK, v_KS = k_HSK[head].contiguous(), v_HSK[head].contiguous().T
        for start in range(0, padded, rows_of_block):
            rows = slice(start, start + rows_of_block)
            scores = linear(q_HSK[head, rows] * width**-0.5, k_SK)
            scores[:, length:] = float("-inf")
            out_SHK[rows, head] = linear(torch.softmax(scores, dim=-1, out=scores), v_KS)
    return out_SHK[:length].transpose(0, 1)


def _visible(key_lengths: list[int], length: int, window: int | None) -> Tensor:
    """`[B, 1, S, S]` bool: key j is among the first of its sequence and within the window of query i."""
    place = torch.arange(length, device="cpu")
    visible = (place < torch.tensor(key_lengths, device="cpu")[:, None])[:, None, None, :].expand(-1, 1, length, -1)
    return visible if window is None else visible & ((place[:, None] - place).abs() <= window)


def _band(qkv_T3HK: Tensor, cos_TR: Tensor, sin_TR: Tensor, lengths: tuple[int, ...], window: int) -> Tensor:
    """Local attention of the whole batch: a block of queries sees its own keys and a window on both sides.

    Keys and values are overlapping views of one padded buffer, without a copy per block. Inference rotates and pads
    PART queries and the keys around them at a time, so these copies do not grow with the batch.
    """
    tokens, span = qkv_T3HK.shape[0], BLOCK + 2 * window
    mask = _band_mask(lengths, window, qkv_T3HK.dtype)
    part = tokens if torch.is_grad_enabled() and qkv_T3HK.requires_grad else PART
    outputs = []
    for start in range(0, tokens, part):
        stop = min(start + part, tokens)
        first, last = max(0, start - window), min(stop + window, tokens)
        q, k, v = _rotate(qkv_T3HK[first:last], cos_TR[first:last], sin_TR[first:last])
        blocks = -(-(stop - start) // BLOCK)
        tail = blocks * BLOCK - (stop - start)
        q = F.pad(q[start - first : stop - first], (0, 0, 0, 0, 0, tail)).unflatten(0, (blocks, BLOCK)).transpose(1, 2)
        around = (0, 0, 0, 0, window - (start - first), tail + window - (last - stop))
        k, v = (F.pad(x, around).unfold(0, span, BLOCK).transpose(2, 3) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[start // BLOCK :][:blocks])
        outputs.append(out.transpose(1, 2).flatten(0, 1)[: stop - start])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _band_mask(lengths: tuple[int, ...], window: int, dtype: torch.dtype) -> Tensor:
    """`[blocks, 1, BLOCK, BLOCK + 2 * window]` additive mask: same sequence and within the window.

    Not an inference tensor, because a later pass that trains may use it. Finite, because the rows after the last token
    see nothing and would give NaN.
    """
    key = lengths, window, dtype
    if getattr(_last, "key", None) != key:
        with torch.inference_mode(False):
            length_B = torch.tensor(lengths, device="cpu")
            sequence_T = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), length_B)
            blocks = -(-len(sequence_T) // BLOCK)
            tail = blocks * BLOCK - len(sequence_T)
            keys = F.pad(sequence_T, (window, tail + window), value=-1).unfold(0, BLOCK + 2 * window, BLOCK)
            queries = F.pad(sequence_T, (0, tail), value=-2).unflatten(0, (blocks, BLOCK))
            row, column = torch.arange(BLOCK, device="cpu"), torch.arange(BLOCK + 2 * window, device="cpu")
            distance = row[:, None] + window - column
            visible = (queries[:, :, None] == keys[:, None, :]) & (distance.abs() <= window)
            mask = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min / 2)
        _last.key, _last.mask = key, mask[:, None]
    return _last.mask


@torch.library.custom_op("modernbert_kernels::attention_cpu", mutates_args=())
def _opaque(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cos_TR: Tensor,
    sin_TR: Tensor,
    window: int | None,
    key_lengths: Tensor | None,
) -> Tensor:
    return _attention(qkv_T3HK, cu_seqlens, max_seqlen, cos_TR, sin_TR, window, key_lengths).contiguous()


@_opaque.register_fake
def _(qkv_T3HK: Tensor, *_: object) -> Tensor:
    return torch.empty_like(qkv_T3HK[:, 0], memory_format=torch.contiguous_format)


@torch.library.custom_op("modernbert_kernels::attention_cpu_backward", mutates_args=())
def _opaque_backward(
    grad_THK: Tensor,
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cos_TR: Tensor,
    sin_TR: Tensor,
    window: int | None,
    key_lengths: Tensor | None,
) -> Tensor:
    def forward(qkv_T3HK: Tensor) -> Tensor:
        return _attention(qkv_T3HK, cu_seqlens, max_seqlen, cos_TR, sin_TR, window, key_lengths)

    # torch.func and not torch.autograd.grad: inside of an operator autograd records nothing.
    pull_back = torch.func.vjp(forward, qkv_T3HK)[1]
    return pull_back(grad_THK)[0].contiguous()


@_opaque_backward.register_fake
def _(grad_THK: Tensor, qkv_T3HK: Tensor, *_: object) -> Tensor:
    return torch.empty_like(qkv_T3HK, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    qkv_T3HK, cu_seqlens, ctx.max_seqlen, cos_TR, sin_TR, ctx.window, key_lengths = inputs
    ctx.save_for_backward(qkv_T3HK, cu_seqlens, cos_TR, sin_TR, key_lengths)


def _backward(ctx, grad_THK: Tensor):
    qkv_T3HK, cu_seqlens, cos_TR, sin_TR, key_lengths = ctx.saved_tensors
    arguments = (qkv_T3HK, cu_seqlens, ctx.max_seqlen, cos_TR, sin_TR, ctx.window, key_lengths)
    return _opaque_backward(grad_THK.contiguous(), *arguments), None, None, None, None, None, None


_opaque.register_autograd(_backward, setup_context=_setup_context)
