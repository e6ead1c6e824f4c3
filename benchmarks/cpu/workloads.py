"""The workloads of the `cpu` suite: what is run, what must come out, and who runs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu import contenders, exported, int8
from benchmarks.harness import Contender, check
from benchmarks.inputs import ASSETS, Ids, batched, demo_passages, normal_lengths, paper_lengths, random_ids

THREADS = 2
TOLERANCE = 1e-4
TORCH = ("torch",)
FLOAT32 = f"{contenders.OURS}, float32"


@dataclass(frozen=True)
class Workload:
    """What is run, what must come out, and who runs it.

    Attributes:
        what: the workload in words.
        expected: what every contender must return, within `tolerance`.
        tokens: real tokens of one call, for rows in tokens/s; None for rows in ms.
        goals: how many times faster than each peer we mean to be.
        slow: fewer samples are taken of it.
        tolerance: None where contenders may differ as far as they do, which their rows then say.
    """

    what: str
    contenders: list[Contender]
    expected: Tensor
    tokens: int | None = None
    goals: dict[str, float] = field(default_factory=dict)
    slow: bool = False
    tolerance: float | None = TOLERANCE


def alone(folder: Path, sequences: Ids) -> Tensor:
    """The reference: `[T, D]` of transformers in float32, every text by itself, so that nothing is padded."""
    one = contenders.transformers_sdpa(folder, batched(sequences, 1), "sdpa")
    return one.result(one.run())


def short(folder: Path, length: int, *, quick: bool) -> Workload:
    sequences = random_ids([length])
    batches = batched(sequences, 1)
    return Workload(
        f"Ettin-17m, one text of {length} tokens",
        [
            contenders.ours(folder, sequences),
            contenders.transformers_sdpa(folder, batches, "sdpa"),
            *([] if quick else contenders.transformers_compiled(folder, batches)),
            *exported.onnx_runtime(folder, batches, "one text", THREADS),
            *exported.openvino(folder, batches, "one text", THREADS, sources=sources(quick)),
        ],
        alone(folder, sequences),
        goals={contenders.TRANSFORMERS: 1.8 if length == 32 else 2.0, contenders.ONNX_RUNTIME: 1.0},
    )


def fixed(folder: Path, *, quick: bool) -> Workload:
    sequences = random_ids([512] * 16)
    sizes = (1, 8) if quick else (1, 2, 4, 8, 16)
    return Workload(
        "Ettin-17m, 16 texts of 512 tokens",
        [
            contenders.ours(folder, sequences),
            *(contenders.transformers_sdpa(folder, batched(sequences, n), f"sdpa, batches of {n}") for n in sizes),
            *exported.onnx_runtime(folder, batched(sequences, 1), "one by one", THREADS),
            *exported.openvino(folder, batched(sequences, 1), "one by one", THREADS, sources=sources(quick)),
        ],
        alone(folder, sequences),
        tokens=16 * 512,
        goals={contenders.TRANSFORMERS: 1.2},
    )


def variable(folder: Path, *, quick: bool) -> Workload:
    lengths = paper_lengths(32)
    sequences = random_ids(lengths)
    peers = [
        *contenders.transformers_batchings(folder, sequences, sizes=(8,) if quick else (2, 4, 8, 16, 32)),
        *exported.onnx_runtime(folder, batched(sequences, 1), "one by one", THREADS),
        *exported.openvino(folder, batched(sequences, 1), "one by one", THREADS, sources=sources(quick)),
    ]
    if not quick:
        by_length, settings = batched(sequences, 4, by_length=True), "length-sorted batches of 4"
        peers += exported.onnx_runtime(folder, by_length, settings, THREADS)
        peers += exported.openvino(folder, by_length, settings, THREADS)
    return Workload(
        f"Ettin-17m, 32 texts of the paper's variable lengths (mean {sum(lengths) / 32:.0f})",
        [contenders.ours(folder, sequences), *peers],
        alone(folder, sequences),
        tokens=sum(lengths),
        goals={
            contenders.AS_THEY_COME: 1.6,
            contenders.LENGTH_SORTED: 1.3,
            contenders.ONE_BY_ONE: 1.3,
            contenders.ONNX_RUNTIME: 1.2,
        },
    )


def first_token(folder: Path, *, quick: bool) -> Workload:
    """What is saved where only one row of each text is read."""
    lengths = paper_lengths(32)
    sequences = random_ids(lengths)
    first_B = torch.tensor([0, *lengths[:-1]]).cumsum(0)

    def of_first(one: Contender) -> Contender:
        return replace(one, result=lambda outputs: one.result(outputs)[first_B])

    peers = contenders.transformers_batchings(folder, sequences, sizes=(8,) if quick else (2, 4, 8))
    return Workload(
        f"Ettin-17m, [CLS] of 32 texts of the paper's variable lengths (mean {sum(lengths) / 32:.0f})",
        [*contenders.ours_first_tokens(folder, sequences), *map(of_first, peers)],
        alone(folder, sequences)[first_B],
        tokens=sum(lengths),
    )


def long(folder: Path) -> Workload:
    """Without ONNX Runtime: it takes more than 6 GB here."""
    sequences = random_ids([8192])
    return Workload(
        "Ettin-17m, one text of 8192 tokens",
        [
            contenders.ours(folder, sequences),
            contenders.transformers_sdpa(folder, batched(sequences, 1), "sdpa"),
        ],
        alone(folder, sequences),
        tokens=8192,
        goals={contenders.TRANSFORMERS: 2.3},
        slow=True,
    )


def from_text(folder: Path, *, quick: bool) -> Workload:
    """From strings on both sides, with the tokenizer of the default model: its ids fit the seeded weights.

    The texts are lower-cased beforehand: that model's tokenizer.json leaves it to the caller, and a plain
    transformers tokenizer does not do it.
    """
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "default" / file, folder)
    texts = [text.lower() for text in demo_passages(64)]
    sizes = (8, 32) if quick else (1, 4, 8, 16, 32)
    mine, tokens = contenders.ours_from_text(folder, texts)
    return Workload(
        f"Ettin-17m, 64 Wikipedia passages ({tokens:,} tokens), text to pooled vectors, tokenising timed",
        [mine, *contenders.sentence_transformers(folder, texts, sizes=sizes)],
        contenders.mean_alone(folder, texts),
        tokens=tokens,
    )


def maxsim(width: int, *, quick: bool) -> Workload:
    """Every contender gets the documents in the form that it likes best before the clock starts."""
    lengths = normal_lengths(1000, mean=181, low=16, high=300)
    generator = torch.Generator().manual_seed(0)
    query_QE = F.normalize(torch.randn(32, width, generator=generator), dim=-1)
    documents = F.normalize(torch.randn(sum(lengths), width, generator=generator), dim=-1).split(lengths)
    in_float64 = [(query_QE.double() @ document.double().T).amax(1).sum() for document in documents]
    return Workload(
        f"MaxSim, 1 query of 32 x 1000 documents ({sum(lengths):,} tokens), width {width}",
        [
            contenders.ours_maxsim(query_QE, documents),
            *contenders.padded_maxsim(query_QE, documents, chunks=(50,) if quick else (200, 50, 10)),
            *contenders.maxsim_cpu(query_QE, documents),
        ],
        torch.stack(in_float64),
        goals={contenders.PADDED_EINSUM: 4.0, contenders.MAXSIM_CPU: 1.2} if width == 48 else {},
    )


def base(folder: Path, *, quick: bool) -> Workload:
    lengths = paper_lengths(4 if quick else 8)
    sequences = random_ids(lengths)
    return Workload(
        f"ModernBERT-base, {len(lengths)} texts of the paper's variable lengths",
        [
            contenders.ours(folder, sequences),
            *contenders.transformers_batchings(folder, sequences, sizes=() if quick else (2, 4, 8)),
            *([] if quick else exported.openvino(folder, batched(sequences, 1), "one by one", THREADS, sources=TORCH)),
        ],
        alone(folder, sequences),
        tokens=sum(lengths),
        goals={contenders.LENGTH_SORTED: 1.15, contenders.ONE_BY_ONE: 1.15},
        slow=True,
    )


def int8_short(folder: Path, *, quick: bool) -> Workload:
    sequences = random_ids([32])
    batches, expected = batched(sequences, 1), alone(folder, sequences)
    mine = replace(contenders.ours(folder, sequences), implementation=FLOAT32)
    return Workload(
        "Ettin-17m with int8 products, one text of 32 tokens",
        [
            exact(mine, expected),
            int8.ours(folder, sequences),
            *exported.onnx_runtime(folder, batches, "one text", THREADS, int8=True),
            *exported.openvino(folder, batches, "one text", THREADS, int8=True, sources=sources(quick)),
        ],
        expected,
        tolerance=None,
    )


def int8_variable(folder: Path, *, quick: bool) -> Workload:
    lengths = paper_lengths(32)
    sequences = random_ids(lengths)
    batches, expected = batched(sequences, 1), alone(folder, sequences)
    mine = replace(contenders.ours(folder, sequences), implementation=FLOAT32)
    return Workload(
        f"Ettin-17m with int8 products, 32 texts of the paper's variable lengths (mean {sum(lengths) / 32:.0f})",
        [
            exact(mine, expected),
            int8.ours(folder, sequences),
            *exported.onnx_runtime(folder, batches, "one by one", THREADS, int8=True),
            *exported.openvino(folder, batches, "one by one", THREADS, int8=True, sources=sources(quick)),
        ],
        expected,
        tokens=sum(lengths),
        tolerance=None,
    )


def exact(contender: Contender, expected: Tensor) -> Contender:
    """One that is in float32, and that the usual tolerance holds for among those that have none."""

    def result(returned: object) -> Tensor:
        output = contender.result(returned)
        check(replace(contender, run=lambda: returned), expected, TOLERANCE)
        return output

    return replace(contender, result=result)


def sources(quick: bool) -> tuple[str, ...]:
    """What OpenVINO gets its model from; a try-out has no time for both."""
    return TORCH if quick else ("torch", "onnx")


# name: (shape of the model or None, builder); each builder is called when its turn comes.
BUILDERS: dict[str, tuple[str | None, Callable[..., Workload]]] = {
    "short-16": ("ettin-17m", lambda folder, quick: short(folder, 16, quick=quick)),
    "short-24": ("ettin-17m", lambda folder, quick: short(folder, 24, quick=quick)),
    "short-32": ("ettin-17m", lambda folder, quick: short(folder, 32, quick=quick)),
    "fixed-512": ("ettin-17m", fixed),
    "variable": ("ettin-17m", variable),
    "first-token": ("ettin-17m", first_token),
    "from-text": ("ettin-17m", from_text),
    "maxsim-48": (None, lambda folder, quick: maxsim(48, quick=quick)),
    "maxsim-128": (None, lambda folder, quick: maxsim(128, quick=quick)),
    "long-8192": ("ettin-17m", lambda folder, quick: long(folder)),
    "base-variable": ("modernbert-base", base),
    "int8-short-32": ("ettin-17m", int8_short),
    "int8-variable": ("ettin-17m", int8_variable),
}
