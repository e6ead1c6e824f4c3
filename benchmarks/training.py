"""Suite `training`: forward and backward of the encoder, with AdamW, with masked tokens, and with late interaction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modernbert_kernels as ops
from benchmarks import harness, inputs, peers, texts, work
from benchmarks.harness import BETTER, Run, Suite, Table
from benchmarks.late_interaction import with_mask
from benchmarks.peers import EAGER, FLASH, FLASH_COMPILED, OURS, PEERS, REFERENCE, SDPA, SDPA_COMPILED, those
from benchmarks.worker import Build, Job, Peer, Setup, Variant
from modernbert import pack

MASKED, MASK_ID, IGNORED = 0.3, 50_284, -100
"""The share of tokens that is predicted, and the id in their place, as ModernBERT was trained; no target."""

TOKENS = 16_384
"""Of a call on a GPU."""

PAIRS, QUERY, DOCUMENT, WIDTH = 64, 32, 180, 128
SHARE = 0.45
"""Of the matrix product's rate, that we want to reach with ModernBERT-base on an H200."""


def load(setup: Setup, who: str) -> Any:
    """Our encoder ("ours"), or transformers' with this attention."""
    return peers.load_ours(setup) if who == "ours" else peers.load_theirs(setup, who)


def adamw(setup: Setup, *, who: str) -> Build:
    """float32 weights, both passes under autocast to the dtype of the setup, and fused AdamW."""
    model = load(replace(setup, dtype="float32"), who)
    if setup.dtype != "float32":
        model.forward = torch.autocast(setup.device, setup.torch_dtype)(model.forward)
    # It does all of its work and leaves the weights as they are, so that all calls do the same.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def variants(job: Job) -> Iterator[Variant]:
        forward = model if who == "ours" else peers.forward_of(model)
        if who == "ours":
            made = iter([peers.packed_variant("packed", job, setup, model, model, [range(len(job.lengths))])])
        elif who == "flash":
            made = iter([peers.flattened_variant("FlashAttention of torch, flattened", job, setup, model, forward)])
        else:
            made = peers.batchings(who, job, setup, model, forward)
        for one in made:
            run = stepped(one, optimizer)
            yield replace(one, settings=f"{one.settings}, fused AdamW", run=run, warm=run)

    return variants


def stepped(one: Variant, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def run() -> None:
        one.run()
        optimizer.step()

    return run


def masked_lm(setup: Setup, *, who: str) -> Build:
    """The loss of the masked tokens and its gradients, weights in the dtype of the setup.

    Ours asks the encoder for the masked rows only, and never has all logits at once. transformers computes logits of
    those rows only too (`sparse_prediction`). Texts have one length.
    """
    if who == "ours":
        return our_masked_lm(setup)
    from transformers import ModernBertForMaskedLM

    attention = peers.register_flash() if who == "flash" else who
    settings = {"attn_implementation": attention, "dtype": setup.torch_dtype, "sparse_prediction": True}
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
        yield step(f"{who}, sparse_prediction", model, lambda: model(**given).loss)

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


def contrastive(setup: Setup, *, who: str) -> Build:
    """A step of ColBERT on pairs: every query against all documents of the batch, by MaxSim and cross entropy.

    The first half of the texts are queries, the second their documents. Ours stays packed; transformers pads, and
    scores by an einsum and a mask as PyLate does.
    """
    model = load(setup, who)
    weight_ED = texts.projection(model.config.hidden_size, WIDTH).to(setup.device, setup.torch_dtype).requires_grad_()

    def variants(job: Job) -> Iterator[Variant]:
        pairs = len(job.lengths) // 2
        sides = [range(pairs), range(pairs, 2 * pairs)]
        wanted_B = torch.arange(pairs, device=setup.device)
        score = packed_scores(job, setup, sides) if who == "ours" else padded_scores(job, setup, sides)
        forward = model if who == "ours" else peers.forward_of(model)

        def loss() -> Tensor:
            weight_ED.grad = None
            return F.cross_entropy(score(forward, weight_ED), wanted_B)

        yield step("packed" if who == "ours" else f"{who}, padded, einsum", model, loss)

    return variants


Score = Callable[[Callable[[Any], Tensor], Tensor], Tensor]
"""From a model and the projection to `[B, B]` scores, float32."""


def packed_scores(job: Job, setup: Setup, sides: Sequence[Sequence[int]]) -> Score:
    batches = [pack([inputs.ids(one, job.lengths[one]).tolist() for one in side]).to(setup.device) for side in sides]

    def score(model: Callable[[Any], Tensor], weight_ED: Tensor) -> Tensor:
        queries_QE, documents_NE = (ops.project_normalize(model(batch), weight_ED) for batch in batches)
        return ops.maxsim(queries_QE, batches[0].cu_seqlens, documents_NE, batches[1].cu_seqlens)

    return score


def padded_scores(job: Job, setup: Setup, sides: Sequence[Sequence[int]]) -> Score:
    given = []
    for side in sides:
        ids_BS, mask_BS = inputs.padded([inputs.ids(index, job.lengths[index]) for index in side])
        given.append(peers.onto(with_mask({"input_ids": ids_BS, "attention_mask": mask_BS}), setup))

    def score(forward: Callable[[Any], Tensor], weight_ED: Tensor) -> Tensor:
        queries_BSE, documents_BSE = (F.normalize(F.linear(forward(one), weight_ED), dim=-1) for one in given)
        scores_BBST = torch.einsum("ash,bth->abst", queries_BSE, documents_BSE).float()
        hidden = given[1]["attention_mask"][None, :, None] == 0
        best_BBS = scores_BBST.masked_fill(hidden, -math.inf).amax(-1)
        return (best_BBS * given[0]["attention_mask"][:, None]).sum(-1)

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


BUILDERS: dict[str, Callable[..., Build]] = {"adamw": adamw, "masked-lm": masked_lm, "contrastive": contrastive}


def peers_of(here: Run, workload: str) -> tuple[dict[str, Peer], Peer]:
    """Who takes part, and the reference."""
    if workload == "encoder":
        more = () if here.quick else (EAGER, *((SDPA_COMPILED, FLASH_COMPILED) if here.is_gpu else ()))
        return those(OURS, SDPA, FLASH, *more), REFERENCE
    made = {
        name: Peer(BUILDERS[workload], {"who": who}, PEERS[name].applies, PEERS[name].package)
        for name, who in ((OURS, "ours"), (SDPA, "sdpa"), (FLASH, "flash"))
    }
    return made, REFERENCE if workload == "adamw" else made[SDPA]


def tables(here: Run, names: Sequence[str]) -> Iterator[Table]:
    for model in ("modernbert-base", "ettin-17m") if here.is_gpu else ("ettin-17m",):
        for workload in names:
            lengths, name = sizes(here, workload)
            found, reference = peers_of(here, workload)
            each = f"{len(lengths)} texts of {lengths[-1]} tokens"
            pairs = f"{len(lengths) // 2} queries of {lengths[0]} tokens against as many documents of {max(lengths)} or less"
            what = {
                "encoder": f"{model}, {here.dtype}, {each}, forward and backward",
                "adamw": f"{model}, float32 weights, passes in {here.dtype}, {each}, with AdamW",
                "masked-lm": f"{model}, {here.dtype}, {each}, loss of 30 % masked tokens",
                "contrastive": f"{model}, {here.dtype}, {pairs}, contrastive loss",
            }
            yield Table(
                workload,
                what[workload],
                model,
                here.dtype,
                Job(lengths, backward=True),
                found,
                reference,
                name,
                model_pass=workload in ("encoder", "adamw"),  # heads and losses are not part of the roofline
                passes="forward + backward + AdamW" if workload == "adamw" else "forward + backward",
                goal=goal(here, model, lengths) if workload == "encoder" else {},
            )


def sizes(here: Run, workload: str) -> tuple[tuple[int, ...], str]:
    """The lengths of a call, and the name of their set."""
    if workload == "contrastive":
        pairs = PAIRS if here.is_gpu else 3 if here.quick else 8
        # Queries first, then documents of varied lengths, cut as ColBERT cuts them.
        documents = tuple(min(DOCUMENT, one) for one in inputs.in_set("variable short", pairs))
        return (QUERY,) * pairs + tuple(one // 4 if here.tries else one for one in documents), "pairs"
    length = 64 if here.tries else 512
    count = TOKENS // length if here.is_gpu else 2 if here.quick else 8
    return (length,) * count, f"fixed {length}"


def goal(here: Run, model: str, lengths: Sequence[int]) -> dict[str, float | None]:
    """The tokens per second that are `SHARE` of the matrix product's rate."""
    if not here.is_gpu or model != "modernbert-base":
        return {}
    operations = work.flops(here.config(model), lengths, backward=True) / sum(lengths)
    return {OURS: SHARE * here.rates(here.dtype).matmul / operations}


SUITES = {
    "training": Suite(
        "training: forward and backward of the encoder, with AdamW, with masked tokens, and with late interaction",
        {
            "encoder": "tokens per second forward and backward, texts of 512 tokens, weights and activations in one dtype",
            "adamw": "forward, backward and AdamW, float32 weights under bfloat16 autocast",
            "masked-lm": "forward and backward with the loss of 30 % masked tokens over the whole vocabulary",
            "contrastive": "forward and backward of a late-interaction batch: every query against every document by MaxSim",
        },
        "transformers (eager, sdpa, FlashAttention), the latter two under torch.compile too",
        harness.of_tables(tables),
        BETTER,
        weight=12,
    )
}
