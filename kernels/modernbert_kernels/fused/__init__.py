"""Backends in Triton, forward and backward: each file registers on its op when it is imported."""

from . import (  # noqa: F401
    attention,
    embed_layer_norm,
    geglu,
    layer_norm,
    linear_cross_entropy,
    maxsim,
    pool,
    project_normalize,
    rotary,
    rotary_table,
    token_ranges,
)
