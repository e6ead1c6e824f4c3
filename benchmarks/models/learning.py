"""Training steps: the encoder, masked-language modelling, late interaction. Every public function is a builder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modernbert_kernels as ops
from benchmarks.models import flash, ours, peers, texts
from benchmarks.models.batches import GRADIENT
from benchmarks.models.case import Build, Case, Place, Way
from modernbert import pack

OURS = "ours"
MASKED, MASK_ID = 0.3, 50_284
"""The share of tokens that is predicted, and the id that stands in their place, as ModernBERT was trained."""

IGNORED = -100
WIDTH = 128


def encoder(place: Place, who: str) -> Build:
    """float32 weights, both passes under autocast to the dtype of the place, and AdamW where the case has the option
    `optimizer`.

    Args:
        who: "ours", or an attention of transformers.
    """
    model = loaded(replace(place, dtype="float32"), who)
    if place.dtype != "float32":
        model.forward = torch.autocast(place.device, place.torch_dtype)(model.forward)
    # It does all of its work, and leaves the weights as they are: all calls then do the same.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def ways(case: Case) -> Iterator[Way]:
        for one in encoder_ways(who, case, place, model):
            yield with_optimizer(one, optimizer) if case.options.get("optimizer") else one

    return ways


def loaded(place: Place, who: str) -> Any:
    if who == OURS:
        return ours.load(place)
    return peers.load(place, flash.register() if who == "flash" else who)


def encoder_ways(who: str, case: Case, place: Place, model: Any) -> Iterator[Way]:
    if who == OURS:
        yield ours.packed_way("packed", case, place, model, [range(len(case.lengths))])
        return
    forward = peers.forward_of(model)
    if who == "flash":
        yield peers.flattened_way("FlashAttention of torch, flattened", case, place, model, forward)
    else:
        yield from peers.batchings(who, case, place, model, forward)


def with_optimizer(one: Way, optimizer: torch.optim.Optimizer) -> Way:
    def run() -> None:
        one.run()
        optimizer.step()

    return replace(one, settings=f"{one.settings}, fused AdamW", run=run, warm=run)


def masked_lm(place: Place, who: str) -> Build:
    """The loss of the masked tokens and its gradients, weights in the dtype of the place.

    Ours asks the encoder for the masked rows only, and never has all logits at once. transformers computes logits of
    those rows only too (`sparse_prediction`). Texts have one length.
    """
    if who == OURS:
        return our_masked_lm(place)
    from transformers import ModernBertForMaskedLM

    attention = flash.register() if who == "flash" else who
    settings = {"attn_implementation": attention, "dtype": place.torch_dtype, "sparse_prediction": True}
    model = ModernBertForMaskedLM.from_pretrained(place.folder, **settings)
    known = head_state(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        model.head.dense.weight.copy_(known["dense"])
        model.head.norm.weight.copy_(known["norm"])
        model.decoder.bias.copy_(known["bias"])
    model = model.to(place.device).eval()  # pyright: ignore[reportArgumentType]

    def ways(case: Case) -> Iterator[Way]:
        places = range(len(case.lengths))
        ids, targets = zip(*(masked(one, case.lengths[one]) for one in places), strict=True)
        inputs = {"input_ids": torch.stack(ids).to(place.device), "labels": torch.stack(targets).to(place.device)}
        yield step_way(f"{who}, sparse_prediction", model, lambda: model(**inputs).loss)

    return ways


def our_masked_lm(place: Place) -> Build:
    model = ours.load(place)
    D, V = model.config.hidden_size, model.config.vocab_size
    head = {name: x.to(place.device, place.torch_dtype).requires_grad_() for name, x in head_state(D, V).items()}

    def ways(case: Case) -> Iterator[Way]:
        places = range(len(case.lengths))
        ids, targets = zip(*(masked(one, case.lengths[one]) for one in places), strict=True)
        targets_T = torch.cat(targets)
        rows_Q = (targets_T >= 0).nonzero()[:, 0].to(place.device)
        targets_Q = targets_T[targets_T >= 0].to(place.device)
        batch = pack([one.tolist() for one in ids]).to(place.device)

        def loss() -> Tensor:
            for parameter in head.values():
                parameter.grad = None
            h_QD = F.gelu(F.linear(model(batch, rows=rows_Q), head["dense"]))
            h_QD = ops.layer_norm(h_QD, head["norm"], None, model.config.norm_eps)
            table_VD = model.embeddings.tok_embeddings.weight
            return ops.linear_cross_entropy(h_QD, table_VD, head["bias"], targets_Q)

        yield step_way("packed, masked rows only", model, loss)

    return ways


def head_state(width: int, vocabulary: int) -> dict[str, Tensor]:
    """Seeded parameters of the head over hidden states; its matrix over the vocabulary is the embedding table."""
    draw = torch.Generator().manual_seed(1)
    dense = torch.randn(width, width, generator=draw) * 1.2 / math.sqrt(width)
    norm = 0.7 + 0.6 * torch.rand(width, generator=draw)
    # Logits of the size of a trained model's, for the table is of unit variance.
    return {"dense": dense, "norm": norm / math.sqrt(width), "bias": 0.1 * torch.randn(vocabulary, generator=draw)}


def masked(place: int, length: int) -> tuple[Tensor, Tensor]:
    """The ids of a text with some of them masked, and what stood there, `IGNORED` elsewhere; at least one is masked."""
    ids = texts.ids(place, length)
    chosen = torch.rand(length, generator=torch.Generator().manual_seed(place)) < MASKED
    chosen[0] = True
    return ids.masked_fill(chosen, MASK_ID), ids.masked_fill(~chosen, IGNORED)


def contrastive(place: Place, who: str) -> Build:
    """A step of ColBERT on pairs: every query against all documents of the batch, by MaxSim and cross entropy.

    The first half of the texts are queries, the second their documents. Ours stays packed; transformers pads, and
    scores by an einsum and a mask as PyLate does.
    """
    model = loaded(place, who)
    weight_ED = projection(model.config.hidden_size, WIDTH).to(place.device, place.torch_dtype).requires_grad_()
    forward = None if who == OURS else peers.forward_of(model)

    def ways(case: Case) -> Iterator[Way]:
        pairs = len(case.lengths) // 2
        sides = [range(pairs), range(pairs, 2 * pairs)]
        wanted_B = torch.arange(pairs, device=place.device)
        score = packed_scores(case, place, sides) if forward is None else padded_scores(case, place, sides)

        def loss() -> Tensor:
            weight_ED.grad = None
            return F.cross_entropy(score(forward or model, weight_ED), wanted_B)

        yield step_way("packed" if forward is None else f"{who}, padded, einsum", model, loss)

    return ways


Score = Callable[[Callable[[Any], Tensor], Tensor], Tensor]
"""From a model and the projection to `[B, B]` scores, float32."""


def packed_scores(case: Case, place: Place, sides: Sequence[Sequence[int]]) -> Score:
    batches = [pack([texts.ids(one, case.lengths[one]).tolist() for one in side]).to(place.device) for side in sides]

    def score(model: Callable[[Any], Tensor], weight_ED: Tensor) -> Tensor:
        queries_QE, documents_NE = (ops.project_normalize(model(batch), weight_ED) for batch in batches)
        return ops.maxsim(queries_QE, batches[0].cu_seqlens, documents_NE, batches[1].cu_seqlens)

    return score


def padded_scores(case: Case, place: Place, sides: Sequence[Sequence[int]]) -> Score:
    inputs = []
    for side in sides:
        ids_BS, mask_BS = texts.padded(case.lengths, side)
        one = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS) if mask_BS is None else mask_BS}
        inputs.append(peers.onto(one, place))

    def score(forward: Callable[[Any], Tensor], weight_ED: Tensor) -> Tensor:
        queries_BSE, documents_BSE = (F.normalize(F.linear(forward(one), weight_ED), dim=-1) for one in inputs)
        scores_BBST = torch.einsum("ash,bth->abst", queries_BSE, documents_BSE).float()
        hidden = inputs[1]["attention_mask"][None, :, None] == 0
        best_BBS = scores_BBST.masked_fill(hidden, -math.inf).amax(-1)
        return (best_BBS * inputs[0]["attention_mask"][:, None]).sum(-1)

    return score


def projection(width: int, to: int) -> Tensor:
    """A seeded matrix `[to, width]`."""
    return torch.randn(to, width, generator=torch.Generator().manual_seed(2)) / math.sqrt(width)


def step_way(settings: str, model: nn.Module, loss: Callable[[], Tensor]) -> Way:
    """A loss and its gradients. What is compared is a gradient times the loss, so that both must be right."""

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        found = loss()
        found.backward()
        return found.detach()

    def answer() -> Tensor:
        found = run()
        weight = next(weight for name, weight in model.named_parameters() if name.endswith(GRADIENT))
        assert weight.grad is not None
        return weight.grad.float().cpu() * found.float().cpu()

    return Way(settings, run, answer)
