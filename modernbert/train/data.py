"""Query-passage pairs: from files to token ids to batches that can be resumed."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")

# What becomes a token: words with their accents, numbers in groups of at most four digits, and the symbols
# that mean something in code and mathematics. Other punctuation (late interaction would skip it in documents
# anyway), spaces and underscores only separate: "file" is one token in "a file", "(file)" and "read_file".
WORDS = r"[\p{L}\p{M}]+|\p{N}{1,4}|[$+<=>^|~#*%&@]|[^\s\p{L}\p{M}\p{N}\p{P}\p{C}`]"


class Pair(NamedTuple):
    query: str
    positive: str
    source: str
    group: str


def read_pairs(folder: str | os.PathLike, *, drop: Collection[str] = ()) -> Iterator[Pair]:
    """The pairs of a folder's `*.jsonl` and `*.jsonl.zst` files in name order, but for the sources in `drop`.

    A line is a JSON object with "query" and "positive" and, optionally, "source" (default: the file's name)
    and "group" (default: the positive itself). Pairs of one group never serve as each other's negatives.
    """
    files = sorted(path for path in Path(folder).iterdir() if path.name.endswith((".jsonl", ".jsonl.zst")))
    if not files:
        raise ValueError(f"no *.jsonl or *.jsonl.zst file in {folder}: --pairs wants a folder of such files")
    for path in files:
        for number, line in enumerate(_lines(path), start=1):
            row = json.loads(line)
            if "query" not in row or "positive" not in row:
                raise ValueError(f'{path}:{number}: a pair needs "query" and "positive", got keys {sorted(row)}')
            source, group = row.get("source", path.name.split(".")[0]), row.get("group", row["positive"])
            if source not in drop:
                yield Pair(row["query"], row["positive"], source, group)


def _lines(path: Path) -> Iterator[str]:
    if path.suffix == ".zst":
        import zstandard

        with path.open("rb") as file:
            yield from io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8")
    else:
        with path.open(encoding="utf-8") as file:
            yield from file


def train_tokenizer(texts: Iterator[str], *, vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer for lower-cased text with ModernBERT's special tokens at ids 0 to 4.

    The texts are lower-cased here; whoever uses the tokenizer lower-cases first (`do_lower_case`). Every word
    starts with the byte-level space, whatever stood before it.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.lower() for text in texts), trainer)
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    return tokenizer


def without_overlap(pairs: Iterable[Pair], held_out: Iterable[str], *, n: int = 8) -> Iterator[Pair]:
    """The pairs whose positive shares no sequence of `n` words with any of the held-out texts."""
    seen = {gram for text in held_out for gram in _word_ngrams(text, n)}
    return (pair for pair in pairs if seen.isdisjoint(_word_ngrams(pair.positive, n)))


def _word_ngrams(text: str, n: int) -> Iterator[str]:
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


def read_corpus(folder: str | os.PathLike) -> Iterator[str]:
    """The texts of a BEIR folder's `corpus.jsonl.gz`."""
    with gzip.open(Path(folder) / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def first_per_source(pairs: Iterable[Pair], limit: int, *, seed: int = 0) -> list[Pair]:
    """At most `limit` pairs of every source, drawn at random by the seed."""
    by_source: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_source.setdefault(pair.source, []).append(pair)
    draw = random.Random(seed)
    return [pair for source in by_source.values() for pair in draw.sample(source, min(limit, len(source)))]


@dataclass(frozen=True, eq=False)
class Rows:
    """Ragged rows of token ids: `values` uint16 or int32 [n], `offsets` int64 [N + 1]."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_texts(cls, texts: Sequence[str], tokenizer: tokenizers.Tokenizer, limit: int) -> Rows:
        """The first `limit` tokens of each lower-cased text, without special tokens."""
        parts, lengths = [], [0]
        dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.int32
        for start in range(0, len(texts), 4096):
            # Tokens of ordinary text are far shorter than 32 characters; the cut saves most of the work.
            lowered = [text[: 32 * limit].lower() for text in texts[start : start + 4096]]
            encodings = tokenizer.encode_batch_fast(lowered, add_special_tokens=False)
            ids = [encoding.ids[:limit] for encoding in encodings]
            lengths += map(len, ids)
            parts.append(np.fromiter(chain.from_iterable(ids), dtype))
        return cls(np.concatenate(parts), np.cumsum(lengths))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]


def plan_batches(
    lengths: np.ndarray, strata: np.ndarray, topics: np.ndarray, *, max_pairs: int, max_tokens: int, seed: int
) -> list[np.ndarray]:
    """Index arrays that cover every pair once: the same list for the same arguments.

    A batch holds pairs of one stratum whose documents are alike, because such documents are harder negatives:
    a stratum is shuffled, cut into windows of about 64 batches, and a window is halved along the line between
    two of its own topic vectors until a part fits a batch. The order of the batches is random.

    Args:
        lengths: tokens of each pair, int [N]. strata: int [N]. topics: float [N, k].
        max_pairs, max_tokens: what a batch holds. A pair longer than `max_tokens` is a batch of its own.
    """
    rng = np.random.default_rng(seed)
    # What a pair takes of a batch: of its tokens or of its places, whichever is scarcer.
    cost = np.minimum(np.maximum(lengths / max_tokens, 1 / max_pairs), 1)
    plan: list[np.ndarray] = []
    parts = []
    for stratum in np.unique(strata):
        members = rng.permutation(np.flatnonzero(strata == stratum))
        parts += np.array_split(members, max(1, round(cost[members].sum() / 64)))
    while parts:
        part = parts.pop()
        if cost[part].sum() <= 1 + 1e-9:
            plan.append(part)
            continue
        first, second = rng.choice(part, 2, replace=False)
        part = part[np.argsort(topics[part] @ (topics[first] - topics[second]), kind="stable")]
        filled, batches = np.cumsum(cost[part]), np.ceil(cost[part].sum())
        cut = int(np.searchsorted(filled, filled[-1] * (batches // 2) / batches + 1e-9, side="right"))
        parts += np.split(part, [min(max(cut, 1), len(part) - 1)])
    return [plan[i] for i in rng.permutation(len(plan))]


def topic_vectors(rows: Rows, table: np.ndarray) -> np.ndarray:
    """The mean of each text's token vectors `table [V, k]`, weighted by -log(frequency): float32 [N, k]."""
    counts = np.bincount(rows.values, minlength=len(table))
    weighted = (table * np.log(counts.sum() / np.maximum(counts, 1))[:, None]).astype(np.float32)
    topics = np.zeros((len(rows.lengths), table.shape[1]), np.float32)
    for i in np.flatnonzero(rows.lengths).tolist():
        topics[i] = weighted[rows[i]].mean(0)
    return topics
