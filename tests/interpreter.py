"""Makes bfloat16 right in Triton's interpreter, and counts what no kernel has written as wrong.

The interpreter of Triton 3.6 and 3.7 multiplies the bit patterns of bfloat16 in `tl.dot` (triton-lang/triton#11584),
and cuts float32 to bfloat16 where a GPU rounds to the nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_create_dot = interpreter.InterpreterBuilder.create_dot
_convert_float = interpreter._convert_float


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


interpreter.InterpreterBuilder.create_dot = create_dot
interpreter._convert_float = convert_float

# torch.empty is full of NaN from here on, so that an element which a kernel forgets is seen.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
