"""Rows that are asked for are the rows of the whole result, with the same gradients, for less work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hf_twin import TINY, random_ids, twins
from torch import Tensor, nn

from modernbert import ColBERT, Encoder, Packed, Session, pack
from modernbert.encoder import Layer
from modernbert.inference.batches import split_rows

LENGTHS = [5, 0, 70, 1, 33]


@pytest.fixture
def encoder() -> Encoder:
    return twins(TINY)[1]


@pytest.fixture
def batch() -> Packed:
    return pack(random_ids(LENGTHS, TINY.vocab_size))


ROWS = {
    "first of each": [0, 5, 75, 76],
    "last": [108],
    "none": [],
    "all": list(range(109)),
    "some": [0, 1, 7, 50, 51, 90, 108],
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_rows_are_those_of_the_whole_with_the_same_gradients(
    encoder: Encoder, batch: Packed, name: str, checkpointing: bool
) -> None:
    encoder.gradient_checkpointing = checkpointing
    rows = torch.tensor(ROWS[name], dtype=torch.int64)
    weight = torch.randn(len(rows), TINY.hidden_size, generator=torch.Generator().manual_seed(1))

    def values_and_gradients(x_QD: Tensor) -> list[Tensor]:
        gradients = torch.autograd.grad((x_QD * weight).sum(), list(encoder.parameters()), materialize_grads=True)
        return [x_QD, *gradients]

    wanted = values_and_gradients(encoder(batch)[rows])
    got = values_and_gradients(encoder(batch, rows=rows))
    for mine, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=2e-5)


def test_the_last_layer_skips_the_others(encoder: Encoder, batch: Packed) -> None:
    seen: dict[str, int] = {}
    for number, layer in enumerate(encoder.layers):
        assert isinstance(layer, Layer)
        for name, module in (("Wqkv", layer.attn.Wqkv), ("Wo", layer.attn.Wo), ("mlp", layer.mlp)):

            def note(module: nn.Module, inputs: tuple[Tensor, ...], key: str = f"{number} {name}") -> None:
                seen[key] = len(inputs[0])

            module.register_forward_pre_hook(note)
    encoder(batch, rows=torch.tensor([3, 80]))
    last = len(encoder.layers) - 1
    few = {f"{last} Wo", f"{last} mlp"}
    assert {key for key, rows in seen.items() if rows == 2} == few
    assert {rows for key, rows in seen.items() if key not in few} == {109}


def test_rows_of_a_batch_that_runs_in_parts(encoder: Encoder) -> None:
    """int32 as well, as [CLS] has them in cu_seqlens."""
    batch = pack(random_ids([700, 900, 1500, 30, 2100, 8], TINY.vocab_size))
    with torch.no_grad():
        whole = encoder(batch)
        for rows in (batch.cu_seqlens[:-1], torch.arange(3, batch.num_tokens, 97), torch.tensor([1600, 5237])):
            torch.testing.assert_close(encoder(batch, rows=rows), whole[rows], rtol=0, atol=2e-5)
            torch.testing.assert_close(Session(encoder)(batch, rows=rows), whole[rows], rtol=0, atol=2e-5)


def test_split_rows() -> None:
    rows = torch.tensor([0, 4, 5, 9, 14])
    assert [part.tolist() for part in split_rows(rows, [5, 0, 4, 1, 5])] == [[0, 4], [], [0], [0], [4]]


def test_rows_trace_in_one_graph(encoder: Encoder, batch: Packed) -> None:
    rows = torch.tensor([0, 40])
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch, rows=rows), encoder(batch, rows=rows), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (torch.tensor([3, 2]), "increasing"),
        (torch.tensor([2, 2]), "increasing"),
        (torch.tensor([-1, 2]), "increasing"),
        (torch.tensor([109]), "less than the 109 tokens"),
        (torch.tensor([1.0]), "float32 of shape"),
        (torch.tensor([[1]]), "of shape"),
        (torch.ones(109, dtype=torch.bool), "bool of shape"),
    ],
)
def test_rows_that_cannot_be_meant(encoder: Encoder, batch: Packed, rows: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        encoder(batch, rows=rows)


def test_rows_with_what_contradicts_them(encoder: Encoder, batch: Packed) -> None:
    rows = torch.tensor([1])
    with pytest.raises(ValueError, match="index last_hidden_state"):
        encoder(torch.zeros(1, 3, dtype=torch.int64), rows=rows)


def test_colbert_gives_the_rows_that_are_scored() -> None:
    model = ColBERT.default()
    tokens = model.tokenize_documents(["one two three", "", "four"])
    tokens = replace(tokens, keep=torch.arange(tokens.batch.num_tokens) % 3 > 0)
    with torch.no_grad():
        wanted = tokens.ragged(model(tokens.batch))
        got = model(tokens.batch, rows=tokens.rows)
    assert tokens.offsets.tolist() == wanted.offsets.tolist()
    assert [len(rows) for rows in wanted] == [4, 2, 2]
    torch.testing.assert_close(got, wanted.values, rtol=0, atol=2e-6)
    assert model.tokenize_queries(["none is left out"]).rows is None
