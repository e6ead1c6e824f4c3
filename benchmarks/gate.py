"""Whether each row of a result is right. Tests and benchmarks use this rule beside their own for whole tensors.

A root mean square over a whole tensor does not see one row: at 16,384 rows, a row of zeros is 0.8 percent of it, and
one rounding step of bfloat16 is as much. A kernel that never writes its last row or tile would pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Worst(NamedTuple):
    """The row that is the furthest beyond what is allowed, or the closest to it.

    Attributes:
        row: its indices in all dimensions but the last; those of a number, if the tensor has one dimension.
        found, allowed: root mean squares over the row.
    """

    row: tuple[int, ...]
    found: float
    allowed: float

    @property
    def is_right(self) -> bool:
        return self.found <= self.allowed  # False for NaN

    def __str__(self) -> str:
        return f"row {self.row} is off by {self.found:.2e}, allowed {self.allowed:.2e}"


def worst_row(got: Tensor, plain: Tensor, truth: Tensor, eps: float) -> Worst:
    """Compare every row, which is the last dimension: of `[T, H, K]`, each head of each token.

    A row may be off by three times the worst row of `plain`, the same maths in the same dtype, and by one rounding step
    of its own size. The worst row and not the same one: the errors of two equally good computations are alike in
    distribution, and where a row's error is that of a single number (a gradient that is zero but for rounding), one
    of them may be close to zero by chance. Three times: twice, as for whole tensors, and half as much again, by which
    the worst of some hundred rows varies from one computation to the next. The worst of single numbers varies more, by
    twice: in a tensor of one dimension a number may be off by four times the worst of `plain`.

    Args:
        got, plain, truth: of one shape, with at least one number.
        eps: of the dtype in which `got` and `plain` were computed.
    """

    def size(x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1] if x.dim() > 1 else 1).square().mean(dim=1).sqrt()

    exact = truth.double()
    found, plain_error = size(got.double() - exact), size(plain.double() - exact)
    allowed = (3 if truth.dim() > 1 else 4) * plain_error.max() + eps * size(exact)
    at = int((found - allowed).nan_to_num(nan=torch.inf).argmax())
    lengths = truth.shape[:-1] if truth.dim() > 1 else truth.shape
    row = torch.unravel_index(torch.tensor(at), lengths) if lengths else ()
    return Worst(tuple(map(int, row)), found[at].item(), allowed[at].item())
