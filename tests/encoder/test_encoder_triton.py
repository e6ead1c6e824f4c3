"""The whole encoder on the Triton kernels gives transformers' numbers, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from accuracy import assert_accurate
from hf_twin import BIASES, TINY, pad, random_ids, twins
from kernel_calls import DEVICE, TRITON
from torch import Tensor, nn

import modernbert_kernels as ops
from modernbert import ColBERT, EncoderConfig, maxsim, pack

pytestmark = TRITON

LENGTHS = [1, 2, 17, 64, 65]
CONFIGS = {"plain": TINY, "biases, silu": replace(TINY, **BIASES, hidden_activation="silu", num_hidden_layers=3)}


def values_and_gradients(model: nn.Module, run: Callable[[], list[Tensor]]) -> dict[str, Tensor]:
    """Every row of every text, and the gradient of each parameter by a fixed cotangent, in float64 on the CPU."""
    model.zero_grad()
    rows = run()
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=generator).bfloat16() for x in rows]
    torch.stack([(x.double() * w.to(x.device)).sum() for x, w in zip(rows, weights, strict=True)]).sum().backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"values": torch.cat(rows).detach().cpu(), **gradients}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_encoder_is_as_accurate_as_transformers(name: str, dtype: torch.dtype) -> None:
    """Against transformers in float64, with at most twice the error of transformers in the same dtype."""
    config: EncoderConfig = CONFIGS[name]
    theirs, ours = twins(config)
    ids = random_ids(LENGTHS, config.vocab_size)
    padded, mask = pad(ids)

    def padded_rows(model: nn.Module) -> list[Tensor]:
        states = model(padded, attention_mask=mask).last_hidden_state
        return [row[: len(one)] for row, one in zip(states, ids, strict=True)]

    # Copies, because the twins share their parameters, and one of them moves.
    ours, theirs = copy.deepcopy(ours).to(DEVICE, dtype), theirs.to(dtype)
    exact = copy.deepcopy(theirs).double()
    truth = values_and_gradients(exact, lambda: padded_rows(exact))
    plain = values_and_gradients(theirs, lambda: padded_rows(theirs))
    batch = pack(ids, vocab_size=config.vocab_size).to(DEVICE)
    with ops.backend("triton"):
        got = values_and_gradients(ours, lambda: list(ours(batch).split(batch.lengths)))
    assert got.keys() == truth.keys()
    for key, value in got.items():
        assert_accurate(value, plain[key], truth[key], key)


def test_query_rows_give_the_reference_numbers() -> None:
    """Rows that no token sees, as ColBERT's query expansion makes them."""
    _, ours = twins(TINY)
    ids = random_ids([9, 30, 40], TINY.vocab_size)
    padded, mask = pad(ids, extra=20)
    queries = 1 - mask
    with torch.inference_mode():
        batch = pack(padded, mask, query_mask=queries)
        wanted = ours(batch)
        with ops.backend("triton"):
            got = ours.to(DEVICE)(batch.to(DEVICE))
    torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=1e-4)


def test_the_encoder_compiles_in_one_graph() -> None:
    """`torch.compile(fullgraph=True)` traces the fused ops, forward and backward."""
    _, ours = twins(TINY)
    ours.to(DEVICE)
    batch = pack(random_ids([5, 40], TINY.vocab_size)).to(DEVICE)
    weight = ours.layers[1].attn.Wqkv.weight
    with ops.backend("triton"):
        wanted = ours(batch)
        (expected,) = torch.autograd.grad(wanted.square().sum(), weight)
        got = torch.compile(ours, fullgraph=True, backend="aot_eager")(batch)
        (gradient,) = torch.autograd.grad(got.square().sum(), weight)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_colbert_finds_the_same_with_the_same_scores() -> None:
    """From text to scores with the model that ships here: encoder, projection and MaxSim on the kernels."""
    model = ColBERT.default().to(DEVICE)
    texts = ["A glacier is a body of dense ice.", "The treaty of 1648 ended a war, thirty years old."]

    def scores() -> Tensor:
        with torch.inference_mode():
            rows = []
            for tokens in (model.tokenize_queries(["which war ended?"]), model.tokenize_documents(texts)):
                rows.append(tokens.ragged(model(tokens.batch.to(DEVICE))))
            return maxsim(*rows).cpu()

    wanted = scores()
    with ops.backend("triton"):
        got = scores()
    assert wanted.argmax() == 1
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
