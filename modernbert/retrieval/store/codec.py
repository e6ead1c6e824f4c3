"""Vectors in four or two bits a number: residual codes, as those of ColBERTv2 (arXiv 2112.01488, section 3.3).

A vector is the nearest of 256 centroids plus a residual, of which each number is rounded to one of 16 or 4 levels. The
levels are those of the least squared error (Lloyd 1982), in units of the deviation of the dimension and of the token.
The buckets of ColBERTv2, which hold equally many residuals, are wide where residuals are large, and their error is
larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .kmeans import kmeans, nearest

BITS = {"4bit": 4, "2bit": 2}
"""Bits of a number, by the `dtype` of a store."""

CENTROIDS = 256
"""Their numbers fit into a byte."""

FEWEST, EACH = 1000, 16
"""Tokens that a codec is learned from, and tokens for each centroid, at least."""

STEPS = 30
"""Iterations that learn levels. After 30, the error changes in its fourth digit."""

LIMIT, CELLS = 8.0, 4096
"""Residuals are rounded to levels by a table of so many cells, from minus to plus the limit."""

ROWS = 1 << 14
"""Vectors encoded at a time."""

PIECES = {4: torch.float64, 2: torch.complex128}
"""A byte of codes as one element of PyTorch: two or four float32. Such elements are looked up fastest."""


@dataclass(frozen=True, eq=False)
class Codec:
    """Vectors to codes and back.

    Attributes:
        bits: of a number, 4 or 2.
        centroids_KE, scales_E, levels: float32: number e of a vector is that of its centroid, plus one of the
            `2 ** bits` levels times `scales_E[e]` and the gain of the token.
    """

    bits: int
    centroids_KE: Tensor
    scales_E: Tensor
    levels: Tensor

    @classmethod
    def train(cls, sample_NE: Tensor, bits: int) -> Codec:
        """Learn a codec from vectors in random order. On one machine, deterministic.

        Raises:
            ValueError: the vectors are too few, or `check_width` refuses them.
        """
        check_width(sample_NE.shape[1], bits)
        if len(sample_NE) < FEWEST:
            raise ValueError(
                f"{bits}-bit codes are learned from the first texts of a store, from {FEWEST:,} tokens at least, and "
                f"these have {len(sample_NE)}: index more texts, or with fp16 or int8"
            )
        sample_NE = sample_NE.float()
        count = min(CENTROIDS, len(sample_NE) // EACH)
        nearest_N = nearest(sample_NE, kmeans(sample_NE, count))
        sums_KE = torch.zeros(count, sample_NE.shape[1], device="cpu").index_add_(0, nearest_N, sample_NE)
        centroids_KE = sums_KE / nearest_N.bincount(minlength=count).clamp_min(1)[:, None]
        residuals_NE = sample_NE - centroids_KE[nearest_N]
        scales_E = residuals_NE.square().mean(0).sqrt().clamp_min(1e-6)
        cells = _cells(residuals_NE / scales_E).ravel().bincount(minlength=CELLS)
        return cls(bits, centroids_KE, scales_E, _levels(cells, 1 << bits))

    def encode(self, values_NE: Tensor) -> dict[str, Tensor]:
        """Vectors to uint8 `codes` `[N, E * bits / 8]`, uint8 `centroids` `[N]` and float16 `gains` `[N]`.

        The gain is that with which the product of a vector and what is decoded is that of the vector with itself: the
        least squared error would make all similarities too small.
        """
        level_of_cell = torch.bucketize(_middles(), (self.levels[1:] + self.levels[:-1]) / 2).to(torch.uint8)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for block_NE in values_NE.split(ROWS):
            block_NE = block_NE.float()
            # The nearest by distance: the centroids differ in length.
            nearest_N = nearest(block_NE, self.centroids_KE, -self.centroids_KE.square().sum(1) / 2)
            residual_NE = block_NE - self.centroids_KE[nearest_N]
            level_NE = level_of_cell[_cells(residual_NE / self.scales_E)]
            rounded_NE = self.levels[level_NE.int()] * self.scales_E
            gain_N = (block_NE * residual_NE).sum(1) / (block_NE * rounded_NE).sum(1)
            # Near that of the least squared error, if the vector is nearly at a right angle to its residual.
            least_N = (residual_NE * rounded_NE).sum(1) / rounded_NE.square().sum(1)
            gain_N = gain_N.clamp(0.7 * least_N, 1.3 * least_N).nan_to_num(0.0)
            parts.append((_packed(level_NE, self.bits), nearest_N.to(torch.uint8), gain_N.half()))
        codes, centroids, gains = map(torch.cat, zip(*parts, strict=True))
        return {"codes": codes, "centroids": centroids, "gains": gains}

    def decode(self, rows: Mapping[str, Tensor]) -> Tensor:
        """What `encode` made to `[N, E]` float32."""
        found = self.table().index_select(0, rows["codes"].ravel().int())
        residuals_NE = found.view(torch.float32).view(len(rows["codes"]), len(self.scales_E))
        residuals_NE.mul_(self.scales_E).mul_(rows["gains"][:, None])
        return residuals_NE.add_(self.centroids_KE.index_select(0, rows["centroids"].int()))

    def table(self) -> Tensor:
        """`[256]`: for each byte of codes its `8 / bits` levels, as one element (see `PIECES`)."""
        bytes_ = torch.arange(256, device="cpu")[:, None] >> torch.arange(0, 8, self.bits, device="cpu")
        return self.levels[bytes_ & (1 << self.bits) - 1].view(PIECES[self.bits]).ravel()

    def tensors(self) -> dict[str, Tensor]:
        """What `Codec(bits, **tensors)` is made of again."""
        return {"centroids_KE": self.centroids_KE, "scales_E": self.scales_E, "levels": self.levels}


def check_width(width: int, bits: int) -> None:
    """Raise ValueError for vectors whose codes would not fill whole bytes."""
    if width * bits % 8:
        raise ValueError(f"{bits}-bit codes of width {width} do not fill whole bytes: use int8 or fp16")


def _cells(residuals_NE: Tensor) -> Tensor:
    """Int32: the cell of each number, in units of the deviation of its row from 0."""
    deviation_N1 = residuals_NE.square().mean(1, keepdim=True).sqrt().clamp_min(1e-9)
    place_NE = residuals_NE / deviation_N1 * (CELLS / 2 / LIMIT) + CELLS / 2
    return place_NE.clamp_(0, CELLS - 1).to(torch.int32)


def _middles() -> Tensor:
    """`[CELLS]`: the number in the middle of each cell."""
    return (torch.arange(CELLS, device="cpu") + 0.5) * (2 * LIMIT / CELLS) - LIMIT


def _levels(counts: Tensor, count: int) -> Tensor:
    """`[count]`, ascending: levels of the least squared error, for numbers of which so many are in each cell."""
    counts, middles = counts.double(), _middles().double()
    share = counts.cumsum(0) / counts.sum()
    levels = middles[torch.searchsorted(share, (torch.arange(count, device="cpu").double() + 0.5) / count)]
    for _ in range(STEPS):
        nearest_C = torch.bucketize(middles, (levels[1:] + levels[:-1]) / 2)
        weight = nearest_C.bincount(counts, minlength=count)
        levels = torch.where(weight > 0, nearest_C.bincount(counts * middles, minlength=count) / weight, levels)
    return levels.float()


def _packed(level_NE: Tensor, bits: int) -> Tensor:
    """`[N, E * bits / 8]`: the levels of `8 / bits` dimensions in a byte, the first in its lowest bits."""
    parts = level_NE.unflatten(1, (-1, 8 // bits)).unbind(2)
    return torch.stack([part << bits * i for i, part in enumerate(parts)]).sum(0, dtype=torch.uint8)
