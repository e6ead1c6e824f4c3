"""Late interaction: token ids to unit vectors, text to vectors, and MaxSim. Every public function is a builder."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modernbert_kernels as ops
from benchmarks.inputs import demo_passages
from benchmarks.models import ours, peers, texts
from benchmarks.models.batches import Batch, way
from benchmarks.models.case import Build, Case, Place, Way
from benchmarks.models.learning import OURS, loaded, projection
from modernbert import ColBERT, pack
from modernbert.heads.dense import Dense
from modernbert.inference.graphs import Graphed
from modernbert.packing import Packed


class Projected(nn.Module):
    """Our encoder, its rows projected and normalised."""

    def __init__(self, encoder: Any, weight_ED: Tensor) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        self.register_buffer("weight_ED", weight_ED)
        self.weight_ED: Tensor

    def forward(self, batch: Packed) -> Tensor:
        return ops.project_normalize(self.encoder(batch), self.weight_ED)


def vectors(place: Place, who: str, width: int) -> Build:
    """Token ids to vectors of `width`, the reference included.

    Args:
        who: "ours", "graphs" (ours as CUDA graphs), "alone" (transformers, every text by itself), or an attention of
            transformers, padded; "flash" also flattened.
    """
    model = loaded(place, {"graphs": OURS, "alone": "sdpa"}.get(who, who))
    weight_ED = projection(model.config.hidden_size, width).to(place.device, place.torch_dtype)
    if who == "graphs":
        return partial(graphed_ways, place=place, encoder=model, weight_ED=weight_ED)
    if who == OURS:
        mine: Any = Projected(model, weight_ED)
        return lambda case: [ours.packed_way("packed", case, place, mine, [range(len(case.lengths))])]
    hidden = peers.forward_of(model)

    def forward(inputs: Any) -> Tensor:
        return F.normalize(F.linear(hidden(inputs), weight_ED), dim=-1)

    def ways(case: Case) -> Iterator[Way]:
        if who == "alone":
            yield peers.padded_way("every text by itself", case, place, model, [[at] for at in case.checked], forward)
            return
        if who == "flash":
            yield peers.flattened_way("FlashAttention of torch, flattened", case, place, model, forward)
        yield from peers.batchings(who, case, place, model, forward)

    return ways


def graphed_ways(case: Case, place: Place, encoder: Any, weight_ED: Tensor) -> Iterator[Way]:
    """Graphs take batches from the host: packing is not timed where the others' batches lie on the device."""
    replay = Graphed(Projected(encoder, weight_ED).eval(), max(1024, sum(case.lengths)))
    places = list(range(len(case.lengths)))
    batch = pack([texts.ids(one, case.lengths[one]).tolist() for one in places])
    yield way("packed, CUDA graphs", case, encoder, [Batch(places, batch)], replay)


def sentence_transformers(place: Place, width: int) -> Build:
    """The modules of a MultiVectorEncoder on padded token ids: its tokenizer is not measured."""
    model = multi_vector_encoder(place, save_colbert(place, width))

    def forward(inputs: dict[str, Tensor | None]) -> Tensor:
        given = {name: x for name, x in inputs.items() if x is not None}
        # Its mask of punctuation asks for one.
        given.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))  # pyright: ignore
        return model(given)["token_embeddings"]

    return lambda case: peers.batchings("sdpa, MultiVectorEncoder", case, place, model, forward)


def pylate(place: Place, width: int) -> Build:
    """The modules of PyLate's ColBERT on padded token ids, and the normalisation that follows them in `encode`."""
    folder = save_colbert(place, width)
    model = import_module("pylate.models").ColBERT(str(folder), device=place.device)
    # It cuts the vocabulary to that of the tokenizer, which is not measured.
    model[0].auto_model = body = peers.load(place, "sdpa")
    model = model.to(place.torch_dtype).eval()

    def forward(inputs: dict[str, Tensor | None]) -> Tensor:
        given = {name: x for name, x in inputs.items() if x is not None}
        given.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))  # pyright: ignore
        return F.normalize(model(given)["token_embeddings"], dim=-1)

    return lambda case: peers.batchings("sdpa, models.ColBERT", case, place, body, forward)


def multi_vector_encoder(place: Place, folder: Path) -> Any:
    package = import_module("sentence_transformers")
    if not hasattr(package, "MultiVectorEncoder"):
        raise RuntimeError(f"sentence-transformers {package.__version__} has no MultiVectorEncoder: 6.2 does")
    settings = {"attn_implementation": "sdpa", "dtype": place.torch_dtype}
    model = package.MultiVectorEncoder(str(folder), device=place.device, model_kwargs=settings)
    return model.to(place.torch_dtype).eval()


def save_colbert(place: Place, width: int) -> Path:
    """The encoder of the place with the projection and the default model's tokenizer, as a folder of its own."""
    encoder, template = ours.load(replace(place, dtype="float32", device="cpu")), ColBERT.default()
    head = Dense(encoder.config.hidden_size, width)
    with torch.no_grad():
        head.linear.weight.copy_(projection(encoder.config.hidden_size, width))
    folder = Path(tempfile.mkdtemp(dir=Path(place.folder).parent))
    ColBERT(encoder, template.tokenizer, [head], template.config).save_pretrained(folder)
    return folder


def from_text(place: Place, who: str) -> Build:
    """Passages of the demo corpus to vectors of width 128 on the CPU, tokenising timed. Lengths of the case say how
    many, and nothing else.

    Args:
        who: "ours", or "sentence-transformers".
    """
    folder = save_colbert(place, 128)
    if who == OURS:
        mine = ColBERT.from_pretrained(folder, dtype=place.torch_dtype, device=place.device)

        def encode(passages: list[str], size: int) -> Any:
            return mine.encode_documents(passages, progress=False)
    else:
        theirs = multi_vector_encoder(place, folder)

        def encode(passages: list[str], size: int) -> Any:
            return theirs.encode_document(passages, batch_size=size, show_progress_bar=False)

    sizes = (0,) if who == OURS else (32,) if place.quick else (32, 128, 512) if place.is_gpu else (8, 32)

    def ways(case: Case) -> Iterator[Way]:
        passages = demo_passages(len(case.lengths))
        for size in sizes:

            def answer(size: int = size) -> Tensor:
                found = list(encode([passages[at] for at in case.checked], size))
                return torch.cat([one.float().cpu() for one in found])

            settings = "encode_documents" if not size else f"encode_document, sdpa, batch_size={size}"
            yield Way(settings, partial(encode, passages, size), answer)

    return ways


def maxsim(place: Place, who: str, width: int) -> Build:
    """Scores of all queries with all documents, from vectors that lie on the device.

    The case has the option `queries`: so many of its texts, the first, are queries.

    Args:
        who: "ours", "reference" (pair by pair), "einsum" (padded, as PyLate), or "compiled" (the same, compiled).
    """

    def ways(case: Case) -> Iterator[Way]:
        matrices = [
            unit(at, length, width).to(place.device, place.torch_dtype) for at, length in enumerate(case.lengths)
        ]
        queries, documents = matrices[: case.options["queries"]], matrices[case.options["queries"] :]
        for settings, run in scorers(who, queries, documents):
            yield Way(settings, run, lambda run=run: run().float().cpu())

    return ways


def unit(place: int, length: int, width: int) -> Tensor:
    """Seeded unit vectors `[length, width]`, rounded so that every dtype sees the same."""
    drawn = torch.randn(length, width, generator=torch.Generator().manual_seed(place))
    return F.normalize(drawn, dim=-1).bfloat16().float()


def scorers(who: str, queries: list[Tensor], documents: list[Tensor]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    if who == "reference":
        yield "pair by pair", lambda: torch.stack([_one_by_one(query, documents) for query in queries])
        return
    if who == OURS:
        (query_QE, cu_queries), (document_NE, cu_documents) = (_packed(side) for side in (queries, documents))
        yield "ragged", lambda: ops.maxsim(query_QE, cu_queries, document_NE, cu_documents)
        return
    padded_BSE, padded_NSE = (nn.utils.rnn.pad_sequence(side, batch_first=True) for side in (queries, documents))
    lengths_N = torch.tensor([len(document) for document in documents], device=padded_NSE.device)
    hidden_NT = torch.arange(padded_NSE.shape[1], device=padded_NSE.device) >= lengths_N[:, None]
    score = torch.compile(_padded_scores, dynamic=False) if who == "compiled" else _padded_scores
    for chunk in dict.fromkeys((len(documents), max(1, len(documents) // 8))):
        pieces = list(zip(padded_NSE.split(chunk), hidden_NT.split(chunk), strict=True))
        yield (
            f"einsum of padded vectors, {chunk} documents at a time",
            lambda pieces=pieces: torch.cat([score(padded_BSE, *piece) for piece in pieces], dim=1),
        )


def _one_by_one(query_QE: Tensor, documents: list[Tensor]) -> Tensor:
    return torch.stack([(query_QE @ document.T).float().amax(1).sum() for document in documents])


def _packed(matrices: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0, *map(len, matrices)]).cumsum(0).to(torch.int32)
    return torch.cat(matrices), lengths.to(matrices[0].device)


def _padded_scores(queries_BSE: Tensor, documents_NTE: Tensor, hidden_NT: Tensor) -> Tensor:
    """`[B, N]`; a query's padding is zero, and adds nothing."""
    scores_BNST = torch.einsum("bse,nte->bnst", queries_BSE, documents_NTE)
    return scores_BNST.masked_fill(hidden_NT[None, :, None], -math.inf).amax(-1).float().sum(-1)
