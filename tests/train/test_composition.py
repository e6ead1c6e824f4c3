"""No loss and no gradient of a text depends on what else is in its batch, forward and backward.

Each loss is computed for every text alone and for texts packed into one batch, in several orders, behind and between
others. Two things must hold.

1. The sum of the batch's losses, and its gradient of every weight, are the sums over the texts alone. In float64 they
   agree to 1e-12 of the largest entry: the two add up the same numbers in another order, so only rounding differs, and
   1e-12 is some thousand rounding steps (2.2e-16) for sums of that many terms. What leaks from text to text is in the
   size of attention weights, at 1e-3 and more. In float32 the batch may be off from float64 by twice as much as the
   texts alone are, and one rounding step.
2. The gradient that the loss of one text gives to the embeddings of every other token in the batch is zero. Not small:
   each bit of it is zero, which no rounding excuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from accuracy import assert_accurate
from hf_twin import BIASES, TINY, make_loud, random_ids
from torch import Tensor, nn

import modernbert_kernels as ops
from modernbert import Encoder, Ragged, pack
from modernbert.train.losses import info_nce, kl_distill, n_way_scores

TEXTS = random_ids([9, 1, 40, 23, 2, 33], 100)
"""Some longer than the window of 8 on each side, some shorter; the global layers see all of each."""
WAYS = 3
PAIRS = [  # a query and its documents, of which the first is the positive
    (query, random_ids(lengths, 100, seed=seed))
    for seed, (query, lengths) in enumerate(zip(TEXTS, ([5, 30, 1], [20, 2, 2], [1, 1, 44]) * 2, strict=True), start=2)
]
TEACHER = torch.randn(len(PAIRS), WAYS, generator=torch.Generator().manual_seed(9))
ORDERS = [[0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 1, 3], [2, 3]]


class Model(nn.Module):
    """An encoder whose weights all matter, with a projection for late interaction."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(replace(TINY, **BIASES))
        make_loud(self.encoder)
        self.projection = nn.Linear(TINY.hidden_size, 16, bias=False)

    def embeddings(self, texts: list[list[int]]) -> Tensor:
        """`[T, D]`, leaves: what reaches them has come through every layer."""
        ids = torch.tensor([token for text in texts for token in text], device=self.projection.weight.device)
        return self.encoder.embeddings.tok_embeddings(ids)

    def vectors(self, texts: list[list[int]], embeddings_TD: Tensor, *, expanded: bool = False) -> Ragged:
        """With `expanded`, the last third of a text are query-only rows, as the [MASK] of query expansion."""
        batch = pack(texts)
        if expanded:
            keys = [len(text) - len(text) // 3 for text in texts]
            batch = replace(batch, key_lengths=torch.tensor(keys, dtype=torch.int32))
        x_TD = self.encoder(batch.to(embeddings_TD.device), inputs_embeds=embeddings_TD)
        return Ragged(ops.project_normalize(x_TD, self.projection.weight), batch.cu_seqlens.long())


Losses = tuple[Tensor, list[Tensor], list[list[int]]]
"""The loss of each item; the embeddings of the packed batches; for each batch, the item of every token."""


def masked_lm_losses(model: Model, items: list[int]) -> Losses:
    """Every third token of each text is predicted, through the tied table."""
    texts = [TEXTS[item] for item in items]
    batch, x_TD = pack(texts), model.embeddings(texts)
    owner = [index for index, text in enumerate(texts) for _ in text]
    places = [place for text in texts for place in range(len(text))]
    rows = torch.tensor([row for row, place in enumerate(places) if place % 3 == 0], device=x_TD.device)
    h_QD = model.encoder(batch.to(x_TD.device), rows=rows, inputs_embeds=x_TD)
    table_VD, labels_Q = model.encoder.embeddings.tok_embeddings.weight, batch.input_ids.to(x_TD.device)[rows]
    owner_Q = torch.tensor(owner, device=x_TD.device)[rows]
    loss_Q = ops.linear_cross_entropy(h_QD, table_VD, None, labels_Q, reduction="none")
    losses = torch.zeros(len(items), dtype=loss_Q.dtype, device=loss_Q.device).index_add(0, owner_Q, loss_Q)
    whole = ops.linear_cross_entropy(h_QD, table_VD, None, labels_Q)  # as training computes it
    torch.testing.assert_close(losses.sum() / len(rows), whole)
    return losses, [x_TD], [owner]


def late_interaction_losses(model: Model, items: list[int], loss: Callable[[Tensor, list[int]], Tensor]) -> Losses:
    """Queries in one batch, documents in another."""
    queries = [PAIRS[item][0] for item in items]
    documents = [document for item in items for document in PAIRS[item][1]]
    q_TD, d_TD = model.embeddings(queries), model.embeddings(documents)
    scores_Bn = n_way_scores(model.vectors(queries, q_TD, expanded=True), model.vectors(documents, d_TD))
    owners = [[i for i, text in enumerate(queries) for _ in text]]
    owners += [[i // WAYS for i, text in enumerate(documents) for _ in text]]
    return loss(scores_Bn, items), [q_TD, d_TD], owners


def info_nce_losses(model: Model, items: list[int]) -> Losses:
    """Each query with its own positive and its own negatives: the pairs of the batch are no negatives of each other."""

    def losses(scores_Bn: Tensor, items: list[int]) -> Tensor:
        one_by_one = [info_nce(row[None, :1], negatives_BN=row[None, 1:], temperature=0.5) for row in scores_Bn]
        # As training does it, with all pairs of the batch in one group.
        matrix = scores_Bn[:, :1].expand(-1, len(items))
        groups = torch.zeros(len(items), device=matrix.device)
        whole = info_nce(matrix, groups, negatives_BN=scores_Bn[:, 1:], temperature=0.5)
        torch.testing.assert_close(torch.stack(one_by_one).mean(), whole)
        return torch.stack(one_by_one)

    return late_interaction_losses(model, items, losses)


def kl_losses(model: Model, items: list[int]) -> Losses:
    def losses(scores_Bn: Tensor, items: list[int]) -> Tensor:
        teacher = TEACHER[items].to(scores_Bn.dtype)
        one_by_one = [kl_distill(s[None], t[None], temperature=0.5) for s, t in zip(scores_Bn, teacher, strict=True)]
        whole = kl_distill(scores_Bn, teacher, temperature=0.5)
        torch.testing.assert_close(torch.stack(one_by_one).mean(), whole)
        return torch.stack(one_by_one)

    return late_interaction_losses(model, items, losses)


LOSSES = {"masked LM": masked_lm_losses, "InfoNCE": info_nce_losses, "KL": kl_losses}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(dtype: torch.dtype, device: str) -> Model:
    torch.manual_seed(0)
    return Model().to(device, dtype)


def summed(model: Model, losses: Callable[..., Losses], batches: list[list[int]]) -> dict[str, Tensor]:
    """The loss of each item and the gradient of every weight, over batches whose losses are added up."""
    model.zero_grad()
    found = [losses(model, items)[0] for items in batches]
    torch.cat(found).sum().backward()
    grads = {name: weight.grad.cpu() for name, weight in model.named_parameters() if weight.grad is not None}
    return {"losses": torch.cat(found).detach().cpu(), **grads}


@pytest.mark.parametrize("order", ORDERS, ids=["in order", "shuffled", "two"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_is_the_sum_of_its_texts_alone(device: str, dtype: torch.dtype, name: str, order: list[int]) -> None:
    losses, alone = LOSSES[name], [[item] for item in order]
    truth = summed(make(torch.float64, "cpu"), losses, alone)
    model = make(dtype, device)
    got = summed(model, losses, [order])
    assert got.keys() == truth.keys()
    assert truth["losses"].min() > 1e-3
    if dtype is torch.float64:
        for key, value in truth.items():
            limit = 1e-12 * value.abs().max().item()
            torch.testing.assert_close(got[key], value, rtol=0, atol=limit, msg=lambda text, key=key: f"{key}: {text}")
        return
    plain = summed(model, losses, alone)
    for key, value in truth.items():
        assert_accurate(got[key], plain[key], value, key)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_text_gives_no_gradient_to_the_tokens_of_others(device: str, name: str) -> None:
    """Every bit of it is zero; and its own tokens get some."""
    model = make(torch.float32, device)
    losses_B, embeddings, owners = LOSSES[name](model, ORDERS[1])
    for index, loss in enumerate(losses_B):
        for grad_TD, owner in zip(torch.autograd.grad(loss, embeddings, retain_graph=True), owners, strict=True):
            own_T = torch.tensor(owner, device=grad_TD.device) == index
            assert own_T.any()
            assert not grad_TD[~own_T].any()
            assert grad_TD[own_T].any()
