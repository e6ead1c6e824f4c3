"""Passages and queries of an exact length, and a model that costs nothing: what large stores are filled with.

The text is real: sentences of the Wikipedia corpus that ships with the package, put together anew. The vectors of
`synthetic` are not: they are seeded, and no more like each other than those of the default model are. Only its
encoder is a stand-in; tokens, windows, tables, shards and scores are made by the code that everybody runs.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.inputs import ASSETS
from modernbert import ColBERT, EncoderConfig
from modernbert.heads.dense import Dense
from modernbert.packing import Packed

DEMO = ASSETS / "demo" / "corpus.jsonl.gz"

HELD_OUT = 8
"""Every so many paragraphs of the corpus one is kept for queries: what is asked stands in no passage."""

END = re.compile(r"(?<=[.!?])\s+")
"""Of a sentence."""

ROWS = 1 << 16
"""Rows of the table that all parts of a synthetic vector are drawn from."""


class Demo(NamedTuple):
    """The demo corpus: sentences by title, paragraphs for queries, and the tokens of each word.

    A word is what stands between white space; its tokens do not depend on its neighbours (`write_corpus` looks).
    """

    sentences: dict[str, list[str]]
    held_out: list[str]
    cost: dict[str, int]


@cache
def demo() -> Demo:
    with gzip.open(DEMO, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    held_out = [record["text"] for record in records[::HELD_OUT]]
    asked = {sentence for text in held_out for sentence in END.split(text)}  # some paragraphs come twice, nearly
    sentences: dict[str, list[str]] = {}
    for record in (record for i, record in enumerate(records) if i % HELD_OUT):
        new = (sentence for sentence in END.split(record["text"]) if sentence not in asked)
        sentences.setdefault(record["title"], []).extend(new)
    words = sorted({word for record in records for field in ("title", "text") for word in record[field].split()})
    lengths = default().tokenize_documents(["", *words], truncate=False).batch.lengths
    cost = {word: length - lengths[0] for word, length in zip(words, lengths[1:], strict=True)}
    return Demo(sentences, held_out, cost)


@cache
def default() -> ColBERT:
    return ColBERT.default()


def write_corpus(path: Path, passages: int, tokens: int) -> None:
    """A BEIR corpus.jsonl whose passages the default model reads as exactly `tokens` tokens, special ones included.

    A passage is sentences of one article in random order under its title; the same call writes the same file.
    """
    sentences, _, cost = demo()
    draw, titles = random.Random(0), list(sentences)
    special = len(default().tokenize_documents([""]).keep)
    beside = path.with_name(f".{path.name}")
    first = []
    with beside.open("w", encoding="utf-8") as file:
        for number in range(passages):
            title = draw.choice(titles)
            endless = iter(lambda title=title: draw.choice(sentences[title]).split(), None)
            room = tokens - special - sum(cost[word] for word in title.split())
            text = fill(chain.from_iterable(endless), room, cost)
            file.write(json.dumps({"_id": f"p{number}", "title": title, "text": text}, ensure_ascii=False) + "\n")
            first += [f"{title} {text}"] if number < 256 else []
    lengths = set(default().tokenize_documents(first).batch.lengths)
    if lengths - {tokens}:
        raise ValueError(f"passages have {sorted(lengths)} tokens instead of {tokens}: words are not tokenised alone")
    beside.replace(path)


def queries(count: int, tokens: int) -> list[str]:
    """The beginnings of `count` paragraphs that are in no passage, of exactly `tokens` rows each."""
    special = len(default().tokenize_queries([""]).keep)
    paragraphs = random.Random(0).sample(demo().held_out, len(demo().held_out))  # of all articles
    texts = (fill(text.split(), tokens - special, demo().cost) for text in paragraphs)
    found = [text for text in texts if text is not None][:count]
    if len(found) < count:
        raise ValueError(f"the demo corpus gives {len(found)} queries of {tokens} tokens, not {count}")
    return found


def fill(words: Iterable[str], room: int, cost: Mapping[str, int]) -> str | None:
    """The first words that cost exactly `room` together, leaving out what no longer fits; None if they run out."""
    chosen = []
    for word in words:
        if cost[word] <= room:
            chosen.append(word)
            room -= cost[word]
        if not room:
            return " ".join(chosen)
    return None


def model(width: int | None) -> ColBERT | None:
    """The model that a store of the benchmarks is opened with: a synthetic one of this width, or its own."""
    return synthetic(width) if width else None


def synthetic(width: int) -> ColBERT:
    """A ColBERT with the tokens of the default model, a vector of `width` for every one, and no network."""
    head = Dense(width, width)
    nn.init.eye_(head.linear.weight)
    encoder: Any = TableEncoder(default().encoder.config.vocab_size, width)
    return ColBERT(encoder, default().tokenizer, [head], default().config).eval()


class TableEncoder(nn.Module):
    """In the place of an `Encoder`: `[T]` tokens to `[T, width]` sums of seeded unit vectors.

    What two tokens have in common says which vectors they share, and `SHARES` what these weigh: cosines then have
    the means of the default model's. The same passage gets the same vectors in every batch.
    """

    # Of the squared length. Mean cosines of the default model in 60 passages: 0.15 of two tokens in two passages, 0.21
    # of two in one, 0.28 of the same in two, 0.54 of the same in one.
    SHARES = (0.15, 0.06, 0.13, 0.20, 0.46)

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.config = EncoderConfig(
            vocab_size=vocab_size, hidden_size=width, num_hidden_layers=1, num_attention_heads=1
        )
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("table", F.normalize(torch.randn(ROWS, width, generator=generator), dim=-1))
        self.register_buffer("shares", torch.tensor(self.SHARES))  # So that the fingerprint of a store has them.
        self.table: Tensor

    def forward(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor:
        ids_T = batch.input_ids
        lengths_B = torch.tensor(batch.lengths)
        text_T = torch.stack([ids.sum() for ids in ids_T.split(batch.lengths)]).repeat_interleave(lengths_B)
        # Every text ends in the same token and begins with the same: beyond its ends stands what always stands there.
        trigram_T = (ids_T.roll(1) * 8209 + ids_T) * 8209 + ids_T.roll(-1)
        anything_T = torch.zeros_like(ids_T)
        keys = (anything_T, text_T, ids_T, text_T * 8209 + ids_T, trigram_T)
        x_TD = torch.zeros(len(ids_T), self.config.hidden_size)
        for part, (share, key_T) in enumerate(zip(self.SHARES, keys, strict=True)):
            row_T = ((key_T * len(keys) + part) * 2_654_435_761 >> 16) % ROWS
            x_TD += share**0.5 * self.table[row_T]
        return x_TD if rows is None else x_TD[rows]
