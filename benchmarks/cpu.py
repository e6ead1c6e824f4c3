"""Suite `cpu`: encoding, MaxSim and search on two threads, in float32 and in int8, next to what people use today."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import accuracy, encoder, harness, inputs, peers, texts
from benchmarks.encoder import of_texts
from benchmarks.harness import MS, Result, Run, Suite, Table
from benchmarks.late_interaction import ON_CPU, maxsim_table
from benchmarks.peers import FIRST_ROWS, INT8, ONNX_RUNTIME, OPENVINO, ORDERS, OURS, SDPA, SESSION, those
from benchmarks.worker import Build, Job, Peer, Setup, Variant
from modernbert import ColBERT, Tokenizer

THREADS = 2
BEFORE = "modernbert, the other checkout"
PASSAGES, QUERIES, TOP = 10_000, 100, 10
MAX_LENGTH = 512  # of a text in `from-text`

Other = str | None
"""The folder of the other checkout."""


def measure(
    here: Run, names: Sequence[str], *, data: Path | None = None, against: Path | None = None
) -> Iterator[Result]:
    """Measure these workloads.

    Args:
        data: folders in BEIR's layout for `int8-retrieval`; None: the demo corpus, which has no judgements.
        against: another checkout of this project. Only it, the plain modules and a `Session` take part then, each in
            its own process, in the workloads `AGAINST`.
    """
    torch.set_num_threads(THREADS)
    here = replace(here, device="cpu")
    other = None if against is None else str(against.resolve())
    names = [name for name in names if against is None or name in AGAINST]
    yield from harness.measure(here, (MAKE[name](here, name, other) for name in names if name in MAKE))
    if accuracy.WORKLOAD in names and here.left() > 0:
        yield accuracy.retrieval(here, data)


def ettin(here: Run, workload: str, what: str, lengths: Sequence[int], found: Mapping[str, Peer], **more: Any) -> Table:
    """A table of Ettin-17m in float32 in which every text is compared."""
    known = {"dtype": "float32", "checked": tuple(range(len(lengths))), "rounds": 9} | more
    return of_texts(here, workload, "ettin-17m", f"Ettin-17m, {what}", lengths, found, **known)


def ours(other: Other, builder: Callable[..., Build]) -> dict[str, Peer]:
    """A Session, the plain modules, and those of another checkout."""
    found = {SESSION: Peer(builder, {"session": True}), OURS: Peer(builder, {"session": False})}
    return found | ({BEFORE: Peer(builder, {"session": False}, checkout=other)} if other else {})


def short(here: Run, workload: str, other: Other) -> Table:
    others = {} if other else those(SDPA, peers.SDPA_COMPILED, ONNX_RUNTIME, OPENVINO)
    length = int(workload[6:])
    return ettin(here, workload, f"one text of {length} tokens", [length], ours(other, peers.packed) | others, **MS)


def fixed(here: Run, workload: str, other: Other) -> Table:
    found = those(OURS, SESSION, SDPA, ONNX_RUNTIME, OPENVINO)
    return ettin(here, workload, "16 texts of 512 tokens", [512] * 16, found)


def variable(here: Run, workload: str, other: Other) -> Table:
    found, lengths = those(OURS, SESSION, *ORDERS, ONNX_RUNTIME, OPENVINO), paper_lengths()
    return ettin(here, workload, words(lengths), lengths, found)


def paper_lengths(count: int = 32) -> tuple[int, ...]:
    return inputs.in_set("variable short", count)


def words(lengths: Sequence[int]) -> str:
    return f"{len(lengths)} texts of the paper's variable lengths (mean {sum(lengths) / len(lengths):.0f})"


def first_token(here: Run, workload: str, other: Other) -> Table:
    """What is saved where only one row of each text is read."""
    lengths, found = paper_lengths(), those(FIRST_ROWS, OURS, *ORDERS)
    return ettin(here, workload, f"[CLS] of {words(lengths)}", lengths, found, options={"first": True})


def long(here: Run, workload: str, other: Other) -> Table:
    """Without ONNX Runtime, which needs more than 6 GB here."""
    return ettin(here, workload, "one text of 8192 tokens", [8192], those(OURS, SDPA), rounds=4)


def long_memory(here: Run, workload: str, other: Other) -> Table:
    what, found = "Ettin-17m, one text of 8192 tokens: peak memory beyond the loaded model", those(OURS, SDPA)
    return encoder.memory_table(here, workload, "ettin-17m", what, 1, 8192, found, dtype="float32", x=None)


def base(here: Run, workload: str, other: Other) -> Table:
    lengths, found = paper_lengths(4 if here.quick else 8), those(OURS, SESSION, *ORDERS, OPENVINO)
    made = ettin(here, workload, "", lengths, found, rounds=4)
    return replace(made, what=f"ModernBERT-base, {words(lengths)}", model="modernbert-base")


def int8(here: Run, workload: str, other: Other) -> Table:
    found, one = those(OURS, INT8, f"{ONNX_RUNTIME}, int8", f"{OPENVINO}, int8"), workload == "int8-short-32"
    lengths = [32] if one else paper_lengths()
    what = f"int8 products, {'one text of 32 tokens' if one else words(lengths)}"
    return ettin(here, workload, what, lengths, found, **MS if one else {})


def maxsim(here: Run, workload: str, other: Other) -> Table:
    return maxsim_table(here, workload, 1, 1000, ON_CPU, dtype="float32", rounds=9, **MS)


# From a string to a mean-pooled vector, with the tokenizer of the default model, whose ids fit the seeded weights.


def from_text(here: Run, workload: str, other: Other) -> Table:
    folder = here.setup("ettin-17m", "float32").folder
    texts.add_tokenizer(folder)
    batch = Tokenizer.from_pretrained(folder)(passages(4 if here.quick else 64), max_length=MAX_LENGTH)
    found = {OURS: Peer(pooled), peers.SENTENCE_TRANSFORMERS: Peer(pooled_theirs, package="sentence_transformers")}
    what = f"{len(batch)} Wikipedia passages ({batch.num_tokens:,} tokens), text to pooled vectors, tokenising timed"
    known = {"reference": Peer(pooled_alone, package="transformers"), "model_pass": False}
    return ettin(here, workload, what, batch.lengths, found, **known)


def passages(count: int) -> list[str]:
    """Lower-cased: the tokenizer.json of the default model leaves it to the caller, and transformers does not do it."""
    return [text.lower() for text in texts.paragraphs(count)]


def pooled(setup: Setup) -> Build:
    model, tokenizer = peers.load_ours(setup), Tokenizer.from_pretrained(setup.folder)

    def variants(job: Job) -> Iterator[Variant]:
        read = passages(len(job.lengths))

        def run() -> Tensor:
            with torch.inference_mode():
                batch = tokenizer(read, max_length=MAX_LENGTH)
                return torch.segment_reduce(model(batch), "mean", lengths=torch.tensor(batch.lengths))

        yield Variant("Tokenizer, Encoder, mean", run, run)

    return variants


def pooled_theirs(setup: Setup) -> Build:
    """Through `encode`, which sorts by length."""
    modules = import_module("sentence_transformers.sentence_transformer.modules")
    body = modules.Transformer(setup.folder, model_kwargs={"attn_implementation": "sdpa"}, max_seq_length=MAX_LENGTH)
    pooling = modules.Pooling(body.get_embedding_dimension(), pooling_mode="mean")
    model = import_module("sentence_transformers").SentenceTransformer(modules=[body, pooling], device="cpu")

    def variants(job: Job) -> Iterator[Variant]:
        for size in (8, 32) if setup.quick else (1, 4, 8, 16, 32):
            known = {"batch_size": size, "show_progress_bar": False, "convert_to_tensor": True}
            run = partial(model.encode, passages(len(job.lengths)), **known)
            yield Variant(f"sdpa, batch_size={size}", run, run)

    return variants


def pooled_alone(setup: Setup) -> Build:
    """The reference: the mean of transformers' hidden states, every text alone."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(setup.folder), peers.load_theirs(setup, "sdpa")

    def variants(job: Job) -> Iterator[Variant]:
        def answer() -> Tensor:
            known = {"truncation": True, "max_length": MAX_LENGTH, "return_tensors": "pt"}
            ids = [tokenizer(text, **known)["input_ids"] for text in passages(len(job.lengths))]
            with torch.inference_mode():
                return torch.cat([model(input_ids=one).last_hidden_state.mean(1) for one in ids])

        yield Variant("every text alone", answer, answer)

    return variants


# A Session next to the plain modules, and this checkout next to another one.


def documents(here: Run, workload: str, other: Other) -> Table:
    """Texts to vectors, tokenising timed."""
    lengths, said = paper_lengths(8 if here.quick else 256), "the paper's lengths"
    if workload == "documents-short":
        count = 16 if here.quick else 1024
        # From 3 to 32 in an order that does not help.
        lengths, said = tuple(3 + 29 * (at * 389 % count) // (count - 1) for at in range(count)), "3 to 32 tokens"
    folder = here.setup("ettin-17m", "float32").folder
    texts.save_colbert(folder, Path(folder) / "colbert", width=128, longest=512)
    known = {"reference": Peer(encode_alone, package="transformers"), "model_pass": False}
    known["checked"] = here.checked(lengths)
    what = f"encode_documents of {len(lengths):,} texts of {said}"
    return ettin(here, workload, what, lengths, ours(other, encode), **known)


def encode(setup: Setup, *, session: bool) -> Build:
    model = ColBERT.from_pretrained(Path(setup.folder) / "colbert")
    encoding = peers.session_of(model) if session else model

    def variants(job: Job) -> Iterator[Variant]:
        read = texts.of_lengths(job.lengths)
        call = partial(encoding.encode_documents, read, progress=False)
        yield Variant("encode_documents, tokenising timed", call, lambda: chosen(call(), job.checked))

    return variants


def chosen(vectors: Any, indices: Sequence[int]) -> Tensor:
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
        read = texts.of_lengths(job.lengths)

        def answer() -> Tensor:
            return torch.cat([of_text(read[index]) for index in job.checked])

        yield Variant("every text alone", answer, answer)

    return variants


def search(here: Run, workload: str, other: Other) -> Table:
    """One question after another; every checkout indexes the passages."""
    count = 200 if here.quick else PASSAGES
    found = {OURS: Peer(store, {"name": "this"})} | (
        {BEFORE: Peer(store, {"name": "before"}, checkout=other)} if other else {}
    )
    texts.write_corpus(Path(here.setup("ettin-17m", "float32").folder) / "corpus.jsonl", count, 100)
    what = f"exact search of {count:,} passages of 100 tokens, default model: p50 of {QUERIES} queries of 32 tokens"
    timed = partial(harness.latency, count=20 if here.quick else QUERIES, figures=("p50",))
    known = {"reference": Peer(brute_force), "model_pass": False, "checked": (0, 1), "measure": timed} | MS
    return replace(ettin(here, workload, "", (100,) * count, found, **known), what=what)


def store(setup: Setup, *, name: str) -> Build:
    from modernbert.retrieval import Store, index

    def variants(job: Job) -> Iterator[Variant]:
        folder, asked = Path(setup.folder) / f"store-{name}", texts.queries(QUERIES, 32)
        if not folder.exists():
            index([folder.with_name("corpus.jsonl")], folder, ColBERT.default(), progress=False)
        opened, following = Store(folder, ColBERT.default()), itertools.cycle(asked)

        def answer() -> Tensor:
            found = opened.search(asked[: len(job.checked)], top_k=TOP)
            return torch.tensor([[hit.score for hit in hits] for hits in found])

        yield Variant("Store.search", lambda: opened.search([next(following)], top_k=TOP), answer)

    return variants


def brute_force(setup: Setup) -> Build:
    """The reference: the best scores over all vectors, rounded to float16 as a store keeps them, in float64."""

    def variants(job: Job) -> Iterator[Variant]:
        model, corpus = ColBERT.default(), Path(setup.folder) / "corpus.jsonl"
        records = map(json.loads, corpus.read_text("utf-8").splitlines())
        vectors = model.encode_documents([f"{one['title']} {one['text']}" for one in records], progress=False)
        values_NE, lengths = vectors.values.half().double(), vectors.offsets.diff()

        def best(query_QE: Tensor) -> Tensor:
            most = torch.segment_reduce(values_NE @ query_QE.double().T, "max", lengths=lengths)
            return most.sum(1).topk(TOP).values

        def answer() -> Tensor:
            asked = model.encode_queries(texts.queries(QUERIES, 32)[: len(job.checked)], progress=False)
            return torch.stack([best(query_QE) for query_QE in asked])

        yield Variant("brute force", answer, answer)

    return variants


SHORT = ("short-16", "short-24", "short-32")
AGAINST = (*SHORT, "documents", "documents-short", "search-10k")
MAKE: dict[str, Callable[[Run, str, Other], Table]] = {
    **dict.fromkeys(SHORT, short),
    "fixed-512": fixed,
    "variable": variable,
    "first-token": first_token,
    "from-text": from_text,
    "documents": documents,
    "documents-short": documents,
    "maxsim-48": maxsim,
    "maxsim-128": maxsim,
    "search-10k": search,
    "long-8192": long,
    "long-8192-memory": long_memory,
    "base-variable": base,
    "int8-short-32": int8,
    "int8-variable": int8,
}
WORKLOADS = {
    **{name: f"latency of one text of {name[6:]} tokens" for name in SHORT},
    "fixed-512": "16 texts of 512 tokens",
    "variable": "32 texts of the lengths of the ModernBERT paper, N(256, 64) clipped to [32, 512]",
    "first-token": "[CLS] of the same texts: what it saves to compute only the rows that are read",
    "from-text": "64 Wikipedia passages from string to mean-pooled vector, tokenising timed",
    "documents": "`encode_documents` of 256 texts of the paper's lengths: plain modules, and a Session",
    "documents-short": "the same of 1,024 texts of 3 to 32 tokens",
    "maxsim-48": "one query of 32 tokens against 1000 documents of 16 to 300 tokens, width 48",
    "maxsim-128": "the same in width 128",
    "search-10k": "p50 of exact search of 10,000 passages, default model",
    "long-8192": "one text of 8192 tokens",
    "long-8192-memory": "its peak memory beyond the loaded model, a fresh process for each sample",
    "base-variable": "ModernBERT-base, 8 texts of the paper's lengths",
    "int8-short-32": "int8 products, one text of 32 tokens, next to our float32; the error is in the row",
    "int8-variable": "int8 products, 32 texts of the paper's lengths, next to our float32",
    "int8-retrieval": "what int8 costs the default model: nDCG@10 on the sets of --data, recall of float32's top 10",
}

SUITES = {
    "cpu": Suite(
        "encoding, MaxSim and search on two threads of a CPU, in float32 and in int8, next to what people use today",
        WORKLOADS,
        "transformers (and under torch.compile), sentence-transformers, ONNX Runtime, OpenVINO, maxsim-cpu",
        measure,
        minutes="about half an hour",
        weight=10,
    )
}
