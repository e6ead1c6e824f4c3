"""What a folder holds, and a save that must leave it alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from modernbert import ColBERT, Encoder


def tree(folder: Path) -> dict[str, bytes]:
    """The content of every file below, by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_refused(model: Encoder | ColBERT, target: Path, words: str) -> None:
    """Saving ends in a ValueError with these words, and changes nothing beside the target or in it."""
    before, names = tree(target.parent), [path.name for path in target.parent.iterdir()]
    with pytest.raises(ValueError, match=rf"(?s){words}") as caught:
        model.save_pretrained(target)
    assert f".{target.name}." not in str(caught.value)  # the hidden folder of the new files
    assert tree(target.parent) == before
    assert [path.name for path in target.parent.iterdir()] == names
