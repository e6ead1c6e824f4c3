"""Backends for the CPU, in PyTorch: each file registers on its op when it is imported."""

from . import attention, linear, linear_cross_entropy, maxsim  # noqa: F401  (imported to register)
