"""What is given to encode_* is what it seems, or is refused in a sentence that names the index or the argument."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modernbert import ColBERT, Session
from modernbert.encoder import Encoder
from modernbert.heads.colbert import ColBERTConfig
from modernbert.inference import devices, encode
from modernbert.late_interaction import Ragged
from modernbert.tokenizer import Tokenizer

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
TEXTS = ["one", "two words", "", "a longer text of some more words, to be the first of its batch"]


class Column:
    """As a column of pandas: it is iterated over its values, and its index is not their number."""

    ndim = 1

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, label: int) -> Any:
        raise KeyError(label)


class Table(Column):
    ndim = 2


@pytest.fixture(scope="module")
def colbert() -> ColBERT:
    torch.manual_seed(0)
    encoder, tokenizer = Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)
    return ColBERT.from_encoder(encoder, tokenizer, dim=24, config=ColBERTConfig(document_length=40)).eval()


@pytest.fixture(scope="module", params=["model", "session", "queries", "tokens", "ids", "stream"])
def entrance(request: pytest.FixtureRequest, colbert: ColBERT) -> Callable[[Any], Any]:
    session = Session(colbert)
    return {
        "model": colbert.encode_documents,
        "session": session.encode_documents,
        "queries": session.encode_queries,
        "tokens": colbert.tokenize_queries,
        "ids": colbert.document_ids,
        "stream": lambda texts: list(session.stream_documents(texts)),
    }[request.param]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a text", "got one str: put it in a list"),
        (b"a text", "got one bytes: put it in a list"),
        ({"id": "a text"}, "got one dict: make a list of its texts"),
        ({"id": "a text"}.keys(), "got one dict_keys"),
        ({"a text"}, "got one set"),
        (None, "got one NoneType"),
        (7, "got one int"),
        (np.array("a text"), "got a ndarray that is not one column"),
        (np.array([["a", "b"]]), "got a ndarray that is not one column"),
        (Table(["column"]), "got a Table that is not one column"),
        (["a", None], r"texts\[1\] must be a str, got NoneType None"),
        (["a", "b", 7], r"texts\[2\] must be a str, got int 7"),
        (["a", ("b", "c")], r"texts\[1\] must be a str, got tuple"),
        ([b"a"], r"texts\[0\] must be a str, got bytes"),
        ([["a"]], r"texts\[0\] must be a str, got list"),
        (Column(["a", float("nan")]), r"texts\[1\] must be a str, got float nan"),
    ],
)
def test_what_is_not_a_list_of_texts(entrance: Callable[[Any], Any], texts: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        entrance(texts)


def test_half_a_surrogate_pair(entrance: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"texts\[1\] has half a surrogate pair at character 2"):
        entrance(["é", "ab\ud800"])


@pytest.mark.parametrize("make", [list, tuple, iter, np.array, Column, lambda texts: (text for text in texts)])
def test_every_iterable_with_an_order(colbert: ColBERT, make: Callable[[list[str]], Iterable[str]]) -> None:
    wanted = colbert.encode_documents(TEXTS)
    for model in (colbert, Session(colbert)):
        got = model.encode_documents(make(TEXTS))
        assert torch.equal(got.offsets, wanted.offsets)
        torch.testing.assert_close(got.values, wanted.values, rtol=0, atol=2e-6)


def test_the_index_is_that_of_the_whole_list(colbert: ColBERT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "TEXTS", 3)
    for wrong, error in ((None, TypeError), ("\udfff", ValueError)):
        for texts in ([*TEXTS, *TEXTS, wrong], iter([*TEXTS, *TEXTS, wrong])):
            with pytest.raises(error, match=r"texts\[8\]"):
                colbert.encode_queries(texts)


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, True, "8", float("nan")])
def test_counts(colbert: ColBERT, value: Any) -> None:
    for model in (colbert, Session(colbert)):
        for call in (model.encode_queries, model.encode_documents, model.stream_documents):
            with pytest.raises(ValueError, match="batch_tokens must be at least 1 and a whole number"):
                call(TEXTS, batch_tokens=value)
        for call in (model.encode_documents, model.stream_documents):
            with pytest.raises(ValueError, match="pool_factor must be at least 1 and a whole number"):
                call(iter([None]), pool_factor=value)  # before any text is looked at
    with pytest.raises(ValueError, match="batch_tokens"):
        colbert.encode_documents(TEXTS, devices=["cpu"], batch_tokens=value)
    with pytest.raises((TypeError, ValueError), match="max_length"):
        colbert.tokenizer(TEXTS, max_length=value)


def test_counts_of_numpy(colbert: ColBERT) -> None:
    wanted = colbert.encode_documents(TEXTS, batch_tokens=7, pool_factor=2)
    got = colbert.encode_documents(TEXTS, batch_tokens=np.int64(7), pool_factor=np.int32(2))  # pyright: ignore
    assert torch.equal(got.values, wanted.values)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("cpu", "devices is one device, 'cpu': put it in a list"),
        (torch.device("cpu"), "devices is one device, 'cpu'"),
        (["nope"], r"devices\[0\] is 'nope', which this machine does not have"),
        (["cpu", "meta"], r"devices\[1\] is 'meta'"),
        (["cuda:99"], r"devices\[0\] is 'cuda:99'"),
        (["cpu", None], r"devices\[1\] is None"),
        ([0], r"devices\[0\] is 0"),
        ([], "devices is empty"),
    ],
)
def test_devices_are_looked_at_before_a_process_starts(colbert: ColBERT, wanted: Any, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        colbert.encode_documents(TEXTS, devices=wanted)
    assert time.perf_counter() - start < 2


def test_the_error_of_a_process_is_handed_on(colbert: ColBERT, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model that does not fit on its device, which was a BrokenProcessPool without a reason."""
    monkeypatch.setattr(devices, "_checked", lambda wanted: ["cuda:77"])
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        colbert.encode_documents(TEXTS, devices=["cuda:77"])


@torch.no_grad()
def test_vectors_that_are_not_finite_are_named(colbert: ColBERT, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token of one text has an embedding with NaN."""
    table = colbert.encoder.embeddings.tok_embeddings.weight
    token = colbert.document_ids(["glacier"])[0][0]
    assert all(token not in ids for ids in colbert.document_ids(TEXTS))
    kept, table[token, 3] = table[token].clone(), float("nan")
    try:
        for texts in ([*TEXTS, "glacier"], [*TEXTS, "glacier", *TEXTS]):
            for model in (colbert, Session(colbert)):
                with pytest.raises(ValueError, match=r"texts\[4\] has a vector that is not finite"):
                    model.encode_documents(texts, batch_tokens=8)
                with pytest.raises(ValueError, match=r"texts\[4\] has a vector that is not finite"):
                    list(model.stream_documents(texts))
        with pytest.raises(ValueError, match=r"texts\[0\] has a vector that is not finite"):
            Session(colbert).encode_tokens(colbert.tokenize_queries(["glacier"]))
        colbert.encode_documents(TEXTS)
    finally:
        table[token] = kept


def test_documents_of_a_generator_come_in_order_and_in_bounded_memory(
    colbert: ColBERT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts without an end: no more than a part of them is taken ahead of the vectors."""
    monkeypatch.setattr(encode, "TEXTS", 8)
    taken = itertools.count()

    def texts() -> Iterator[str]:
        while True:
            yield TEXTS[next(taken) % len(TEXTS)]

    wanted = list(colbert.encode_documents(TEXTS))
    for model in (colbert, Session(colbert)):
        taken = itertools.count()
        for index, x_NE in enumerate(itertools.islice(model.stream_documents(texts()), 50)):
            torch.testing.assert_close(x_NE, wanted[index % len(TEXTS)], rtol=0, atol=2e-6)
            assert x_NE.untyped_storage().nbytes() == x_NE.nbytes  # it keeps no other text in memory
        assert next(taken) <= 50 + 2 * 8
    assert list(colbert.stream_documents([])) == []
    pooled = colbert.encode_documents(TEXTS, pool_factor=3)
    for got, one in zip(colbert.stream_documents(iter(TEXTS), pool_factor=3), pooled, strict=True):
        torch.testing.assert_close(got, one, rtol=0, atol=2e-6)


def test_a_part_of_a_stream_overlaps_as_on_a_gpu(colbert: ColBERT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "TEXTS", 3)
    parts = iter([TEXTS[:3], TEXTS[3:]])
    tokens = encode.one_ahead(lambda part: colbert.tokenize_documents(part, spans=False), parts)
    got = list(encode._encode(encode.Modules(colbert), tokens, 8, None))
    wanted: list[Tensor] = list(colbert.encode_documents(TEXTS))
    for mine, yours in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=2e-6)


def test_the_default_device_and_dtype_change_nothing(colbert: ColBERT) -> None:
    session = Session(colbert)

    def encoded() -> list[Ragged]:
        calls = (colbert.encode_documents, session.encode_documents, Session(colbert).encode_queries)
        return [call(texts) for call in calls for texts in (TEXTS, TEXTS[:1], [])] + [
            colbert.encode_documents(TEXTS, pool_factor=2)
        ]

    wanted = encoded()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        got = encoded()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for mine, yours in zip(got, wanted, strict=True):
        assert mine.values.dtype is torch.float32
        torch.testing.assert_close(mine.values, yours.values, rtol=0, atol=2e-6)


def test_ids_and_batches(colbert: ColBERT) -> None:
    for tokens in (colbert.query_tokens, colbert.document_tokens):
        for ids in ([[10**6]], [[-1]]):
            with pytest.raises(ValueError, match="out of range"):
                tokens(ids)
        for wrong in ([1, 2], [None], ["ab"], [b"ab"], {"input_ids": [[1]]}, [[True]], [[1.5]], [[[1]]]):
            with pytest.raises(TypeError, match="ids"):
                tokens(wrong)  # pyright: ignore
    for model in (colbert, Session(colbert)):
        with pytest.raises(TypeError, match=r"called with a Packed, got Tensor: make one with pack"):
            model(torch.ones(1, 3, dtype=torch.int64))  # pyright: ignore
