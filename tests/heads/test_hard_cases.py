"""What other libraries were reported to get wrong. docs/compatibility.md lists these tests and those elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_twin import TINY, make_loud, random_ids
from torch import nn

from modernbert import ColBERT, Embedder, Encoder, MaskedLM, Reranker, SequenceClassifier, Tokenizer, pack
from modernbert.config import SLIDING
from modernbert.heads.colbert_files import ColBERTConfig

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
WORDS = "the library keeps its oldest maps in a dry room below the hall, and reads them. "


def colbert(**settings: Any) -> ColBERT:
    torch.manual_seed(0)
    encoder, tokenizer = Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)
    return ColBERT.from_encoder(encoder, tokenizer, dim=24, config=ColBERTConfig(**settings)).eval()


def embedder() -> Embedder:
    return Embedder(Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)).eval()


def reranker() -> Reranker:
    classifier = SequenceClassifier(Encoder.from_pretrained(BACKBONE), labels=1)
    return Reranker(classifier, Tokenizer.from_pretrained(BACKBONE)).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_nan_with_padding_in_half_precision(side: str, dtype: torch.dtype) -> None:
    """transformers#35988: logits were NaN where a batch had padding. Here a row of it sees no key in local layers."""
    model = MaskedLM(Encoder(replace(TINY, num_hidden_layers=3)))
    make_loud(model)
    model = model.to(dtype)
    texts = random_ids([1, 40, 0, 7], TINY.vocab_size)
    ids, mask = torch.zeros(2, 4, 60, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(60 - len(text), 60) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = torch.tensor(text, dtype=torch.int64), 1
    output = model(ids, mask, labels=ids.masked_fill(mask == 0, -100))
    assert output.loss.isfinite()
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    with torch.no_grad():
        logits = model(ids, mask).logits
        assert logits.isfinite().all()
        for row, text in enumerate(texts):
            alone = model(pack([text])).float()
            # The same numbers in other products: a few roundings of the largest.
            limit = 8 * torch.finfo(dtype).eps * float(alone.abs().max()) if text else 0
            torch.testing.assert_close(logits[row][mask[row] == 1].float(), alone, rtol=0, atol=limit)


def test_the_skiplist_of_a_byte_level_tokenizer(modernbert_tokenizer_file: Path) -> None:
    """The point has two tokens there, and PyLate skips the one without a blank in front: its models were trained so."""
    encoder = Encoder(replace(TINY, vocab_size=50368))
    model = ColBERT.from_encoder(encoder, Tokenizer.from_pretrained(modernbert_tokenizer_file.parent), dim=8)
    tokens = model.tokenize_documents(["maps. rooms . [ok]!"])
    kept = [model.tokenizer.id_to_token(int(token)) for token in tokens.batch.input_ids[tokens.rows]]
    assert kept == ["[CLS]", "[D] ", "maps", "Ġrooms", "Ġ.", "Ġ[", "ok", "[SEP]"]


def test_an_embedding_table_of_50370_rows(modernbert_tokenizer_file: Path, tmp_path: Path) -> None:
    """The prefixes of a ColBERT take two rows behind the 50,368 of ModernBERT, and its folder says so."""
    tokenizer = Tokenizer.from_pretrained(modernbert_tokenizer_file.parent)
    model = ColBERT.from_encoder(Encoder(replace(TINY, vocab_size=50368)), tokenizer, dim=8)
    assert [model.tokenizer.token_to_id(prefix) for prefix in ("[Q] ", "[D] ")] == [50368, 50369]
    model.save_pretrained(tmp_path)  # loads it again
    config = tmp_path / "config.json"
    assert json.loads(config.read_text())["vocab_size"] == model.tokenizer.vocab_size == 50370
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 50368}))
    with pytest.raises(ValueError, match=r"50370, 64\] instead of float32\[50368, 64\]"):
        ColBERT.from_pretrained(tmp_path)


def test_texts_of_100_000_tokens() -> None:
    """Cut to what the model reads, with a warning, or all of it: in windows, and by an encoder of local layers."""
    text = WORDS * 4000
    model = colbert()
    whole = model.tokenizer.encode_batch([text], max_length=10**6, offsets=False)[0].ids
    assert len(whole) > 100_000
    with pytest.warns(UserWarning, match="texts"):
        assert len(model.encode_documents([text])[0]) <= model.config.document_length
    windows = model.tokenizer.encode_windows([text], max_length=512)
    assert [token for window in windows for token in window.ids[1:-1]] == whole[1:-1]

    encoder = Encoder(replace(TINY, num_hidden_layers=2, layer_pattern=(SLIDING,), max_position_embeddings=200_000))
    ids = [token % TINY.vocab_size for token in whole[:100_000]]
    with torch.inference_mode():
        rows = encoder(pack([ids]))
        part = encoder(pack([ids[50_000:50_100]]))
    assert rows.isfinite().all()
    # Rows in the middle of a part see no farther than it. Angles at place 50,000 are exact to 50,000 / 2^24.
    torch.testing.assert_close(rows[50_020:50_080], part[20:80], rtol=0, atol=0.02)


@pytest.mark.parametrize("texts", [[""], ["", "map", ""], []], ids=str)
def test_empty_texts_everywhere(texts: list[str]) -> None:
    """They have special tokens alone, in any batch; a batch of no text has no row."""
    late, dense, pairs = colbert(), embedder(), reranker()
    for encode in (late.encode_queries, late.encode_documents):
        rows = encode(texts)
        assert rows.offsets.diff().tolist() == [3 if text == "" else len(encode([text])[0]) for text in texts]
        assert rows.values.isfinite().all()
    assert tuple(dense.encode(texts).shape) == (len(texts), dense.dim)
    assert dense.encode(texts).isfinite().all()
    assert tuple(pairs.score("", texts).shape) == (len(texts),)


@pytest.mark.parametrize("make", [colbert, embedder, reranker])
def test_a_compiled_model_is_what_encodes(make: Callable[[], Any]) -> None:
    """sentence-transformers#3791: `model.compile()` did nothing, because encoding went around `__call__`."""
    model, seen = make(), []

    def backend(graph: nn.Module, _: object) -> nn.Module:
        seen.append(graph)
        return graph

    plain = run(model, ["the map", "a room below"])
    model.compile(backend=backend)
    torch.testing.assert_close(run(model, ["the map", "a room below"]), plain)
    assert seen


def run(model: Any, texts: list[str], **options: Any) -> torch.Tensor:
    if isinstance(model, Reranker):
        return model.score("which map?", texts, **options)
    return (
        model.encode_documents(texts, **options).values
        if isinstance(model, ColBERT)
        else model.encode(texts, **options)
    )


@pytest.mark.parametrize("make", [colbert, embedder, reranker])
def test_each_text_alone_has_the_same_bits_in_any_batch(make: Callable[[], Any]) -> None:
    """For caches: with `batch_tokens=1` each text is a batch of its own, whatever texts there are beside it."""
    model = make()
    texts = [WORDS * count + "why" for count in (0, 3, 1, 5, 0, 2)]
    alone = torch.cat([run(model, [text]) for text in texts])
    together = run(model, texts, batch_tokens=1)
    assert torch.equal(together, alone)
    other = run(model, [*texts[::-1], *[WORDS] * 5], batch_tokens=1)
    assert torch.equal(other[: len(run(model, texts[-1:]))], run(model, texts[-1:]))
