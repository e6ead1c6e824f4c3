"""Projects the throughput of the encoder on a GPU that nobody here has: no figure of it was measured.

    python -m benchmarks.roofline                                       an RTX 4090
    python -m benchmarks.roofline --gpu "NVIDIA H200" --output FOLDER   another, and rows in a file

Beside each other stand the bound by the datasheet (every kernel as fast as its operations or its bytes allow) and a
projection, which assumes of every kernel a share of those rates. The shares are `assumptions`, all of them printed:
what the offline compile says (`kernels/resources.jsonl`: programs on a processor, and so the bytes they keep on their
way and the warps that feed the tensor cores) times constants that others have published or that are a guess.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.kernels.resources import read_table
from benchmarks.model_work import DATASHEETS, Kernel, flops, kernels, least_seconds
from benchmarks.models.texts import LENGTHS
from benchmarks.rows import Row, append, row
from modernbert.config import PRESETS, EncoderConfig
from modernbert_kernels.dispatch import LONG

TOKENS = 65_536
"""About as many real tokens a batch has as one of `encode` on a GPU."""

ITEMSIZE = 2

PRODUCTS = 0.80
"""Of the tensor cores' rate. On an H200 a large square product has reached 0.797 of it."""

COPY = 0.90
"""Of the memory's rate, where enough bytes are on their way. On an H200 a copy has reached 0.896 of it."""

ATTENTION = 0.50
"""Of the tensor cores' rate, for our attention with enough warps. A guess: others' Triton kernels for heads of width 64
were published with 0.34 to 0.41 on an H100, whose own instructions Triton uses less well than those of older cards."""

FLASH = {89: 0.86, 90: 0.33}
"""The same for the FlashAttention of PyTorch: on an RTX 4090 as follows from the times in the ModernBERT paper, on an
H100 as FlashAttention-3's authors measured it. Elsewhere as `ATTENTION`."""

WARPS = 8
"""On a processor keep its tensor cores busy: two for each of its four parts."""

LATENCY = 800e-9
"""Seconds from asking for bytes of the memory to having them."""

LOADS = 32
"""Bytes that each thread of an elementwise kernel has on their way: two loads of 16."""

GAP = 1.0e-6
"""Seconds between two kernels in a graph."""


class Card(NamedTuple):
    """Compute capability, 89 for 8.9, and the number of multiprocessors."""

    arch: int
    processors: int


CARDS = {
    "NVIDIA H200": Card(90, 132),
    "NVIDIA H100 80GB HBM3": Card(90, 132),
    "NVIDIA H100 PCIe": Card(90, 114),
    "NVIDIA B200": Card(100, 148),
    "NVIDIA A100-SXM4-80GB": Card(80, 108),
    "NVIDIA A100 80GB PCIe": Card(80, 108),
    "NVIDIA A100-SXM4-40GB": Card(80, 108),
    "NVIDIA A100-PCIE-40GB": Card(80, 108),
    "NVIDIA L40S": Card(89, 142),
    "NVIDIA GeForce RTX 4090": Card(89, 128),
    "NVIDIA GeForce RTX 5090": Card(120, 170),
}


@cache
def warps_on_a_processor(arch: int) -> dict[str, int]:
    """Per op, of its forward kernel in bfloat16 in the case that has the fewest; attention in that of its width 64."""
    found: dict[str, int] = {}
    for one in read_table()[1]:
        # Rotary is a kernel of attention too, and none of its backward pass is asked for.
        forward = one["kernel"].startswith(("norm_forward", "geglu_forward", "attention_forward", "rotary"))
        width = "x 64," in one["case"] or not one["op"].endswith("attention")
        own = one["op"] != "attention" or one["kernel"].startswith("attention")
        if (one["arch"], one["dtype"]) == (arch, "bfloat16") and forward and width and own:
            found[one["op"]] = min(found.get(one["op"], 64), one["programs"] * one["warps"])
    return found


class Shares(NamedTuple):
    """Of the datasheet's rates, what is assumed: of the bytes per op, and of operations.

    Attributes:
        wasted: pairs that a tile of local attention computes, for each that is seen.
    """

    bytes: dict[str, float]
    products: float
    attention: float
    flash: float
    wasted: float


def assumed(gpu: str, window: int) -> Shares:
    """What the offline compile says of this GPU, and the constants above."""
    from modernbert_kernels.fused.tiles import TILES

    card, sheet = CARDS[gpu], DATASHEETS[gpu]
    warps = warps_on_a_processor(card.arch)
    needed = sheet.bytes * LATENCY / card.processors
    moved = {op: COPY * min(1.0, count * 32 * LOADS / needed) for op, count in warps.items() if op != "attention"}
    attention = ATTENTION * min(1.0, warps["attention"] / WARPS)
    tiles = TILES["attention forward", 64, ITEMSIZE]
    own = tiles[max(arch for arch in tiles if arch <= card.arch)].block_m
    wasted = (own + 2 * window) / (2 * window + 1)
    return Shares(moved, PRODUCTS, attention, FLASH.get(card.arch, ATTENTION), wasted)


def assumptions(gpu: str, window: int) -> list[str]:
    """All of them, for people; each says that it is projected."""
    card, shares = CARDS[gpu], assumed(gpu, window)
    warps = warps_on_a_processor(card.arch)
    said = [
        f"{op}: {share:.0%} of the memory's rate, {warps[op]} warps on a processor"
        for op, share in shares.bytes.items()
    ]
    return [
        f"projected for {gpu}, sm_{card.arch}, {card.processors} processors: {part}"
        for part in (
            f"products: {shares.products:.0%} of the tensor cores' rate, {COPY:.0%} of the memory's",
            f"our attention: {shares.attention:.0%} of that rate, {warps['attention']} warps on a processor",
            f"our local attention: {shares.wasted:.2f} pairs computed for each that is seen, as its tiles are",
            f"global attention beyond {LONG:,} tokens: PyTorch's, {shares.flash:.0%}, after a rotation",
            *said,
            f"{1e6 * GAP:g} us between two kernels",
        )
    ]


def projected_seconds(config: EncoderConfig, lengths: Sequence[int], gpu: str) -> float:
    """Of a forward pass in bfloat16 in a graph."""
    sheet, shares = DATASHEETS[gpu], assumed(gpu, config.window)
    is_long = max(lengths) > LONG

    def seconds(kernel: Kernel) -> float:
        operations, moved = kernel.flops / sheet.bfloat16, kernel.bytes / sheet.bytes
        if kernel.name == "product":
            return max(operations / shares.products, moved / COPY)
        if kernel.name == "local attention":
            return max(operations * shares.wasted / shares.attention, moved / COPY)
        if kernel.name != "global attention":
            return moved / shares.bytes[kernel.name]
        if not is_long:
            return max(operations / shares.attention, moved / COPY)
        rotation = 6 * sum(lengths) * config.hidden_size * ITEMSIZE / sheet.bytes / shares.bytes["rotary"] + GAP
        return rotation + max(operations / shares.flash, moved / COPY)

    return sum(seconds(kernel) + GAP for kernel in kernels(config, lengths, ITEMSIZE))


@cache
def lengths_of(name: str) -> tuple[int, ...]:
    """Texts of one of the paper's four sets, about `TOKENS` tokens of them."""
    few = LENGTHS[name](16)
    return LENGTHS[name](max(1, round(TOKENS / (sum(few) / len(few)))))


def rows_of(gpu: str) -> list[Row]:
    """A bound and a projection of every preset and every set of lengths."""
    sheet, made = DATASHEETS[gpu], []
    for model, config in PRESETS.items():
        for name in LENGTHS:
            lengths = lengths_of(name)
            bound = least_seconds(config, lengths, ITEMSIZE, sheet.bfloat16, sheet.bytes)
            projected = projected_seconds(config, lengths, gpu)
            for implementation, seconds in (("bound by the datasheet", bound), ("modernbert", projected)):
                made.append(projected_row(gpu, model, name, implementation, seconds, bound))
    return made


def projected_row(gpu: str, model: str, name: str, implementation: str, seconds: float, bound: float) -> Row:
    """Like a row of `throughput`, but of the kind that is never beside measured ones."""
    config, lengths, card = PRESETS[model], lengths_of(name), CARDS[gpu]
    settings = assumptions(gpu, config.window) if implementation == "modernbert" else ["every kernel at its roofline"]
    operations = flops(config, lengths) / seconds
    return row(
        workload=f"projected, {name}",
        what=f"Projected, not measured: {model}, {name}, bfloat16, forward",
        implementation=implementation,
        settings="; ".join(settings),
        unit="tokens/s",
        values=[sum(lengths) / seconds],
        max_error=None,
        tolerance=None,
    ) | {
        "kind": "projected",
        "suite": "roofline",
        "samples": 0,
        "dtype": "bfloat16",
        "gpu": gpu,
        "driver": None,
        "capability": f"{card.arch // 10}.{card.arch % 10}",
        "state": {},
        "pass": "forward",
        "model": model,
        "figure": "throughput",
        "lengths": {"name": name, "sequences": len(lengths), "tokens": sum(lengths), "longest": max(lengths)},
        "x": None,
        "tflop_per_s": float(f"{operations * 1e-12:.4g}"),
        "percent_of_matmul": None,
        "percent_of_datasheet": float(f"{100 * operations / DATASHEETS[gpu].bfloat16:.4g}"),
        "percent_of_roofline": None,
        "percent_of_datasheet_roofline": float(f"{100 * bound / seconds:.4g}"),
    }


def table(rows: Sequence[Row]) -> Table:
    """The bound and the projection of each model and set, thousand tokens a second."""
    shown = Table(title=f"Projected, not measured: {rows[0]['gpu']}, bfloat16, forward, thousand tokens/s")
    for heading in ("", *LENGTHS):
        shown.add_column(heading, justify="right" if heading else "left")
    known = {(one["model"], one["lengths"]["name"], one["implementation"]): one["median"] for one in rows}
    for model in dict.fromkeys(one["model"] for one in rows):
        for implementation, says in (("bound by the datasheet", "projected bound"), ("modernbert", "projected")):
            figures = (f"{known[model, name, implementation] / 1000:,.0f}" for name in LENGTHS)
            shown.add_row(f"{model}, {says}", *figures)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="NVIDIA GeForce RTX 4090", choices=sorted(CARDS), metavar="NAME")
    parser.add_argument("--output", type=Path, help="write the rows to a new .jsonl file in this folder")
    arguments = parser.parse_args()
    rows = rows_of(arguments.gpu)
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width of its own
    console.print(table(rows))
    for line in assumptions(arguments.gpu, PRESETS["modernbert-base"].window):
        console.print(line, highlight=False)
    if arguments.output:
        file = arguments.output / f"{datetime.now(timezone.utc):%Y-%m-%d-%H%M%S}-projected.jsonl"
        append(rows, file)
        console.print(f"wrote {file}, projected rows alone", highlight=False)


if __name__ == "__main__":
    main()
