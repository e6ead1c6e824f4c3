"""The tables of a repository of Hugging Face's `datasets`, on the hub or in a folder, by config and split."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from datasets import Dataset

# Suffixes of files to the builder of `datasets` that reads them, and its options.
BUILDERS = {
    ".parquet": ("parquet", {}),
    ".jsonl": ("json", {}),
    ".jsonl.gz": ("json", {}),
    ".tsv": ("csv", {"sep": "\t"}),
}

MLDR = "Shitao/MLDR"
MLDR_FOLDER = "mldr-v1.0-"
MLDR_LANGUAGES = ("ar", "de", "en", "es", "fr", "hi", "it", "ja", "ko", "pt", "ru", "th", "zh")

_PART = re.compile(r"-\d+-of-\d+$")


class Source(Protocol):
    """Where tables come from. Each is a split of a config.

    Attributes:
        name: a hub id or a folder.
    """

    name: str

    def configs(self) -> list[str]: ...
    def splits(self, config: str) -> list[str]: ...
    def load(self, config: str, split: str) -> Dataset: ...


def open_source(name: str) -> Source:
    """The source with this hub id, or in this folder."""
    folder = Path(name)
    if name == MLDR or any(folder.glob(f"{MLDR_FOLDER}*")):
        return MldrFiles(name)
    readme = folder / "README.md"
    has_configs = readme.is_file() and "config_name:" in readme.read_text(encoding="utf-8")
    return Folder(folder) if folder.is_dir() and not has_configs else Repository(name)


class Repository:
    """A repository on the hub, or a folder with its files, among them the README.md that names the configs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def configs(self) -> list[str]:
        from datasets import get_dataset_config_names

        return get_dataset_config_names(self.name)

    def splits(self, config: str) -> list[str]:
        from datasets import get_dataset_split_names

        return list(map(str, get_dataset_split_names(self.name, config)))

    def load(self, config: str, split: str) -> Dataset:
        from datasets import load_dataset, load_dataset_builder

        # One split alone: those of LongEmbed have different columns, which `datasets` does not load together.
        files = load_dataset_builder(self.name, config).config.data_files or {}
        return load_dataset(self.name, data_files={split: files[split]}, split=split)


class Folder:
    """A folder without such a README.md, whose subfolders are the configs, or which is the only config.

    A config was written by `save_to_disk`, or has a file for each split (`test.jsonl`, `test-00000-of-00001.parquet`),
    or a folder for each split.
    """

    def __init__(self, folder: Path) -> None:
        self.name, self._folder = str(folder), folder

    def configs(self) -> list[str]:
        inside = [
            path for path in sorted(self._folder.iterdir()) if path.is_dir() and (_is_saved(path) or _files(path))
        ]
        return [""] if _is_saved(self._folder) or not inside else [path.name for path in inside]

    def splits(self, config: str) -> list[str]:
        folder = self._folder / config
        return list(_saved(folder) if _is_saved(folder) else _files(folder))

    def load(self, config: str, split: str) -> Dataset:
        from datasets import load_dataset

        folder = self._folder / config
        if _is_saved(folder):
            return _saved(folder)[split]
        files = _files(folder)[split]
        builder, options = next(row for suffix, row in BUILDERS.items() if files[0].endswith(suffix))
        return load_dataset(builder, data_files=files, split="train", **options)


class MldrFiles:
    """The files of MLDR's repository, with the configs and splits that its script gives them.

    `datasets` no longer runs scripts.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._base = name if os.path.isdir(name) else f"hf://datasets/{name}"

    def configs(self) -> list[str]:
        return [*MLDR_LANGUAGES, *(f"corpus-{language}" for language in MLDR_LANGUAGES)]

    def splits(self, config: str) -> list[str]:
        return ["corpus"] if config.startswith("corpus-") else ["train", "dev", "test"]

    def load(self, config: str, split: str) -> Dataset:
        from datasets import load_dataset

        language = config.removeprefix("corpus-")
        return load_dataset("json", data_files=f"{self._base}/{MLDR_FOLDER}{language}/{split}.jsonl.gz", split="train")


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _saved(folder: Path) -> Mapping[str, Dataset]:
    from datasets import Dataset, load_from_disk

    found = load_from_disk(str(folder))
    if isinstance(found, Dataset):
        return {str(found.split or "train"): found}
    return {str(split): table for split, table in found.items()}


def _files(folder: Path) -> dict[str, list[str]]:
    """The files of each split."""
    found: dict[str, list[str]] = {}
    for file in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        suffix = next((suffix for suffix in BUILDERS if file.name.endswith(suffix)), None)
        if suffix:
            split = file.parent.name if file.parent != folder else _PART.sub("", file.name.removesuffix(suffix))
            found.setdefault(split, []).append(str(file))
    return found
