"""Suite `training`: forward and backward of the encoder, with AdamW, with masked tokens, and with late interaction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modernbert_kernels as ops
from benchmarks import inputs, peers, texts
from benchmarks.encoder import of_texts, suite
from benchmarks.harness import Run, Table
from benchmarks.late_interaction import with_mask
from benchmarks.peers import COMPILED, EAGER, FLASH, OURS, PEERS, REFERENCE, SDPA, those
from benchmarks.worker import Build, Job, Peer, Setup, Variant
from modernbert import pack

MASKED, MASK_ID, IGNORED = 0.3, 50_284, -100
"""The share of tokens that is predicted, and the id in their place, as ModernBERT was trained; no target."""

WIDTH = 128


def masked_lm(setup: Setup, *, attention: str | None = None) -> Build:
    """The loss of the masked tokens and its gradients, of transformers with this attention, or ours.

    Ours asks the encoder for the masked rows only, and never has all logits at once. transformers computes logits of
    those rows only too (`sparse_prediction`). Texts have one length.
    """
    if attention is None:
        return our_masked_lm(setup)
    from transformers import ModernBertForMaskedLM

    name = peers.register_flash() if attention == "flash" else attention
    settings = {"attn_implementation": name, "dtype": setup.torch_dtype, "sparse_prediction": True}
    model = ModernBertForMaskedLM.from_pretrained(setup.folder, **settings)
    known = head_state(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        model.head.dense.weight.copy_(known["dense"])
        model.head.norm.weight.copy_(known["norm"])
        model.decoder.bias.copy_(known["bias"])
    model = model.to(setup.device).eval()  # pyright: ignore[reportArgumentType]

    def variants(job: Job) -> Iterator[Variant]:
        ids, targets = masked(job, model.config.vocab_size)
        given = {"input_ids": torch.stack(ids).to(setup.device), "labels": torch.stack(targets).to(setup.device)}
        yield step(f"{attention}, sparse_prediction", model, lambda: model(**given).loss)

    return variants


def our_masked_lm(setup: Setup) -> Build:
    model = peers.load_ours(setup)
    known = head_state(model.config.hidden_size, model.config.vocab_size)
    head = {name: x.to(setup.device, setup.torch_dtype).requires_grad_() for name, x in known.items()}

    def variants(job: Job) -> Iterator[Variant]:
        ids, targets = masked(job, model.config.vocab_size)
        targets_T = torch.cat(targets)
        rows_Q = (targets_T >= 0).nonzero()[:, 0].to(setup.device)
        targets_Q = targets_T[targets_T >= 0].to(setup.device)
        batch = pack([one.tolist() for one in ids]).to(setup.device)

        def loss() -> Tensor:
            for parameter in head.values():
                parameter.grad = None
            h_QD = F.gelu(F.linear(model(batch, rows=rows_Q), head["dense"]))
            h_QD = ops.layer_norm(h_QD, head["norm"], None, model.config.norm_eps)
            table_VD = model.embeddings.tok_embeddings.weight
            return ops.linear_cross_entropy(h_QD, table_VD, head["bias"], targets_Q)

        yield step("packed, masked rows only", model, loss)

    return variants


def head_state(width: int, vocabulary: int) -> dict[str, Tensor]:
    """Seeded parameters of the head over hidden states; its matrix over the vocabulary is the embedding table."""
    draw = torch.Generator().manual_seed(1)
    dense = torch.randn(width, width, generator=draw) * 1.2 / math.sqrt(width)
    norm = 0.7 + 0.6 * torch.rand(width, generator=draw)
    # Logits of the size of a trained model's, because the table has unit variance.
    return {"dense": dense, "norm": norm / math.sqrt(width), "bias": 0.1 * torch.randn(vocabulary, generator=draw)}


def masked(job: Job, vocabulary: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The ids of each text with some of them masked, at least one, and the true ids there, `IGNORED` elsewhere."""

    def of_text(index: int, length: int) -> tuple[Tensor, Tensor]:
        ids = inputs.ids(index, length)
        hidden = torch.rand(length, generator=torch.Generator().manual_seed(index)) < MASKED
        hidden[0] = True
        return ids.masked_fill(hidden, min(MASK_ID, vocabulary - 1)), ids.masked_fill(~hidden, IGNORED)

    ids, targets = zip(*(of_text(index, length) for index, length in enumerate(job.lengths)), strict=True)
    return ids, targets


def contrastive(setup: Setup, *, attention: str | None = None) -> Build:
    """A step of ColBERT on pairs: every query against all documents of the batch, by MaxSim and cross entropy.

    The first half of the texts are queries, the second their documents. Ours stays packed; transformers pads, and
    scores by an einsum and a mask as PyLate does.
    """
    model: Any = peers.load_theirs(setup, attention) if attention else peers.load_ours(setup)
    weight_ED = texts.projection(model.config.hidden_size, WIDTH).to(setup.device, setup.torch_dtype).requires_grad_()
    forward = peers.forward_of(model) if attention else model

    def variants(job: Job) -> Iterator[Variant]:
        pairs = len(job.lengths) // 2
        sides = [peers.ids_of(job, range(pairs)), peers.ids_of(job, range(pairs, 2 * pairs))]
        wanted_B, score = (
            torch.arange(pairs, device=setup.device),
            (padded_scores if attention else packed_scores)(sides),
        )

        def loss() -> Tensor:
            weight_ED.grad = None
            return F.cross_entropy(score(forward, weight_ED), wanted_B)

        yield step(f"{attention}, padded, einsum" if attention else "packed", model, loss)

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
    given = [with_mask(inputs.padded(side)) for side in sides]

    def score(forward: Callable[[Any], Tensor], weight_ED: Tensor) -> Tensor:
        queries, documents = (peers.onto(one, weight_ED.device) for one in given)
        queries_BSE, documents_BSE = (
            F.normalize(F.linear(forward(one), weight_ED), dim=-1) for one in (queries, documents)
        )
        scores_BBST = torch.einsum("ash,bth->abst", queries_BSE, documents_BSE).float()
        best_BBS = scores_BBST.masked_fill(documents["attention_mask"][None, :, None] == 0, -math.inf).amax(-1)
        return (best_BBS * queries["attention_mask"][:, None]).sum(-1)

    return score


def step(settings: str, model: nn.Module, loss: Callable[[], Tensor]) -> Variant:
    """A loss and its gradients. A gradient times the loss is compared, so that both must be right."""

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        found = loss()
        found.backward()
        return found.detach()

    def answer() -> Tensor:
        found = run()
        return peers.gradient_of(model) * found.float().cpu()

    return Variant(settings, run, answer)


def peers_of(here: Run, workload: str) -> tuple[Mapping[str, Peer], Peer]:
    """The implementations that take part, and the reference."""
    if workload == "encoder":
        more = () if here.quick else (EAGER, *(COMPILED if here.is_gpu else ()))
        return those(OURS, SDPA, FLASH, *more), REFERENCE
    if workload == "adamw":
        adamw = {"adamw": True}
        return {
            name: one._replace(options={**one.options, **adamw}) for name, one in those(OURS, SDPA, FLASH).items()
        }, REFERENCE
    builder = masked_lm if workload == "masked-lm" else contrastive
    found = {OURS: Peer(builder)}
    for name in (SDPA, FLASH):
        found[name] = PEERS[name]._replace(builder=builder)
    return found, found[SDPA]


def tables(here: Run, names: Sequence[str]) -> Iterator[Table]:
    for model in ("modernbert-base", "ettin-17m") if here.is_gpu else ("ettin-17m",):
        for workload in names:
            lengths, (found, reference) = lengths_of(here, workload), peers_of(here, workload)
            each = f"{len(lengths)} texts of {lengths[-1]} tokens"
            pairs = f"{len(lengths) // 2} queries of {lengths[0]} tokens, as many documents of at most {max(lengths)}"
            what = {
                "encoder": f"{here.dtype}, {each}, forward and backward",
                "adamw": f"float32 weights, passes in {here.dtype}, {each}, with fused AdamW",
                "masked-lm": f"{here.dtype}, {each}, loss of 30 % masked tokens",
                "contrastive": f"{here.dtype}, {pairs}, contrastive loss",
            }
            known: dict[str, Any] = {"options": {"adamw": True} if workload == "adamw" else {}, "reference": reference}
            known["model_pass"] = workload in ("encoder", "adamw")  # heads and losses are not part of the roofline
            yield of_texts(here, workload, model, f"{model}, {what[workload]}", lengths, found, backward=True, **known)


def lengths_of(here: Run, workload: str) -> tuple[int, ...]:
    if workload == "contrastive":
        pairs = 64 if here.is_gpu else 3 if here.quick else 8
        # Queries first, then documents of varied lengths, cut as ColBERT cuts them.
        documents = tuple(min(180, one) for one in inputs.in_set("variable short", pairs))
        return (32,) * pairs + tuple(one // 4 if here.tries else one for one in documents)
    length = 64 if here.tries else 512
    return (length,) * (16_384 // length if here.is_gpu else 2 if here.quick else 8)


SUITES = {
    "training": suite(
        "forward and backward of the encoder, with AdamW, with masked tokens, and with late interaction",
        {
            "encoder": "tokens per second, texts of 512 tokens, weights and activations in one dtype",
            "adamw": "forward, backward and AdamW, float32 weights under bfloat16 autocast",
            "masked-lm": "forward and backward with the loss of 30 % masked tokens over the whole vocabulary",
            "contrastive": "forward and backward of pairs: every query against every document by MaxSim",
        },
        "transformers (eager, sdpa, FlashAttention, under torch.compile)",
        tables,
        12,
    )
}
