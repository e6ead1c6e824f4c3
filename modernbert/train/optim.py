"""The optimizers of training beside PyTorch's own.

Pretraining: `StableAdamW`, as ModernBERT and Ettin. Fine-tuning: `torch.optim.AdamW`, unless losses have spikes.
`muon.MuonAdamW` is an option to compare with these.
"""

# The foreach operations, which PyTorch does not export: tests/test_private_names.py has them.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import local

Groups = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
HALF = (torch.bfloat16, torch.float16)
ELEMENTS = 2**26
"""Elements that one call updates, if a parameter is not larger: they bound what a step allocates, 0.5 GB."""
CACHED = 2**18
"""The same on a CPU, where larger parameters are cut: a step reuses its memory, in a third of the time at 17m."""


class StableAdamW(torch.optim.Optimizer):
    """AdamW whose learning rate shrinks for a tensor in a step that its second moments did not expect.

    From arXiv 2304.13013, in the form of torch-optimi, which trained ModernBERT and Ettin. It replaces the clipping of
    gradients: a tensor with `RMS = sqrt(mean(g² / max(v, eps²)))` has the learning rate `lr / max(1, RMS)`. In place of
    the moments, the betas of a step are debiased.

    It computes the same numbers in each run. It never waits for a GPU: rates are tensors, and the number of steps is a
    Python number. So a step is not for a CUDA graph. The RMS of a parameter that is sharded (FSDP2, tensor parallelism)
    is that of the whole tensor: all ranks call `step`, which sums one vector over each mesh. FSDP1 is not supported,
    because it joins parameters into one.

    Parameters in half precision keep moments in float32 and what rounding took from them, so that small updates and
    weight decay are not lost.

    Args:
        params: parameters or groups, such as those of `groups.parameter_groups`.
        lr: the learning rate, a number or a tensor.
        betas, eps: of the moments. The defaults are ModernBERT's.
        weight_decay: without `decouple_lr` a step takes `lr · weight_decay` of a weight, as AdamW does.
        decouple_lr: a step takes `lr / max_lr · weight_decay`, as ModernBERT does: about 1e-5 in place of 1e-2.
        max_lr: the highest learning rate of a schedule; None: that of the group when it is added.

    Raises:
        ValueError: a setting out of range, or a parameter that is complex.
        RuntimeError: a sparse gradient, in `step`.
    """

    def __init__(
        self,
        params: Groups,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        decouple_lr: bool = False,
        max_lr: float | None = None,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings | {"decouple_lr": decouple_lr, "max_lr": max_lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["max_lr"] is None:
            group["max_lr"] = float(group["lr"])
        for name, accepted, wanted in (
            ("lr", group["lr"] >= 0, "0 or more"),
            ("max_lr", group["max_lr"] >= 0, "0 or more"),
            ("eps", group["eps"] > 0, "above 0"),
            ("weight_decay", group["weight_decay"] >= 0, "0 or more"),
            ("betas", all(0 <= beta < 1 for beta in group["betas"]), "from 0 to below 1"),
        ):
            if not accepted:
                raise ValueError(f"{name} is {group[name]}, but must be {wanted}")
        if any(parameter.is_complex() for parameter in group["params"]):
            raise ValueError("StableAdamW has no rule for complex parameters: train their torch.view_as_real")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # It has cast everything to the dtypes of the parameters.
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[parameter][name].dtype:
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        parts = [part for group in self.param_groups for part in self._parts(group)]
        means: dict[Tensor, Tensor] = {}
        for part in parts:
            _update_moments(part, means)
        _sum_over_shards(means, chain.from_iterable(group["params"] for group in self.param_groups))
        for part in parts:
            _update_weights(part, [means[parameter] for parameter in part.parameters])
        return loss

    def _parts(self, group: dict[str, Any]) -> list[_Part]:
        """The parameters of a group that have a gradient, by device, dtype and number of steps."""
        parts: list[_Part] = []
        last: dict[tuple[torch.device, torch.dtype, int], _Part] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                raise RuntimeError("StableAdamW needs dense gradients: build the nn.Embedding with sparse=False")
            state = self.state[parameter]
            if not state:
                dtype = torch.float32 if parameter.dtype in HALF else parameter.dtype
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
            if parameter.dtype in HALF and "rounded" not in state:
                state["rounded"] = torch.zeros_like(parameter)
            state["step"] += 1
            key = parameter.device, parameter.dtype, state["step"]
            tensors = [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
            tensors += [state["rounded"]] if parameter.dtype in HALF else []
            for weight, grad, average, square, *rounded in _pieces([local(tensor) for tensor in tensors]):
                part = last.get(key)
                if part is None or part.elements() + weight.numel() > (CACHED if weight.is_cpu else ELEMENTS):
                    part = last[key] = _Part(group, state["step"], [], [], [], [], [], [])
                    parts.append(part)
                part.parameters.append(parameter)
                part.weights.append(weight)
                part.grads.append(grad)
                part.averages.append(average)
                part.squares.append(square)
                part.rounded.extend(rounded)
        return parts


class _Part(NamedTuple):
    """What one call of a foreach operation updates: local shards of parameters, or pieces of them, and their state."""

    group: dict[str, Any]
    step: int
    parameters: list[nn.Parameter]
    weights: list[Tensor]
    grads: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    rounded: list[Tensor]

    def elements(self) -> int:
        return sum(weight.numel() for weight in self.weights)


def _pieces(tensors: list[Tensor]) -> Iterable[Sequence[Tensor]]:
    """The tensors of one parameter: whole, or on a CPU cut into pieces that belong together."""
    if not all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return zip(*(tensor.view(-1).split(CACHED) for tensor in tensors), strict=True)


def debiased(beta: float, step: int) -> float:
    """The beta with which an average that began at 0 is, at each step from 1 on, the debiased one."""
    return (beta**step - beta) / (beta**step - 1)


def _update_moments(part: _Part, means: dict[Tensor, Tensor]) -> None:
    """Add to the mean of `g² / max(v, eps²)` of each parameter, with the new `v`, the share of this part."""
    beta1, beta2 = (debiased(beta, part.step) for beta in part.group["betas"])
    grads = [grad.to(average.dtype) for grad, average in zip(part.grads, part.averages, strict=True)]
    torch._foreach_lerp_(part.averages, grads, 1 - beta1)
    torch._foreach_mul_(part.squares, beta2)
    torch._foreach_addcmul_(part.squares, grads, grads, value=1 - beta2)
    roots = torch._foreach_sqrt(part.squares)
    torch._foreach_clamp_min_(roots, part.group["eps"])
    ratios = torch._foreach_div(grads, roots)
    torch._foreach_mul_(ratios, ratios)
    # Not `_foreach_norm`, which on a CPU is off by percents for a large table.
    for parameter, ratio in zip(part.parameters, ratios, strict=True):
        share = ratio.sum() / max(1, parameter.numel())
        means[parameter] = means[parameter] + share if parameter in means else share


def _sum_over_shards(means: dict[Tensor, Tensor], parameters: Iterable[nn.Parameter]) -> None:
    """Sum the shares of the shards, with one all-reduce for all parameters that are sharded alike."""
    meshes: dict[tuple[Any, tuple[int, ...]], list[nn.Parameter]] = {}
    for parameter in parameters:
        placements = getattr(parameter, "placements", ())
        dims = tuple(dim for dim, placement in enumerate(placements) if not placement.is_replicate())
        if dims:
            mesh = parameter.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
            meshes.setdefault((mesh, dims), []).append(parameter)
    for (mesh, dims), sharded in meshes.items():
        # Also those without a gradient, so that the ranks always agree on the length.
        none = torch.zeros((), device=local(sharded[0]).device)
        total = torch.stack([means.get(parameter, none) for parameter in sharded])
        for dim in dims:
            dist.all_reduce(total, group=mesh.get_group(dim))
        means.update(zip(sharded, total.unbind(), strict=True))


def _update_weights(part: _Part, means: list[Tensor]) -> None:
    group = part.group
    rates = -group["lr"] / torch.stack(means).sqrt().clamp(min=1)
    weights = part.weights
    if part.rounded:
        weights = [weight.float().add_(rest) for weight, rest in zip(weights, part.rounded, strict=True)]
    roots = torch._foreach_sqrt(part.squares)
    torch._foreach_add_(roots, group["eps"])
    updates = torch._foreach_div(part.averages, roots)
    decay = group["weight_decay"]
    if decay and group["decouple_lr"]:
        decay = decay / group["max_lr"] if group["max_lr"] else 0.0
    if decay:
        torch._foreach_add_(updates, weights, alpha=decay)
    torch._foreach_addcmul_(weights, updates, list(rates.unbind()))
    if part.rounded:
        for weight, wide, rest in zip(part.weights, weights, part.rounded, strict=True):
            weight.copy_(wide)
            rest.copy_(wide.sub_(weight))


def load_moments(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Take the state of a saved optimizer, but not its settings.

    For the next stage of a training, which goes on with the moments of the last one at its own learning rate and weight
    decay. A resumed run calls `load_state_dict`, for both.
    """
    own = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state_dict)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.clear()  # what `fit` has noted there is of the last stage
        group.update(settings)


def adamw(model: nn.Module, table: Tensor, *, learning_rate: float, table_rate: float) -> torch.optim.AdamW:
    """AdamW for a model whose embedding table has a learning rate of its own."""
    others = [parameter for parameter in model.parameters() if parameter is not table]
    groups = [{"params": [table], "lr": table_rate}, {"params": others, "lr": learning_rate}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
