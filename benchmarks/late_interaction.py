"""Suite `colbert`: text to vectors; and MaxSim on a CPU; against sentence-transformers, PyLate and the like."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import modernbert_kernels as ops
from benchmarks import harness, inputs, peers
from benchmarks.encoder import models, of_texts
from benchmarks.harness import MS, Run, Suite, Table
from benchmarks.worker import ENGINES, OURS, SESSION, Build, Job, Peer, Setup, Variant
from modernbert import ColBERT, Session

MULTI_VECTOR = "MultiVectorEncoder"


def text_ours(setup: Setup, *, session: bool, engine: str | None = None) -> Build:
    model = ColBERT.from_pretrained(Path(setup.folder) / "colbert-128", dtype=setup.torch_dtype, device=setup.device)
    encoding: Any = Session(model, engine=engine) if session else model
    encode = partial(encoding.encode_documents, progress=False)
    return lambda job: [text_variant(job, encode, "encode_documents")]


def load_sentence_transformers(setup: Setup, folder: str, in_place: bool) -> Any:
    """A `SentenceTransformer` in the folder `dense`, else a `MultiVectorEncoder`."""
    kind = getattr(import_module("sentence_transformers"), "SentenceTransformer" if folder == "dense" else MULTI_VECTOR)
    known = {"attn_implementation": "sdpa", "dtype": setup.torch_dtype}
    model = kind(f"{setup.folder}/{folder}", model_kwargs=known)
    return peers.packed_in_place(model.to(setup.device, setup.torch_dtype).eval(), in_place)


def load_pylate(setup: Setup, in_place: bool) -> Any:
    model = import_module("pylate.models").ColBERT(f"{setup.folder}/colbert-128", device=setup.device)
    return peers.packed_in_place(model.to(setup.torch_dtype).eval(), in_place)


def sentence_transformers(setup: Setup, *, folder: str = "colbert-128", in_place: bool = False) -> Build:
    model = load_sentence_transformers(setup, folder, in_place)
    encode = partial(model.encode, convert_to_tensor=True) if folder == "dense" else model.encode_document
    return partial(batched, setup, encode)


def pylate(setup: Setup, *, in_place: bool = False) -> Build:
    encode = load_pylate(setup, in_place).encode
    return partial(batched, setup, partial(encode, is_query=False, convert_to_tensor=True))


def batched(setup: Setup, encode: Callable[..., Any], job: Job) -> Iterator[Variant]:
    sizes = (32,) if setup.quick else (32, 128, 512) if setup.is_gpu else (1, 4, 8, 32)
    for size in (job.batch,) if job.batch else sizes:
        yield text_variant(job, partial(encode, batch_size=size, show_progress_bar=False), f"batch_size={size}")


def text_variant(job: Job, encode: Callable[[list[str]], Any], settings: str) -> Variant:
    """Of Wikipedia paragraphs, or of random words of the lengths of the job."""
    paragraphs = "paragraphs" in job.options
    texts = inputs.paragraphs(len(job.lengths)) if paragraphs else inputs.of_lengths(job.lengths)
    checked = [texts[index] for index in job.checked]
    return Variant(settings, partial(encode, texts), lambda: torch.cat([x.float().cpu() for x in encode(checked)]))


def text_alone(setup: Setup) -> Build:
    """The reference: transformers on every text alone, the projection, and the norm."""
    folder = Path(setup.folder) / "colbert-128"
    model, tokens = peers.load_theirs(setup, "sdpa"), ColBERT.from_pretrained(folder)
    weight_ED = load_file(folder / "1_Dense" / "model.safetensors")["linear.weight"].to(setup.device, setup.torch_dtype)

    def encode(text: str) -> Tensor:
        ids = tokens.tokenize_documents([text]).batch.input_ids.to(setup.device)
        with torch.inference_mode():
            return F.normalize(F.linear(model(input_ids=ids[None]).last_hidden_state[0], weight_ED), dim=-1)

    return lambda job: [text_variant(job, lambda texts: map(encode, texts), "every text alone")]


TEXT = {
    SESSION: Peer(text_ours, {"session": True}),
    OURS: Peer(text_ours, {"session": False}),
    **{name: Peer(text_ours, options, peers.on_cpu, exact="int8" not in name) for name, options in ENGINES.items()},
    "sentence-transformers": Peer(sentence_transformers, package="sentence_transformers"),
    "PyLate": Peer(pylate, package="pylate"),
}


def text_table(
    here: Run,
    workload: str,
    what: str,
    lengths: Sequence[int] = (),
    count: int = 0,
    model: str = "ettin-17m",
    **more: Any,
) -> Table:
    """Texts of these lengths, or so many Wikipedia paragraphs."""
    inputs.save_colbert(here.setup(model, here.dtype).folder, width=128)
    known = {"reference": Peer(text_alone, package="transformers"), "model_pass": False}
    if not lengths:
        lengths = inputs.default().tokenize_documents(inputs.paragraphs(count), truncate=False).batch.lengths
        known["options"] = {"paragraphs": True}
    what = f"{model}, {what} to vectors of width 128, tokenising timed"
    return of_texts(here, workload, model, what, lengths, TEXT, **known | more)


Scores = Iterator[tuple[str, Callable[[], Tensor]]]
"""Settings, and a call that gives the scores of a query `[Q, E]` with all documents, `[N]`; on a CPU in float32."""


def maxsim(setup: Setup, *, score: Callable[[Tensor, list[Tensor]], Scores], width: int) -> Build:
    """Scores of the first text of a job with the others."""

    def variants(job: Job) -> Iterator[Variant]:
        query_QE, *documents = (unit(index, length, width) for index, length in enumerate(job.lengths))
        for settings, plain in score(query_QE, documents):
            run = torch.inference_mode()(plain)
            yield Variant(settings, run, run)

    return variants


def unit(index: int, length: int, width: int) -> Tensor:
    """Seeded unit vectors `[length, width]`."""
    drawn = torch.randn(length, width, generator=torch.Generator().manual_seed(index))
    return F.normalize(drawn, dim=-1).bfloat16().float()


def exactly(query_QE: Tensor, documents: list[Tensor]) -> Scores:
    query_EQ = query_QE.double().T
    yield "float64", lambda: torch.stack([(one.double() @ query_EQ).amax(0).sum() for one in documents]).float()


def ragged(query_QE: Tensor, documents: list[Tensor]) -> Scores:
    ends = torch.tensor([0, *map(len, documents)]).cumsum(0).to(torch.int32)
    packed = query_QE, ends.new_tensor([0, len(query_QE)]), torch.cat(documents), ends
    yield "ragged", lambda: ops.maxsim(*packed)[0]


def einsum(query_QE: Tensor, documents_NTE: Tensor, hidden_NT: Tensor) -> Tensor:
    scores_NQT = torch.einsum("bqe,nte->bnqt", query_QE[None], documents_NTE)[0]
    return scores_NQT.masked_fill(hidden_NT[:, None], -math.inf).amax(-1).sum(-1)


def matmul(query_QE: Tensor, documents_NTE: Tensor, hidden_NT: Tensor) -> Tensor:
    return (documents_NTE @ query_QE.T).masked_fill_(hidden_NT[..., None], -math.inf).amax(1).sum(-1)


def in_chunks(
    query_QE: Tensor,
    documents: list[Tensor],
    *,
    scores: Any = (einsum,),
    sizes: Any = (1000, 125),
    compiled: bool = False,
) -> Scores:
    """Scores of padded vectors, some documents at a time; padding is not timed."""
    documents_NTE = nn.utils.rnn.pad_sequence(documents, batch_first=True)
    lengths_N1 = torch.tensor([[len(document)] for document in documents])
    hidden_NT = torch.arange(documents_NTE.shape[1]) >= lengths_N1

    def score(call: Callable[..., Tensor], size: int) -> Tensor:
        pieces = zip(documents_NTE.split(size), hidden_NT.split(size), strict=True)
        return torch.cat([call(query_QE, *piece) for piece in pieces])

    for plain, size in product(scores, sizes):
        call: Any = torch.compile(plain, dynamic=False) if compiled else plain
        yield f"{plain.__name__}, {size} documents at a time, padding not timed", partial(score, call, size)


def maxsim_cpu(query_QE: Tensor, documents: list[Tensor]) -> Scores:
    """The package on a ready list of arrays and on a ready padded array."""
    package, padded = import_module("maxsim_cpu"), nn.utils.rnn.pad_sequence(documents, batch_first=True).numpy()
    of_list = partial(package.maxsim_scores_variable, query_QE.numpy(), [document.numpy() for document in documents])
    yield "list of arrays", lambda: torch.from_numpy(of_list())
    yield "padded array", lambda: torch.from_numpy(package.maxsim_scores(query_QE.numpy(), padded))


SCORES = {
    OURS: Peer(maxsim, {"score": ragged}),
    "padded einsum, as PyLate": Peer(maxsim, {"score": in_chunks}),
    "padded, tuned by hand": Peer(maxsim, {"score": partial(in_chunks, scores=(einsum, matmul), sizes=(200, 50, 10))}),
    "padded einsum, compiled": Peer(maxsim, {"score": partial(in_chunks, compiled=True)}, peers.can_compile, slow=True),
    "maxsim-cpu": Peer(maxsim, {"score": maxsim_cpu}, package="maxsim_cpu"),
}


def maxsim_table(here: Run, workload: str) -> Table:
    """One query against 1,000 documents."""
    documents, width = inputs.Lengths(181, 64, 300, shortest=16).first(1000), int(workload.rpartition("-")[2])
    found = {name: one._replace(options={**one.options, "width": width}) for name, one in SCORES.items()}
    known = {"reference": Peer(maxsim, {"score": exactly, "width": width}), "model_pass": False}
    known |= {"checked": (0,), "rounds": 9}
    what = f"MaxSim, 1 query of 32 x 1,000 documents ({sum(documents):,} tokens), width {width}"
    return of_texts(here, workload, "ettin-17m", what, (32, *documents), found, **known | MS)


def tables(here: Run, names: Sequence[str]) -> Iterator[Table]:
    for model, workload in product(models(here, "ettin-17m", "modernbert-base"), names):
        count = 1024 if here.is_gpu else 4 if here.quick else 32
        what, lengths = f"{count:,} Wikipedia paragraphs", ()
        if workload == "queries":
            what, lengths = f"{count:,} texts of 8 to 32 tokens", [8 + 3 * at % 25 for at in range(count)]
        known = per_second("documents" if workload == "documents" else "texts", count)
        yield text_table(here, workload, what, lengths, count, model, **known)


def per_second(figure: str, count: int) -> dict[str, Any]:
    return {"figure": figure, "unit": f"{figure}/s", "value": lambda cost: count / cost}


SUITES = {
    "colbert": Suite(
        "late interaction: paragraphs and short texts a second, from text to vectors",
        {
            "documents": "text to vectors of width 128, tokenising timed",
            "queries": "the same of texts of 8 to 32 tokens",
        },
        "sentence-transformers, PyLate",
        harness.of_tables(tables),
        weight=8,
    )
}
