"""Projects the throughput of the encoder on a GPU from its datasheet and the compiled kernels: nothing is measured.

    python -m benchmarks roofline                    an RTX 4090
    python -m benchmarks roofline --gpu "NVIDIA H200"

The bound takes every kernel to be as fast as its operations or its bytes allow. The projection assumes shares of these
rates, which are printed: what the offline compile says (`kernels/resources.jsonl`) times published or guessed constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.inputs import LENGTHS, MEAN
from benchmarks.resources import read_table
from benchmarks.work import DATASHEETS, Kernel, kernels, least_seconds
from modernbert.config import PRESETS, EncoderConfig
from modernbert_kernels.dispatch import LONG

TOKENS, ITEMSIZE = 65_536, 2
PRODUCTS, COPY = 0.80, 0.90
"""Of the tensor cores' rate and of the memory's. On an H200 a large product reached 0.797, a copy 0.896."""

ATTENTION = 0.50
"""Of the tensor cores' rate, for our attention with enough warps. A guess: Triton kernels for heads of width 64 were
published with 0.34 to 0.41 on an H100, whose own instructions Triton uses less well than those of older cards."""

FLASH = {89: 0.86, 90: 0.33}
"""The same for PyTorch's FlashAttention: on an RTX 4090 by the times in the ModernBERT paper, on an H100 as
FlashAttention-3's authors measured it."""

WARPS, LATENCY, LOADS, GAP = 8, 800e-9, 32, 1.0e-6
"""Warps that keep a processor's tensor cores busy; seconds from asking memory for bytes to having them; bytes that each
thread of an elementwise kernel has on their way; seconds between two kernels in a graph."""

CARDS = {
    "NVIDIA H200": (90, 132),
    "NVIDIA H100 80GB HBM3": (90, 132),
    "NVIDIA H100 PCIe": (90, 114),
    "NVIDIA B200": (100, 148),
    "NVIDIA A100-SXM4-80GB": (80, 108),
    "NVIDIA A100 80GB PCIe": (80, 108),
    "NVIDIA L40S": (89, 142),
    "NVIDIA GeForce RTX 4090": (89, 128),
    "NVIDIA GeForce RTX 5090": (120, 170),
}
"""Compute capability, 89 for 8.9, and the number of multiprocessors."""


class Shares(NamedTuple):
    """Of the datasheet's rates: of the bytes per op, and of the operations of our attention and of FlashAttention."""

    bytes: dict[str, float]
    attention: float
    flash: float


def assumed(gpu: str) -> Shares:
    """By the warps on a processor, of the forward kernel in bfloat16 that has the fewest."""
    (arch, processors), sheet = CARDS[gpu], DATASHEETS[gpu]
    warps: dict[str, int] = {}
    for one in read_table()[1]:
        forward = one["kernel"].startswith(
            ("norm_forward", "layer_norm_forward", "geglu_forward", "attention_forward", "rotary")
        )
        width = "x 64," in one["case"] or not one["op"].endswith("attention")
        own = one["op"] != "attention" or one["kernel"].startswith("attention")
        if (one["arch"], one["dtype"]) == (arch, "bfloat16") and forward and width and own:
            warps[one["op"]] = min(warps.get(one["op"], 64), one["programs"] * one["warps"])
    needed = sheet.bytes * LATENCY / processors
    moved = {op: COPY * min(1.0, count * 32 * LOADS / needed) for op, count in warps.items()}
    return Shares(moved, ATTENTION * min(1.0, warps["attention"] / WARPS), FLASH.get(arch, ATTENTION))


def projected_seconds(config: EncoderConfig, lengths: Sequence[int], gpu: str) -> float:
    """Of a forward pass in bfloat16 in a graph."""
    sheet, shares, is_long = DATASHEETS[gpu], assumed(gpu), max(lengths) > LONG

    def seconds(kernel: Kernel) -> float:
        operations, moved = kernel.flops / sheet.bfloat16, kernel.bytes / sheet.bytes
        if kernel.name == "product":
            return max(operations / PRODUCTS, moved / COPY)
        if kernel.name == "global attention" and is_long:
            rotation = 6 * sum(lengths) * config.hidden_size * ITEMSIZE / sheet.bytes / shares.bytes["rotary"] + GAP
            return rotation + max(operations / shares.flash, moved / COPY)
        if kernel.name.endswith("attention"):
            return max(operations / shares.attention, moved / COPY)
        return moved / shares.bytes[kernel.name]

    return sum(seconds(kernel) + GAP for kernel in kernels(config, lengths, ITEMSIZE))


def show(gpu: str) -> None:
    """Thousand tokens a second of every preset and set of lengths: the bound, and the projection."""
    sheet, shares = DATASHEETS[gpu], assumed(gpu)
    print(f"Projected, not measured: {gpu}, bfloat16, forward, thousand tokens/s (bound by the datasheet / projected)")
    for model, config in PRESETS.items():
        cells = []
        for name, make in LENGTHS.items():
            lengths = make(TOKENS // MEAN[name])
            bound = least_seconds(config, lengths, ITEMSIZE, sheet.bfloat16, sheet.bytes)
            each = (sum(lengths) / seconds / 1e3 for seconds in (bound, projected_seconds(config, lengths, gpu)))
            cells.append(f"{name} {' / '.join(f'{one:,.0f}' for one in each)} (projected)")
        print(f"{model}: {'; '.join(cells)}")
    print(
        f"Assumed: products {PRODUCTS:.0%}, our attention {shares.attention:.0%}, FlashAttention beyond {LONG:,} tokens"
    )
    print(
        f"{shares.flash:.0%} of the tensor cores' rate; {COPY:.0%} of the memory's, {1e6 * GAP:g} us between kernels;"
    )
    print(
        ", ".join(f"{op} {share:.0%}" for op, share in shares.bytes.items() if op != "attention"),
        "of the memory's rate",
    )
