"""One op, several backends: the reference is the op, faster implementations register on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

ORDER = {
    "embed_layer_norm": ("triton",),
    "layer_norm": ("triton",),
    "add_layer_norm": ("triton",),
    "linear": ("onednn",),
    "rotary_table": ("triton",),
    "token_ranges": ("triton",),
    "rotary": ("triton",),
    "rotate_back": ("triton",),
    "attention": ("flash", "triton", "cpu"),
    "geglu": ("triton",),
    "linear_cross_entropy": ("triton", "cpu"),
    "pool": ("triton",),
    "project_normalize": ("triton",),
    "maxsim": ("triton", "cpu"),
}
"""Our backends of each op. The first whose `when` accepts a call takes it, whatever the order of the imports."""

LONG = 1024
"""Up to this length of a sequence `triton` takes attention without a window, beyond it `flash`. The Triton kernel
rotates q and k as it loads them. In a longer sequence many tiles would rotate the same keys again, and there
FlashAttention is faster by its authors' figures. Not timed here."""

# A plain global: torch.compile guards on it, but cannot trace a ContextVar.
_forced: str | None = None
_names = {"reference"}


class Op(Generic[P, R]):
    """Calls the first backend whose `when` accepts the arguments, else the reference; the reference, if it is recorded.

    Backends that `ORDER` does not name come first, the newest before the others; then those of `ORDER`.

    Attributes:
        reference: the specification, in plain differentiable PyTorch.
        backends: name to callable, `"reference"` included.
    """

    def __init__(self, reference: Callable[P, R]) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.backends: dict[str, Callable[P, R]] = {"reference": reference}
        self._choices: tuple[tuple[str, Callable[P, bool], Callable[P, R]], ...] = ()
        self.__doc__ = reference.__doc__

    def register(
        self, backend: str, *, when: Callable[P, bool], check: Callable[P, object] | None = None
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorator: use this implementation for calls that `when(*args, **kwargs)` accepts.

        Args:
            check: raises an error for a call that the implementation does not take. It runs where `when` has not been
                asked: in a call of `backends[backend]`, which is also what `backend(name)` forces.
        """

        def add(implementation: Callable[P, R]) -> Callable[P, R]:
            if backend in self.backends:
                raise ValueError(f"{self.name}: backend {backend!r} is already registered")

            def checked(*args: P.args, **kwargs: P.kwargs) -> R:
                if check is not None:
                    check(*args, **kwargs)
                return implementation(*args, **kwargs)

            self.backends[backend] = implementation if check is None else checked
            _names.add(backend)
            order = ORDER.get(self.name, ())
            choices = ((backend, when, implementation), *self._choices)
            self._choices = tuple(sorted(choices, key=lambda row: order.index(row[0]) if row[0] in order else -1))
            return implementation

        return add

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if _forced is not None:
            return self.backends.get(_forced, self.reference)(*args, **kwargs)
        # `recorded()`, without its call.
        if torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None:
            return self.reference(*args, **kwargs)
        for _, when, implementation in self._choices:
            if when(*args, **kwargs):
                return implementation(*args, **kwargs)
        return self.reference(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<op {self.name}: {', '.join(self.backends)}>"


def recorded() -> bool:
    """Whether `torch.export`, `torch.onnx` or `torch.jit.trace` is recording a program, which may run anywhere.

    No branch may then depend on a number, as the program would follow that of its example for ever.
    """
    # Not is_exporting(), which in torch 2.11 is true under torch.compile too. Not torch.jit.is_tracing(), which takes
    # three calls where every op asks.
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


def forced() -> str | None:
    """The name that `backend` has set, None outside of it."""
    return _forced


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op that has the named backend with it, and the others with their reference.

    `with backend("reference"): ...` runs the specification. The setting is process-wide, not per thread.

    Raises:
        ValueError: no op has a backend of this name.
    """
    global _forced
    if name not in _names:
        raise ValueError(f"no op has a backend {name!r}; there are {', '.join(sorted(_names))}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
