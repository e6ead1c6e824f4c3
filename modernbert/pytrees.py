"""Dataclasses of tensors as pytrees, so that code of PyTorch finds the tensors in them: DDP, FSDP, `tree_map`.

Without it, DDP with a static graph and FSDP would not see that an output is part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch.utils import _pytree

T = TypeVar("T")
Context = tuple[Sequence[str], dict[str, Any]]
"""The names of the children, and the values of all other fields."""


def pytree(*kept: str) -> Callable[[type[T]], type[T]]:
    """Decorator of a dataclass: its fields are children in a tree, but for None and for those that are `kept`."""

    def register(cls: type[T]) -> type[T]:
        def flatten(found: T) -> tuple[list[Any], Context]:
            names = [name for name, value in vars(found).items() if value is not None and name not in kept]
            rest = {name: value for name, value in vars(found).items() if name not in names}
            return [getattr(found, name) for name in names], (names, rest)

        def unflatten(values: Iterable[Any], context: Context) -> T:
            names, rest = context
            made = object.__new__(cls)  # not validated: a tree may hold anything for a while
            vars(made).update(rest, **dict(zip(names, values, strict=True)))
            return made

        _pytree.register_pytree_node(cls, flatten, unflatten)
        return cls

    return register
