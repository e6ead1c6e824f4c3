"""A case as batches that a model takes one after another: what is timed, and what is compared, by the same calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import texts
from benchmarks.models.case import Case, Place, Way

GRADIENT = "layers.0.attn.Wo.weight"
"""What is compared of a backward pass: it depends on all layers, and both transformers and we call it so."""


@dataclass(frozen=True)
class Batch:
    """Texts that are run together.

    Attributes:
        places: of the texts, in the order of `inputs`.
        inputs: what the model takes.
        cotangent: the gradient of its hidden states, of their shape; None if there is no backward pass.
    """

    places: list[int]
    inputs: Any
    cotangent: Tensor | None = None


def way(settings: str, case: Case, model: nn.Module, batches: Sequence[Batch], forward: Callable[[Any], Tensor]) -> Way:
    """A way that calls `forward` on the inputs of each batch.

    Args:
        model: holds the parameters, under the names of the checkpoint.
        forward: to hidden states, `[T, D]` of all texts in a row, or right-padded `[B, S, D]`.
    """

    def step(batch: Batch) -> Tensor:
        if batch.cotangent is None:
            with torch.inference_mode():
                return forward(batch.inputs)
        hidden = forward(batch.inputs)
        torch.autograd.backward(hidden, batch.cotangent)
        return hidden.detach()

    def clear() -> None:
        model.zero_grad(set_to_none=True)

    def run() -> None:
        clear()
        for batch in batches:
            step(batch)

    def answer() -> Tensor:
        if case.backward:
            run()
            gradient = dict(model.named_parameters())[GRADIENT].grad
            assert gradient is not None
            return gradient.float().cpu()
        found: dict[int, Tensor] = {}
        for batch in batches:
            if set(case.checked) & set(batch.places):
                hidden = step(batch)
                for place, rows in zip(batch.places, rows_of(hidden, batch.places, case.lengths), strict=True):
                    if place in case.checked:
                        found[place] = rows.float().cpu()
        return torch.cat([found[place] for place in sorted(found)])

    largest = max(batches, key=lambda batch: sum(case.lengths[place] for place in batch.places))
    # Beside many batches one is enough to warm up.
    return Way(settings, run, answer, (lambda: step(largest)) if len(batches) > 4 else None, clear)


def rows_of(hidden: Tensor, places: Sequence[int], lengths: Sequence[int]) -> list[Tensor]:
    """The hidden states of each text, `[n, D]`."""
    if hidden.dim() == 2:
        return list(hidden.split([lengths[place] for place in places]))
    return [hidden[row, : lengths[place]] for row, place in enumerate(places)]


def cotangent(case: Case, place: Place, places: Sequence[int], width: int, *, padded: bool) -> Tensor | None:
    """The gradients of the hidden states of these texts, in a row or right-padded; None without a backward pass."""
    if not case.backward:
        return None
    pieces = [texts.cotangent(one, case.lengths[one], width) for one in places]
    whole = nn.utils.rnn.pad_sequence(pieces, batch_first=True) if padded else torch.cat(pieces)
    return whole.to(place.device, place.torch_dtype)
