"""Vectors of texts in int8 or in bits, as sentence-transformers' `quantize_embeddings` gives them."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Precision: TypeAlias = Literal["int8", "uint8", "binary", "ubinary"]
DTYPES = {"int8": torch.int8, "uint8": torch.uint8, "binary": torch.int8, "ubinary": torch.uint8}
LEVELS = 255


def ranges_of(calibration_NE: Tensor) -> Tensor:
    """`[2, E]`, the smallest and the largest number at each place of some vectors, for `quantize`.

    Take some thousands of vectors of documents: of few vectors the ranges are too narrow. ValueError: no vector.
    """
    if calibration_NE.dim() != 2 or not len(calibration_NE):
        raise ValueError(f"ranges need vectors [N, E], at least one, got shape {tuple(calibration_NE.shape)}")
    return torch.stack([calibration_NE.amin(0), calibration_NE.amax(0)])


def quantize(vectors_NE: Tensor, precision: Precision, ranges_2E: Tensor | None = None) -> Tensor:
    """Vectors `[N, E]` in less memory.

    Args:
        precision: "int8", "uint8": `[N, E]`, the place of each number in its range, in 256 levels; numbers outside of
            the range are at its ends. "binary", "ubinary": `[N, E / 8]`, rounded up, a bit for each number, 1 above 0;
            the first number is the highest bit. int8 is uint8 less 128, of bits too.
        ranges_2E: of `ranges_of`, for "int8" and "uint8" alone. Vectors with other ranges cannot be compared.

    Raises:
        ValueError: another precision, vectors that are not floats in a matrix, ranges that do not fit or are missing.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision is {precision!r:.80}, but must be one of {', '.join(DTYPES)}")
    if vectors_NE.dim() != 2 or not vectors_NE.is_floating_point():
        raise ValueError(f"vectors must be floats [N, E], got {vectors_NE.dtype} of shape {tuple(vectors_NE.shape)}")
    width = vectors_NE.shape[1]
    if precision in ("binary", "ubinary"):
        bits_N8 = F.pad((vectors_NE > 0).to(torch.int16), (0, -width % 8)).unflatten(1, (-1, 8))
        levels = (bits_N8 << torch.arange(7, -1, -1, dtype=torch.int16, device=bits_N8.device)).sum(-1)
    else:
        if ranges_2E is None or ranges_2E.shape != (2, width):
            got = "none" if ranges_2E is None else f"shape {tuple(ranges_2E.shape)}"
            raise ValueError(f"{precision} needs ranges [2, {width}], as of ranges_of(vectors of documents), got {got}")
        low_E, high_E = ranges_2E.to(vectors_NE.device, torch.float32)
        step_E = (high_E - low_E) / LEVELS
        step_E = step_E.masked_fill(step_E == 0, 1)
        levels = ((vectors_NE - low_E) / step_E).floor().clamp(0, LEVELS)
    dtype = DTYPES[precision]
    return (levels - 128 if dtype is torch.int8 else levels).to(dtype)
