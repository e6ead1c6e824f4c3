"""Backends for the CPU, in PyTorch: each file registers on its op when it is imported."""

from . import attention, linear, maxsim  # noqa: F401  (imported to register)
