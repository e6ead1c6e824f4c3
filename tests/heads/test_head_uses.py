"""Autocast of heads, and the uses of ColBERT that tests of other heads have: compiled, copied, pickled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from head_twin import CONFIGS, LABELLED, head_twins
from hf_twin import make_loud, pad, random_ids
from torch import Tensor

from modernbert import ColBERT, Embedder, Encoder, Tokenizer, pack
from modernbert.heads.embedder import EmbedderConfig

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
TEXTS = random_ids([1, 40, 17, 66], 100)
QUERIES = ["How do I fold a tensor?", "", "the gradient of the norm", "a " * 60]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("task", LABELLED)
def test_autocast_of_a_head(task: str, name: str, dtype: torch.dtype) -> None:
    """No worse than twice transformers' own error, in training and in inference."""
    theirs, ours = head_twins(task, CONFIGS[name])
    ids, mask = pad(TEXTS)
    rows = slice(None) if task == "SequenceClassification" else mask.bool()
    truth = copy.deepcopy(theirs).double()(ids, attention_mask=mask).logits[rows].detach()
    with torch.autocast("cpu", dtype):
        plain = theirs(ids, attention_mask=mask).logits[rows].detach()
        got = ours(pack(TEXTS))
        with torch.inference_mode():
            quiet = ours(pack(TEXTS))
    got.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in ours.parameters())
    for logits in (got.detach(), quiet):
        assert_accurate(logits, plain, truth)


def colbert() -> ColBERT:
    torch.manual_seed(0)
    model = ColBERT.from_encoder(Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE), dim=24).eval()
    make_loud(model)
    return model


def embedder() -> Embedder:
    torch.manual_seed(0)
    config = EmbedderConfig(pooling="mean")
    model = Embedder(Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE), config=config).eval()
    make_loud(model)
    return model


def vectors(model: Any) -> Tensor:
    tokens = model.tokenize_queries(QUERIES) if isinstance(model, ColBERT) else model.tokenize(QUERIES)
    output = model(tokens)
    return output if isinstance(output, Tensor) else output.values


@pytest.mark.parametrize("make", [colbert, embedder], ids=["ColBERT", "Embedder"])
def test_autocast_of_a_retriever(make: Callable[[], Any]) -> None:
    """No worse than twice the error of weights in bfloat16; gradients of every parameter."""
    model = make()
    truth = vectors(copy.deepcopy(model).double()).detach()
    plain = vectors(copy.deepcopy(model).bfloat16()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        got = vectors(model)
    got.float()[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert_accurate(got.detach().to(plain.dtype), plain, truth)


def test_a_compiled_colbert() -> None:
    """One graph for batches of any lengths, and its gradients."""
    model = colbert()
    model.encoder.layers, model.encoder.thetas = model.encoder.layers[:1], model.encoder.thetas[:1]
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for texts in (QUERIES, QUERIES[:2]):
        batch = model.tokenize_queries(texts).batch
        got, wanted = compiled(batch), model(batch)
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
        grads = [torch.autograd.grad(rows[:, 0].sum(), list(model.parameters())) for rows in (got, wanted)]
        for mine, yours in zip(*grads, strict=True):
            torch.testing.assert_close(mine, yours, rtol=0, atol=1e-4 * max(1, yours.abs().max().item()))


def test_copies_of_a_colbert_are_apart() -> None:
    model = colbert()
    wanted = vectors(model).detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(vectors(twin), wanted)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter += 0.1
        assert not torch.equal(vectors(twin), wanted)
    assert torch.equal(vectors(model), wanted)
