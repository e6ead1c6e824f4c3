"""What crosses the border between the process that compares and those that hold a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call that all implementations of a table make.

    Attributes:
        lengths: of its texts, in tokens. Their ids are those of `texts.ids`.
        checked: places of the texts whose hidden states are compared with the reference.
        batch: texts of a batch where a protocol says so; None lets everybody choose.
        from_host: the ids lie on the host, and bringing them to the device is timed.
        backward: the call goes forward and backward, by the gradients `texts.cotangent`.
        options: further arguments for builders of other suites.
    """

    lengths: tuple[int, ...]
    checked: tuple[int, ...]
    batch: int | None = None
    from_host: bool = False
    backward: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where an implementation loads its model from, and where it runs.

    Attributes:
        folder: a checkpoint that transformers and we can both read.
        dtype: of weights and activations, "float32" or "bfloat16".
        device: "cpu" or "cuda".
        quick: fewer settings are tried.
    """

    folder: str
    dtype: str
    device: str
    quick: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"


class Order(NamedTuple):
    """What a process is started with.

    Attributes:
        builder: "module:function"; the function takes `place` and `options` and returns a `Build`.
        threads: of torch.
    """

    builder: str
    place: Place
    threads: int
    options: Mapping[str, Any] = {}


def nothing() -> None:
    return


@dataclass(frozen=True)
class Way:
    """A case, ready to be run with one choice of settings.

    Attributes:
        settings: what was chosen, in words.
        run: the call that is timed. It returns when everything is asked of a GPU, not when it is done.
        answer: what is compared: computed as `run` computes it, float32 on the CPU.
        warm: what is run before a sample, untimed; by default `run`.
        clear: drops what a run leaves behind, gradients.
    """

    settings: str
    run: Callable[[], Any]
    answer: Callable[[], Tensor]
    warm: Callable[[], Any] | None = None
    clear: Callable[[], Any] = nothing


Build = Callable[[Case], Iterable[Way]]
"""The ways to run a case, one after another, so that the memory of one is free before the next is made."""


def some_places(lengths: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Which texts are compared: the longest, the shortest, the first and the last, up to `tokens` tokens in all."""
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    chosen: list[int] = []
    for place in dict.fromkeys([order[0], order[-1], 0, len(lengths) - 1]):
        if not chosen or sum(lengths[one] for one in chosen) + lengths[place] <= tokens:
            chosen.append(place)
    return tuple(sorted(chosen))
