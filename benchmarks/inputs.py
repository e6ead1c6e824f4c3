"""What is encoded: the lengths of the ModernBERT paper, token ids, texts of the demo corpus, and seeded checkpoints."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modernbert import ColBERT, Encoder, EncoderConfig

DOCUMENTS = 8192
"""Of each set of the paper."""


class Lengths(NamedTuple):
    """A set of documents: normal lengths, clipped, seed 42."""

    mean: int
    spread: int
    longest: int
    shortest: int = 32

    def first(self, count: int) -> tuple[int, ...]:
        """Lengths of the first documents."""
        generator = torch.Generator().manual_seed(42)
        drawn = torch.randn(max(count, DOCUMENTS), generator=generator)[:count] * self.spread + self.mean
        return tuple(drawn.round().clamp(self.shortest, self.longest).int().tolist())

    @property
    def is_long(self) -> bool:
        return self.mean > 512

    def words(self) -> str:
        each = f"N({self.mean}, {self.spread}) tokens, clipped to [{self.shortest}, {self.longest}]"
        return each if self.spread else f"{self.mean} tokens each"


SETS = {
    "fixed-512": Lengths(512, 0, 512),
    "variable-short": Lengths(256, 64, 512),
    "fixed-8192": Lengths(8192, 0, 8192),
    "variable-long": Lengths(4096, 1024, 8192),
}
"""Of the ModernBERT paper."""


def ids(index: int, length: int) -> Tensor:
    """Token ids of the text at `index`, uniform in [100, 16000) as in the paper: `[length]` int64."""
    return torch.randint(100, 16_000, (length,), generator=torch.Generator().manual_seed(index))


def padded(texts: Sequence[Tensor], pad: int, *, masked: bool = False) -> dict[str, Tensor]:
    """Input ids and attention mask `[B, S]` of these texts' ids, right-padded; a mask where one is needed or asked."""
    ids_BS = nn.utils.rnn.pad_sequence([*texts], batch_first=True, padding_value=pad)
    mask_BS = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return {"input_ids": ids_BS} | ({"attention_mask": mask_BS} if masked or not bool(mask_BS.all()) else {})


def groups(lengths: Sequence[int], size: int, *, by_length: bool = False) -> list[list[int]]:
    """Indices in batches of `size`, in order or length-sorted."""
    indices = list(range(len(lengths)))
    if by_length:
        indices.sort(key=lambda index: lengths[index])
    return [indices[start : start + size] for start in range(0, len(indices), size)]


HELD_OUT = 8
"""Every so many paragraphs of the demo corpus one is kept for queries, so that no passage contains a query."""

ASSETS = Path(__file__).parents[1] / "modernbert" / "assets"


@cache
def default() -> ColBERT:
    return ColBERT.default()


@cache
def records() -> list[dict[str, str]]:
    """The paragraphs of the demo corpus, with `title` and `text`."""
    with gzip.open(ASSETS / "demo" / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def examples(source: Path | None, count: int) -> list[Any]:
    """So many rows of files for training, drawn by a seed; or paragraphs whose first ten words are a query."""
    from modernbert.train.reading import read_rows  # not in every checkout that a worker may import

    known = [{"query": " ".join(one["text"].split()[:10]), "positive": one["text"], **one} for one in records()]
    return random.Random(0).sample([row.fields for row in read_rows(source)] if source else known, count)


def paragraphs(count: int) -> list[str]:
    """The first of the corpus, from the start again where it has no more."""
    return [records()[index % len(records())]["text"].strip() for index in range(count)]


def write_corpus(path: Path, passages: int) -> None:
    """A BEIR corpus.jsonl: under the title of an article three of its sentences, 100 tokens in the mean.

    The same call writes the same file.
    """
    asked = {sentence for record in records()[::HELD_OUT] for sentence in sentences(record)}
    by_title: dict[str, list[str]] = {}
    for record in (record for index, record in enumerate(records()) if index % HELD_OUT):
        by_title.setdefault(record["title"], []).extend(one for one in sentences(record) if one not in asked)
    draw, titles = random.Random(0), [title for title, known in by_title.items() if known]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    with beside.open("w", encoding="utf-8") as file:
        for number in range(passages):
            title = draw.choice(titles)
            one = {"_id": f"p{number}", "title": title, "text": " ".join(draw.choices(by_title[title], k=3))}
            file.write(json.dumps(one, ensure_ascii=False) + "\n")
    beside.replace(path)


def sentences(record: Mapping[str, str]) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", record["text"])


def queries(count: int) -> list[str]:
    """The first 20 words of paragraphs of all articles that no passage contains, about 30 tokens."""
    held_out = random.Random(0).sample(records()[::HELD_OUT], count)
    return [" ".join(record["text"].split()[:20]) for record in held_out]


def of_lengths(lengths: Sequence[int]) -> list[str]:
    """Texts of random words that have these lengths as documents of the default model, special tokens included."""
    words = sorted({word for record in records() for word in record["text"].split() if word.isalpha()})
    tokens = default().tokenize_documents(["", *words], truncate=False).batch.lengths
    single = [word for word, length in zip(words, tokens[1:], strict=True) if length == tokens[0] + 1]
    draw = random.Random(0)
    return [" ".join(draw.choices(single, k=length - tokens[0])) for length in lengths]


@torch.no_grad()
def save_seeded(config: EncoderConfig, folder: Path) -> None:
    """Write a seeded checkpoint, for transformers and for us.

    The weights are larger than those of an initialisation, so that attention is not uniform and errors show. The speed
    is that of the trained model.
    """
    with torch.device("meta"):
        encoder, generator = Encoder(config), torch.Generator("cpu").manual_seed(0)
    for name, weight in encoder.to_empty(device="cpu").named_parameters():
        if weight.dim() == 1:
            low, high = (0.7, 1.3) if "norm.weight" in name else (0.0, 0.0)
            weight.uniform_(low, high, generator=generator)
        else:
            spread = 1.0 if "tok_embeddings" in name else 1.2 / math.sqrt(weight.shape[1])
            weight.normal_(0, spread, generator=generator)
    encoder.save_pretrained(folder)


def save_from(checkpoint: str, name: str, make: Callable[[Encoder], Any]) -> None:
    """Make, once, a folder in that of a checkpoint, with a seeded model around its encoder."""
    if not (folder := Path(checkpoint) / name).exists():
        torch.manual_seed(0)
        make(Encoder.from_pretrained(checkpoint)).save_pretrained(folder)


def save_colbert(checkpoint: str, *, width: int = 128) -> None:
    """For PyLate, sentence-transformers and us: a projection, and the default model's tokenizer; at most 512 tokens."""
    from modernbert.heads.dense import Dense  # not in every checkout that a worker may import

    def make(encoder: Encoder) -> ColBERT:
        template, head = default(), Dense(encoder.config.hidden_size, width)
        nn.init.normal_(head.linear.weight, std=encoder.config.hidden_size**-0.5)
        return ColBERT(encoder, template.tokenizer, [head], replace(template.config, document_length=512))

    save_from(checkpoint, f"colbert-{width}", make)


def save_embedder(checkpoint: str) -> None:
    """The same for one vector a text, the mean."""
    from modernbert.heads.embedder import Embedder, EmbedderConfig

    config = EmbedderConfig(pooling="mean", max_length=512)
    save_from(checkpoint, "dense", lambda encoder: Embedder(encoder, default().tokenizer, config=config))
