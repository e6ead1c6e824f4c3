"""What a padded caller gets back."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class EncoderOutput(NamedTuple):
    """A named tuple that also answers as an output of transformers does: `output["last_hidden_state"]`.

    Attributes:
        last_hidden_state: `[B, S, D]`, after the final norm; zero in padding.
        hidden_states: None, or the tuple that `integrations.transformers` fills in. None counts as not there.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None

    def __getitem__(self, key: Any) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def keys(self) -> list[str]:
        return [name for name, _ in self.items()]

    def values(self) -> list[Any]:
        return [value for _, value in self.items()]

    def items(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in zip(self._fields, self, strict=True) if value is not None]

    def get(self, key: str, default: Any = None) -> Any:
        return dict(self.items()).get(key, default)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())
