"""A small untrained ColBERT and a small corpus for the tests of stores; vectors still follow the tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from modernbert import ColBERT, Encoder, EncoderConfig, Tokenizer
from modernbert.heads.colbert import ColBERTConfig
from modernbert.retrieval import Store

WORDS = ["owl", "mouse", "night", "glacier", "ice", "cell", "energy", "treaty", "peace", "river", "storm", "hail"]


def small_colbert(tokenizer_folder: Path, **settings: object) -> ColBERT:
    config = EncoderConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    settings = {"document_length": 40, "query_length": 24, **settings}
    return ColBERT.from_encoder(
        Encoder.from_config(config),
        tokenizer,
        dim=16,
        config=ColBERTConfig(**settings),  # pyright: ignore
    ).eval()


def small_shards(patch: pytest.MonkeyPatch, passages: int) -> None:
    for module in ("build", "store.writer"):
        patch.setattr(f"modernbert.retrieval.{module}.PASSAGES", passages)


def corpus(count: int, seed: int = 0) -> list[dict[str, object]]:
    """BEIR records with metadata; every seventh is longer than a window of 40 tokens."""
    random = np.random.default_rng(seed)
    return [
        {
            "_id": f"d{i}",
            "title": " ".join(random.choice(WORDS, 2)),
            "text": " ".join(random.choice(WORDS, 80 if i % 7 == 3 else 9)) + f", and number {i}.",
            "metadata": {"year": str(2000 + i % 3), "even": i % 2 == 0},
        }
        for i in range(count)
    ]


def write_corpus(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_dataset(folder: Path, count: int) -> None:
    """A data set in BEIR's layout, with one query."""
    write_corpus(folder / "corpus.jsonl", corpus(count))
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "owl"}\n')
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td0\t1\n")


def rows(store: Path, model: str) -> list[tuple[object, ...]]:
    """All passages with their vectors, in order."""
    with Store(store, model) as opened:
        return [
            (
                *map(str, (passage.path, passage.id, passage.title, passage.text, passage.line, passage.metadata)),
                vectors,
            )
            for _, passages, ragged in opened.batches()
            for passage, vectors in zip(passages, (x.numpy().tobytes() for x in ragged), strict=True)
        ]
