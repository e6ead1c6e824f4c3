"""What `benchmarks.tune` can choose: the entries of the table of tiles, with candidates and calls to try them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import modernbert_kernels as ops
from benchmarks.kernels.cases import Case, randn
from benchmarks.kernels.tasks import offsets
from benchmarks.kernels.tiles_file import Key


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def dtype_of(itemsize: int) -> torch.dtype:
    # The interpreter multiplies the bit patterns of bfloat16.
    return torch.float32 if itemsize == 4 else torch.float16 if interpreted() else torch.bfloat16


class Subject(NamedTuple):
    """An entry of the table.

    Attributes:
        key: of the entry. kernel: the one that takes its tile.
        backward: the kernel belongs to the backward pass: both passes are timed.
        candidates: what a program owns, what it visits, warps, stages.
        cases: calls that take the entry, on a device with so many tokens; all count alike.
    """

    key: Key
    kernel: str
    backward: bool
    candidates: tuple[tuple[int, int, int, int], ...]
    cases: Callable[[str, int], Iterator[Case]]

    @property
    def op(self) -> str:
        """The word by which `--only` names it."""
        return str(self.key[0]).split()[0]


def attention(part: str, width: int, itemsize: int) -> Subject:
    """Local and global layers of 768 numbers, in texts of 512 tokens."""

    def cases(device: str, tokens: int) -> Iterator[Case]:
        length = min(512, tokens)
        count = tokens // length
        qkv = randn(tokens, 3, max(1, min(768, tokens) // width), width, dtype=dtype_of(itemsize), device=device)
        rope = ops.rotary_table(torch.arange(length, device=device).repeat(count), 10_000.0, width)
        args = (qkv, offsets(count, length, qkv.device), length)
        for window in (64, None):
            yield Case(ops.attention, f"window {window}", args, {"rope": rope, "window": window})

    owns, visits = ((32, 64, 128), (32, 64, 128)) if itemsize == 2 else ((16, 32, 64), (16, 32, 64))
    candidates = tuple(product(owns, visits, (4, 8), (1, 2, 3)))
    kernel = f"attention_{part}_kernel"
    return Subject((f"attention {part}", width, itemsize), kernel, part != "forward", candidates, cases)


def maxsim(rows: int) -> Subject:
    """Of many queries, or of a single one of so many tokens, with documents of 300 tokens, in both usual widths."""

    def cases(device: str, tokens: int) -> Iterator[Case]:
        # As in training, or as in reranking a thousand.
        queries, documents = (
            (max(1, tokens // 128), max(2, tokens // 128)) if rows == 128 else (1, max(2, tokens // 16))
        )
        for width in (128, 48):
            vectors = (randn(n, width, dtype=torch.float32, device=device) for n in (queries * rows, documents * 300))
            q, d = (F.normalize(x, dim=-1).to(dtype_of(2)) for x in vectors)
            offsets_ = (offsets(queries, rows, q.device), offsets(documents, 300, d.device))
            yield Case(ops.maxsim, f"width {width}", (q, offsets_[0], d, offsets_[1]), {})

    candidates = tuple(product((rows,), (32, 64, 128), (4, 8), (2, 3, 4)))
    return Subject(("maxsim", rows), "maxsim_kernel", False, candidates, cases)


def geglu(part: str) -> Subject:
    """In the MLPs of Ettin-17m and of ModernBERT-base."""

    def cases(device: str, tokens: int) -> Iterator[Case]:
        for width in (1152, 384):
            h = randn(tokens, 2 * width, dtype=dtype_of(2), device=device)
            yield Case(ops.geglu, f"{width}", (h, "gelu"), {})

    # There is no loop that stages could overlap.
    candidates = tuple(product((1024, 2048, 4096, 8192), (128, 512), (4, 8), (3,)))
    return Subject((f"geglu {part}",), f"geglu_{part}_kernel", part == "backward", candidates, cases)


SUBJECTS: tuple[Subject, ...] = (
    *(attention(part, 64, 2) for part in ("forward", "dq", "dkv")),
    maxsim(32),
    maxsim(128),
    geglu("forward"),
    geglu("backward"),
    attention("forward", 64, 4),
    maxsim(64),
    *(attention(part, 64, 4) for part in ("dq", "dkv")),
    *(attention(part, width, size) for size in (2, 4) for width in (128, 32) for part in ("forward", "dq", "dkv")),
)
"""The most used first: the time may end before the last."""


def way_of(case: Case) -> Callable[..., Any]:
    return case.op.backends["triton"]
