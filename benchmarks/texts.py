"""Texts of exact lengths made of the demo corpus, and a late-interaction model of any size that reads them."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from modernbert import ColBERT, Encoder

ASSETS = Path(__file__).parents[1] / "modernbert" / "assets"

HELD_OUT = 8
"""Every so many paragraphs of the corpus one is kept for queries, so that no passage contains a query."""

END = re.compile(r"(?<=[.!?])\s+")
"""Of a sentence."""


@cache
def records() -> list[dict[str, str]]:
    """The paragraphs of the demo corpus, with `title` and `text`."""
    with gzip.open(ASSETS / "demo" / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@cache
def default() -> ColBERT:
    return ColBERT.default()


def paragraphs(count: int) -> list[str]:
    """The first of the corpus, from the start again where it has no more, without outer blanks."""
    known = [record["text"].strip() for record in records()]
    return [known[index % len(known)] for index in range(count)]


class Corpus(NamedTuple):
    """Sentences by title, the paragraphs that are held out, and the tokens of each word for the default model.

    A word is what is between white space; its tokens do not depend on its neighbours (`write_corpus` checks it).
    """

    sentences: dict[str, list[str]]
    held_out: list[str]
    cost: dict[str, int]


@cache
def corpus() -> Corpus:
    held_out = [record["text"] for record in records()[::HELD_OUT]]
    asked = {sentence for text in held_out for sentence in END.split(text)}  # some paragraphs come twice, nearly
    sentences: dict[str, list[str]] = {}
    for record in (record for index, record in enumerate(records()) if index % HELD_OUT):
        new = (sentence for sentence in END.split(record["text"]) if sentence not in asked)
        sentences.setdefault(record["title"], []).extend(new)
    words = sorted({word for record in records() for field in ("title", "text") for word in record[field].split()})
    lengths = default().tokenize_documents(["", *words], truncate=False).batch.lengths
    return Corpus(sentences, held_out, {word: n - lengths[0] for word, n in zip(words, lengths[1:], strict=True)})


def write_corpus(path: Path, passages: int, tokens: int) -> None:
    """A BEIR corpus.jsonl whose passages have exactly `tokens` tokens for the default model, special ones included.

    A passage is sentences of one article in random order under its title; the same call writes the same file.
    """
    sentences, _, cost = corpus()
    draw, titles = random.Random(0), list(sentences)
    special = len(default().tokenize_documents([""]).keep)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, first = path.with_name(f".{path.name}"), []
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
    """The beginnings of `count` paragraphs that no passage contains, of exactly `tokens` rows each."""
    special = len(default().tokenize_queries([""]).keep)
    shuffled = random.Random(0).sample(corpus().held_out, len(corpus().held_out))  # of all articles
    found = [fill(text.split(), tokens - special, corpus().cost) for text in shuffled]
    kept = [text for text in found if text is not None][:count]
    if len(kept) < count:
        raise ValueError(f"the demo corpus gives {len(kept)} queries of {tokens} tokens, not {count}")
    return kept


def of_lengths(lengths: Sequence[int]) -> list[str]:
    """Texts of random words that have these lengths as documents of the default model, special tokens included."""
    words = [word for word, cost in corpus().cost.items() if cost == 1 and word.isalpha()]
    draw, special = random.Random(0), len(default().tokenize_documents([""]).keep)
    return [" ".join(draw.choices(words, k=length - special)) for length in lengths]


def fill(words: Iterable[str], room: int, cost: Mapping[str, int]) -> str | None:
    """The first words that cost exactly `room` together, without those that no longer fit; None if they run out."""
    chosen = []
    for word in words:
        if cost[word] <= room:
            chosen.append(word)
            room -= cost[word]
        if not room:
            return " ".join(chosen)
    return None


def projection(width: int, to: int) -> Tensor:
    """A seeded matrix `[to, width]`."""
    return torch.randn(to, width, generator=torch.Generator().manual_seed(2)) / math.sqrt(width)


def save_colbert(checkpoint: str, folder: Path, *, width: int, longest: int | None = None) -> Path:
    """A folder for PyLate, sentence-transformers and us, if there is none: a checkpoint, a projection to `width` and
    the default model's tokenizer. Documents are cut to `longest` tokens.
    """
    from modernbert.heads.dense import Dense  # not in every checkout that a worker may import

    if not folder.exists():
        encoder, template = Encoder.from_pretrained(checkpoint), default()
        head = Dense(encoder.config.hidden_size, width)
        with torch.no_grad():
            head.linear.weight.copy_(projection(encoder.config.hidden_size, width))
        config = replace(template.config, document_length=longest or template.config.document_length)
        ColBERT(encoder, template.tokenizer, [head], config).save_pretrained(folder)
    return folder


def add_tokenizer(folder: str) -> None:
    """Copy the tokenizer of the default model next to a checkpoint."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "default" / file, folder)
