"""FlashAttention of torch and of the packages: `forward` and `backward` of rotated q, k and v as plain functions.

Windows are neighbours per side everywhere in this library. They become FlashAttention's left and right sizes here only.
FlashAttention aligns the window with the last query and the last key (query i sees keys about `i + keys - queries`), we
with the first ones. The two agree where a sequence has as many keys as queries, so `choose` refuses a window together
with `key_lengths`. Without a window, the keys are gathered into packed rows of their own first.

All tensors are float16 or bfloat16, `[T, H, K]`. Only the last dimension must be contiguous, so views of packed qkv are
accepted. The packages are optional and are imported when they are called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import arch


class Varlen(NamedTuple):
    """The batch as FlashAttention takes it: cumulative lengths, `[B + 1]` int32, the longest sequence, the window."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen: int
    window: int | None

    @property
    def positional(self) -> tuple[Tensor, Tensor, int, int]:
        return self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen, self.max_seqlen

    @property
    def named(self) -> dict[str, Tensor | int]:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return dict(zip(names, self.positional, strict=True))

    def window_sizes(self, unlimited: int | None) -> dict[str, int | None]:
        """Left and right size, both ends included. `unlimited`: what this generation takes for no window."""
        size = unlimited if self.window is None else self.window
        return {"window_size_left": size, "window_size_right": size}


OutAndLse = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def _deterministic() -> bool:
    """The condition under which torch's own FlashAttention is deterministic, for the packages."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _torch_forward(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, at: Varlen) -> OutAndLse:
    options = {"dropout_p": 0.0, "is_causal": False, "return_debug_mask": False, **at.window_sizes(None)}
    return torch.ops.aten._flash_attention_forward(q_THK, k_THK, v_THK, *at.positional, **options)[:2]


def _torch_backward(
    dout_THK: Tensor, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, out_THK: Tensor, lse_HT: Tensor, at: Varlen
) -> Gradients:
    # The op requires a state of the random generator, and reads it for dropout only.
    state = q_THK.new_empty(2, dtype=torch.uint64)
    options = {"dropout_p": 0.0, "is_causal": False, "rng_state": state, "unused": state, **at.window_sizes(None)}
    saved = (dout_THK, q_THK, k_THK, v_THK, out_THK, lse_HT)
    return torch.ops.aten._flash_attention_backward(*saved, *at.positional, **options)


def _flash2_forward(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, at: Varlen) -> OutAndLse:
    package = import_module("flash_attn.flash_attn_interface")
    options = {"dropout_p": 0.0, "softmax_scale": q_THK.shape[-1] ** -0.5, "causal": False, **at.window_sizes(-1)}
    return package._flash_attn_varlen_forward(q_THK, k_THK, v_THK, *at.positional, **options)[:2]


def _flash2_backward(
    dout_THK: Tensor, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, out_THK: Tensor, lse_HT: Tensor, at: Varlen
) -> Gradients:
    package = import_module("flash_attn.flash_attn_interface")
    gradients = (torch.empty_like(q_THK), torch.empty_like(k_THK), torch.empty_like(v_THK))
    options = {"dropout_p": 0.0, "softmax_scale": q_THK.shape[-1] ** -0.5, "causal": False, **at.window_sizes(-1)}
    required = {"softcap": 0.0, "alibi_slopes": None, "deterministic": _deterministic()}
    saved = (dout_THK, q_THK, k_THK, v_THK, out_THK, lse_HT)
    package._flash_attn_varlen_backward(*saved, *gradients, *at.positional, **options, **required)
    return gradients


def _flash3_forward(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, at: Varlen) -> OutAndLse:
    package = import_module("flash_attn_interface")
    options = {"softmax_scale": q_THK.shape[-1] ** -0.5, **at.named, **at.window_sizes(-1)}
    return package._flash_attn_forward(q_THK, k_THK, v_THK, **options)[:2]


def _flash3_backward(
    dout_THK: Tensor, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, out_THK: Tensor, lse_HT: Tensor, at: Varlen
) -> Gradients:
    package = import_module("flash_attn_interface")
    dq_THK, dk_THK, dv_THK = torch.empty_like(q_THK), torch.empty_like(k_THK), torch.empty_like(v_THK)
    options = {"softmax_scale": q_THK.shape[-1] ** -0.5, "deterministic": _deterministic(), **at.window_sizes(-1)}
    saved = (dout_THK, q_THK, k_THK, v_THK, out_THK, lse_HT)
    package._flash_attn_backward(*saved, dq=dq_THK, dk=dk_THK, dv=dv_THK, **at.named, **options)
    return dq_THK, dk_THK, dv_THK


def _flash4_forward(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, at: Varlen) -> OutAndLse:
    package = import_module("flash_attn.cute.interface")
    return package._flash_attn_fwd(q_THK, k_THK, v_THK, **at.named, **at.window_sizes(None), return_lse=True)[:2]


def _flash4_backward(
    dout_THK: Tensor, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, out_THK: Tensor, lse_HT: Tensor, at: Varlen
) -> Gradients:
    package = import_module("flash_attn.cute.interface")
    # This generation takes the gradient after the output.
    saved = (q_THK, k_THK, v_THK, out_THK, dout_THK, lse_HT)
    options = {"deterministic": _deterministic(), **at.window_sizes(None)}
    return package._flash_attn_bwd(*saved, **at.named, **options)


class Package(NamedTuple):
    """One FlashAttention.

    Attributes:
        distribution: its name and its oldest version with these functions; None for torch itself.
        module, calls: where its functions are; how many tensors each is given by position here, and what by name.
        oldest, newest: compute capabilities on which forward and backward run, 89 for 8.9.
    """

    distribution: tuple[str, tuple[int, ...]] | None
    module: str
    calls: dict[str, tuple[int, tuple[str, ...]]]
    oldest: int
    newest: int
    forward: Callable[[Tensor, Tensor, Tensor, Varlen], OutAndLse]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Varlen], Gradients]


_WINDOW = ("window_size_left", "window_size_right")
_NAMED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", *_WINDOW)
_SECOND = ("dropout_p", "softmax_scale", "causal", *_WINDOW)

PACKAGES = {
    # Uses Hopper's own instructions. By its authors' figures, faster than generation 2 from 1,024 tokens on.
    "flash3": Package(
        ("flash-attn-3", (3,)),
        "flash_attn_interface",
        {
            "_flash_attn_forward": (3, (*_NAMED, "softmax_scale")),
            "_flash_attn_backward": (6, (*_NAMED, "softmax_scale", "deterministic", "dq", "dk", "dv")),
        },
        90,
        90,
        _flash3_forward,
        _flash3_backward,
    ),
    # Its forward pass also runs on 8.x and its backward pass also on 12.x, without instructions of their own.
    "flash4": Package(
        ("flash-attn-4", (4,)),
        "flash_attn.cute.interface",
        {"_flash_attn_fwd": (3, (*_NAMED, "return_lse")), "_flash_attn_bwd": (6, (*_NAMED, "deterministic"))},
        90,
        119,
        _flash4_forward,
        _flash4_backward,
    ),
    # Generation 2, without a package to build.
    "torch": Package(None, "torch", {}, 80, 999, _torch_forward, _torch_backward),
    # The same kernels, for a torch that was built without them.
    "flash2": Package(
        ("flash-attn", (2, 7)),
        "flash_attn.flash_attn_interface",
        {
            "_flash_attn_varlen_forward": (7, _SECOND),
            "_flash_attn_varlen_backward": (13, (*_SECOND, "softcap", "alibi_slopes", "deterministic")),
        },
        80,
        999,
        _flash2_forward,
        _flash2_backward,
    ),
}
"""The best first. The order follows their authors' figures; it has not been timed here."""


@cache
def _installed(name: str) -> bool:
    distribution = PACKAGES[name].distribution
    if distribution is None:
        return torch.backends.cuda.is_flash_attention_available()
    package, oldest = distribution
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    numbers = [int(number) for number in version.split(".")[: len(oldest)] if number.isdigit()]
    if tuple(numbers) < oldest:
        return False
    # Versions do not tell: builds of flash-attn-3 from before and after a change of its arguments are all 3.0.0b1.
    module, calls = import_module(PACKAGES[name].module), PACKAGES[name].calls
    return all(_takes(getattr(module, function, None), *call) for function, call in calls.items())


def _takes(function: Callable[..., object] | None, positional: int, names: tuple[str, ...]) -> bool:
    """Whether a function can be called with so many tensors and these names. Operators of torch take any by Python."""
    try:
        if function is not None:
            inspect.signature(function).bind(*range(positional), **dict.fromkeys(names))
    except TypeError:
        return False
    return function is not None


def installed(name: str) -> bool:
    """Whether this row of `PACKAGES` is installed, with functions that take our calls. Looked up once."""
    return _installed(name)


# A compiler cannot trace the look-up. `torch.compiler.assume_constant_result` sets this too, but imports the compiler.
installed._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def usable(device: torch.device) -> tuple[str, ...]:
    """The rows of `PACKAGES` that are installed and run on this device, the best first."""
    if device.type != "cuda":
        return ()
    capability = arch(device)
    return tuple(name for name, row in PACKAGES.items() if row.oldest <= capability <= row.newest and installed(name))


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
    """The row of `PACKAGES` that takes this call of `attention`, None if none does."""
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


def _pack_keys(cu_seqlens: Tensor, key_lengths: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices that gather the keys into packed rows of their own, without waiting for the device to count them.

    Returns the cumulative lengths of the keys, `[B + 1]`; the token of each packed row; the packed row of each token;
    and whether a token is a key. There are `[T]` packed rows: those after the last key repeat some token and belong to
    no sequence.
    """
    cu_keys = F.pad(key_lengths.cumsum(0), (1, 0)).to(torch.int32)
    last = len(key_lengths) - 1
    token_T = torch.arange(num_tokens, device=cu_seqlens.device)
    sequence_T = torch.bucketize(token_T, cu_seqlens[1:], right=True).clamp(max=last)
    position_T = token_T - cu_seqlens[sequence_T]
    sequence_of_row_T = torch.bucketize(token_T, cu_keys[1:], right=True).clamp(max=last)
    source_T = (cu_seqlens[sequence_of_row_T] + token_T - cu_keys[sequence_of_row_T]).clamp(max=num_tokens - 1)
    is_key_T = position_T < key_lengths[sequence_T]
    return cu_keys, source_T, torch.where(is_key_T, cu_keys[sequence_T] + position_T, 0), is_key_T


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
    """Attention by a row of `PACKAGES`: `[T, H, K]`, and the log-sum-exp of each softmax, `[H, T]` float32."""
    cu_keys = cu_seqlens
    if key_lengths is not None:
        cu_keys, source_T, _, _ = _pack_keys(cu_seqlens, key_lengths, len(k_THK))
        k_THK, v_THK = k_THK[source_T], v_THK[source_T]
    return PACKAGES[name].forward(q_THK, k_THK, v_THK, Varlen(cu_seqlens, cu_keys, max_seqlen, window))


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
    """dq, dk and dv of the same call, three tensors `[T, H, K]`. Tokens that are not keys get zeros in dk and dv."""
    saved = (dout_THK, q_THK, k_THK, v_THK, out_THK, lse_HT)
    if key_lengths is None:
        return PACKAGES[name].backward(*saved, Varlen(cu_seqlens, cu_seqlens, max_seqlen, window))
    cu_keys, source_T, row_T, is_key_T = _pack_keys(cu_seqlens, key_lengths, len(k_THK))
    saved = (dout_THK, q_THK, k_THK[source_T], v_THK[source_T], out_THK, lse_HT)
    dq_THK, dk_THK, dv_THK = PACKAGES[name].backward(*saved, Varlen(cu_seqlens, cu_keys, max_seqlen, window))
    # FlashAttention does not write rows outside of every sequence; `is_key_T` drops whatever they hold.
    dk_THK, dv_THK = (torch.where(is_key_T[:, None, None], x[row_T], 0) for x in (dk_THK, dv_THK))
    return dq_THK, dk_THK, dv_THK
