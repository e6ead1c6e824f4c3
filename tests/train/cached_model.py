"""A small model with vectors for late interaction or for dot products, and texts for it.

Without `hf_twin`, whose import of transformers each process of a test over ranks would repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modernbert_kernels as ops
from modernbert import Encoder, EncoderConfig, Ragged, pack
from modernbert.packing import Packed
from modernbert.train.grad_cache import token_chunks


def random_ids(lengths: Sequence[int], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(100, (length,), generator=generator).tolist() for length in lengths]


QUERIES, DOCUMENTS = random_ids([3, 9, 1, 6, 5]), random_ids([20, 4, 33, 2, 15, 8, 8, 27, 1, 11], seed=2)
SIZES = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
DROPOUT = {"embedding_dropout": 0.1, "attention_dropout": 0.2, "mlp_dropout": 0.3}


class Model(nn.Module):
    """Token vectors for late interaction, or the vector of [CLS]."""

    def __init__(self, late: bool, **config: Any) -> None:
        super().__init__()
        self.late = late
        self.encoder = Encoder(EncoderConfig(**SIZES, num_attention_heads=2, local_attention=16, **config))
        self.projection = nn.Linear(32, 16, bias=False)
        for weight in self.encoder.parameters():  # so that every part matters
            if weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, batch: Packed) -> Ragged | Tensor:
        offsets, batch = batch.cu_seqlens.long(), batch.to(self.projection.weight.device)
        if self.late:
            return Ragged(ops.project_normalize(self.encoder(batch), self.projection.weight), offsets)
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
