"""Suite `colbert`: token ids and text to unit vectors, and MaxSim, against transformers, PyLate and the like."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modernbert_kernels as ops
from benchmarks import inputs, peers, texts
from benchmarks.encoder import of_texts, suite
from benchmarks.harness import Run, Table
from benchmarks.peers import FLASH, OURS, REFERENCE, SDPA, SENTENCE_TRANSFORMERS, SESSION, those
from benchmarks.worker import Build, Job, Peer, Setup, Variant
from modernbert import ColBERT

PYLATE, MAXSIM_CPU = "PyLate", "maxsim-cpu"
EINSUM, TUNED, COMPILED = "padded einsum, as PyLate", "padded, tuned by hand", "padded einsum, compiled"


# Token ids to vectors, and text to vectors.


def multi_vector(setup: Setup, *, width: int) -> Build:
    """The modules of sentence-transformers' MultiVectorEncoder on padded token ids: its tokenizer is not measured."""
    model = multi_vector_encoder(setup, width)

    def forward(given: dict[str, Tensor]) -> Tensor:
        return model(with_mask(given))["token_embeddings"]

    return lambda job: peers.batchings("sdpa, MultiVectorEncoder", job, setup, model, forward)


def pylate(setup: Setup, *, width: int) -> Build:
    """The modules of PyLate's ColBERT on padded token ids, and the normalisation that follows them in `encode`."""
    model = import_module("pylate.models").ColBERT(str(colbert_folder(setup, width)), device=setup.device)
    # It cuts the vocabulary to that of the tokenizer, which is not measured.
    model[0].auto_model = body = peers.load_theirs(setup, "sdpa")
    model = model.to(setup.torch_dtype).eval()

    def forward(given: dict[str, Tensor]) -> Tensor:
        return F.normalize(model(with_mask(given))["token_embeddings"], dim=-1)

    return lambda job: peers.batchings("sdpa, models.ColBERT", job, setup, body, forward)


def with_mask(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"attention_mask": torch.ones_like(given["input_ids"]), **given}


def multi_vector_encoder(setup: Setup, width: int) -> Any:
    known = {"attn_implementation": "sdpa", "dtype": setup.torch_dtype}
    make = import_module("sentence_transformers").MultiVectorEncoder  # from 6.2 on
    model = make(str(colbert_folder(setup, width)), device=setup.device, model_kwargs=known)
    return model.to(setup.torch_dtype).eval()


def colbert_folder(setup: Setup, width: int) -> Path:
    return texts.save_colbert(setup.folder, Path(setup.folder) / f"colbert-{width}", width=width)


def vectors(width: int) -> tuple[dict[str, Peer], Peer]:
    """The implementations that take part, and the reference."""
    known = {"width": width}
    found = {
        name: one._replace(options={**one.options, **known}) for name, one in those(OURS, SESSION, SDPA, FLASH).items()
    }
    found[SENTENCE_TRANSFORMERS] = Peer(multi_vector, known, package="sentence_transformers")
    return found | {PYLATE: Peer(pylate, known, package="pylate")}, REFERENCE._replace(options=known)


def text_ours(setup: Setup, *, session: bool = False) -> Build:
    model = ColBERT.from_pretrained(colbert_folder(setup, 128), dtype=setup.torch_dtype, device=setup.device)
    encoding: Any = peers.session_of(model) if session else model
    encode = partial(encoding.encode_documents, progress=False)
    return lambda job: [text_variant(job, encode, "encode_documents")]


def text_theirs(setup: Setup) -> Build:
    model = multi_vector_encoder(setup, 128)

    def variants(job: Job) -> Iterator[Variant]:
        for size in (32,) if setup.quick else (32, 128, 512) if setup.is_gpu else (8, 32):
            encode = partial(model.encode_document, batch_size=size, show_progress_bar=False)
            yield text_variant(job, encode, f"encode_document, sdpa, batch_size={size}")

    return variants


def text_variant(job: Job, encode: Callable[[list[str]], Any], settings: str) -> Variant:
    """Paragraphs of the demo corpus; the job's lengths say how many, and nothing else."""
    passages = texts.paragraphs(len(job.lengths))
    checked = [passages[index] for index in job.checked]
    return Variant(settings, partial(encode, passages), lambda: torch.cat([x.float().cpu() for x in encode(checked)]))


# MaxSim.

Score = Callable[[], Tensor]


def maxsim(setup: Setup, *, score: Callable[..., Iterator[tuple[str, Score]]], width: int) -> Build:
    """Scores of all queries with all documents; the first `queries` texts of the job are queries."""

    def variants(job: Job) -> Iterator[Variant]:
        count, known = job.options["queries"], {"device": setup.device, "dtype": setup.torch_dtype}
        matrices = [unit(index, length, width).to(**known) for index, length in enumerate(job.lengths)]
        for settings, plain in score(matrices[:count], matrices[count:]):
            run = torch.inference_mode()(plain)
            yield Variant(settings, run, lambda run=run: run().float().cpu())

    return variants


def unit(index: int, length: int, width: int) -> Tensor:
    """Seeded unit vectors `[length, width]`, the same in every dtype."""
    drawn = torch.randn(length, width, generator=torch.Generator().manual_seed(index))
    return F.normalize(drawn, dim=-1).bfloat16().float()


def pair_by_pair(queries: list[Tensor], documents: list[Tensor]) -> Iterator[tuple[str, Score]]:
    """The reference: float64 for float32."""
    higher = torch.float64 if queries[0].dtype is torch.float32 else queries[0].dtype

    def score(query_QE: Tensor) -> Tensor:
        return torch.stack([(query_QE.to(higher) @ one.to(higher).T).amax(1).float().sum() for one in documents])

    yield "pair by pair", lambda: torch.stack([score(query_QE) for query_QE in queries])


def ragged(queries: list[Tensor], documents: list[Tensor]) -> Iterator[tuple[str, Score]]:
    def packed(matrices: list[Tensor]) -> tuple[Tensor, Tensor]:
        ends = torch.tensor([0, *map(len, matrices)]).cumsum(0).to(torch.int32)
        return torch.cat(matrices), ends.to(matrices[0].device)

    sides = *packed(queries), *packed(documents)
    yield "ragged", lambda: ops.maxsim(*sides)


def einsum(queries_BSE: Tensor, documents_NTE: Tensor, hidden_NT: Tensor) -> Tensor:
    """`[B, N]`; the padding of a query is zero, and adds nothing."""
    scores_BNST = torch.einsum("bse,nte->bnst", queries_BSE, documents_NTE)
    return scores_BNST.masked_fill(hidden_NT[None, :, None], -math.inf).amax(-1).float().sum(-1)


def matmul(queries_BSE: Tensor, documents_NTE: Tensor, hidden_NT: Tensor) -> Tensor:
    """A query at a time, by batched products of its documents."""
    each = [(documents_NTE @ query.T).masked_fill_(hidden_NT[..., None], -math.inf).amax(1) for query in queries_BSE]
    return torch.stack([scores_NS.float().sum(-1) for scores_NS in each])


def in_chunks(
    score: Callable[[Tensor, Tensor, Tensor], Tensor], queries: list[Tensor], documents: list[Tensor], *sizes: int
) -> Iterator[tuple[str, Score]]:
    """`score` of padded vectors, some documents at a time; padding is not timed."""
    padded_BSE, padded_NTE = (nn.utils.rnn.pad_sequence(side, batch_first=True) for side in (queries, documents))
    lengths_N = torch.tensor([len(document) for document in documents], device=padded_NTE.device)
    hidden_NT = torch.arange(padded_NTE.shape[1], device=padded_NTE.device) >= lengths_N[:, None]
    for size in sizes or dict.fromkeys((len(documents), max(1, len(documents) // 8))):
        pieces = list(zip(padded_NTE.split(size), hidden_NT.split(size), strict=True))
        yield (
            f"{score.__name__}, {size} documents at a time, padding not timed",
            lambda pieces=pieces: torch.cat([score(padded_BSE, *piece) for piece in pieces], dim=1),
        )


def plain_einsum(queries: list[Tensor], documents: list[Tensor]) -> Iterator[tuple[str, Score]]:
    yield from in_chunks(einsum, queries, documents)


def tuned(queries: list[Tensor], documents: list[Tensor]) -> Iterator[tuple[str, Score]]:
    for score in (einsum, matmul):
        yield from in_chunks(score, queries, documents, 200, 50, 10)


def compiled_einsum(queries: list[Tensor], documents: list[Tensor]) -> Iterator[tuple[str, Score]]:
    yield from in_chunks(torch.compile(einsum, dynamic=False), queries, documents)


def maxsim_cpu(queries: list[Tensor], documents: list[Tensor]) -> Iterator[tuple[str, Score]]:
    """The package on a ready list of arrays and on a ready padded array."""
    package, arrays = import_module("maxsim_cpu"), [document.numpy() for document in documents]
    padded = nn.utils.rnn.pad_sequence(documents, batch_first=True).numpy()
    scorers = {
        "list of arrays": partial(package.maxsim_scores_variable, docs=arrays),
        "padded array": partial(package.maxsim_scores, docs=padded),
    }
    for settings, score in scorers.items():
        yield settings, lambda score=score: torch.stack([torch.from_numpy(score(query.numpy())) for query in queries])


ON_CPU = {OURS: ragged, EINSUM: plain_einsum, TUNED: tuned, MAXSIM_CPU: maxsim_cpu}
ON_GPU = {OURS: ragged, EINSUM: plain_einsum, COMPILED: compiled_einsum}


def maxsim_table(
    here: Run, workload: str, queries: int, count: int, scores: Mapping[str, Callable[..., Any]], **more: Any
) -> Table:
    documents, width = inputs.variable(count, mean=181, low=16, longest=300), int(workload.rpartition("-")[2])
    found = {name: Peer(maxsim, {"score": score, "width": width}) for name, score in scores.items()}
    if COMPILED in found:
        found[COMPILED] = found[COMPILED]._replace(slow=True, applies=peers.can_compile)
    if MAXSIM_CPU in found:
        found[MAXSIM_CPU] = found[MAXSIM_CPU]._replace(package="maxsim_cpu")
    words = f"{queries} {'query' if queries == 1 else 'queries'} of 32 x {count:,} documents"
    known = {"reference": Peer(maxsim, {"score": pair_by_pair, "width": width}), "model_pass": False}
    known |= {"options": {"queries": queries}, "checked": (0,)}
    what = f"MaxSim, {words} ({sum(documents):,} tokens), width {width}"
    return of_texts(here, workload, "ettin-17m", what, (32,) * queries + documents, found, **known | more)


# The suite.


def tables(here: Run, names: Sequence[str]) -> Iterator[Table]:
    for workload in names:
        kind, _, width = workload.rpartition("-")
        if here.tries and width == "48":
            continue  # a try-out tries one width: the other takes the same path
        if kind == "maxsim":
            queries, count = (32, 1000) if here.is_gpu else (2, 50) if here.quick else (4, 1000)
            value = partial(per_second, queries * count)
            yield maxsim_table(here, workload, queries, count, ON_GPU, figure="pairs", unit="pairs/s", value=value)
            continue
        several = here.is_gpu and kind in ("documents", "queries") and not here.quick
        for model in ("ettin-17m", "modernbert-base") if several else ("ettin-17m",):
            yield encoding(here, model, workload, kind, width)


def per_second(count: int, cost: float) -> float:
    return count / cost


def encoding(here: Run, model: str, workload: str, kind: str, width: str) -> Table:
    count = 1 if kind == "queries" else 1024 if here.is_gpu else 4 if here.quick else 32
    lengths = (32,) if kind == "queries" else tuple(min(180, n) for n in inputs.in_set("variable short", count))
    figure = "queries" if kind == "queries" else "documents"
    known: dict[str, Any] = {"figure": figure, "unit": f"{figure}/s", "value": partial(per_second, count)}
    if workload == "from-text":
        theirs = Peer(text_theirs, package="sentence_transformers")
        found = {OURS: Peer(text_ours), SESSION: Peer(text_ours, {"session": True}), SENTENCE_TRANSFORMERS: theirs}
        what = f"{model}, {count:,} passages of the demo corpus, text to vectors of width 128"
        return of_texts(here, workload, model, what, lengths, found, reference=theirs, model_pass=False, **known)
    found, reference = vectors(int(width))
    what = (
        f"{count:,} documents of at most 180 tokens, ids"
        if kind == "documents"
        else "one query of 32 tokens, ids on the host"
    )
    known |= {"from_host": kind == "queries", "reference": reference}
    return of_texts(here, workload, model, f"{model}, {what} to vectors of width {width}", lengths, found, **known)


SUITES = {
    "colbert": suite(
        "late interaction: documents and queries a second to unit vectors, from ids and from text, and pairs a second",
        {
            "documents-128": "documents of at most 180 tokens a second, ids to unit vectors of width 128",
            "queries-128": "one query of 32 tokens at a time, ids to unit vectors of width 128",
            "maxsim-128": "pairs of a query of 32 vectors and a document of 16 to 300 a second, width 128",
            "documents-48": "as documents-128, width 48",
            "maxsim-48": "as maxsim-128, width 48",
            "from-text": "passages of the demo corpus a second, text to vectors of width 128, tokenising timed",
        },
        "transformers (sdpa, FlashAttention), sentence-transformers, PyLate, padded einsum as PyLate has it",
        tables,
        8,
    )
}
