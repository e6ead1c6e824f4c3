"""Rows under the mask that a library scores: query expansion of PyLate and MultiVectorEncoder gets their numbers."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_twin import BIASES, TINY, pad, twins
from torch import Tensor
from transformers import ModernBertModel

from modernbert import Encoder
from modernbert.integrations.transformers import TransformersEncoder
from modernbert.padded import pack_padded

PAD, MASK = 3, 4
TEXTS = [[1, 7, 8, 9, 2], [1, 2], [1, *range(10, 40), 2]]


def models(pad_token_id: int | None = PAD, **changes: Any) -> tuple[ModernBertModel, Encoder]:
    theirs, ours = twins(replace(TINY, **BIASES, **changes))
    ours.config = replace(ours.config, pad_token_id=pad_token_id)
    return theirs, ours


def filled(texts: list[list[int]], side: str, token: int, length: int) -> tuple[Tensor, Tensor]:
    ids, mask = pad(texts, side, extra=length - max(map(len, texts)))
    return ids.masked_fill(mask == 0, token), mask


def compare(theirs: ModernBertModel, ours: Encoder, ids: Tensor, mask: Tensor, padding: Tensor | None = None) -> None:
    """Values of every row that is not padding, and gradients; padding is zero."""
    real = torch.ones_like(mask, dtype=torch.bool) if padding is None else ~padding
    wanted = theirs(ids, attention_mask=mask, output_hidden_states=True)
    got = ours(ids, attention_mask=mask)[0]
    torch.testing.assert_close(got[real], wanted[0][real], rtol=0, atol=3e-5)
    assert got[~real].eq(0).all()
    states = TransformersEncoder(ours)(ids, mask, output_hidden_states=True).hidden_states
    for mine, yours in zip(states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(mine[real], yours[real], rtol=0, atol=3e-5)
    weights = torch.randn_like(got[real])
    grads = [torch.autograd.grad((x[real] * weights).sum(), list(ours.parameters())) for x in (got, wanted[0])]
    for mine, yours in zip(*grads, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=2e-4 * yours.abs().max().item())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_expansion_tokens_have_the_numbers_of_transformers(side: str, dtype: torch.dtype) -> None:
    """They were zero: pylate#109 and #125. Some of them are farther from the text than the window."""
    theirs, ours = models()
    ids, mask = filled(TEXTS, side, MASK, 48)
    with torch.no_grad():
        got = ours(ids, mask.to(dtype))[0]
        torch.testing.assert_close(got, theirs(ids, attention_mask=mask)[0], rtol=0, atol=3e-5)
    if dtype is torch.int64:
        compare(theirs, ours, ids, mask)


def test_eager_attention_agrees_where_a_token_is_in_reach() -> None:
    theirs, ours = models()
    theirs.set_attn_implementation("eager")
    ids, mask = filled(TEXTS[:1], "right", MASK, 12)
    compare(theirs, ours, ids, mask)


@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_padded_documents_stay_packed(side: str) -> None:
    config = models()[1].config
    ids, mask = filled(TEXTS, "right" if side == "both" else side, PAD, 40)
    if side == "both":
        ids, mask = ids.roll(3, 1), mask.roll(3, 1)
    batch = pack_padded(ids, mask, None, config)
    assert batch.key_lengths is None
    assert batch.lengths == tuple(map(len, TEXTS))


@pytest.mark.parametrize("side", ["right", "left"])
def test_expansion_beside_padding(side: str) -> None:
    """A batch with queries of its strategy "min": [MASK] up to a length, and padding beyond it or before it."""
    theirs, ours = models()
    texts = [[*TEXTS[0], *[MASK] * 4], TEXTS[2], [*TEXTS[1], PAD, PAD, MASK, MASK], [*TEXTS[1], MASK, PAD, MASK]]
    texts = [text[::-1] for text in texts] if side == "left" else texts
    ids, mask = filled(texts, side, PAD, 34)
    padding = mask == 0
    mask &= (ids != MASK) & (ids != PAD)
    compare(theirs, ours, ids, mask, padding)


def test_tokens_on_both_sides_are_refused() -> None:
    ids, mask = torch.tensor([[1, 5, 6, 2], [MASK, 1, 2, MASK]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
    with pytest.raises(ValueError, match=r"sequence 1 has tokens under attention_mask 0 on both sides .* which is 3"):
        models()[1](ids, mask)


@pytest.mark.parametrize("texts", [[[], [1, 2]], [[], []]])
def test_a_text_of_no_token(texts: list[list[int]]) -> None:
    """Under a mask of zeros a row sees nothing: sdpa of transformers gives it a zero from attention."""
    theirs, ours = models()
    ids, mask = filled(texts, "right", MASK, 6)
    with torch.no_grad():
        got, wanted = ours(ids, mask)[0], theirs(ids, attention_mask=mask)[0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=3e-5)
    ids, mask = filled(texts, "right", PAD, 6)
    assert ours(ids, mask)[0][mask == 0].eq(0).all()


def test_without_a_pad_token_zero_is_padding() -> None:
    theirs, ours = models(None)
    compare(theirs, ours, *filled(TEXTS, "right", MASK, 40))
    ids, mask = filled(TEXTS, "right", 0, 40)
    compare(theirs, ours, ids, mask, mask == 0)


def test_expansion_by_the_pad_token_is_named_by_a_query_mask() -> None:
    theirs, ours = models(MASK)
    ids, mask = filled(TEXTS, "right", MASK, 40)
    with torch.no_grad():
        wanted = theirs(ids, attention_mask=mask)[0]
        got = TransformersEncoder(ours)(ids, mask, query_mask=1 - mask)[0]
        torch.testing.assert_close(got, wanted, rtol=0, atol=3e-5)
        assert ours(ids, mask)[0][mask == 0].eq(0).all()


def test_embeddings_have_no_ids() -> None:
    """All rows after the real ones may be scored; those in front are padding, and never read."""
    theirs, ours = models()
    for side in ("right", "left"):
        _, mask = filled(TEXTS, side, PAD, 40)
        embeds = torch.randn(3, 40, 64)
        with torch.no_grad():
            got = ours(None, mask, inputs_embeds=embeds)[0]
            wanted = theirs(inputs_embeds=embeds, attention_mask=mask)[0]
        real = mask.bool() | (side == "right")
        torch.testing.assert_close(got[real], wanted[real], rtol=0, atol=3e-5)
        assert got[~real].eq(0).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_of_expansion_tokens(side: str) -> None:
    theirs, ours = models()
    ids, mask = filled(TEXTS, side, MASK, 40)
    steps = torch.randint(1, 4, ids.shape).cumsum(1)
    with torch.no_grad():
        for positions in (steps, steps[:1]):
            wanted = theirs(ids, attention_mask=mask, position_ids=positions)[0]
            got = TransformersEncoder(ours)(ids, mask, position_ids=positions)[0]
            torch.testing.assert_close(got, wanted, rtol=0, atol=3e-5)


def test_wrong_arguments_are_still_named() -> None:
    ours = models()[1]
    ids, mask = filled(TEXTS, "right", MASK, 40)
    for wrong, words in (
        (mask[:, None, None, :].expand(-1, 1, 40, -1), "prepared 3-D or 4-D masks"),
        (mask.double().log(), "of sequence 0 has -inf"),
        (torch.zeros(3, 40), "additive mask"),
        (mask.index_fill(1, torch.tensor([1]), 0), "of sequence 0 has holes"),
    ):
        with pytest.raises(ValueError, match=words):
            ours(ids, wrong)
    ids[0, 10] = 100
    with pytest.raises(ValueError, match="token id 100 is out of range"):
        ours(ids, mask)


def packed_forward(model: ModernBertModel, encoder: Encoder) -> None:
    """Our forward pass in a live model of transformers."""

    def forward(self: Any, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=encoder(input_ids, attention_mask).last_hidden_state)

    model.forward = types.MethodType(forward, model)


@pytest.mark.parametrize("strategy", ["fixed", "min"])
def test_multi_vector_encoder(strategy: str, modernbert_tokenizer_file: Path, tmp_path: Path) -> None:
    """28 of 32 rows of a query were zero."""
    from sentence_transformers import MultiVectorEncoder
    from transformers import AutoTokenizer

    theirs, ours = models(50283, vocab_size=50368)
    theirs.config.pad_token_id = 50283
    theirs.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(modernbert_tokenizer_file.parent).save_pretrained(tmp_path)
    model = MultiVectorEncoder(str(tmp_path), device="cpu")
    model[0].query_expansion = {"strategy": strategy, "length": 32, "attend": False}
    texts = ["what is a glacier?", "ice", "a question of more words than the others have " * 2]
    wanted = [model.encode_query(texts), model.encode_document(texts)]
    packed_forward(model[0].model, ours)
    for mine, yours in zip([model.encode_query(texts), model.encode_document(texts)], wanted, strict=True):
        for x, y in zip(mine, yours, strict=True):
            torch.testing.assert_close(torch.as_tensor(x), torch.as_tensor(y), rtol=0, atol=3e-5)
