"""The stores that are measured, made once and kept, and how a figure of them becomes a row."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.cpu.suite import THREADS
from benchmarks.retrieval import synthetic as texts
from benchmarks.retrieval.process import build, search, watched
from benchmarks.rows import Row

TOKENS, QUERY_TOKENS, TOP = 100, 32, 10
WIDTH = 48
"""Of synthetic vectors; the default model's are wider."""


@dataclass(frozen=True)
class Sizes:
    """Passages of the stores: `scale` and `memory` really encoded, `synthetic` not; and how often things are done."""

    index: int = 5_000
    search: int = 10_000
    scale: tuple[int, ...] = (10_000, 100_000)
    synthetic: int = 1_000_000
    memory: tuple[int, int] = (10_000, 100_000)
    start: int = 200
    queries: int = 100
    rounds: int = 5


FULL = Sizes()
QUICK = Sizes(index=200, search=500, scale=(200, 500), synthetic=5_000, memory=(200, 500), queries=30, rounds=2)


@dataclass(frozen=True)
class Bench:
    """Where the stores of a run lie, and what was found out about them already.

    Attributes:
        work: keeps corpora and stores; what is there is used, what is unfinished goes on.
    """

    work: Path
    sizes: Sizes = FULL
    searched: dict[tuple[int, int | None, bool], tuple[Any, float]] = field(default_factory=dict)

    def corpus(self, passages: int) -> Path:
        path = self.work / f"{passages}" / "corpus.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            texts.write_corpus(path, passages, TOKENS)
        return path

    def folder(self, passages: int, width: int | None) -> Path:
        return self.work / f"{passages}" / (f"synthetic-{width}" if width else "store")

    def build(
        self, passages: int, width: int | None, folder: Path, *, prefilter: bool, limit_mb: int | None = None
    ) -> tuple[Any, float]:
        """What `watched` returns of indexing into `folder`, or of giving the store that is there a pre-filter."""
        where = {"corpus": str(self.corpus(passages)), "folder": str(folder)}
        return watched(build, **where, width=width, prefilter=prefilter, threads=THREADS, limit_mb=limit_mb)

    def store(self, passages: int, width: int | None) -> Path:
        """A store with a pre-filter."""
        folder = self.folder(passages, width)
        manifest = folder / "store.json"
        if not manifest.exists() or "prefilter" not in json.loads(manifest.read_bytes()):
            self.build(passages, width, folder, prefilter=True)
        return folder

    def search(self, passages: int, width: int | None, *, prefilter: bool) -> tuple[Any, float]:
        """What `watched` returns of a search; it is done once in a run."""
        key = (passages, width, prefilter)
        if key not in self.searched:
            rounds = max(1, min(self.sizes.rounds, 300_000 // passages))
            self.searched[key] = watched(
                search,
                folder=str(self.store(passages, width)),
                width=width,
                queries=texts.queries(self.sizes.queries, QUERY_TOKENS),
                top_k=TOP,
                prefilter=prefilter,
                rounds=rounds,
                retries=rounds - 1,
                threads=THREADS,
            )
        return self.searched[key]

    def row(
        self,
        *,
        corpus: str,
        figure: str,
        synthetic: bool = False,
        at_most: float | None = None,
        at_least: float | None = None,
        **measured: Any,
    ) -> Row:
        """A row of this suite.

        Args:
            corpus: what was indexed or searched. figure: which of its figures this is.
            synthetic: the vectors are.
            at_most, at_least: the bar, which only the full sizes have to reach.
            measured: as of `rows.row`.
        """
        one = rows.row(**{"settings": "", "max_error": None, "tolerance": None} | measured)
        bar, met = None, None
        if self.sizes == FULL and at_most is not None:
            bar, met = f"<= {at_most:g}", one["median"] <= at_most
        if self.sizes == FULL and at_least is not None:
            bar, met = f">= {at_least:g}", one["median"] >= at_least
        kind = "synthetic vectors" if synthetic else "measured"
        known = {"suite": "retrieval", "kind": kind, "dtype": "fp16 vectors"}
        return one | known | {"corpus": corpus, "figure": figure, "bar": bar, "met": met}


def described(passages: int, width: int | None) -> str:
    if width:
        return f"{passages:,} passages, synthetic vectors of width {width}"
    return f"{passages:,} passages, default model"
