"""A store for one command: it is deleted at the end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..retrieval.documents.reading import Reading
    from ..retrieval.documents.text import OnNote
    from ..retrieval.store.identity import LoadedModel
    from ..retrieval.store.search import Store


@contextmanager
def temporary_store(
    paths: Sequence[Path],
    model: LoadedModel,
    on_note: OnNote,
    dtype: str | None = None,
    *,
    exclude: Sequence[str] = (),
    gitignore: bool = True,
    reading: Reading | None = None,
) -> Iterator[Store]:
    """A store of files and folders on disk, so that one search has the code and the results of an index.

    Raises OSError if the place for temporary files is full or cannot be written to, and what `index` raises.
    """
    from ..retrieval import Store, index

    with tempfile.TemporaryDirectory() as folder:
        try:
            options = {} if reading is None else asdict(reading)
            index(paths, folder, model, dtype=dtype, note=on_note, exclude=exclude, gitignore=gitignore, **options)
        except OSError as error:
            if folder not in str(error):
                raise
            # The error of `index` has a command that resumes in this folder, which is deleted now.
            raise OSError(
                f"cannot write to the folder for temporary files, {Path(folder).parent} ({error.__cause__ or error}): "
                "make room there, or set TMPDIR to another folder"
            ) from error
        with Store(folder, model) as store:
            yield store
