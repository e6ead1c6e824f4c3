"""A second tree of modules over the same parameters, so that inference changes nothing that others see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from ..encoder import MLP, Attention, Embeddings, Encoder, Layer
from ..modules import Linear, Norm, is_plain

M = TypeVar("M", bound=nn.Module)

ORDINARY = {Encoder, Embeddings, Layer, Attention, MLP, Linear, Norm, nn.Embedding, nn.Linear, nn.ModuleList}
"""The modules of an encoder whose forward pass is that of `encoder.py`. Any other may compute something else."""


def replicate(module: nn.Module, change: Callable[[nn.Module], nn.Module | None] = lambda module: None) -> nn.Module:
    """A copy of the module tree in evaluation mode, which shares parameters, buffers and hooks.

    Args:
        change: gives what replaces a module and all below it, or None for its replica; parents come first.

    Raises:
        ValueError: a module whose `forward` belongs to another object, so that a replica would run that object.
    """
    changed = change(module)
    if changed is not None:
        return changed
    replica = _shallow(module)
    for name, child in module._modules.items():
        replica._modules[name] = child if child is None else replicate(child, change)
    return replica


def evaluated(model: M) -> M:
    """The model, or a replica if any of its modules is in training mode: modes are never changed."""
    return cast("M", replicate(model)) if any(module.training for module in model.modules()) else model


def changed_module(encoder: nn.Module) -> str | None:
    """The first module whose forward pass may not be that of `encoder.py`, described; None if there is none."""
    for name, module in encoder.named_modules():
        if type(module) not in ORDINARY or getattr(module, "max_norm", None) is not None:
            return f"{type(module).__name__} as {name}"
    return hooked_module(encoder)


def hooked_module(model: nn.Module) -> str | None:
    """The first module with a hook or with a forward of its own, described; None if there is none."""
    for name, module in model.named_modules():
        if not is_plain(module, type(module)):
            return f"{type(module).__name__} with hooks or a forward of its own{name and ' as ' + name}"
    return None


def forward_hooks(model: nn.Module) -> list[dict[int, Any]]:
    """The dictionaries in which PyTorch keeps hooks of the modules and of all modules, also those that come later."""
    own = [hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    return [*own, nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks]


def with_weight(module: Linear, weight_FD: Tensor) -> Linear:
    """The linear layer with a weight in another layout, which `ops.linear` takes."""
    replica = _shallow(module)
    del replica._parameters["weight"]
    replica._buffers["weight"] = weight_FD
    return replica


def _shallow(module: M) -> M:
    if "forward" in module.__dict__ or "_orig_mod" in module._modules:
        raise ValueError(
            f"{type(module).__name__} has a forward of its own (torch.compile, or a patched one), which would not run "
            "in evaluation mode: encode with the module inside, or with a model that is in evaluation mode"
        )
    # Not copy.copy, which refuses parametrized modules.
    replica = module.__new__(type(module))
    replica.__dict__.update(module.__dict__)
    replica.__dict__["_compiled_call_impl"] = None  # of the original
    for name in ("_modules", "_parameters", "_buffers"):
        replica.__dict__[name] = dict(module.__dict__[name])
    replica.training = False
    return replica
