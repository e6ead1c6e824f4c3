"""A model for tools that look for linear layers by their exact type, as `torch.ao.quantization` does."""

from __future__ import annotations

from typing import TypeVar, cast

from torch import nn

from ..inference.replica import replicate
from ..modules import Linear

M = TypeVar("M", bound=nn.Module)


def plain_linears(model: M) -> M:
    """A copy of the model in evaluation mode whose linear layers are `torch.nn.Linear`; it shares the parameters.

    `torch.ao.quantization.quantize_dynamic(plain_linears(model), {torch.nn.Linear})` is then int8 throughout.
    """
    return cast("M", replicate(model, _plain))


def _plain(module: nn.Module) -> nn.Linear | None:
    if type(module) is not Linear:
        return None
    plain = nn.Linear(module.in_features, module.out_features, device="meta")
    plain.weight, plain.bias = module.weight, module.bias
    return plain.eval()
