"""The folder of a run, which is known by its settings: they are written before anything else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import output_folder, replacing
from ..json_files import has_file, read_json
from .distributed import ALONE, Ranks
from .options import check_same

RUN, LOCK = "run.json", ".lock"


@contextmanager
def claim_folder(
    output: str | os.PathLike[str], recipe: str, settings: Mapping[str, object], ranks: Ranks = ALONE
) -> Iterator[Path]:
    """The folder `output` of a run of `recipe` with these settings: a new one, or one in which it goes on.

    It is locked until the end of the `with` block, or of the process. A run that has written nothing but its settings
    may be begun again with others. Hidden files are left alone. All ranks call it, and the first one claims.

    Raises:
        NotADirectoryError, ValueError: as `output_folder`.
        ValueError: the folder is of a run with other settings, which are named.
        FileExistsError: the folder holds files, and is not that of a run.
        BlockingIOError: another run is in the folder now.
    """
    with ExitStack() as lock:
        yield ranks.on_first(lambda: _claim(output_folder(output), {"recipe": recipe, **settings}, lock))


def _claim(folder: Path, request: Mapping[str, object], lock: ExitStack) -> Path:
    taken = _taken(folder)
    if taken and not has_file(folder / RUN):
        more = f" and {len(taken) - 3} more" if len(taken) > 3 else ""
        raise FileExistsError(
            f"{folder} holds {', '.join(taken[:3])}{more}, but no {RUN} of a run: choose a new --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.enter_context(FileLock(folder / LOCK).acquire(timeout=0))
    except Timeout as error:
        raise BlockingIOError(
            f"another run is writing to {folder}: wait until it has ended, or choose another --output"
        ) from error
    if _taken(folder):  # looked at again, as another run may have begun and ended
        check_same(folder / RUN, read_json(folder, RUN), request)
    else:
        with replacing(folder / RUN) as beside:
            beside.write_text(json.dumps(request, indent=2), encoding="utf-8")
    return folder


def _taken(folder: Path) -> list[str]:
    """The names in a folder, besides hidden ones and the settings."""
    names = sorted(os.listdir(folder)) if folder.exists() else []
    return [name for name in names if not name.startswith(".") and name != RUN]


def foreign_names(folder: Path, half: re.Pattern[str], is_ours: Callable[[], bool]) -> list[str]:
    """The names in a folder of another program; none in one that is ours, or that is not there.

    Args:
        half: half-written files of ours, which do not count.
    """
    if not folder.exists():
        return []
    # The names first, as another caller may be beginning.
    names = [name for name in sorted(os.listdir(folder)) if name != LOCK and not half.fullmatch(name)]
    return [] if is_ours() else names
