"""A teacher folder: the vectors that a single-vector model gives to texts, looked up by text."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import output_folder, replacing
from ..json_files import read_json
from ..tokenizer import Tokenizer

ABOUT = "teacher.json"  # written first: by its content `write_teacher` knows its folder after it was killed


class Teacher:
    """Vectors by text: `keys.npy` (uint64 [n], ascending hashes of texts) and `vectors.npy` (float16 [n, E]).

    Any program may write such a folder; `write_teacher` does it with a sentence-transformers model.
    """

    def __init__(self, folder: str | os.PathLike):
        try:
            self.keys = np.load(Path(folder) / "keys.npy")
            self.vectors = np.load(Path(folder) / "vectors.npy", mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{folder}: keys.npy or vectors.npy is damaged: {error}") from error
        if not len(self.keys) or self.keys.shape != self.vectors.shape[:1] or np.any(self.keys[1:] <= self.keys[:-1]):
            shapes = f"{self.keys.shape} and {self.vectors.shape}"
            raise ValueError(f"{folder}: keys.npy must ascend and be as long as vectors.npy, got {shapes}")

    def index(self, texts: Iterable[str]) -> np.ndarray:
        """The row of each text in `vectors`, int64 [N]; -1 where the teacher has not seen the text."""
        keys = np.fromiter((text_key(text) for text in texts), np.uint64)
        index = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[index] == keys, index, -1)

    def __getitem__(self, index: np.ndarray) -> Tensor:
        """float32 [n, E] on the CPU, of length one."""
        return F.normalize(torch.from_numpy(self.vectors[index].astype(np.float32)), dim=-1)


def text_key(text: str) -> int:
    """The first eight bytes of BLAKE2b of the text: the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def write_teacher(texts: Sequence[str], model: str, folder: str | os.PathLike, *, max_length: int = 96) -> None:
    """Embed texts, cut to `max_length` tokens, with a sentence-transformers model under bfloat16 autocast.

    Raises:
        FileExistsError: the folder holds files of these names that another program has written.
    """
    from sentence_transformers import SentenceTransformer

    folder = output_folder(folder)
    taken = [name for name in (ABOUT, "keys.npy", "vectors.npy") if os.path.lexists(folder / name)]
    if taken and not _is_teacher(folder):
        raise FileExistsError(f"{folder} holds {', '.join(taken)} of another program; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    encoder = SentenceTransformer(model)
    encoder.max_seq_length = max_length
    unique = sorted({text_key(text): text for text in texts}.items())
    started, vectors = time.perf_counter(), []
    for start in range(0, len(unique), 4_000):
        part = [text for _, text in unique[start : start + 4_000]]
        with torch.autocast(encoder.device.type, torch.bfloat16):
            vectors.append(encoder.encode(part, batch_size=128, convert_to_tensor=True).half().cpu().numpy())
        seconds = time.perf_counter() - started
        print(f"teacher: {start + len(part):,} of {len(unique):,} texts, {seconds:.0f} s", flush=True)
    about = {"model": Path(model).name, "texts": len(unique), "max_length": max_length}
    (folder / ABOUT).write_text(json.dumps(about))
    np.save(folder / "vectors.npy", np.concatenate(vectors))
    # Last and in one step: a folder without keys is written again.
    with replacing(folder / "keys.npy") as beside, beside.open("wb") as file:
        np.save(file, np.array([key for key, _ in unique], np.uint64))


def _is_teacher(folder: Path) -> bool:
    try:
        return {"model", "texts", "max_length"} == read_json(folder, ABOUT).keys()
    except (ValueError, FileNotFoundError):
        return False


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """Each token of the vocabulary as a text that a teacher can embed."""
    return [tokenizer.decode([i]).strip() or str(tokenizer.id_to_token(i)) for i in range(tokenizer.vocab_size)]


def teach_embeddings(table_VD: Tensor, tokenizer: Tokenizer, teacher: Teacher, *, deviation: float) -> None:
    """Copy the teacher's vectors of the tokens, on their D main axes, into the table; nothing if it lacks a token.

    Args:
        deviation: standard deviation of the new elements.
    """
    index = teacher.index(token_texts(tokenizer))
    if (index < 0).any():
        return
    vectors = teacher[index] - teacher[index].mean(0)
    _, _, axes = torch.linalg.svd(vectors, full_matrices=False)
    width = table_VD.shape[1]
    vectors = F.normalize(vectors @ axes[:width].T, dim=-1)
    # The elements of a unit vector deviate by width ** -0.5.
    with torch.no_grad():
        table_VD[:, : vectors.shape[1]] = vectors * (deviation * width**0.5)
