"""The linear layer and the norm of the encoder, which compute through ops, and the rule when one op fuses modules."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

import modernbert_kernels as ops

from .config import EncoderConfig

M = TypeVar("M", bound=nn.Module)


class Linear(nn.Linear):
    """`torch.nn.Linear` that computes through the `linear` op.

    `torch.ao.quantization` does not find it, because it looks for layers by their exact type. It is refused before it
    leaves a model as it was: it sets `qconfig` on each module first.
    """

    @property
    def qconfig(self) -> None:
        raise AttributeError("a modernbert.modules.Linear has no qconfig")

    @qconfig.setter
    def qconfig(self, _: object) -> None:
        raise TypeError(
            "torch.ao.quantization takes torch.nn.Linear by its exact type, and this layer is one of "
            "modernbert.modules: quantize modernbert.integrations.quantization.plain_linears(model) instead"
        )

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class Norm(nn.LayerNorm):
    """`torch.nn.LayerNorm` that computes through the `layer_norm` op."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether a call of `module` runs `kind.forward` and nothing else, so that a fused op may read its weights instead.

    Hooks, adapters, offloading, FSDP units, pruning, parametrizations and another forward or class must be called.
    """
    return are_plain((module, kind))


def are_plain(*each: tuple[nn.Module, type[nn.Module]]) -> bool:
    """Whether all of these modules are plain."""
    for module, kind in each:
        if (
            type(module) is not kind
            or "forward" in module.__dict__
            or (module._forward_pre_hooks or module._forward_hooks)
            or (module._backward_pre_hooks or module._backward_hooks)
        ):
            return False
    return not _has_any_global_hook()


def adds_in_place(x_TD: Tensor, *products: nn.Linear) -> bool:
    """Whether plain products may add their result to `x_TD` where it is, by one GEMM with beta = 1: see `Layer`."""
    if torch.is_autocast_enabled("cuda"):
        return False
    for product in products:
        weight = product.weight
        # Sharded and quantized weights are subclasses.
        if type(weight) not in (nn.Parameter, Tensor) or weight.dtype != x_TD.dtype or product.bias is not None:
            return False
    return True


def add_norm(
    x_TD: Tensor, delta_TD: Tensor | None, norm: nn.Module, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`(x + delta, norm(x + delta))`, in one kernel if the norm is plain, which then has this dtype."""
    if delta_TD is not None and (is_plain(norm, Norm) or is_plain(norm, nn.LayerNorm)):
        return ops.add_layer_norm(x_TD, delta_TD, norm.weight, norm.bias, norm.eps, dtype)
    x_TD = x_TD if delta_TD is None else x_TD + delta_TD
    return x_TD, norm(x_TD)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast multiplies; None outside of it.

    A norm that is only multiplied is rounded to it as it is written, in the place of a copy in that dtype.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def has_options(table: nn.Embedding) -> bool:
    """Whether the table's values or gradients are not those of `embed_layer_norm`."""
    return table.padding_idx is not None or table.max_norm is not None or table.scale_grad_by_freq or table.sparse
