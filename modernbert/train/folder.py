"""The folder of a run: whether it is one is decided before anything is written to it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from ..files import output_folder
from .checkpoints import read_checkpoint

TOKENS, CHECKPOINT = "tokens.npz", "checkpoint.pt"
OTHERS = ("log.jsonl", "model", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")


def run_folder(output: str | os.PathLike[str]) -> Path:
    """The folder `output`, made if it is not there; a run may begin or go on in it.

    A folder is that of a run by the content of its tokens or of its checkpoint. All other files in it are left alone.

    Raises:
        NotADirectoryError, ValueError: as `output_folder`.
        FileExistsError: a run would replace files that no run has written.
    """
    folder = output_folder(output)
    taken = [name for name in (TOKENS, CHECKPOINT, *OTHERS) if os.path.lexists(folder / name)]
    if taken and not (_has_tokens(folder / TOKENS) or _has_checkpoint(folder / CHECKPOINT)):
        raise FileExistsError(
            f"{folder} holds {', '.join(taken)}, but neither the tokens nor a checkpoint of a run: they are damaged, "
            "or of another program. Choose a new folder for --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _has_tokens(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return {"queries.values.npy", "positives.values.npy"} <= set(archive.namelist())


def _has_checkpoint(file: Path) -> bool:
    try:
        return bool(read_checkpoint(file))
    except (ValueError, FileNotFoundError):
        return False
