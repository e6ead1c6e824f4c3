"""Suite `drop-in`: a model of another library after `pack_in_place`, next to the same model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks import harness, inputs, peers, training
from benchmarks.encoder import of_texts
from benchmarks.harness import Run, Suite, Table
from benchmarks.late_interaction import per_second, pylate, sentence_transformers
from benchmarks.worker import Build, Peer

STOCK, PACKED, BATCH = "as it was", "packed in place", 32


def both(builder: Callable[..., Build], package: str, **options: Any) -> dict[str, Peer]:
    stock = Peer(builder, options, package=package)
    return {PACKED: stock._replace(options={**options, "in_place": True}), STOCK: stock}


def tables_of(
    here: Run, workload: str, dtype: str, groups: dict[str, Sequence[int]], found: dict[str, Peer], **more: Any
) -> Iterator[Table]:
    """Groups of texts in batches of the default size, and in those that are the fastest on each side."""
    inputs.save_embedder(folder := here.setup("ettin-17m", dtype).folder)
    inputs.save_colbert(folder)
    batches = (BATCH, f"batches of {BATCH}"), (None, "the fastest batches")
    for what, lengths in groups.items():
        for batch, words in batches[: 1 if here.quick or len(lengths) == 1 else 2]:
            known = per_second("texts", len(lengths)) | {"reference": found[STOCK], "model_pass": False}
            words = f"ettin-17m, {dtype}: {what}, {words}"
            known |= {"batch": batch, "dtype": dtype, "rounds": 3}
            yield of_texts(here, workload, "ettin-17m", words, lengths, found, **known | more)


def padded(here: Run, workload: str, *, dtype: str) -> Iterator[Table]:
    count = 512 if here.is_gpu else 8 if here.quick else 32
    groups = {
        f"{count} texts of the paper's variable lengths": inputs.SETS["variable-short"].first(count),
        f"{count} texts of 8 to 32 tokens": [8 + 3 * index % 25 for index in range(count)],
        f"{count // 4} texts of 512 tokens": (512,) * (count // 4),
        "one text of 32 tokens": (32,),
    }
    yield from tables_of(here, workload, dtype, groups, both(peers.transformers, "transformers"))


def texts(here: Run, workload: str) -> Iterator[Table]:
    builder, package, _, options = TEXTS[workload]
    groups = {}
    for count in (1024 if here.is_gpu else 8 if here.quick else 64, 1):
        tokens = inputs.default().tokenize_documents(inputs.paragraphs(count), truncate=False)
        groups[f"{count} Wikipedia paragraphs to vectors by {package}, tokenising timed"] = tokens.batch.lengths
    yield from tables_of(
        here, workload, here.dtype, groups, both(builder, package, **options), options={"paragraphs": True}
    )


def steps(here: Run, workload: str, *, of: str, builder: Callable[..., Build], package: str) -> Iterator[Table]:
    make, _ = training.WORKLOADS[of]
    yield next(make(here, workload, found=both(builder, package)))  # the second one is of memory


DENSE = {"folder": "dense"}
TEXTS = {
    "sentence-transformers": (sentence_transformers, "sentence_transformers", "SentenceTransformer.encode", DENSE),
    "multi-vector": (sentence_transformers, "sentence_transformers", "MultiVectorEncoder.encode_document", {}),
    "pylate": (pylate, "pylate", "ColBERT.encode of documents", {}),
}
STEPS = {
    "transformers-step": ("masked-lm", training.transformers, "accelerate", "transformers' Trainer, masked LM"),
    "sentence-transformers-step": ("dense", training.sentence_transformers, "datasets", "ranking loss, dense"),
    "multi-vector-step": ("late-interaction", training.sentence_transformers, "datasets", "the same, multi-vector"),
    "pylate-step": ("late-interaction", training.pylate, "pylate", "PyLate's contrastive loss"),
}
WORKLOADS: dict[str, tuple[Callable[[Run, str], Iterator[Table]], str]] = {
    "transformers": (partial(padded, dtype="float32"), "ModernBertModel on padded batches"),
    "transformers-half": (partial(padded, dtype="bfloat16"), "the same in bfloat16"),
    **{name: (texts, line) for name, (_, _, line, _) in TEXTS.items()},
    **{
        name: (partial(steps, of=of, builder=builder, package=package), f"steps of training: {line}")
        for name, (of, builder, package, line) in STEPS.items()
    },
}

SUITES = {
    "drop-in": Suite(
        "models of other libraries after `pack_in_place`: encoding and steps of training",
        {name: line for name, (_, line) in WORKLOADS.items()},
        "the same models as they were",
        harness.of_workloads(WORKLOADS),
        weight=8,
    )
}
