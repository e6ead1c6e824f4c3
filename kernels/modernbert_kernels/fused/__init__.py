"""Fast paths in Triton, forward and backward: each file registers on its op when it is imported."""

from . import attention, cross_entropy, embedding, geglu, layer_norm, maxsim, pooling, projection, rotary  # noqa: F401
