"""`convert`: a checkpoint of one library as that of another, with the same numbers."""

from __future__ import annotations

import os
from functools import reduce
from pathlib import Path

import torch

from ..checkpoint import load_state_dict, locate
from ..encoder import Encoder
from ..pretrained import Pretrained
from ..weights import PICKLE, SAFETENSORS, find
from . import composer_files, flexbert_config
from .classes import CLASSES
from .folders import class_of
from .reranker import Reranker

COMPOSER = "composer"
FORMATS = ("transformers", "sentence-transformers", "pylate", "stanford", COMPOSER)


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], *, to: str) -> str:
    """Write the model of `source` as a checkpoint of another library, and give the name of its class here.

    The numbers of the weights and their dtype stay, and so do the files of the tokenizer. Other files, such as a model
    card, are not copied. The new checkpoint is loaded before it is in place.

    Args:
        source: a folder, the id of a repository on the hub, or the file of a checkpoint of Composer.
        target: a folder that does not exist or is empty; for "composer" a file that does not exist.
        to: "transformers" (4.48 and later, one config.json for all), "sentence-transformers" (`SentenceTransformer`,
            `CrossEncoder` or `MultiVectorEncoder`), "pylate", "stanford" (of a ColBERT) or "composer" (of a FlexBERT).

    Raises:
        ValueError: a format that does not exist, or that holds no model of this class or with these settings; what
            loading or saving refuses.
        FileExistsError: there is something at `target`.
        FileNotFoundError: no `source`.
    """
    if to not in FORMATS:
        raise ValueError(f"to is {to!r:.80}, but must be one of {', '.join(FORMATS)}")
    there = Path(target).expanduser()
    if os.path.lexists(there) and not (to != COMPOSER and there.is_dir() and not any(there.iterdir())):
        raise FileExistsError(f"{there} is there already: give the name of a {'file' if to == COMPOSER else 'folder'}")
    file = Path(source).expanduser()
    model, tokenizer = _of_composer(file) if file.is_file() else _of_folder(locate(source), to)
    kind = type(model).__name__
    formats = [*model.formats, *([COMPOSER] if kind in flexbert_config.CLASSES else [])]
    if to not in formats:
        raise ValueError(
            f"{source} holds a model of {kind}, which is written for {', '.join(formats)}, and not for {to}"
        )
    content = model._content_in(to, None)
    if to == COMPOSER:
        composer_files.write(there, kind, model.base_model.config, content.state, tokenizer)
    else:
        model._write(there, content._replace(files={**tokenizer, **content.files}))
    return kind


def _of_composer(file: Path) -> tuple[Pretrained, dict[str, bytes]]:
    """The model of a checkpoint of Composer, and the files of its tokenizer."""
    found = composer_files.read(file)
    with torch.device("meta"):
        model = CLASSES[found.kind](Encoder(found.config))  # pyright: ignore[reportCallIssue]
    load_state_dict(model, found.state, prefix="", ignore=())
    return model.eval(), found.tokenizer


def _of_folder(folder: Path, to: str) -> tuple[Pretrained, dict[str, bytes]]:
    """The model of a folder, and the files of a tokenizer beside it, which a model with one writes itself."""
    kind = class_of(folder)
    if kind is None or kind not in CLASSES:
        what = "names no class in architectures" if kind is None else f"names {kind:.80}, which no class here reads"
        raise ValueError(f"{folder}: config.json {what}: one of {', '.join(CLASSES)} is converted")
    reader = Reranker if (kind, to) == ("SequenceClassifier", "sentence-transformers") else CLASSES[kind]
    names = (name for name in composer_files.TOKENIZER if (folder / name).is_file())
    return reader.from_pretrained(folder, dtype=_dtype(folder)), {name: (folder / name).read_bytes() for name in names}


def _dtype(folder: Path) -> torch.dtype:
    """The smallest dtype that holds all numbers of a folder and of its modules."""
    files = [path for name in (SAFETENSORS, PICKLE) for path in folder.glob(f"*/{name}")]
    stored = [each.like.dtype for place in (folder, *(path.parent for path in files)) for each in find(place).values()]
    return reduce(torch.promote_types, [dtype for dtype in stored if dtype.is_floating_point], stored[0])
