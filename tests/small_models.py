"""Tiny, seeded models and pairs to train on, for the stages of a retriever."""

import json
import random

import torch

from modernbert.config import EncoderConfig
from modernbert.encoder import Encoder
from modernbert.heads.colbert import ColBERT
from modernbert.heads.embedder import Embedder, EmbedderConfig
from modernbert.heads.masked_lm import MaskedLM
from modernbert.tokenizer import Tokenizer
from modernbert.train.vocabulary import train_cased_tokenizer

WORDS = ["river", "mountain", "engine", "pressure", "violin", "market", "planet", "protein"]


def tiny_tokenizer() -> Tokenizer:
    texts = [f"find the {word} which was Seen by 12 people {word[::-1]}" for word in WORDS]
    return train_cased_tokenizer(texts * 9, vocab_size=340)


def tiny_encoder(tokenizer: Tokenizer) -> Encoder:
    torch.manual_seed(0)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Encoder(EncoderConfig(vocab_size=tokenizer.vocab_size, **shape, **ids))


def save_masked_lm(folder):
    tokenizer = tiny_tokenizer()
    MaskedLM(tiny_encoder(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_colbert(folder):
    tokenizer = tiny_tokenizer()
    ColBERT.from_encoder(tiny_encoder(tokenizer), tokenizer, dim=16).save_pretrained(folder)
    return folder


def save_embedder(folder):
    tokenizer = tiny_tokenizer()
    Embedder(tiny_encoder(tokenizer), tokenizer, config=EmbedderConfig(max_length=64)).save_pretrained(folder)
    return folder


def toy_pairs(count: int, negatives: int = 0) -> list[dict]:
    """A query asks in another word for what its document names, so that only learning finds it."""
    draw, rows = random.Random(0), []
    for i in range(count):
        word = draw.choice(WORDS[:4])
        rows.append(
            {
                "query": f"find {word[::-1]} {i}",
                "positive": f"the {word} was seen by {i} people",
                "source": "ab"[i % 2],
                "group": word,
            }
        )
        if negatives:
            others = [other for other in WORDS[:4] if other != word]
            rows[-1]["negatives"] = [f"the {draw.choice(others)} was seen by {i}{n} people" for n in range(negatives)]
    return rows


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
