"""Corrects bfloat16 in Triton's interpreter, makes it faster, and fills memory that no kernel has written with NaN.

The interpreter of Triton 3.6 and 3.7 multiplies the bit patterns of bfloat16 in `tl.dot` (triton-lang/triton#11584),
and truncates float32 to bfloat16 where a GPU rounds to the nearest, ties to even. It also replaces the functions of
`triton.language` again in every call of a device function, which took a quarter of the time of these tests.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_create_dot = interpreter.InterpreterBuilder.create_dot
_convert_float = interpreter._convert_float
_patch_lang = interpreter._patch_lang
_get_np_dtype = cache(interpreter._get_np_dtype)


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _create_dot(builder, _widened(a), _widened(b), *rest)


def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source != tl.float32 or target != tl.bfloat16:
        return _convert_float(values, source, target, rounding)
    floats = np.ascontiguousarray(values, np.float32) if values.dtype == np.float32 else values.view(np.float32)
    bits = floats.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded[np.isnan(floats)] = 0x7FC0
    return rounded.reshape(values.shape)


def get_np_dtype(dtype: Any) -> np.dtype:
    """Looked up once for each scalar type: it made a table of all types in every call."""
    scalar = dtype.scalar
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _get_np_dtype(scalar)


@cache
def languages(function: Any) -> list[ModuleType]:
    """The modules of `triton.language` that a device function sees, as `_patch_lang` finds them."""
    return [x for x in function.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)]


def patch_lang(function: Any) -> Any:
    """Replace the functions that this function sees, unless the kernel that calls it has replaced them already."""
    if any(tl.core.is_builtin(module.load) for module in languages(function)):
        return _patch_lang(function)
    return None


interpreter.InterpreterBuilder.create_dot = create_dot
interpreter._convert_float = convert_float
interpreter._patch_lang = patch_lang
interpreter._get_np_dtype = get_np_dtype

# torch.empty gives NaN from here on, so that an element that a kernel does not write fails a test.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
