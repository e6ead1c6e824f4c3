"""What a padded caller gets back: named tuples that also answer as outputs of transformers do, `output["loss"]`."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

# Functions and not a base class: PyTorch, DDP and accelerate find the tensors only in direct subclasses of `tuple`.


def _items(self: NamedTuple) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in zip(self._fields, self, strict=True) if value is not None]


def _keys(self: NamedTuple) -> list[str]:
    return [name for name, _ in _items(self)]


def _values(self: NamedTuple) -> list[Any]:
    return [value for _, value in _items(self)]


def _get(self: NamedTuple, key: str, default: Any = None) -> Any:
    return dict(_items(self)).get(key, default)


def _to_tuple(self: NamedTuple) -> tuple[Any, ...]:
    return tuple(_values(self))


def _found(output: NamedTuple, key: Any) -> Any:
    return dict(_items(output))[key] if isinstance(key, str) else _to_tuple(output)[key]


class EncoderOutput(NamedTuple):
    """What an encoder gives.

    Attributes:
        last_hidden_state: `[B, S, D]`, after the final norm; zero in padding.
        hidden_states: None, or the tuple that `integrations.transformers` fills in. None counts as not there.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None

    keys, values, items, get, to_tuple = _keys, _values, _items, _get, _to_tuple

    def __getitem__(self, key: Any) -> Any:
        return _found(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()


class AttentionOutput(NamedTuple):
    """What `integrations.transformers` gives that was asked for maps of attention.

    Attributes:
        last_hidden_state, hidden_states: as in `EncoderOutput`.
        attentions: of each layer `[B, H, S, S]`: in row i the weights with which token i reads each token; zero in
            padding.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    keys, values, items, get, to_tuple = _keys, _values, _items, _get, _to_tuple

    def __getitem__(self, key: Any) -> Any:
        return _found(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()


class HeadOutput(NamedTuple):
    """What a head gives that was called with labels or with padded tensors.

    Attributes:
        loss: a scalar in float32 or better; None without labels.
        logits: of each text `[B, C]`, or of each token: `[B, S, C]` for a padded caller, zero in padding, and `[Q, C]`
            for the rows of a `Packed`; None where only the loss was computed.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None

    keys, values, items, get, to_tuple = _keys, _values, _items, _get, _to_tuple

    def __getitem__(self, key: Any) -> Any:
        return _found(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()


class SpanOutput(NamedTuple):
    """What `QuestionAnswering` gives with positions or for padded tensors.

    Attributes:
        loss: a scalar in float32 or better; None without positions.
        start_logits, end_logits: of each token, `[B, S]` for a padded caller, zero in padding, or `[T]` for a `Packed`.
    """

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None

    keys, values, items, get, to_tuple = _keys, _values, _items, _get, _to_tuple

    def __getitem__(self, key: Any) -> Any:
        return _found(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()
