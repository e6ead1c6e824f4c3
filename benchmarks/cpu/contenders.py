"""The contenders on the same seeded weights: ours, and each peer the way its users run it fastest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Contender, WrongOutput
from benchmarks.inputs import Batch, Ids, batched, real_rows

OURS = "modernbert"
TRANSFORMERS, ONNX_RUNTIME, OPENVINO = "transformers", "ONNX Runtime", "OpenVINO"
COMPILED = f"{TRANSFORMERS}, compiled"
AS_THEY_COME, LENGTH_SORTED, ONE_BY_ONE = (
    f"{TRANSFORMERS}, {how}" for how in ("as they come", "length-sorted", "one by one")
)
SENTENCE_TRANSFORMERS = "sentence-transformers"
PADDED_EINSUM, PADDED_TUNED, MAXSIM_CPU = "padded einsum, as PyLate", "padded, tuned by hand", "maxsim-cpu"

MAX_LENGTH = 512  # where the workload from text cuts


def ours(folder: Path, sequences: Ids) -> Contender:
    from modernbert import pack

    encoder = our_encoder(folder)

    def run() -> Tensor:
        with torch.inference_mode():
            return encoder(pack(sequences))

    return Contender(OURS, "packed; packing is timed", run, lambda x_TD: x_TD)


def ours_first_tokens(folder: Path, sequences: Ids) -> Iterator[Contender]:
    """[CLS] of every text: the last layer computes these rows alone, or all of them."""
    from modernbert import pack

    encoder = our_encoder(folder)

    def run(chosen: bool) -> Tensor:
        with torch.inference_mode():
            batch = pack(sequences)
            first_B = batch.cu_seqlens[:-1]
            return encoder(batch, rows=first_B) if chosen else encoder(batch)[first_B]

    yield Contender(OURS, "rows=cu_seqlens[:-1]", partial(run, True), lambda x_BD: x_BD)
    yield Contender(f"{OURS}, all rows", "indexed afterwards", partial(run, False), lambda x_BD: x_BD)


def transformers_sdpa(folder: Path, batches: list[Batch], settings: str, name: str = TRANSFORMERS) -> Contender:
    """Tokenised, padded batches are ready before the clock starts."""
    model = transformers_model(folder)

    def run() -> list[Tensor]:
        with torch.inference_mode():
            return [model(input_ids=ids, attention_mask=mask).last_hidden_state for ids, mask, _ in batches]

    return Contender(name, settings, run, lambda outputs: real_rows(outputs, batches))


def transformers_batchings(folder: Path, sequences: Ids, *, sizes: Sequence[int]) -> Iterator[Contender]:
    """Three implementations, two of them with every batch size to choose from."""
    for size in sizes:
        batches = batched(sequences, size)
        yield transformers_sdpa(folder, batches, f"sdpa, batches of {size}", AS_THEY_COME)
        batches = batched(sequences, size, by_length=True)
        yield transformers_sdpa(folder, batches, f"sdpa, batches of {size}", LENGTH_SORTED)
    yield transformers_sdpa(folder, batched(sequences, 1), "sdpa", ONE_BY_ONE)


def transformers_compiled(folder: Path, batches: list[Batch]) -> Iterator[Contender]:
    """Compiled for every shape by itself with the weights as constants; none where no C++ compiler is found.

    Compiling takes 15 to 30 seconds a shape, before the clock starts.
    """
    if not shutil.which("g++"):
        return
    from torch._dynamo.exc import TorchDynamoException

    model = torch.compile(transformers_model(folder), dynamic=False, options={"freezing": True})

    def run() -> list[Tensor]:
        try:
            with torch.inference_mode():
                return [model(input_ids=ids, attention_mask=mask).last_hidden_state for ids, mask, _ in batches]
        except TorchDynamoException as error:
            raise WrongOutput(f"does not compile: {str(error)[:300]}") from error

    yield Contender(COMPILED, "sdpa, torch.compile, freezing", run, lambda outputs: real_rows(outputs, batches))


@cache
def our_encoder(folder: Path) -> torch.nn.Module:
    from modernbert import Encoder

    return Encoder.from_pretrained(folder).eval()


@cache
def transformers_model(folder: Path) -> torch.nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()


def ours_from_text(folder: Path, texts: list[str]) -> tuple[Contender, int]:
    """The contender, and how many real tokens the texts have."""
    from modernbert import Tokenizer

    encoder, tokenizer = our_encoder(folder), Tokenizer.from_pretrained(folder)

    def run() -> Tensor:
        with torch.inference_mode():
            batch = tokenizer(texts, max_length=MAX_LENGTH)
            return torch.segment_reduce(encoder(batch), "mean", lengths=torch.tensor(batch.lengths))

    return Contender(OURS, "Tokenizer, Encoder, mean", run, lambda vectors: vectors), tokenizer(
        texts, max_length=MAX_LENGTH
    ).num_tokens


def mean_alone(folder: Path, texts: list[str]) -> Tensor:
    """The reference: the mean of transformers' hidden states in float32, `[B, D]`, every text by itself."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), transformers_model(folder)
    with torch.inference_mode():
        tokenized = [tokenizer(text, truncation=True, max_length=MAX_LENGTH, return_tensors="pt") for text in texts]
        return torch.cat([model(input_ids=one["input_ids"]).last_hidden_state.mean(1) for one in tokenized])


def sentence_transformers(folder: Path, texts: list[str], *, sizes: Sequence[int]) -> Iterator[Contender]:
    """Mean pooling through `encode`, which sorts by length itself; none where it is not installed."""
    if not find_spec("sentence_transformers"):
        return
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    body = Transformer(str(folder), model_kwargs={"attn_implementation": "sdpa"}, max_seq_length=MAX_LENGTH)
    pooling = Pooling(body.get_embedding_dimension(), pooling_mode="mean")
    model = SentenceTransformer(modules=[body, pooling], device="cpu")
    for size in sizes:
        yield Contender(
            SENTENCE_TRANSFORMERS,
            f"sdpa, batch_size={size}",
            lambda size=size: model.encode(texts, batch_size=size, show_progress_bar=False, convert_to_tensor=True),
            lambda vectors: vectors,
        )


def ours_maxsim(query_QE: Tensor, documents: Sequence[Tensor]) -> Contender:
    from modernbert import maxsim
    from modernbert.late_interaction import Ragged

    queries, corpus = Ragged.from_list([query_QE]), Ragged.from_list(documents)

    def run() -> Tensor:
        with torch.inference_mode():
            return maxsim(queries, corpus)

    return Contender(OURS, "ragged", run, lambda scores_BN: scores_BN[0])


def padded_maxsim(query_QE: Tensor, documents: Sequence[Tensor], *, chunks: Sequence[int]) -> Iterator[Contender]:
    """On documents padded with zeros: PyLate's `colbert_scores`, and the best that hands make of it."""
    padded_NSE = torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True)
    lengths_N1 = torch.tensor([len(document) for document in documents])[:, None]
    real_NS = torch.arange(padded_NSE.shape[1]) < lengths_N1

    def einsum(docs_NSE: Tensor, real_NS: Tensor) -> Tensor:
        scores = torch.einsum("ash,bth->abst", query_QE[None], docs_NSE) * real_NS[None, :, None]
        return scores.max(dim=-1).values.sum(dim=-1)[0]

    def matmul(docs_NSE: Tensor, real_NS: Tensor) -> Tensor:
        scores_NSQ = (docs_NSE @ query_QE.T).masked_fill_(~real_NS[..., None], -torch.inf)
        return scores_NSQ.amax(1).sum(-1)

    def run(score: Callable[[Tensor, Tensor], Tensor], chunk: int) -> Tensor:
        with torch.inference_mode():
            pieces = zip(padded_NSE.split(chunk), real_NS.split(chunk), strict=True)
            return torch.cat([score(docs_NSE, real) for docs_NSE, real in pieces])

    whole = partial(run, einsum, len(documents))
    yield Contender(PADDED_EINSUM, "all documents at once, padding not timed", whole, lambda scores_N: scores_N)
    for score in (einsum, matmul):
        for chunk in chunks:
            settings = f"{score.__name__}, {chunk} documents at a time, padding not timed"
            yield Contender(PADDED_TUNED, settings, partial(run, score, chunk), lambda scores_N: scores_N)


def maxsim_cpu(query_QE: Tensor, documents: Sequence[Tensor]) -> Iterator[Contender]:
    """The package on a ready list of arrays and on a ready padded array; none where it is not installed."""
    if not find_spec("maxsim_cpu"):
        return
    package = import_module("maxsim_cpu")
    query, arrays = query_QE.numpy(), [document.numpy() for document in documents]
    padded = torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True).numpy()
    calls: dict[str, Callable[[], Any]] = {
        "list of arrays": lambda: package.maxsim_scores_variable(query, arrays),
        "padded array": lambda: package.maxsim_scores(query, padded),
    }
    for settings, run in calls.items():
        yield Contender(MAXSIM_CPU, settings, run, torch.from_numpy)
