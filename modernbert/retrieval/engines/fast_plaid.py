"""fast-plaid: vectors in 4 bits a number, searched by their clusters. Approximate, and so are its scores.

It takes all vectors in memory at once, in half precision, when an index is made: 100,000 passages of 150 tokens at
width 64 are 2 GB. Its binary fits one version of torch only, which its package pins.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import requires, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from fast_plaid.search import FastPlaid  # pyright: ignore[reportMissingImports] -- not with every torch
from torch import Tensor

from ...late_interaction import Ragged
from ..passages import Passage
from ..store.format import replacing

if TYPE_CHECKING:
    from ..store.search import Store

MANIFEST, TABLE, PREFIX = "modernbert.json", "passages.sqlite", "fast-plaid-"


def export(store: Store, place: str, rows: Iterable[tuple[int, Passage, Tensor]]) -> None:
    """Make a new index beside the old one, and put it in its place when it is complete."""
    _check_torch()
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
    vectors = []
    table = sqlite3.connect(fresh / TABLE)
    table.execute("CREATE TABLE passages (row INTEGER PRIMARY KEY, number INTEGER, passage TEXT)")
    for row, (number, passage, x_NE) in enumerate(rows):
        vectors.append(x_NE.half())
        table.execute("INSERT INTO passages VALUES (?, ?, ?)", (row, number, json.dumps(asdict(passage))))
    table.commit()
    table.close()
    # `start_from_scratch` keeps a copy of all vectors for updates, and there are none: an export replaces.
    FastPlaid(str(fresh), device="cpu").create(vectors, start_from_scratch=0)
    manifest = {"model": store.model, "fingerprint": store.fingerprint, "index": fresh.name}
    with replacing(folder / MANIFEST) as beside:
        beside.write_text(json.dumps(manifest))
    for old in folder.glob(f"{PREFIX}*"):
        if old != fresh:
            shutil.rmtree(old)


class Index:
    """An index that `export` has made."""

    def __init__(self, place: str) -> None:
        _check_torch()
        file = Path(place) / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(f"no {MANIFEST} in {place}; `modernbert export` makes one")
        self.manifest = json.loads(file.read_text())
        folder = Path(place) / self.manifest["index"]
        self._table = sqlite3.connect(f"{(folder / TABLE).resolve().as_uri()}?mode=ro", uri=True)
        self._index = FastPlaid(str(folder), device="cpu")

    def search(self, vectors: Ragged, top_k: int) -> Iterator[list[tuple[float, Passage, int]]]:
        """For each query `top_k` passages, with scores from compressed vectors."""
        for found in self._index.search(list(vectors), top_k=top_k, show_progress=False):
            hits = []
            for row, score in found:
                select = "SELECT number, passage FROM passages WHERE row = ?"
                number, passage = self._table.execute(select, (row,)).fetchone()
                hits.append((score, Passage(**json.loads(passage)), number))
            yield hits

    def close(self) -> None:
        """Let go of the files."""
        self._table.close()
        self._index.close()


def _check_torch() -> None:
    """With another torch than it was built for, fast-plaid can be imported, and ends the process when it is used."""
    built_for = next(need for need in requires("fast-plaid") or [] if need.startswith("torch=="))
    if built_for != f"torch=={torch.__version__.partition('+')[0]}":
        raise ValueError(
            f"fast-plaid {version('fast-plaid')} needs {built_for}, and this is torch {torch.__version__}: use it from "
            "an environment of its own, made by pip install 'modernbert[fast-plaid]'"
        )
