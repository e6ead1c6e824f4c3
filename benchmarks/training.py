"""Suite `training`: forward and backward of the encoder, and with late interaction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import modernbert_kernels as ops
from benchmarks import harness, inputs, peers
from benchmarks.encoder import of_texts
from benchmarks.harness import Run, Suite, Table
from benchmarks.peers import COMPILED, EAGER, FLASH, SDPA, those
from benchmarks.worker import OURS, Build, Job, Setup, Variant
from modernbert import pack

WIDTH = 128


def contrastive(setup: Setup, *, attention: str | None = None) -> Build:
    """A step of ColBERT on pairs: every query against all documents of the batch, by MaxSim and cross entropy.

    The first half of the texts are queries, the second their documents. Ours stays packed; transformers pads, and
    scores by an einsum and a mask as PyLate does.
    """
    model: Any = peers.load_theirs(setup, attention) if attention else peers.load_ours(setup)
    weight_ED = inputs.projection(model.config.hidden_size, WIDTH).to(setup.device, setup.torch_dtype).requires_grad_()
    forward = peers.forward_of(model) if attention else model

    def variants(job: Job) -> Iterator[Variant]:
        pairs = len(job.lengths) // 2
        sides = [peers.ids_of(job, range(pairs)), peers.ids_of(job, range(pairs, 2 * pairs))]
        wanted_B, score = (
            torch.arange(pairs, device=setup.device),
            (padded_scores if attention else packed_scores)(sides),
        )

        def run() -> Tensor:
            model.zero_grad(set_to_none=True)
            weight_ED.grad = None
            loss = F.cross_entropy(score(forward, weight_ED), wanted_B)
            loss.backward()
            return loss.detach()

        def answer() -> Tensor:
            """A gradient times the loss, so that both must be right."""
            loss = run()
            return peers.gradient_of(model) * loss.float().cpu()

        yield Variant(f"{attention}, padded, einsum" if attention else "packed", run, answer)

    return variants


Score = Callable[[Callable[[Any], Tensor], Tensor], Tensor]
"""From a model and the projection to `[B, B]` scores, float32."""


def packed_scores(sides: Sequence[Sequence[Tensor]]) -> Score:
    batches = [pack([ids.tolist() for ids in side]) for side in sides]

    def score(model: Callable[[Any], Tensor], weight_ED: Tensor) -> Tensor:
        queries, documents = (batch.to(weight_ED.device) for batch in batches)
        queries_QE, documents_NE = (ops.project_normalize(model(batch), weight_ED) for batch in (queries, documents))
        return ops.maxsim(queries_QE, queries.cu_seqlens, documents_NE, documents.cu_seqlens)

    return score


def padded_scores(sides: Sequence[Sequence[Tensor]]) -> Score:
    given = [inputs.padded(side, masked=True) for side in sides]

    def score(forward: Callable[[Any], Tensor], weight_ED: Tensor) -> Tensor:
        queries, documents = (peers.onto(one, weight_ED.device) for one in given)
        queries_BSE, documents_BSE = (
            F.normalize(F.linear(forward(one), weight_ED), dim=-1) for one in (queries, documents)
        )
        scores_BBST = torch.einsum("ash,bth->abst", queries_BSE, documents_BSE).float()
        best_BBS = scores_BBST.masked_fill(documents["attention_mask"][None, :, None] == 0, -math.inf).amax(-1)
        return (best_BBS * queries["attention_mask"][:, None]).sum(-1)

    return score


def tables(here: Run, names: Sequence[str]) -> Iterator[Table]:
    length, pairs = 64 if here.tries else 512, 64 if here.is_gpu else 3 if here.quick else 8
    count = 16_384 // length if here.is_gpu else 2 if here.quick else 8
    each = f"{count} texts of {length} tokens"
    # Queries first, then documents of varied lengths, cut as ColBERT cuts them.
    documents = [min(180, one) // (4 if here.tries else 1) for one in inputs.SETS["variable-short"].first(pairs)]
    for model in ("modernbert-base", "ettin-17m") if here.is_gpu else ("ettin-17m",):
        for workload in names:
            lengths: tuple[int, ...] = (length,) * count
            known: dict[str, Any] = {"backward": True}
            if workload == "encoder":
                more = () if here.quick else (EAGER, *(COMPILED if here.is_gpu else ()))
                found, what = those(OURS, SDPA, FLASH, *more), f"{here.dtype}, {each}, forward and backward"
            else:
                found = {name: one._replace(builder=contrastive) for name, one in those(OURS, SDPA, FLASH).items()}
                lengths = (*(32,) * pairs, *documents)
                words = f"{pairs} queries of 32 tokens, as many documents of at most {max(documents)}"
                what = f"{here.dtype}, {words}, contrastive loss"
                # Heads and losses are not part of the roofline.
                known |= {"reference": found[SDPA], "model_pass": False}
            yield of_texts(here, workload, model, f"{model}, {what}", lengths, found, **known)


SUITES = {
    "training": Suite(
        "forward and backward of the encoder, and with late interaction",
        {
            "encoder": "tokens per second, texts of 512 tokens, weights and activations in one dtype",
            "contrastive": "forward and backward of pairs: every query against every document by MaxSim",
        },
        "transformers (eager, sdpa, FlashAttention, under torch.compile)",
        harness.of_tables(tables),
        weight=12,
    )
}
