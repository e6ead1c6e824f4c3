"""A text that a model reads only in part is named once a call, whatever encodes it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modernbert import ColBERT, Encoder, Session, Tokenizer
from modernbert.heads.colbert import ColBERTConfig
from modernbert.inference import encode
from modernbert.tokenizer import TruncationWarning

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
LONG = "far more words than either length has room for " * 5
TEXTS = ["one", "two words", LONG, "", LONG]


@pytest.fixture(scope="module")
def colbert() -> ColBERT:
    torch.manual_seed(0)
    encoder, tokenizer = Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)
    return ColBERT.from_encoder(
        encoder, tokenizer, dim=8, config=ColBERTConfig(query_length=16, document_length=40)
    ).eval()


def messages(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if issubclass(one.category, TruncationWarning)]


def length(colbert: ColBERT, name: str) -> int:
    whole = getattr(colbert, f"tokenize_{name}")([LONG])
    return whole.batch.num_tokens + whole.truncated[0]


@pytest.mark.parametrize("name", ["queries", "documents"])
@pytest.mark.parametrize("maker", [lambda model: model, Session])
def test_encoding_names_the_first_text_once(colbert: ColBERT, name: str, maker: Any) -> None:
    run = getattr(maker(colbert), f"encode_{name}")
    (message,) = messages(lambda: run(TEXTS))
    read = {"queries": 16, "documents": 40}[name]
    start = f"texts[2] has at least {length(colbert, name)} tokens, of which the model reads {read}"
    assert message.startswith(f"{start} (2 of 5 texts are longer than it reads): ")
    assert messages(lambda: run([LONG]))[0].startswith(f"texts[0]{start[8:]}: ")
    assert not messages(lambda: run(TEXTS[:2]))


def test_one_warning_for_all_parts(colbert: ColBERT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "TEXTS", 2)
    for call in (lambda: colbert.encode_documents(TEXTS * 3), lambda: list(colbert.stream_documents(iter(TEXTS * 3)))):
        (message,) = messages(call)
        assert message.startswith("texts[2] has")
        assert "(1 of 4 texts" in message
    assert len(messages(lambda: next(colbert.stream_documents(iter([LONG, *TEXTS]))))) == 1


def test_processes_leave_the_warning_to_the_caller(colbert: ColBERT) -> None:
    (message,) = messages(lambda: colbert.encode_documents(["one"] * 5 + [LONG], devices=["cpu"], progress=False))
    assert message.startswith("texts[5] has at least")


def test_tokenising_for_training_does_not_warn(colbert: ColBERT) -> None:
    for call in (colbert.tokenize_queries, colbert.tokenize_documents, colbert.query_ids, colbert.document_ids):
        assert not messages(lambda call=call: call(TEXTS))
    assert not messages(lambda: colbert.query_tokens([[7] * 99]))


def test_an_expanded_query_counts_its_own_tokens(colbert: ColBERT) -> None:
    config = ColBERTConfig(query_length=16, document_length=40, do_query_expansion=True)
    expanded = ColBERT(colbert.encoder, colbert.tokenizer, list(colbert.dense), config)  # pyright: ignore
    assert messages(lambda: expanded.encode_queries(TEXTS)) == messages(lambda: colbert.encode_queries(TEXTS))
