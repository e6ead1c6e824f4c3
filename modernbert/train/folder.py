"""The folder of a run: whether it is one is decided before anything is written to it."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

from ..files import output_folder
from .checkpoints import BEST, CHECKPOINT, LAST, WEIGHTS, read_checkpoint
from .log import LOG

TOKENS = "tokens.npz"
START = b'{"step": '
"""How a row of the log begins."""
OTHERS = ("model", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")


def run_folder(output: str | os.PathLike[str]) -> Path:
    """The folder `output`, made if it is not there; a run may begin or go on in it.

    A folder is that of a run by the content of its tokens, of a checkpoint, or of its log, for a run that was killed
    before its first checkpoint. All other files in it are left alone.

    Raises:
        NotADirectoryError, ValueError: as `output_folder`.
        FileExistsError: a run would replace files that no run has written.
    """
    folder = output_folder(output)
    taken = [name for name in (TOKENS, LAST, BEST, LOG, *OTHERS) if os.path.lexists(folder / name)]
    is_run = (
        _has_tokens(folder / TOKENS)
        or _is_checkpoint(folder / LAST, CHECKPOINT)
        or _is_checkpoint(folder / BEST, WEIGHTS | {"metrics"})
        or _is_log(folder / LOG)
    )
    if taken and not is_run:
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


def _is_checkpoint(file: Path, wanted: set[str]) -> bool:
    try:
        return bool(read_checkpoint(file, wanted))
    except (ValueError, FileNotFoundError):
        return False


def _is_log(file: Path) -> bool:
    try:
        with file.open("rb") as lines:
            line = lines.readline()
        if not line.endswith(b"\n"):  # killed in its first row
            return line[: len(START)] == START[: len(line)]
        row = json.loads(line)
    except (ValueError, OSError):
        return False
    return isinstance(row, dict) and "step" in row and any(name.startswith(("tokens_per_s", "valid_")) for name in row)
