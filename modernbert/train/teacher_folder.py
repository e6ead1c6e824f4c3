"""A teacher folder: what a teacher answers to texts, or to pairs of a query and a document. Each is asked for once.

Any program may write such a folder, such as a script that calls a hosted model. `fill` does it with any function. The
format, if it is written without `fill`:

- `keys-000000.npy` and `values-000000.npy` are one part, `-000001` is the next; `keys.npy` and `values.npy` are a
  part as well, and may be the only one. `vectors` in place of `values` in a name is read too.
- keys: uint64 [n], in any order, `text_key(text)` or `text_key((query, document))` of each text or pair.
- values: float16 or float32, `[n, E]` vectors of texts, or `[n]` scores of pairs, row i the answer to key i.
- `teacher.json` names the teacher, such as `{"teacher": {"model": "voyage-3", "date": "2026-11"}}`. `fill` refuses to
  add the answers of another one. It is not needed to read the folder.
- The values of a part are written first. A part whose keys are there is whole, and it is never changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from ..files import half_written, output_folder, replacing
from ..json_files import read_json
from .claim import LOCK, foreign_names
from .options import as_json

ABOUT = "teacher.json"
HALF = half_written(r"(keys|values)-\d{6}\.npy|teacher\.json")
PART = 4_096
"""Texts of a part, which is what a run that was killed asks for again."""

Asked: TypeAlias = str | tuple[str, str]
"""A text, or a query and a document."""

A = TypeVar("A", str, tuple[str, str])


class Teacher:
    """The answers of a teacher folder, mapped into memory. Keys are in memory: 16 bytes for each answer.

    Attributes:
        width: E of vectors; None: the values are scores.

    Raises:
        FileNotFoundError: no part is there. ValueError: a part is damaged, or of another width than the first.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        parts = [_read_part(keys) for keys in key_files(folder)]
        if not parts:
            raise FileNotFoundError(f"{folder} has no keys.npy or keys-000000.npy: it is not the folder of a teacher")
        self._values = [values for _, values in parts]
        self._ends = np.cumsum([len(values) for values in self._values])
        if len({values.shape[1:] for values in self._values}) > 1 or not self._ends[-1]:
            shapes = ", ".join(sorted({str(values.shape) for values in self._values}))
            raise ValueError(f"{folder}: its parts must all be scores, or vectors of one width, got {shapes}")
        self.width = None if self._values[0].ndim == 1 else int(self._values[0].shape[1])
        # The first answer counts if a text is there twice.
        self.keys, self._rows = np.unique(np.concatenate([keys for keys, _ in parts]), return_index=True)

    def index(self, texts: Iterable[Asked]) -> np.ndarray:
        """The row of each text or pair, int64 [N]; -1 where the teacher has not seen it."""
        return self.find(np.fromiter(map(text_key, texts), np.uint64))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """As `index`, of the `text_key` of each: uint64 [N]."""
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self._rows[places], -1)

    def scores(self, index: np.ndarray) -> Tensor:
        """Answers as they are: float32 [n], or [n, E], on the CPU. ValueError: a row of -1, which is not an answer."""
        if index.min(initial=0) < 0:
            raise ValueError(f"{self.folder} has no answer to {int((index < 0).sum()):,} of {index.size:,} texts")
        found = np.empty((len(index), *self._values[0].shape[1:]), np.float32)
        part_N = np.searchsorted(self._ends, index, side="right")
        for part in np.unique(part_N).tolist():
            inside = part_N == part
            found[inside] = self._values[part][index[inside] - (self._ends[part] - len(self._values[part]))]
        return torch.from_numpy(found)

    def __getitem__(self, index: np.ndarray) -> Tensor:
        """Vectors: float32 [n, E] on the CPU, of length one."""
        return F.normalize(self.scores(index), dim=-1)


def text_key(text: Asked) -> int:
    """The first eight bytes of BLAKE2b of the text, little-endian: the same on every machine.

    That of a pair is of the query's length in characters, a blank, the query and the document, in one text.
    """
    whole = text if isinstance(text, str) else f"{len(text[0])} {text[0]}{text[1]}"
    return int.from_bytes(hashlib.blake2b(whole.encode(), digest_size=8).digest(), "little")


def fill(
    folder: str | os.PathLike[str],
    texts: Iterable[A],
    answer: Callable[[list[A]], np.ndarray | Tensor],
    identity: Mapping[str, object],
) -> Teacher:
    """Ask a teacher for what the folder lacks, `PART` texts at a time; all of the folder's answers.

        fill("voyage", texts, lambda part: client.embed(part).vectors, {"model": "voyage-3"})

    A run that was stopped, even by `kill -9` or by a full disk, goes on where it was when it is started again. Another
    run adds to the folder. If all is there, `answer` is not called. Of several callers, one writes and others wait.

    Args:
        texts: taken a part at a time, so that they need not fit in memory. Those that are there twice are asked once.
        answer: texts to `[n, E]` vectors, kept in float16; or pairs of query and document to `[n]` scores, in float32.
        identity: what the answers depend on, such as the name of a model and the length to which it cuts.

    Raises:
        ValueError: the folder has the answers of another teacher; answers that are not finite, with the text, or not of
            the shape that is wanted; there are no texts.
        FileExistsError: the folder holds files, and is not that of a teacher.
    """
    folder = output_folder(folder)
    if others := foreign_names(folder, HALF, lambda: identity_of(folder) is not None):
        raise FileExistsError(f"{folder} holds {', '.join(others[:3])} of another program; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        for path in filter(lambda path: HALF.fullmatch(path.name), folder.iterdir()):
            path.unlink()
        _check_identity(folder, as_json(identity))
        _add(folder, texts, answer)
    if not key_files(folder):
        raise ValueError(f"there are no texts, so that {folder} would be empty")
    return Teacher(folder)


def key_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of keys, one for each part, in the order of the rows."""
    return sorted(Path(folder).glob("keys*.npy"))


def files(folder: str | os.PathLike[str]) -> list[Path]:
    """All files of the parts."""
    return [file for keys in key_files(folder) for file in (keys, _values_file(keys))]


def _values_file(keys: Path) -> Path:
    names = (keys.name.replace("keys", name, 1) for name in ("values", "vectors"))
    found = [keys.with_name(name) for name in names]
    return next(filter(Path.exists, found), found[0])


def _read_part(file: Path) -> tuple[np.ndarray, np.ndarray]:
    beside = _values_file(file)
    try:
        keys, values = np.load(file), np.load(beside, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file.parent}: {file.name} or {beside.name} is damaged: {error}") from error
    if keys.ndim != 1 or keys.dtype != np.uint64 or values.ndim not in (1, 2) or len(keys) != len(values):
        shapes = f"{keys.dtype} {keys.shape} and {values.dtype} {values.shape}"
        raise ValueError(f"{file.parent}: {file.name} must be uint64, as long as {beside.name}, got {shapes}")
    return keys, values


def identity_of(folder: str | os.PathLike[str]) -> Mapping[str, object] | None:
    """The teacher of a folder; None if its file does not name one."""
    try:
        found = read_json(folder, ABOUT).get("teacher")
    except (ValueError, FileNotFoundError):
        return None
    return found if isinstance(found, dict) else None


def _check_identity(folder: Path, identity: Mapping[str, object]) -> None:
    """Compare the teacher with that of the folder, which a new one gets."""
    there = identity_of(folder)
    if there is None:
        with replacing(folder / ABOUT) as beside:
            beside.write_text(json.dumps({"teacher": identity}), encoding="utf-8")
    elif there != identity:
        names = sorted(name for name in {*there, *identity} if there.get(name) != identity.get(name))
        differs = "; ".join(f"{name} is {there.get(name)!r}, now {identity.get(name)!r}" for name in names)
        raise ValueError(f"{folder} has the answers of another teacher: {differs}. Choose another folder")


def _add(folder: Path, texts: Iterable[A], answer: Callable[[list[A]], np.ndarray | Tensor]) -> None:
    parts = [_read_part(file) for file in key_files(folder)]
    known = np.sort(np.concatenate([np.zeros(0, np.uint64), *(keys for keys, _ in parts)]))
    shape = parts[0][1].shape[1:] if parts else None
    started, added = time.monotonic(), 0
    # Not the number of parts: one that was damaged may have been deleted, and a script may count from 1.
    numbers = (file.stem.removeprefix("keys-") for file in key_files(folder))
    first = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
    for number, part in enumerate(_missing(texts, known), start=first):
        values = _checked(answer(list(part.values())), list(part.values()), shape)
        keys = np.fromiter(part, np.uint64, len(part))
        shape = values.shape[1:]
        # The values first: a part whose keys are there is whole.
        for name, array in (("values", values), ("keys", keys)):
            with replacing(folder / f"{name}-{number:06d}.npy") as beside, beside.open("wb") as file:
                np.save(file, array)
        added += len(part)
        print(f"teacher: {added:,} new texts, {time.monotonic() - started:.0f} s", flush=True)


def _missing(texts: Iterable[A], known: np.ndarray) -> Iterator[dict[int, A]]:
    """Up to `PART` different texts that are not known, by their keys; `known` ascends."""
    part: dict[int, A] = {}
    for text in texts:
        key = text_key(text)
        place = int(np.searchsorted(known, np.uint64(key)))
        if key in part or (place < len(known) and int(known[place]) == key):
            continue
        part[key] = text
        if len(part) == PART:
            yield part
            new = np.sort(np.fromiter(part, np.uint64, len(part)))
            known = np.insert(known, np.searchsorted(known, new), new)
            part = {}
    if part:
        yield part


def _checked(answers: np.ndarray | Tensor, texts: Sequence[Asked], shape: tuple[int, ...] | None) -> np.ndarray:
    """Answers as they are kept: vectors in float16, scores in float32."""
    found = answers.float().cpu().numpy() if isinstance(answers, Tensor) else np.asarray(answers, np.float32)
    if found.ndim not in (1, 2) or len(found) != len(texts) or shape not in (None, found.shape[1:]):
        wanted = "one vector or one score for each" if shape is None else f"[{', '.join(map(str, ('n', *shape)))}]"
        raise ValueError(f"the teacher gave {found.shape} for {len(texts)} texts, wanted {wanted}")
    with np.errstate(over="ignore"):
        kept = found.astype(np.float16 if found.ndim == 2 else np.float32)
    if not (finite := np.isfinite(kept.reshape(len(kept), -1)).all(1)).all():
        text = texts[int(finite.argmin())]
        raise ValueError(f"the teacher's answer to {text!r:.80} is not finite, or beyond float16")
    return kept
