"""The ops of ModernBERT and of late interaction: a plain reference each, and faster backends that register on it."""

from importlib.util import find_spec

from . import cpu, flash  # noqa: F401  (each of these packages registers its backends)
from .dispatch import Op, backend
from .reference import (
    add_layer_norm,
    attention,
    embed_layer_norm,
    geglu,
    layer_norm,
    linear,
    linear_cross_entropy,
    maxsim,
    pool,
    project_normalize,
    rotary,
    rotary_table,
    token_ranges,
)

if find_spec("triton"):
    from . import fused  # noqa: F401

__all__ = [
    "Op",
    "add_layer_norm",
    "attention",
    "backend",
    "cpu",
    "embed_layer_norm",
    "geglu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "maxsim",
    "pool",
    "project_normalize",
    "rotary",
    "rotary_table",
    "token_ranges",
]
