"""A small model with vectors for late interaction or for dot products, and texts for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from hf_twin import BIASES, TINY, make_loud, random_ids
from torch import Tensor, nn

import modernbert_kernels as ops
from modernbert import Encoder, Ragged, pack
from modernbert.packing import Packed
from modernbert.train.grad_cache import token_chunks

QUERIES, DOCUMENTS = random_ids([3, 9, 1, 6, 5], 100), random_ids([20, 4, 33, 2, 15, 8, 8, 27, 1, 11], 100, seed=2)
DROPOUT = {"embedding_dropout": 0.1, "attention_dropout": 0.2, "mlp_dropout": 0.3}


class Model(nn.Module):
    """Token vectors for late interaction, or the vector of [CLS]."""

    def __init__(self, late: bool, **config: Any) -> None:
        super().__init__()
        self.late = late
        self.encoder = Encoder(replace(TINY, **BIASES, **config))
        make_loud(self.encoder)
        self.projection = nn.Linear(TINY.hidden_size, 16, bias=False)

    def forward(self, batch: Packed) -> Ragged | Tensor:
        if self.late:
            x_TD = self.encoder(batch)
            return Ragged(ops.project_normalize(x_TD, self.projection.weight), batch.cu_seqlens.long())
        return F.normalize(self.projection(self.encoder(batch, rows=batch.cu_seqlens[:-1])), dim=1)


def make(late: bool, dtype: torch.dtype = torch.float64, **config: Any) -> Model:
    torch.manual_seed(0)
    return Model(late, **config).to(dtype)


def chunks(tokens: int = 25) -> list[list[Packed]]:
    return [token_chunks(pack(texts), tokens) for texts in (QUERIES, DOCUMENTS)]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], limit: float) -> None:
    """To `limit` of the largest entry."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        atol = limit * value.abs().max().item()
        torch.testing.assert_close(got[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
