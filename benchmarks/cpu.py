"""The `cpu` suite: encoding, MaxSim and search on two threads, in float32 and in int8, next to what people use today."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import harness, inputs, peers
from benchmarks.harness import Result, Run, Table, latency, speed
from benchmarks.peers import INT8, ONNX_RUNTIME, OPENVINO, ORDERS, OURS, PEERS, REFERENCE, SDPA, SESSION, those
from benchmarks.worker import Build, Job, Peer, Setup, Variant
from modernbert import ColBERT

THREADS = 2
BEFORE = "modernbert, the other checkout"
PASSAGES, QUERIES, TOP = 10_000, 100, 10

SHORT = ("short-16", "short-24", "short-32")
AGAINST = (*SHORT, "documents", "documents-short", "search-10k")
WORKLOADS = {
    **{name: f"latency of one text of {name[6:]} tokens" for name in SHORT},
    "documents": "`encode_documents` of 256 texts of the paper's lengths: plain modules, and a Session",
    "documents-short": "the same of 1,024 texts of 3 to 32 tokens",
    "search-10k": "p50 of exact search of 10,000 passages, default model",
}


def run(
    *, quick: bool, only: Sequence[str], minutes: float | None = None, against: Path | None = None
) -> Iterator[Result]:
    """Measure the workloads named in `only`, by default all.

    Args:
        against: another checkout of this project. Only it, the plain modules and a `Session` take part then, each in
            its own process, in the workloads `AGAINST`.
    """
    torch.set_num_threads(THREADS)
    with harness.run("cpu", quick=quick, minutes=minutes, device="cpu") as here:
        other = {} if against is None else {"checkout": str(against.resolve())}
        names = only or (WORKLOADS if against is None else AGAINST)
        yield from harness.measure(here, (table for name in names for table in tables(here, name, other)))


def tables(here: Run, name: str, other: Mapping[str, str]) -> Iterator[Table]:
    if name in SHORT:
        yield short(here, int(name[6:]), other)
    elif name.startswith("documents"):
        yield documents(here, name, other)
    elif name == "search-10k":
        yield search(here, other)


def ours(other: Mapping[str, str], builder: Callable[..., Build]) -> dict[str, Peer]:
    """A Session, the plain modules, and those of another checkout."""
    found = {SESSION: Peer(builder, {"session": True}), OURS: Peer(builder, {"session": False})}
    return found | ({BEFORE: Peer(builder, {"session": False}, **other)} if other else {})


def short(here: Run, length: int, other: Mapping[str, str]) -> Table:
    others = {} if other else those(SDPA, peers.SDPA_COMPILED, ONNX_RUNTIME, OPENVINO)
    return Table(
        f"short-{length}",
        f"Ettin-17m, one text of {length} tokens",
        "ettin-17m",
        "float32",
        Job((length,), (0,)),
        ours(other, peers.packed) | others,
        REFERENCE,
        figure="time",
        unit="ms",
        value=lambda seconds: 1e3 * seconds,
        goals={SESSION: {SDPA: 1.8 if length == 32 else 2.0, ONNX_RUNTIME: 1.0, BEFORE: 0.97}},
        rounds=9,
    )


def documents(here: Run, name: str, other: Mapping[str, str]) -> Table:
    """Texts to vectors, tokenising timed."""
    if name == "documents":
        lengths, words = inputs.variable(8 if here.quick else 256, mean=256, longest=512), "the paper's lengths"
    else:
        count = 16 if here.quick else 1024
        lengths, words = tuple(3 + 29 * index // (count - 1) for index in range(count)), "3 to 32 tokens"
        # In an order that does not help.
        lengths = tuple(lengths[index * 389 % count] for index in range(count))
    setup = here.setup("ettin-17m", "float32")
    folder = Path(setup.folder) / "colbert"
    if not folder.exists():
        inputs.save_colbert(setup.folder, folder, width=128, longest=512)
    return Table(
        name,
        f"Ettin-17m, encode_documents of {len(lengths):,} texts of {words}",
        "ettin-17m",
        "float32",
        Job(lengths, here.checked(lengths)),
        ours(other, encode),
        Peer(encode_alone, package="transformers"),
        model_pass=False,
        goals={SESSION: {BEFORE: 1.12}, OURS: {BEFORE: 0.9}},
        rounds=9,
    )


def encode(setup: Setup, *, session: bool) -> Build:
    model = ColBERT.from_pretrained(Path(setup.folder) / "colbert")
    encoding = peers.session_of(model) if session else model

    def variants(job: Job) -> Iterator[Variant]:
        texts = inputs.texts_of(job.lengths)
        call = partial(encoding.encode_documents, texts, progress=False)
        yield Variant("encode_documents, tokenising timed", call, lambda: chosen(call(), job.checked))

    return variants


def chosen(vectors: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    return torch.cat([vectors[index].float().cpu() for index in indices])


def encode_alone(setup: Setup) -> Build:
    """The reference: transformers on every text alone, the projection, and the norm."""
    folder = Path(setup.folder) / "colbert"
    model, tokens = peers.load_theirs(setup, "sdpa"), ColBERT.from_pretrained(folder)
    weight_ED = load_file(folder / "1_Dense" / "model.safetensors")["linear.weight"]

    def of_text(text: str) -> Tensor:
        ids = tokens.tokenize_documents([text]).batch.input_ids
        with torch.inference_mode():
            hidden_SD = model(input_ids=ids[None]).last_hidden_state[0]
            return torch.nn.functional.normalize(hidden_SD @ weight_ED.T, dim=-1)

    def variants(job: Job) -> Iterator[Variant]:
        texts = inputs.texts_of(job.lengths)

        def answer() -> Tensor:
            return torch.cat([of_text(texts[index]) for index in job.checked])

        yield Variant("every text alone", answer, answer)

    return variants


def search(here: Run, other: Mapping[str, str]) -> Table:
    """One question after another; the passages are of 100 tokens, and every checkout indexes them itself."""
    count = 200 if here.quick else PASSAGES
    return Table(
        "search-10k",
        f"exact search of {count:,} passages of 100 tokens, default model: p50 of {QUERIES} queries of 32 tokens",
        "ettin-17m",  # not loaded: the folder is for the stores
        "float32",
        Job((100,) * count, tuple(range(2))),
        {BEFORE: Peer(store, {"name": "before"}, **other)} | {OURS: Peer(store, {"name": "this"})}
        if other
        else {OURS: Peer(store, {"name": "this"})},
        Peer(brute_force),
        "fixed 100",
        "p50",
        "ms",
        lambda seconds: 1e3 * seconds,
        model_pass=False,
        goals={OURS: {BEFORE: 0.97}},
        rounds=9,
        measure=partial(latency, count=20 if here.quick else QUERIES, figures=("p50",)),
    )


def queries() -> list[str]:
    """The beginnings of paragraphs."""
    return [" ".join(text.split()[:16]) for text in inputs.demo_passages(QUERIES)]


def store(setup: Setup, *, name: str) -> Build:
    from modernbert.retrieval import Store, index

    def variants(job: Job) -> Iterator[Variant]:
        folder, corpus = Path(setup.folder) / f"store-{name}", Path(setup.folder) / "corpus.jsonl"
        if not folder.exists():
            texts = inputs.texts_of(job.lengths)
            records = ({"_id": str(at), "text": text} for at, text in enumerate(texts))
            corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
            index([corpus], folder, ColBERT.default(), progress=False)
        opened, following = Store(folder, ColBERT.default()), itertools.cycle(queries())

        def answer() -> Tensor:
            found = opened.search(queries()[: len(job.checked)], top_k=TOP)
            return torch.tensor([[hit.score for hit in hits] for hits in found])

        yield Variant("Store.search", lambda: opened.search([next(following)], top_k=TOP), answer)

    return variants


def brute_force(setup: Setup) -> Build:
    """The reference: the best scores over all vectors, rounded to float16 as a store keeps them, in float64."""

    def variants(job: Job) -> Iterator[Variant]:
        model = ColBERT.default()
        vectors = model.encode_documents(inputs.texts_of(job.lengths), progress=False)
        values_NE, lengths = vectors.values.half().double(), vectors.offsets.diff()

        def best(query_QE: Tensor) -> Tensor:
            most = torch.segment_reduce(values_NE @ query_QE.double().T, "max", lengths=lengths)
            return most.sum(1).topk(TOP).values

        def answer() -> Tensor:
            asked = model.encode_queries(queries()[: len(job.checked)], progress=False)
            return torch.stack([best(query_QE) for query_QE in asked])

        yield Variant("brute force", answer, answer)

    return variants
