"""Suite `drop-in`: a model of another library after `pack_in_place`, next to the same model as it was.

Rows are calls as users of these libraries make them, with the default batch size, on texts of real lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks import harness, inputs, peers, training
from benchmarks.encoder import of_texts
from benchmarks.harness import Run, Suite, Table
from benchmarks.late_interaction import load_pylate, load_sentence_transformers, per_second, text_variant
from benchmarks.worker import Build, Job, Peer, Setup, Variant

STOCK, PACKED, BATCH = "as it was", "packed in place", 32


def both(builder: Callable[..., Build], package: str, **options: Any) -> dict[str, Peer]:
    stock = Peer(builder, options, package=package)
    return {PACKED: stock._replace(options={**options, "in_place": True}), STOCK: stock}


def forward(setup: Setup, *, in_place: bool = False) -> Build:
    model = peers.in_place(peers.load_theirs(setup, "sdpa"), in_place)

    def variants(job: Job) -> Iterator[Variant]:
        batches = inputs.groups(job.lengths, BATCH)
        yield peers.in_padded(f"batches of {BATCH}", job, setup, batches, peers.forward_of(model))

    return variants


def dense(setup: Setup, *, in_place: bool = False) -> Build:
    model = load_sentence_transformers(setup, "dense", "SentenceTransformer")
    return encoding(partial(peers.in_place(model, in_place).encode, convert_to_tensor=True))


def multi_vector(setup: Setup, *, in_place: bool = False) -> Build:
    return encoding(peers.in_place(load_sentence_transformers(setup), in_place).encode_document)


def pylate(setup: Setup, *, in_place: bool = False) -> Build:
    model = peers.in_place(load_pylate(setup), in_place)
    return encoding(partial(model.encode, is_query=False, convert_to_tensor=True))


def encoding(encode: Callable[..., Any]) -> Build:
    call = partial(encode, batch_size=BATCH, show_progress_bar=False)
    return lambda job: [text_variant(job, call, f"batch_size={BATCH}")]


def table_of(here: Run, workload: str, what: str, lengths: Sequence[int], found: dict[str, Peer], **more: Any) -> Table:
    inputs.save_embedder(folder := here.setup("ettin-17m", here.dtype).folder)
    inputs.save_colbert(folder)
    known = per_second("texts", len(lengths)) | {"reference": found[STOCK], "model_pass": False}
    return of_texts(here, workload, "ettin-17m", f"ettin-17m, {what}", lengths, found, **known | more)


def padded(here: Run, workload: str) -> Iterator[Table]:
    lengths = inputs.SETS["variable-short"].first(512 if here.is_gpu else 8 if here.quick else 64)
    what = f"{len(lengths)} texts of the paper's variable lengths in padded batches of {BATCH}, ids to hidden states"
    yield table_of(here, workload, what, lengths, both(forward, "transformers"))


def texts(here: Run, workload: str, *, builder: Callable[..., Build], package: str) -> Iterator[Table]:
    texts = inputs.paragraphs(1024 if here.is_gpu else 8 if here.quick else 128)
    lengths = inputs.default().tokenize_documents(texts, truncate=False).batch.lengths
    what = f"{len(texts)} Wikipedia paragraphs to vectors by {package}, tokenising timed"
    yield table_of(here, workload, what, lengths, both(builder, package), options={"paragraphs": True})


def steps(here: Run, workload: str, *, of: str, builder: Callable[..., Build], package: str) -> Iterator[Table]:
    make, _ = training.WORKLOADS[of]
    yield next(make(here, workload, found=both(builder, package)))  # the second one is of memory


TEXTS = {
    "sentence-transformers": (dense, "sentence_transformers", "SentenceTransformer.encode"),
    "multi-vector": (multi_vector, "sentence_transformers", "MultiVectorEncoder.encode_document"),
    "pylate": (pylate, "pylate", "ColBERT.encode of documents"),
}
STEPS = {
    "transformers-step": ("masked-lm", training.transformers, "accelerate", "transformers' Trainer, masked LM"),
    "sentence-transformers-step": ("dense", training.sentence_transformers, "datasets", "ranking loss, dense"),
    "multi-vector-step": ("late-interaction", training.sentence_transformers, "datasets", "the same, multi-vector"),
    "pylate-step": ("late-interaction", training.pylate, "pylate", "PyLate's contrastive loss"),
}
WORKLOADS: dict[str, tuple[Callable[[Run, str], Iterator[Table]], str]] = {
    "transformers": (padded, f"ModernBertModel on padded batches of {BATCH}, in the order of the texts"),
    **{name: (partial(texts, builder=of, package=package), line) for name, (of, package, line) in TEXTS.items()},
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
