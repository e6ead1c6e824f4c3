"""Averages of weights: over checkpoints, and over the steps of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..checkpoint import plain_names
from .distributed import local
from .optim import HALF


def average(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several state dicts, in float64, then rounded to the dtype of the first.

    For checkpoints of one run. ModernBERT-base is the mean of the three best ones of its decay and of the last one; its
    large model is a single one, because the mean was not better. So compare them on held-out loss.

    Args:
        states: one or more, read one after another: a generator holds one at a time. Their names may have what wrappers
            such as `torch.compile` add; those of the mean are plain. Sharded tensors give a sharded mean.

    Raises:
        ValueError: no state, or states that differ in a name, a shape, or a tensor that does not hold floats.
    """
    sums: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    count = 0
    for count, given in enumerate(states, start=1):
        state = plain_names(given)
        first = first or state
        if unlike := state.keys() ^ first.keys():
            raise ValueError(f"state {count} and the first one differ in {', '.join(sorted(unlike)[:5])}")
        for name, tensor in state.items():
            same = tensor.shape == first[name].shape
            if same and tensor.is_floating_point():
                sums[name] = tensor.double() + sums[name] if name in sums else tensor.double()
            elif not same or not torch.equal(tensor, first[name]):
                raise ValueError(f"{name} of state {count} is not that of the first one, so they have no mean")
    if not count:
        raise ValueError("no state was given to average")
    return {name: (sums[name] / count).to(value.dtype) if name in sums else value for name, value in first.items()}


class EMA:
    """The exponential moving average of a model's trainable parameters: `average += (1 - decay) · (weight - average)`.

    For runs at a constant learning rate, whose last weights are noisy, at the cost of one copy of the weights. After a
    decay of the learning rate there is little left to gain: "EMA never helped" ModernBERT.

        ema = EMA(model, decay=0.999)
        for batch in batches:
            ...
            optimizer.step()
            ema.update()
        with ema.applied():
            model.save_pretrained(folder)

    Or, where the loop is not yours: `optimizer.register_step_post_hook(lambda *_: ema.update())`.

    Averages are in float32 or wider, on the device of the weights, and sharded like them. `state_dict` has the names of
    the plain model, so that a run can be resumed with or without `torch.compile`.

    Args:
        decay: from 0 to below 1. About `1 / (1 - decay)` steps are averaged.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}, but must be from 0 to below 1")
        self.decay, self._model = decay, model
        self._averages = {name: _wide(weight).clone() for name, weight in self._weights().items()}

    def _weights(self) -> dict[str, Tensor]:
        """By plain name. Looked up each time, because sharding or resizing a model replaces its parameters.

        A state dict has the shards of FSDP2, which after a forward pass may have put whole tensors into the modules.
        """
        state = plain_names(self._model.state_dict(keep_vars=True))
        first: dict[Tensor, str] = {}  # tied weights have several names
        for name, each in state.items():
            if each.requires_grad:
                first.setdefault(each, name)
        return {name: each.detach() for each, name in first.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of now: once after each step of the optimizer."""
        weights = self._weights()
        averages = [local(average) for average in self._averages.values()]
        torch._foreach_lerp_(averages, [_wide(local(weights[name])) for name in self._averages], 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages while this is open, and after it again its weights, bit for bit."""
        kept = {name: weight.clone() for name, weight in self._weights().items()}
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights().items():
            weight.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name. They are not copied: the next `update` changes them."""
        return dict(self._averages)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved averages.

        Raises:
            ValueError: the averages of another model.
        """
        given = plain_names(state)
        if unlike := given.keys() ^ self._averages.keys():
            raise ValueError(f"the averages are of another model, which differs in {', '.join(sorted(unlike)[:5])}")
        for name, average in self._averages.items():
            if given[name].shape != average.shape:
                raise ValueError(
                    f"{name} has shape {[*given[name].shape]} in the averages, {[*average.shape]} in the model"
                )
        with torch.no_grad():
            for name, average in self._averages.items():
                average.copy_(given[name])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor
