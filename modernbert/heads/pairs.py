"""Pairs of texts that a head reads together: their tokens, and the order of their scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple

from torch import Tensor

from ..config import EncoderConfig
from ..late_interaction import check_count
from ..packing import Texts, pack
from ..tokenizer import Tokenizer


class Ranked(NamedTuple):
    """The index of a text among those that were given, and its score."""

    index: int
    score: float


def ranked(scores_N: Tensor, top_k: int | None = None) -> list[Ranked]:
    """The `top_k` best scores (None: all), best first; of equal ones the first. ValueError: a `top_k` below 1."""
    if top_k is not None:
        check_count("top_k", top_k)
    best = scores_N.sort(descending=True, stable=True)
    return [Ranked(*pair) for pair in zip(best.indices.tolist()[:top_k], best.values.tolist()[:top_k], strict=True)]


def longest(tokenizer: Tokenizer, config: EncoderConfig) -> int:
    """Tokens of a text, with special tokens, that both the tokenizer and the encoder allow."""
    limit = config.max_position_embeddings
    return limit if tokenizer.max_length is None else min(limit, tokenizer.max_length)


def check_pairs(what: str, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs as a list. TypeError: anything else in the place of one, with its index; `what` names its parts."""
    if isinstance(pairs, (str, bytes, Mapping, Set)) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs must be a list of {what}, got one {type(pairs).__name__} {pairs!r:.60}")
    found = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise TypeError(f"pairs[{index}] must be {what}, got {type(pair).__name__} {pair!r:.60}")
        found.append((pair[0], pair[1]))
    return found


def tokenize_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, max_length: int, vocab_size: int
) -> Texts:
    """Pairs of at most `max_length` tokens. The longer text of a pair is cut, and then both ("longest_first")."""
    found = tokenizer.encode_batch(pairs, max_length=max_length, offsets=False)
    batch = pack([encoding.ids for encoding in found], vocab_size=vocab_size)
    return Texts(batch, tuple(encoding.truncated for encoding in found))
