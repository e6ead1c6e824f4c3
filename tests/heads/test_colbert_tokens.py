"""Ids to `Tokens` in one place: what training assembles is what inference reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from modernbert import ColBERT
from modernbert.encoder import Encoder
from modernbert.heads.colbert import ColBERTConfig
from modernbert.packing import Tokens
from modernbert.tokenizer import Tokenizer

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
TEXTS = ["How do I fold a tensor?", "", "  a b.  ", "words, " * 60]


def make(template: dict[str, Any] | None = None, **settings: Any) -> ColBERT:
    content = json.loads((BACKBONE / "tokenizer.json").read_text("utf-8"))
    if template is not None:
        content["post_processor"] = template
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
    settings = {"query_length": 12, "document_length": 20} | settings
    return ColBERT.from_encoder(Encoder.from_pretrained(BACKBONE), tokenizer, dim=8, config=ColBERTConfig(**settings))


def assert_same(got: Tokens, wanted: Tokens) -> None:
    assert got.batch.input_ids.tolist() == wanted.batch.input_ids.tolist()
    assert got.batch.lengths == wanted.batch.lengths
    assert got.keep.tolist() == wanted.keep.tolist()
    keys = [None if batch.key_lengths is None else batch.key_lengths.tolist() for batch in (got.batch, wanted.batch)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_query_expansion": True},
        {"do_query_expansion": True, "attend_to_expansion_tokens": True},
        {"query_prefix": "", "document_prefix": ""},
        {"query_prompt": "ask: ", "document_prompt": "read: ", "strip": False},
        {"query_length": 3, "document_length": 3},
    ],
)
def test_ids_to_tokens_is_the_second_half_of_tokenizing(settings: dict[str, Any]) -> None:
    model = make(**settings)
    ids = model.query_ids(TEXTS)
    assert_same(model.query_tokens(ids), model.tokenize_queries(TEXTS, spans=False))
    longer = [[*row, *[7] * (99 if len(row) > 7 else 0)] for row in ids]
    assert_same(model.query_tokens(longer), model.query_tokens(ids))
    ids = model.document_ids(TEXTS)
    assert_same(model.document_tokens(ids), model.tokenize_documents(TEXTS, spans=False))
    assert_same(model.document_tokens([*ids[:3], ids[3] * 9]), model.document_tokens(ids))


def test_spans_are_cut_and_framed_with_their_ids() -> None:
    model = make(do_query_expansion=True, query_length=6)
    tokens = model.query_tokens([[10, 11, 12, 13], [14]], [[(0, 1), None, (2, 3), (3, 4)], [(0, 2)]])
    assert tokens.spans == [[None, None, (0, 1), None, (2, 3), None], [None, None, (0, 2), None, None, None]]
    assert [len(row) for row in tokens.spans] == list(tokens.batch.lengths)


def test_an_uncut_document_stays_uncut() -> None:
    model = make()
    assert model.document_tokens([[10] * 50], truncate=False).batch.lengths == (53,)
    assert model.document_tokens([[10] * 50]).batch.lengths == (20,)


@pytest.mark.parametrize(("single", "front", "back"), [("$A [SEP]", 0, 1), ("[CLS] $A", 1, 0), ("$A", 0, 0)])
def test_the_template_of_the_tokenizer_is_kept(single: str, front: int, back: int) -> None:
    """Not every tokenizer puts [CLS] and [SEP] around a text."""
    names = [name for name in ("[CLS]", "[SEP]") if name in single]
    ids = {name: make().tokenizer.token_to_id(name) for name in names}
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}} if piece == "$A" else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in single.split()
    ]
    model = make(
        {
            "type": "TemplateProcessing",
            "single": pieces,
            "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names},
        },
        document_prefix="",
    )
    tokens = model.tokenize_documents(["fold a tensor"])
    whole = model.tokenizer.encode_batch(["fold a tensor"])[0].ids
    assert tokens.batch.input_ids.tolist() == whole
    assert model.document_ids(["fold a tensor"]) == [whole[front : len(whole) - back]]


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="a length of 2 has no room for the 3 tokens around a text"):
        make(query_length=2).query_tokens([[10]])
