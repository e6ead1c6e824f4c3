"""Who takes part: names of implementations to what builds them, and when they apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from benchmarks.models.case import Place

OURS, GRAPHS = "modernbert", "modernbert, graphs"
SDPA, EAGER, FLASH = (f"transformers, {attention}" for attention in ("sdpa", "eager", "flash"))
SDPA_COMPILED, FLASH_COMPILED = f"{SDPA}, compiled", f"{FLASH}, compiled"
SENTENCE_TRANSFORMERS, PACKED_ENCODERS = "sentence-transformers", "packed-encoders"


class Implementation(NamedTuple):
    """How a process builds it.

    Attributes:
        builder: "module:function".
        applies: whether it runs at such a place at all.
        package: that must be installed.
        slow: it compiles for minutes, and is left out where time is short.
    """

    builder: str
    applies: Callable[[Place], bool] = lambda place: True
    package: str | None = None
    options: Mapping[str, Any] = {}
    slow: bool = False


def _on_gpu(place: Place) -> bool:
    return place.is_gpu


def _half_on_gpu(place: Place) -> bool:
    """FlashAttention knows no float32."""
    return place.is_gpu and place.dtype != "float32"


_PEERS = "benchmarks.models.peers"
REFERENCE = Implementation(f"{_PEERS}:alone", package="transformers")

IMPLEMENTATIONS: dict[str, Implementation] = {
    OURS: Implementation("benchmarks.models.ours:packed"),
    GRAPHS: Implementation("benchmarks.models.ours:graphed", _on_gpu),
    SDPA: Implementation(f"{_PEERS}:transformers", package="transformers", options={"attention": "sdpa"}),
    EAGER: Implementation(f"{_PEERS}:transformers", package="transformers", options={"attention": "eager"}),
    FLASH: Implementation(f"{_PEERS}:transformers_flash", _half_on_gpu, "transformers"),
    SDPA_COMPILED: Implementation(f"{_PEERS}:compiled", _on_gpu, "transformers", {"attention": "sdpa"}, True),
    FLASH_COMPILED: Implementation(f"{_PEERS}:compiled", _half_on_gpu, "transformers", {"attention": "flash"}, True),
    SENTENCE_TRANSFORMERS: Implementation(f"{_PEERS}:sentence_transformers", package="sentence_transformers"),
    PACKED_ENCODERS: Implementation(f"{_PEERS}:packed_encoders", _half_on_gpu, "packed_encoders"),
}


def taking_part(names: Mapping[str, Implementation], place: Place) -> dict[str, Implementation]:
    """Those that run at this place and are installed here."""
    return {
        name: one
        for name, one in names.items()
        if one.applies(place) and (one.package is None or find_spec(one.package) is not None)
    }
