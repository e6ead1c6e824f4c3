"""Fast paths in Triton, forward and backward: each file registers on its op when it is imported."""

from . import (  # noqa: F401
    attention,
    cross_entropy,
    embedding,
    geglu,
    layer_norm,
    maxsim,
    pooling,
    projection,
    rotary,
    rotary_table,
)
