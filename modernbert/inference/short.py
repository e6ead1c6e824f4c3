"""One short text on a CPU: the forward pass of `encoder.py` again, as bare tensor operations.

Through the modules, the products of 16 tokens are 40 % of the time; the rest is Python, dispatch and small operations,
slow because the weights drive them out of the cache. So the parameters are taken out of the modules once, and `forward`
calls what oneDNN and PyTorch offer directly, on prepared weights (Wqkv once more than `linear` keeps it). It answers
None wherever the modules could do anything else. Not seen are methods patched into a class, and writes through `.data`
in evaluation, which `train()` or `eval()` makes known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_module

import modernbert_kernels as ops
from modernbert_kernels.cpu import linear
from modernbert_kernels.dispatch import forced

from ..packing import Packed

if TYPE_CHECKING:
    from ..encoder import Attention, Encoder, Layer

LONGEST = 64
"""Tokens of the longest text. Beyond it the products are most of the time, and published models have a window of 64."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}

ORDINARY = (
    f"{__package__}.encoder",
    *(f"torch.nn.modules.{name}" for name in ("container", "normalization", "sparse")),
)
"""Where the classes of an encoder's modules are defined. A subclass from elsewhere may compute something else."""

VALUES = ("window", "eps", "activation", "heads", "head_dim")
"""Attributes of modules that change what they compute."""

_plans: WeakKeyDictionary[Encoder, Plan] = WeakKeyDictionary()


def forward(encoder: Encoder, batch: Packed, rows_Q: Tensor | None) -> Tensor | None:
    """`encoder(batch, rows=rows_Q)`, `[T, D]` or `[Q, D]`, or None if this way is not for them."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._get_tracing_state():
        return None
    if _functorch.peek_interpreter_stack() is not None:  # vmap knows no operation that overwrites
        return None
    if not 0 < batch.num_tokens <= LONGEST or len(batch.lengths) != 1:
        return None
    if type(batch.input_ids) is not Tensor or not batch.input_ids.is_cpu or torch.is_autocast_enabled("cpu"):
        return None
    if forced() is not None or "onednn" not in ops.linear.backends or torch_module._has_any_global_hook():
        return None
    plan = _plans.get(encoder)
    if plan is None or not plan.holds():
        _plans[encoder] = plan = Plan(encoder)
    return plan.run(batch, rows_Q) if plan.ordinary and batch.num_tokens <= plan.longest else None


class Plan:
    """The parameters of an encoder in the order of their use, and all that must stay as it was when they were taken."""

    def __init__(self, encoder: Encoder) -> None:
        children = list(_descendants(encoder))
        modules = [module for *_, module in children if module is not None]
        # What is None now, a bias or the first norm, may come.
        parameters = [(m._parameters, name, p) for m in modules for name, p in m._parameters.items()]
        values = [(m.__dict__, name, m.__dict__[name]) for m in modules for name in VALUES if name in m.__dict__]
        values += [(encoder.__dict__, "thetas", encoder.thetas)]
        values += [(m.__dict__, "training", m.training) for m in modules if hasattr(m, "dropout_p")]
        values += [(m.__dict__, "forward", m.__dict__.get("forward")) for m in modules]  # where some put their own
        self.owners, self.names, self.members = zip(*children, *parameters, *values, strict=True)
        self.hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.parameters, self.forgotten = [p for *_, p in parameters if p is not None], linear.forgotten()
        self.hooked = list(map(len, self.hooks))
        self.modules, self.types = modules, list(map(type, modules))
        layers = cast("list[Layer]", list(encoder.layers))
        self.heads, self.width = encoder.config.num_attention_heads, encoder.config.head_dim
        self.ordinary = (
            not any(self.hooked)
            and not any(value for _, name, value in values if name in ("training", "forward"))
            and all(type(module).__module__ in ORDINARY for module in (encoder, *modules))
            and [layer.attn_norm is None for layer in layers] == [True] + [False] * (len(layers) - 1)
            and all((layer.attn.heads, layer.attn.head_dim) == (self.heads, self.width) for layer in layers)
            and all(type(p) is nn.Parameter and p.is_cpu and not p.is_inference() for p in self.parameters)
            and all(p.dtype is torch.float32 for p in self.parameters)
        )
        if not self.ordinary:
            return
        self.versions = [p._version for p in self.parameters]
        self.addresses = [p.data_ptr() for p in self.parameters]
        self.storages = [StorageWeakRef(p.untyped_storage()) for p in self.parameters]
        self.table_VD, self.norm = encoder.embeddings.tok_embeddings.weight, _norm(encoder.embeddings.norm)
        norms = [*(layer.attn_norm for layer in layers[1:]), encoder.final_norm]
        self.layers = [
            (
                theta,
                _qkv(layer.attn),
                _linear(layer.attn.Wo),
                _norm(layer.mlp_norm),
                _linear(layer.mlp.Wi),
                ACTIVATIONS[layer.mlp.activation],
                _linear(layer.mlp.Wo),
                _norm(cast("nn.LayerNorm", following)),
            )
            for layer, theta, following in zip(layers, encoder.thetas, norms, strict=True)
        ]
        windows = [layer.attn.window for layer in layers if layer.attn.window is not None]
        self.longest = min([LONGEST, *(window + 1 for window in windows)])

    def holds(self) -> bool:
        """Whether a plan made now would be the same. In loops of C: at this size Python's take a tenth of the time.

        One that is not ordinary may hold for too long, if only a dtype changes: then the modules run, as they can.
        """
        return (
            self.forgotten == linear.forgotten()
            and list(map(len, self.hooks)) == self.hooked
            and list(map(type, self.modules)) == self.types
            and all(map(is_, map(dict.get, self.owners, self.names), self.members))
            and (not self.ordinary or self._same_values())
        )

    def _same_values(self) -> bool:
        return (
            list(map(Tensor.data_ptr, self.parameters)) == self.addresses
            and not any(map(StorageWeakRef.expired, self.storages))  # an address may come again
            and list(map(attrgetter("_version"), self.parameters)) == self.versions
        )

    def run(self, batch: Packed, rows_Q: Tensor | None) -> Tensor:
        """As `Encoder._forward`, with the residual stream and the scores overwritten in place."""
        tokens, heads, width = batch.num_tokens, self.heads, self.width
        keys = None if batch.key_lengths is None else int(batch.key_lengths)
        product, layer_norm = linear.pointwise, torch.layer_norm
        positions = tuple(batch.positions.tolist())
        rope_of = {theta: _rope(positions, theta, width) for theta in {layer[0] for layer in self.layers}}
        h_TD = x_TD = layer_norm(torch.embedding(self.table_VD, batch.input_ids), *self.norm)
        for theta, Wqkv, attn_Wo, mlp_norm, Wi, activate, mlp_Wo, following in self.layers:
            qkv_T3HK = product(h_TD, *Wqkv).view(tokens, 3, heads, width)
            pairs_T2HR2 = qkv_T3HK.view(tokens, 3, heads, width // 2, 2)[:, :2]
            torch.view_as_complex(pairs_T2HR2).mul_(rope_of[theta])
            q_HTK, k_HSK, v_HSK = qkv_T3HK.transpose(0, 2).unbind(1)
            if keys is not None:
                k_HSK, v_HSK = k_HSK[:, :keys], v_HSK[:, :keys]
            scores_HTS = torch.bmm(q_HTK, k_HSK.transpose(1, 2))
            out_HTK = torch.bmm(torch.softmax(scores_HTS, -1, out=scores_HTS), v_HSK)
            x_TD.add_(product(out_HTK.transpose(0, 1).reshape(tokens, -1), *attn_Wo))
            a_TF, gate_TF = product(layer_norm(x_TD, *mlp_norm), *Wi).chunk(2, 1)
            x_TD.add_(product(activate(a_TF).mul_(gate_TF), *mlp_Wo))
            h_TD = layer_norm(x_TD, *following)
        return h_TD if rows_Q is None else h_TD.index_select(0, rows_Q)


def _descendants(parent: nn.Module) -> Iterator[tuple[dict[str, Any], str, nn.Module | None]]:
    """Every module below, or None in its place: the dictionary that holds it, its name there, and itself."""
    for name, module in parent.__dict__["_modules"].items():
        yield parent.__dict__["_modules"], name, module
        if module is not None:
            yield from _descendants(module)


def _norm(norm: nn.LayerNorm) -> tuple[Any, ...]:
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps


def _linear(module: nn.Linear) -> tuple[Any, ...]:
    return linear.prepare(module.weight), module.bias, *linear.PLAIN


def _qkv(attn: Attention) -> tuple[Any, ...]:
    """Wqkv for complex rotary: the rows of a pair side by side, in q and in k, and the scale of the scores in q."""
    rows = torch.arange(3 * attn.heads * attn.head_dim, device="cpu").unflatten(
        0, (3, attn.heads, 2, attn.head_dim // 2)
    )
    rows[:2] = rows[:2].transpose(2, 3).reshape(2, *rows.shape[1:])
    scale_3 = attn.Wqkv.weight.new_tensor([attn.head_dim**-0.5, 1.0, 1.0]).repeat_interleave(len(rows[0].flatten()))
    weight, bias = attn.Wqkv.weight, attn.Wqkv.bias
    arranged = weight[rows.flatten()] * scale_3[:, None]
    return linear.reordered(arranged), None if bias is None else bias[rows.flatten()] * scale_3, *linear.PLAIN


@lru_cache(maxsize=256)
def _rope(positions: tuple[int, ...], theta: float, width: int) -> Tensor:
    """`[T, 1, 1, R]`: the rotation of every position as complex numbers."""
    with torch.inference_mode(False):
        return torch.complex(*ops.rotary_table(torch.tensor(positions, device="cpu"), theta, width))[:, None, None]
