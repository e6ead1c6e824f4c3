"""FlashAttention, the one in torch and the packages: `forward` and `backward` of rotated q, k, v as plain functions.

Windows are neighbours per side everywhere in this library; they become FlashAttention's left and right here and
nowhere else. FlashAttention counts a window from the last query and the last key (query i sees keys about
`i + keys - queries`), we from the first: the two agree where a sequence has as many keys as queries, so `choose`
refuses a window together with separate key lengths. Without a window the keys are packed tightly for it.

All tensors are float16 or bfloat16, `[T, H, K]`; the last dimension is contiguous, so views of packed qkv will do.
Packages are optional: none is imported before it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import arch

LONG = 1024
"""Up to here Triton's kernel takes layers without a window, and rotates q and k as it loads them. A longer sequence
has many tiles that would rotate the same keys again, and there FlashAttention is said to be ahead; not yet timed."""


class Spans(NamedTuple):
    """Which rows belong together: cumulative lengths of queries and keys, `[B + 1]` int32, the longest, the window."""

    queries: Tensor
    keys: Tensor
    longest: int
    window: int | None

    @property
    def side(self) -> int:
        """The window of a side in flash-attn 2 and 3, both ends included; -1 is no limit. (torch and 4 take None.)"""
        return -1 if self.window is None else self.window

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        return self.queries, self.keys, self.longest, self.longest

    @property
    def named(self) -> dict[str, Tensor | int]:
        return dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), self.bounds, strict=True))


OutAndLse = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def _deterministic() -> bool:
    """What torch's own FlashAttention asks itself, for the packages."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _torch_forward(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, at: Spans) -> OutAndLse:
    windows = {"window_size_left": at.window, "window_size_right": at.window}
    switches = {"dropout_p": 0.0, "is_causal": False, "return_debug_mask": False}
    return torch.ops.aten._flash_attention_forward(q_THK, k_THK, v_THK, *at.bounds, **switches, **windows)[:2]


def _torch_backward(
    dout_THK: Tensor, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, out_THK: Tensor, lse_HT: Tensor, at: Spans
) -> Gradients:
    # The state of the random generator is for dropout: it is asked for, and not read.
    state = q_THK.new_empty(2, dtype=torch.uint64)
    windows = {"window_size_left": at.window, "window_size_right": at.window}
    switches = {"dropout_p": 0.0, "is_causal": False, "rng_state": state, "unused": state}
    saved = (dout_THK, q_THK, k_THK, v_THK, out_THK, lse_HT)
    return torch.ops.aten._flash_attention_backward(*saved, *at.bounds, **switches, **windows)


def _flash2_forward(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, at: Spans) -> OutAndLse:
    package = import_module("flash_attn.flash_attn_interface")
    windows = {"window_size_left": at.side, "window_size_right": at.side}
    switches = {"dropout_p": 0.0, "softmax_scale": q_THK.shape[-1] ** -0.5, "causal": False}
    return package._flash_attn_varlen_forward(q_THK, k_THK, v_THK, *at.bounds, **switches, **windows)[:2]


def _flash2_backward(
    dout_THK: Tensor, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, out_THK: Tensor, lse_HT: Tensor, at: Spans
) -> Gradients:
    package = import_module("flash_attn.flash_attn_interface")
    gradients = (torch.empty_like(q_THK), torch.empty_like(k_THK), torch.empty_like(v_THK))
    windows = {"window_size_left": at.side, "window_size_right": at.side}
    switches = {"dropout_p": 0.0, "softmax_scale": q_THK.shape[-1] ** -0.5, "causal": False}
    unused = {"softcap": 0.0, "alibi_slopes": None, "deterministic": _deterministic()}
    saved = (dout_THK, q_THK, k_THK, v_THK, out_THK, lse_HT)
    package._flash_attn_varlen_backward(*saved, *gradients, *at.bounds, **switches, **windows, **unused)
    return gradients


def _flash3_forward(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, at: Spans) -> OutAndLse:
    package = import_module("flash_attn_interface")
    windows = {"window_size_left": at.side, "window_size_right": at.side}
    scale = q_THK.shape[-1] ** -0.5
    return package._flash_attn_forward(q_THK, k_THK, v_THK, softmax_scale=scale, **at.named, **windows)[:2]


def _flash3_backward(
    dout_THK: Tensor, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, out_THK: Tensor, lse_HT: Tensor, at: Spans
) -> Gradients:
    package = import_module("flash_attn_interface")
    dq_THK, dk_THK, dv_THK = torch.empty_like(q_THK), torch.empty_like(k_THK), torch.empty_like(v_THK)
    windows = {"window_size_left": at.side, "window_size_right": at.side}
    switches = {"softmax_scale": q_THK.shape[-1] ** -0.5, "deterministic": _deterministic()}
    saved = (dout_THK, q_THK, k_THK, v_THK, out_THK, lse_HT)
    package._flash_attn_backward(*saved, dq=dq_THK, dk=dk_THK, dv=dv_THK, **at.named, **switches, **windows)
    return dq_THK, dk_THK, dv_THK


def _flash4_forward(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, at: Spans) -> OutAndLse:
    package = import_module("flash_attn.cute.interface")
    windows = {"window_size_left": at.window, "window_size_right": at.window}
    return package._flash_attn_fwd(q_THK, k_THK, v_THK, **at.named, **windows, return_lse=True)[:2]


def _flash4_backward(
    dout_THK: Tensor, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, out_THK: Tensor, lse_HT: Tensor, at: Spans
) -> Gradients:
    package = import_module("flash_attn.cute.interface")
    windows = {"window_size_left": at.window, "window_size_right": at.window}
    # Here the gradient comes after the output.
    saved = (q_THK, k_THK, v_THK, out_THK, dout_THK, lse_HT)
    return package._flash_attn_bwd(*saved, **at.named, **windows, deterministic=_deterministic())


class Flash(NamedTuple):
    """One FlashAttention.

    Attributes:
        package: the distribution and its oldest version with these signatures; None is torch itself.
        oldest, newest: compute capabilities on which forward and backward run, 89 for 8.9.
    """

    package: tuple[str, tuple[int, ...]] | None
    oldest: int
    newest: int
    forward: Callable[[Tensor, Tensor, Tensor, Spans], OutAndLse]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Spans], Gradients]


FLASH = {
    # Hopper's own instructions; by its authors' figures ahead of the kernels of generation 2 from 1,024 tokens on.
    "flash3": Flash(("flash-attn-3", (3,)), 90, 90, _flash3_forward, _flash3_backward),
    # Its forward pass also runs on 8.x, its backward pass also on 12.x, neither with instructions of its own.
    "flash4": Flash(("flash-attn-4", (4,)), 90, 119, _flash4_forward, _flash4_backward),
    # Generation 2, and no package to build.
    "torch": Flash(None, 80, 999, _torch_forward, _torch_backward),
    # The same kernels, for a torch that was built without them.
    "flash2": Flash(("flash-attn", (2, 7)), 80, 999, _flash2_forward, _flash2_backward),
}
"""The best first. Ordered by what their authors publish, and not yet timed here."""


def _installed(package: tuple[str, tuple[int, ...]] | None) -> bool:
    if package is None:
        return torch.backends.cuda.is_flash_attention_available()
    name, oldest = package
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    numbers = [int(number) for number in version.split(".")[: len(oldest)] if number.isdigit()]
    return tuple(numbers) >= oldest


# Looked up once, on import: a compiler could not trace a look at what is installed.
INSTALLED = frozenset(name for name, row in FLASH.items() if _installed(row.package))


def usable(device: torch.device) -> tuple[str, ...]:
    """The rows of `FLASH` that are installed and run on this device, the best first."""
    if device.type != "cuda":
        return ()
    return tuple(name for name, row in FLASH.items() if row.oldest <= arch(device) <= row.newest and name in INSTALLED)


def choose(
    qkv_T3HK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    rope: tuple[Tensor, Tensor],
    window: int | None = None,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
) -> str | None:
    """The row of `FLASH` that takes this call of `attention`, None if none does."""
    head_width = qkv_T3HK.shape[-1]
    fits = (
        qkv_T3HK.dtype in (torch.float16, torch.bfloat16)
        and (head_width % 8 == 0 and head_width <= 128)
        and (len(qkv_T3HK) > 0 and cu_seqlens.dtype == torch.int32)
        and (window is None or key_lengths is None)
        and dropout_p == 0
        and not any(table_TR.requires_grad for table_TR in rope)
    )
    names = usable(qkv_T3HK.device) if fits else ()
    return names[0] if names else None


def empty_outputs(qkv_T3HK: Tensor, *__: object) -> tuple[Tensor, Tensor]:
    """Where any of them, and Triton's kernel, leave what `forward` returns."""
    tokens, _, heads, width = qkv_T3HK.shape
    return qkv_T3HK.new_empty(tokens, heads, width), qkv_T3HK.new_empty(heads, tokens, dtype=torch.float32)


def _tight(cu_seqlens: Tensor, key_lengths: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the keys lie if nothing but keys is kept, without asking the device how many there are.

    Returns the cumulative lengths of the keys, `[B + 1]`; for each kept row its token; for each token its kept row;
    and whether it has one. Kept rows are `[T]`: those after the last key repeat some token, and no sequence holds them.
    """
    cu_keys = F.pad(key_lengths.cumsum(0), (1, 0)).to(torch.int32)
    last = len(key_lengths) - 1
    token_T = torch.arange(num_tokens, device=cu_seqlens.device)
    sequence_T = torch.bucketize(token_T, cu_seqlens[1:], right=True).clamp(max=last)
    place_T = token_T - cu_seqlens[sequence_T]
    owner_T = torch.bucketize(token_T, cu_keys[1:], right=True).clamp(max=last)
    source_T = (cu_seqlens[owner_T] + token_T - cu_keys[owner_T]).clamp(max=num_tokens - 1)
    is_key_T = place_T < key_lengths[sequence_T]
    return cu_keys, source_T, torch.where(is_key_T, cu_keys[sequence_T] + place_T, 0), is_key_T


def forward(
    name: str,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int | None = None,
    key_lengths: Tensor | None = None,
) -> OutAndLse:
    """Attention by a row of `FLASH`: `[T, H, K]`, and the logarithm of each softmax's sum, `[H, T]` float32."""
    cu_keys = cu_seqlens
    if key_lengths is not None:
        cu_keys, source_T, _, _ = _tight(cu_seqlens, key_lengths, len(k_THK))
        k_THK, v_THK = k_THK[source_T], v_THK[source_T]
    return FLASH[name].forward(q_THK, k_THK, v_THK, Spans(cu_seqlens, cu_keys, max_seqlen, window))


def backward(
    name: str,
    dout_THK: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int | None = None,
    key_lengths: Tensor | None = None,
) -> Gradients:
    """dq, dk and dv of the same call, three tensors `[T, H, K]`; what is no key has zeros."""
    saved = (dout_THK, q_THK, k_THK, v_THK, out_THK, lse_HT)
    if key_lengths is None:
        return FLASH[name].backward(*saved, Spans(cu_seqlens, cu_seqlens, max_seqlen, window))
    cu_keys, source_T, kept_T, is_key_T = _tight(cu_seqlens, key_lengths, len(k_THK))
    saved = (dout_THK, q_THK, k_THK[source_T], v_THK[source_T], out_THK, lse_HT)
    dq_THK, dk_THK, dv_THK = FLASH[name].backward(*saved, Spans(cu_seqlens, cu_keys, max_seqlen, window))
    # Rows that no sequence holds are never written: they are left behind, whatever they are.
    dk_THK, dv_THK = (torch.where(is_key_T[:, None, None], x[kept_T], 0) for x in (dk_THK, dv_THK))
    return dq_THK, dk_THK, dv_THK
