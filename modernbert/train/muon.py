"""Muon for the matrices of the layers, with AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on some matrices and `torch.optim.AdamW` on all other parameters, as one optimizer.

    Muon makes each update orthogonal (https://kellerjordan.github.io/posts/muon), scaled so that the learning rate and
    weight decay of AdamW fit (arXiv 2502.16982), and keeps half of its state. On retrievers it was less sensitive to
    the learning rate than AdamW, and not better; its products in bfloat16 crashed on one kind of GPU
    (qcznlp/embedding-optimizer-study). Weights that Adam has pretrained may get worse with it (arXiv 2605.10468).

    Args:
        groups: such as those of `groups.parameter_groups`.
        matrices: the parameters of them that Muon updates, such as `groups.hidden_matrices(model)`.
        betas, eps: of AdamW. momentum: of Muon.

    Raises:
        ValueError: matrices that are not in the groups, or that are not two-dimensional; or nothing for one of the two.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        matrices: Iterable[nn.Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ) -> None:
        chosen, groups = set(matrices), list(groups)
        of_muon = [dict(group, params=[x for x in group["params"] if x in chosen]) for group in groups]
        others = [dict(group, params=[x for x in group["params"] if x not in chosen]) for group in groups]
        of_muon, others = ([group for group in each if group["params"]] for each in (of_muon, others))
        if missing := len(chosen) - sum(len(group["params"]) for group in of_muon):
            raise ValueError(f"{missing} of the {len(chosen)} matrices are in no group: take both from one model")
        if not of_muon or not others:
            raise ValueError("one of the two has no parameters: use torch.optim.Muon or torch.optim.AdamW alone")
        self._muon = torch.optim.Muon(of_muon, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(others, betas=betas, eps=eps)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], self._adamw.defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        # Loading a state dict replaces these two, so the parts get them in each step.
        count = len(self._muon.param_groups)
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self._muon.state = self._adamw.state = self.state
        self._muon.step()
        self._adamw.step()
        return loss
