"""A teacher folder: the vectors that a single-vector model gives to texts, found again by the text."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch


class Teacher:
    """Vectors by text: `keys.npy` (uint64 [n], ascending hashes of texts) and `vectors.npy` (float16 [n, E]).

    Any program may write such a folder; `write_teacher` does it with a sentence-transformers model.
    """

    def __init__(self, folder: str | os.PathLike):
        self.keys = np.load(Path(folder) / "keys.npy")
        self.vectors = np.load(Path(folder) / "vectors.npy", mmap_mode="r")
        if self.keys.shape != self.vectors.shape[:1] or np.any(self.keys[1:] <= self.keys[:-1]):
            shapes = f"{self.keys.shape} and {self.vectors.shape}"
            raise ValueError(f"{folder}: keys.npy must ascend and be as long as vectors.npy, got {shapes}")

    def index(self, texts: Iterable[str]) -> np.ndarray:
        """The row of each text in `vectors`, int64 [N]; -1 where the teacher has not seen the text."""
        keys = np.fromiter((text_key(text) for text in texts), np.uint64)
        rows = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[rows] == keys, rows, -1)

    def __getitem__(self, rows: np.ndarray) -> torch.Tensor:
        """float32 [n, E], of length one."""
        return torch.nn.functional.normalize(torch.from_numpy(self.vectors[rows].astype(np.float32)), dim=-1)


def text_key(text: str) -> int:
    """The first eight bytes of BLAKE2b of the text: the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def write_teacher(texts: Sequence[str], model: str, folder: str | os.PathLike, *, max_length: int = 96) -> None:
    """Embed texts, cut to `max_length` tokens, with a sentence-transformers model under bfloat16 autocast."""
    from sentence_transformers import SentenceTransformer

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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "vectors.npy", np.concatenate(vectors))
    np.save(folder / "keys.npy", np.array([key for key, _ in unique], np.uint64))
    about = {"model": Path(model).name, "texts": len(unique), "max_length": max_length}
    (folder / "teacher.json").write_text(json.dumps(about))
