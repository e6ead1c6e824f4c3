"""fast-plaid: vectors with 4 bits per number, searched by their clusters. Its results and its scores are approximate.

To make an index it needs all vectors in memory, in half precision: 100,000 passages of 150 tokens at width 64 are 2 GB.
Its binary works with one version of torch only, which its package pins.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import requires, version
from pathlib import Path

import torch
from fast_plaid.search import FastPlaid  # pyright: ignore[reportMissingImports] -- needs another torch

from ...late_interaction import Ragged
from ..passages import Passage
from ..store.format import ModelIdentity
from ..store.request import write_json
from ..store.search import Store
from . import Found, Row
from .folder import claim, read_mark
from .held import HeldRow

MANIFEST, TABLE, PREFIX = "modernbert.json", "passages.sqlite", "fast-plaid-"
INDEX = re.compile(rf"{PREFIX}[0-9a-f]{{32}}")
"""The whole name of the folder of an index."""


def export(store: Store, address: str, rows: Iterable[Row]) -> None:
    """Make a new index next to the old one, and replace the old one when the new one is complete."""
    _check_torch()
    manifest = {"model": store.model, "fingerprint": store.fingerprint}
    folder = claim(address, _is_export, MANIFEST, {**manifest, "index": None})
    before, fresh = read_mark(folder / MANIFEST).get("index"), folder / f"{PREFIX}{uuid.uuid4().hex}"
    fresh.mkdir()
    try:
        _write(fresh, rows)
        write_json(folder / MANIFEST, {**manifest, "index": fresh.name})
    except BaseException as error:
        shutil.rmtree(fresh)
        if isinstance(error, sqlite3.OperationalError):
            raise OSError(f"fast-plaid in {address}: {error}") from error
        raise
    for old in folder.glob(f"{PREFIX}*"):
        if old != fresh and (old.name == before or INDEX.fullmatch(old.name)) and not old.is_symlink():
            shutil.rmtree(old)


def _write(fresh: Path, rows: Iterable[Row]) -> None:
    vectors = []
    with closing(sqlite3.connect(fresh / TABLE)) as table:
        table.execute("CREATE TABLE passages (row INTEGER PRIMARY KEY, number INTEGER, passage TEXT)")
        for number, row in enumerate(rows):
            vectors.append(row.vectors.half())
            passage = json.dumps(asdict(row.passage))
            table.execute("INSERT INTO passages VALUES (?, ?, ?)", (number, row.passage_id, passage))
        table.commit()
    # A non-zero `start_from_scratch` keeps a copy of all vectors for updates, which an export does not need.
    FastPlaid(str(fresh), device="cpu").create(vectors, start_from_scratch=0)


def _is_export(folder: Path) -> bool:
    return read_mark(folder / MANIFEST).keys() == {"model", "fingerprint", "index"}


class Index:
    """An index made by `export`."""

    def __init__(self, address: str) -> None:
        _check_torch()
        file = Path(address) / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(f"no {MANIFEST} in {address}; `modernbert export` makes one")
        manifest = json.loads(file.read_text())
        if manifest["index"] is None:
            raise FileNotFoundError(f"the export to {address} is unfinished: run `modernbert export` again")
        self.identity = ModelIdentity(manifest["model"], manifest["fingerprint"])
        folder = Path(address) / manifest["index"]
        self._table = sqlite3.connect(f"{(folder / TABLE).resolve().as_uri()}?mode=ro", uri=True)
        self._index = FastPlaid(str(folder), device="cpu")

    def search(self, vectors: Ragged, top_k: int, among: Sequence[str] | None) -> Iterator[list[Found]]:
        """For each query `top_k` passages, with scores from compressed vectors."""
        assert among is None
        for found in self._index.search(list(vectors), top_k=top_k, show_progress=False):
            hits = []
            for row, score in found:
                select = "SELECT number, passage FROM passages WHERE row = ?"
                passage_id, passage = self._table.execute(select, (row,)).fetchone()
                hits.append(Found(score, Passage(**json.loads(passage)), passage_id))
            yield hits

    def scan(self) -> Iterator[HeldRow]:
        """Not kept in an export to fast-plaid."""
        raise ValueError("an export to fast-plaid cannot be filtered: search the store")

    def close(self) -> None:
        """Release the files."""
        self._table.close()
        self._index.close()


def _check_torch() -> None:
    """With another torch than it was built for, fast-plaid can be imported, but crashes the process when it is used."""
    built_for = next(need for need in requires("fast-plaid") or [] if need.startswith("torch=="))
    if built_for != f"torch=={torch.__version__.partition('+')[0]}":
        raise ValueError(
            f"fast-plaid {version('fast-plaid')} needs {built_for}, and this is torch {torch.__version__}: use it from "
            "an environment of its own, made by pip install 'modernbert[fast-plaid]'"
        )
