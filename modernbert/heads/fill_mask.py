"""The most probable tokens at each [MASK] of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..inference.encode import list_of_texts
from ..inference.replica import evaluated
from ..late_interaction import check_count
from ..packing import pack
from ..tokenizer import Tokenizer
from .masked_lm import MaskedLM


class Guess(NamedTuple):
    """A token, its text, and its probability among all tokens."""

    id: int
    text: str
    probability: float


@torch.inference_mode()
def fill_mask(
    model: MaskedLM, tokenizer: Tokenizer, texts: Sequence[str], *, top_k: int = 5
) -> list[list[list[Guess]]]:
    """For each text and each [MASK] in it the `top_k` most probable tokens, in one batch.

    Raises:
        TypeError, ValueError: as `list_of_texts`; a text without a [MASK], with its index, or a `top_k` below 1.
    """
    check_count("top_k", top_k)
    encodings = tokenizer.encode_batch(list_of_texts(texts), offsets=False)
    masks = [[row for row, token in enumerate(e.ids) if token == tokenizer.mask_token_id] for e in encodings]
    if [] in masks:
        name = None if tokenizer.mask_token_id is None else tokenizer.id_to_token(tokenizer.mask_token_id)
        raise ValueError(f"texts[{masks.index([])}] has no {name or 'mask token, because the tokenizer has none'}")
    batch = pack([e.ids for e in encodings], vocab_size=model.config.vocab_size)
    starts = batch.cu_seqlens.tolist()
    rows = torch.tensor(
        [start + row for start, of_text in zip(starts, masks, strict=False) for row in of_text],
        dtype=torch.int64,
        device="cpu",
    )
    logits_QV = evaluated(model)(batch.to(model.device), rows=rows.to(model.device))
    best = logits_QV.float().softmax(-1).topk(min(top_k, logits_QV.shape[1]))
    guesses = [
        [Guess(token, tokenizer.decode([token]), share) for token, share in zip(ids, shares, strict=True)]
        for ids, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    following = iter(guesses)
    return [[next(following) for _ in of_text] for of_text in masks]
