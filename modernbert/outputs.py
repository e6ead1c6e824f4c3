"""What a padded caller gets back: named tuples that also answer as outputs of transformers do, `output["loss"]`."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor


class _Named(Protocol):
    """A named tuple. Of its fields, those that are None count as not there."""

    @property
    def _fields(self) -> tuple[str, ...]: ...
    def items(self) -> list[tuple[str, Any]]: ...
    def keys(self) -> list[str]: ...
    def values(self) -> list[Any]: ...
    def to_tuple(self) -> tuple[Any, ...]: ...


# Functions and not a base class: PyTorch, DDP and accelerate find the tensors only in direct subclasses of `tuple`.


def _items(self: _Named) -> list[tuple[str, Any]]:
    named = ((name, getattr(self, name)) for name in self._fields)
    return [(name, value) for name, value in named if value is not None]


def _keys(self: _Named) -> list[str]:
    return [name for name, _ in self.items()]


def _values(self: _Named) -> list[Any]:
    return [value for _, value in self.items()]


def _get(self: _Named, key: str, default: Any = None) -> Any:
    return dict(self.items()).get(key, default)


def _to_tuple(self: _Named) -> tuple[Any, ...]:
    return tuple(self.values())


def _getitem(self: _Named, key: Any) -> Any:
    return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]


def _contains(self: _Named, key: object) -> bool:
    return key in self.keys()


class EncoderOutput(NamedTuple):
    """What an encoder gives.

    Attributes:
        last_hidden_state: `[B, S, D]`, after the final norm; zero in padding.
        hidden_states: None, or the tuple that `integrations.transformers` fills in. None counts as not there.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None

    __getitem__, __contains__ = _getitem, _contains
    keys, values, items, get, to_tuple = _keys, _values, _items, _get, _to_tuple


class HeadOutput(NamedTuple):
    """What a head gives that was called with labels or with padded tensors.

    Attributes:
        loss: a scalar in float32 or better; None without labels.
        logits: of each text `[B, C]`, or of each token: `[B, S, C]` for a padded caller, zero in padding, and `[Q, C]`
            for the rows of a `Packed`; None where only the loss was computed.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None

    __getitem__, __contains__ = _getitem, _contains
    keys, values, items, get, to_tuple = _keys, _values, _items, _get, _to_tuple
