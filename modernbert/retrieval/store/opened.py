"""The open files of one state of a store: its table and its shards."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from .fields import nfc
from .format import SHARDS, Manifest, Shard, read_codec, verify


class OpenFiles:
    """The table and the shards that a manifest names, opened for reading.

    They can be used until `close`, in the process that opened them: a forked process must not use its parent's
    connection to SQLite, nor the threads that its parent's model has started.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Open the files. Raises FileNotFoundError if one is missing, ValueError if one is damaged."""
        path = folder / manifest.table
        verify(path, manifest.sha256)
        self._folder, self._process, self._closed = folder, os.getpid(), False
        # A published table never changes: it needs no locks, and a read-only disk would not allow any.
        address = f"file:{quote(os.fsencode(os.path.abspath(path)))}?mode=ro&immutable=1"
        self._table = sqlite3.connect(address, uri=True, check_same_thread=False)
        self._table.create_function("nfc", 1, nfc, deterministic=True)
        self._shards: dict[int, Shard] = {}
        try:
            codec = read_codec(folder, manifest)
            for number, file, sha256 in self._table.execute("SELECT number, file, sha256 FROM shards ORDER BY number"):
                self._shards[number] = Shard(folder / SHARDS / file, sha256, codec)
        except BaseException:
            self.close()
            raise

    @property
    def table(self) -> sqlite3.Connection:
        """The table. Raises ValueError after `close`, RuntimeError in a forked process."""
        self.check()
        return self._table

    @property
    def shards(self) -> dict[int, Shard]:
        """The shards by number, in the order in which they were indexed. Raises as `table` does."""
        self.check()
        return self._shards

    def close(self) -> None:
        """Release the files."""
        self._closed = True
        self._table.close()
        self._shards.clear()

    def check(self) -> None:
        """Raise ValueError after `close`, RuntimeError in a forked process."""
        if self._closed:
            raise ValueError(f"the store {self._folder} is closed: open it again")
        if os.getpid() != self._process:
            raise RuntimeError(f"the store {self._folder} was opened before a fork: open it again in each process")
