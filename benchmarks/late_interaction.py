"""Suite `colbert`: token ids and text to unit vectors, and MaxSim, against transformers, sentence-transformers and PyLate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modernbert_kernels as ops
from benchmarks import harness, inputs, peers, texts
from benchmarks.harness import BETTER, Run, Suite, Table
from benchmarks.peers import FLASH, OURS, PEERS, SDPA, SENTENCE_TRANSFORMERS, SESSION
from benchmarks.worker import Build, Job, Peer, Setup, Variant
from modernbert import ColBERT, Packed

PYLATE, MAXSIM_CPU = "PyLate", "maxsim-cpu"
EINSUM, TUNED, COMPILED = "padded einsum, as PyLate", "padded, tuned by hand", "padded einsum, compiled"

# Token ids to vectors.


class Projected(nn.Module):
    """Our encoder, its rows projected and normalised."""

    def __init__(self, encoder: Any, weight_ED: Tensor) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        self.register_buffer("weight_ED", weight_ED)
        self.weight_ED: Tensor

    def forward(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor:
        return ops.project_normalize(self.encoder(batch, rows=rows), self.weight_ED)


def ours(setup: Setup, *, width: int, session: bool = False) -> Build:
    encoder = peers.load_ours(setup)
    weight_ED = texts.projection(encoder.config.hidden_size, width).to(setup.device, setup.torch_dtype)
    plain = Projected(encoder, weight_ED).eval()
    model: Any = peers.session_of(plain) if session else plain
    name = "Session" if session else "plain modules"

    def variants(job: Job) -> Iterator[Variant]:
        yield peers.packed_variant(name, job, setup, model, plain, [range(len(job.lengths))], on_host=session)

    return variants


def theirs(setup: Setup, *, attention: str, width: int, alone: bool = False) -> Build:
    """transformers, padded, and flattened where it is FlashAttention; or the reference, every text alone."""
    model = peers.load_theirs(setup, attention)
    weight_ED = texts.projection(model.config.hidden_size, width).to(setup.device, setup.torch_dtype)
    hidden = peers.forward_of(model)

    def forward(given: Any) -> Tensor:
        return F.normalize(F.linear(hidden(given), weight_ED), dim=-1)

    def variants(job: Job) -> Iterator[Variant]:
        if alone:
            batches = [[index] for index in job.checked]
            yield peers.padded_variant("every text alone", job, setup, model, batches, forward)
            return
        if attention == "flash":
            yield peers.flattened_variant("FlashAttention of torch, flattened", job, setup, model, forward)
        yield from peers.batchings(attention, job, setup, model, forward)

    return variants


def sentence_transformers(setup: Setup, *, width: int) -> Build:
    """The modules of a MultiVectorEncoder on padded token ids: its tokenizer is not measured."""
    model = multi_vector_encoder(setup, width)

    def forward(given: dict[str, Tensor | None]) -> Tensor:
        return model(with_mask(given))["token_embeddings"]

    return lambda job: peers.batchings("sdpa, MultiVectorEncoder", job, setup, model, forward)


def pylate(setup: Setup, *, width: int) -> Build:
    """The modules of PyLate's ColBERT on padded token ids, and the normalisation that follows them in `encode`."""
    folder = colbert_folder(setup, width)
    model = import_module("pylate.models").ColBERT(str(folder), device=setup.device)
    # It cuts the vocabulary to that of the tokenizer, which is not measured.
    model[0].auto_model = body = peers.load_theirs(setup, "sdpa")
    model = model.to(setup.torch_dtype).eval()

    def forward(given: dict[str, Tensor | None]) -> Tensor:
        return F.normalize(model(with_mask(given))["token_embeddings"], dim=-1)

    return lambda job: peers.batchings("sdpa, models.ColBERT", job, setup, body, forward)


def with_mask(given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Their mask of punctuation asks for an attention mask."""
    known = {name: x for name, x in given.items() if x is not None}
    return {"attention_mask": torch.ones_like(known["input_ids"])} | known


def multi_vector_encoder(setup: Setup, width: int) -> Any:
    package = import_module("sentence_transformers")
    if not hasattr(package, "MultiVectorEncoder"):
        raise RuntimeError(f"sentence-transformers {package.__version__} has no MultiVectorEncoder: 6.2 does")
    settings = {"attn_implementation": "sdpa", "dtype": setup.torch_dtype}
    folder = colbert_folder(setup, width)
    model = package.MultiVectorEncoder(str(folder), device=setup.device, model_kwargs=settings)
    return model.to(setup.torch_dtype).eval()


def colbert_folder(setup: Setup, width: int) -> Path:
    return texts.save_colbert(setup.folder, Path(setup.folder) / f"colbert-{width}", width=width)


def vectors(width: int) -> tuple[dict[str, Peer], Peer]:
    """Who takes part, and the reference."""
    known = {"width": width}
    return {
        OURS: Peer(ours, known),
        SESSION: Peer(ours, known | {"session": True}),
        SDPA: Peer(theirs, known | {"attention": "sdpa"}, package="transformers"),
        FLASH: Peer(theirs, known | {"attention": "flash"}, PEERS[FLASH].applies, "transformers"),
        SENTENCE_TRANSFORMERS: Peer(sentence_transformers, known, package="sentence_transformers"),
        PYLATE: Peer(pylate, known, package="pylate"),
    }, Peer(theirs, known | {"attention": "sdpa", "alone": True}, package="transformers")


# Text to vectors.


def text_ours(setup: Setup, *, session: bool = False) -> Build:
    model = ColBERT.from_pretrained(colbert_folder(setup, 128), dtype=setup.torch_dtype, device=setup.device)
    encoding: Any = peers.session_of(model) if session else model
    return partial(
        text_variants, encode=partial(encoding.encode_documents, progress=False), settings="encode_documents"
    )


def text_theirs(setup: Setup) -> Build:
    model = multi_vector_encoder(setup, 128)

    def variants(job: Job) -> Iterator[Variant]:
        for size in (32,) if setup.quick else (32, 128, 512) if setup.is_gpu else (8, 32):
            encode = partial(model.encode_document, batch_size=size, show_progress_bar=False)
            yield from text_variants(job, encode=encode, settings=f"encode_document, sdpa, batch_size={size}")

    return variants


def text_variants(job: Job, *, encode: Callable[[list[str]], Any], settings: str) -> Iterator[Variant]:
    """Paragraphs of the demo corpus; the job's lengths say how many, and nothing else."""
    passages = texts.paragraphs(len(job.lengths))

    def answer() -> Tensor:
        return torch.cat([one.float().cpu() for one in encode([passages[index] for index in job.checked])])

    yield Variant(settings, partial(encode, passages), answer)


# MaxSim.

Score = Callable[[], Tensor]


def maxsim(setup: Setup, *, score: Callable[..., Iterator[tuple[str, Score]]], width: int) -> Build:
    """Scores of all queries with all documents, of vectors that are on the device; the first `queries` texts of the job
    are queries.
    """

    def variants(job: Job) -> Iterator[Variant]:
        count = job.options["queries"]
        matrices = [
            unit(at, length, width).to(setup.device, setup.torch_dtype) for at, length in enumerate(job.lengths)
        ]
        for settings, run in score(matrices[:count], matrices[count:]):
            yield Variant(settings, in_inference(run), lambda run=run: run().float().cpu())

    return variants


def in_inference(run: Score) -> Score:
    def call() -> Tensor:
        with torch.inference_mode():
            return run()

    return call


def unit(index: int, length: int, width: int) -> Tensor:
    """Seeded unit vectors `[length, width]`, the same in every dtype."""
    drawn = torch.randn(length, width, generator=torch.Generator().manual_seed(index))
    return F.normalize(drawn, dim=-1).bfloat16().float()


def pair_by_pair(queries: list[Tensor], documents: list[Tensor]) -> Iterator[tuple[str, Score]]:
    """The reference: float64 for float32."""
    higher = torch.float64 if queries[0].dtype is torch.float32 else queries[0].dtype

    def score(query_QE: Tensor) -> Tensor:
        query_QE = query_QE.to(higher)
        return torch.stack([(query_QE @ one.to(higher).T).amax(1).float().sum() for one in documents])

    yield "pair by pair", lambda: torch.stack([score(query_QE) for query_QE in queries])


def ragged(queries: list[Tensor], documents: list[Tensor]) -> Iterator[tuple[str, Score]]:
    def packed(matrices: list[Tensor]) -> tuple[Tensor, Tensor]:
        ends = torch.tensor([0, *map(len, matrices)]).cumsum(0).to(torch.int32)
        return torch.cat(matrices), ends.to(matrices[0].device)

    sides = *packed(queries), *packed(documents)
    yield "ragged", lambda: ops.maxsim(*sides)


def in_chunks(
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    queries: list[Tensor],
    documents: list[Tensor],
    sizes: Sequence[int] = (),
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


def einsum(queries_BSE: Tensor, documents_NTE: Tensor, hidden_NT: Tensor) -> Tensor:
    """`[B, N]`; the padding of a query is zero, and adds nothing."""
    scores_BNST = torch.einsum("bse,nte->bnst", queries_BSE, documents_NTE)
    return scores_BNST.masked_fill(hidden_NT[None, :, None], -math.inf).amax(-1).float().sum(-1)


def matmul(queries_BSE: Tensor, documents_NTE: Tensor, hidden_NT: Tensor) -> Tensor:
    """A query at a time, by batched products of its documents."""
    each = [(documents_NTE @ query.T).masked_fill_(hidden_NT[..., None], -math.inf).amax(1) for query in queries_BSE]
    return torch.stack([scores_NS.float().sum(-1) for scores_NS in each])


def plain_einsum(queries: list[Tensor], documents: list[Tensor]) -> Iterator[tuple[str, Score]]:
    yield from in_chunks(einsum, queries, documents)


def tuned(queries: list[Tensor], documents: list[Tensor]) -> Iterator[tuple[str, Score]]:
    for score in (einsum, matmul):
        yield from in_chunks(score, queries, documents, (200, 50, 10))


def compiled_einsum(queries: list[Tensor], documents: list[Tensor]) -> Iterator[tuple[str, Score]]:
    yield from in_chunks(torch.compile(einsum, dynamic=False), queries, documents)


def maxsim_cpu(queries: list[Tensor], documents: list[Tensor]) -> Iterator[tuple[str, Score]]:
    """The package on a ready list of arrays and on a ready padded array."""
    package = import_module("maxsim_cpu")
    arrays, asked = [document.numpy() for document in documents], [query.numpy() for query in queries]
    padded = nn.utils.rnn.pad_sequence(documents, batch_first=True).numpy()
    scorers: dict[str, Callable[[Any], Any]] = {
        "list of arrays": lambda query: package.maxsim_scores_variable(query, arrays),
        "padded array": lambda query: package.maxsim_scores(query, padded),
    }
    for settings, score in scorers.items():
        yield settings, lambda score=score: torch.stack([torch.from_numpy(score(query)) for query in asked])


def maxsims(width: int, *, cpu: bool) -> tuple[dict[str, Peer], Peer]:
    """Who takes part, and the reference."""

    def scores(score: Callable[..., Any], **known: Any) -> Peer:
        return Peer(maxsim, {"score": score, "width": width}, **known)

    found = {OURS: scores(ragged), EINSUM: scores(plain_einsum)}
    if cpu:
        found |= {TUNED: scores(tuned), MAXSIM_CPU: scores(maxsim_cpu, package="maxsim_cpu")}
    else:
        found |= {COMPILED: scores(compiled_einsum, applies=peers.can_compile, slow=True)}
    return found, scores(pair_by_pair)


def maxsim_table(workload: str, queries: int, count: int, width: int, *, cpu: bool) -> Table:
    """Pairs a second, or for one query on a CPU milliseconds."""
    documents, pairs = inputs.variable(count, mean=181, low=16, longest=300), queries * count
    found, reference = maxsims(width, cpu=cpu)
    value: Callable[[float], float] = (lambda cost: 1e3 * cost) if cpu else (lambda cost: pairs / cost)
    return Table(
        workload,
        f"MaxSim, {queries} {'query' if queries == 1 else 'queries'} of 32 x {count:,} documents"
        f" ({sum(documents):,} tokens), width {width}",
        "ettin-17m",
        "float32",
        Job((32,) * queries + documents, options={"queries": queries}),
        found,
        reference,
        "pairs",
        "time" if cpu else "pairs",
        "ms" if cpu else "pairs/s",
        value,
        model_pass=False,
        goals={OURS: {EINSUM: 4.0, MAXSIM_CPU: 1.2}} if cpu and width == 48 else {},
        rounds=9 if cpu else None,
    )


# The suite.


def tables(here: Run, names: Sequence[str]) -> Iterator[Table]:
    for workload in names:
        kind, _, width = workload.rpartition("-")
        encodes = kind in ("documents", "queries")
        if here.tries and width == "48":
            continue  # a try-out tries one width: the other takes the same path
        if kind == "maxsim":
            queries, count = (32, 1000) if here.is_gpu else (2, 50) if here.quick else (4, 1000)
            made = maxsim_table(workload, queries, count, int(width), cpu=False)
            yield replace(made, dtype=here.dtype)
            continue
        for model in ("ettin-17m", "modernbert-base") if here.is_gpu and encodes and not here.quick else ("ettin-17m",):
            yield encoding(here, model, workload, kind, width)


def encoding(here: Run, model: str, workload: str, kind: str, width: str) -> Table:
    known: dict[str, Any] = {"model": model, "dtype": here.dtype, "workload": workload}
    if kind == "queries":
        found, reference = vectors(int(width))
        return Table(
            **known,
            what=f"{model}, one query of 32 tokens, ids on the host to vectors of width {width}",
            job=Job((32,), (0,), from_host=True),
            peers=found,
            reference=reference,
            lengths="fixed 32",
            figure="queries",
            unit="queries/s",
            value=lambda cost: 1 / cost,
        )
    count = 1024 if here.is_gpu else 4 if here.quick else 32
    lengths = tuple(min(180, one) for one in inputs.in_set("variable short", count))
    known |= {"figure": "documents", "unit": "documents/s", "value": lambda cost: count / cost}
    known["job"] = Job(lengths, here.checked(lengths))
    if workload == "from-text":
        of_text = Peer(text_theirs, package="sentence_transformers")
        return Table(
            **known,
            what=f"{model}, {count:,} passages of the demo corpus, text to vectors of width 128",
            peers={OURS: Peer(text_ours), SESSION: Peer(text_ours, {"session": True}), SENTENCE_TRANSFORMERS: of_text},
            reference=of_text,
            lengths="demo",
            model_pass=False,
        )
    found, reference = vectors(int(width))
    del found[SESSION]  # no graph is as large
    return Table(
        **known,
        what=f"{model}, {count:,} documents of at most 180 tokens, ids to vectors of width {width}",
        peers=found,
        reference=reference,
        lengths="documents",
    )


SUITES = {
    "colbert": Suite(
        "late interaction: documents and queries a second to unit vectors, from ids and from text, and pairs a second",
        {
            "documents-128": "documents of at most 180 tokens a second, ids to unit vectors of width 128",
            "queries-128": "one query of 32 tokens at a time, ids to unit vectors of width 128",
            "maxsim-128": "pairs of a query of 32 vectors and a document of 16 to 300 a second, width 128",
            "documents-48": "as documents-128, width 48",
            "maxsim-48": "as maxsim-128, width 48",
            "from-text": "passages of the demo corpus a second, text to vectors of width 128 on the CPU, tokenising timed",
        },
        "transformers (sdpa, FlashAttention), sentence-transformers, PyLate, padded einsum as PyLate has it",
        harness.of_tables(tables),
        BETTER,
        weight=8,
    )
}
