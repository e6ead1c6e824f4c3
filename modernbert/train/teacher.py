"""Teachers that fill a teacher folder, and what a new model takes from one.

- `write_teacher`: the vectors of a sentence-transformers model, for distillation of vectors.
- `write_scores`: the scores of a cross-encoder, or of a `ColBERT` of ours, for KL over the documents of a query.
- Any other teacher is a function that is given to `teacher_folder.fill`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import has_file
from ..heads.colbert import ColBERT
from ..heads.folders import class_of
from ..late_interaction import Ragged, maxsim
from ..tokenizer import Tokenizer
from .reading import digest_folder
from .teacher_folder import Asked as Asked
from .teacher_folder import Teacher as Teacher
from .teacher_folder import fill
from .teacher_folder import text_key as text_key

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PATIENCE = 14 * 24 * 60.0
"""Minutes for which the other ranks wait while the first one asks a teacher. One that has died is noticed at once."""


def write_teacher(
    texts: Iterable[str],
    model: str,
    folder: str | os.PathLike[str],
    *,
    max_length: int = 96,
    device: str | None = None,
) -> Teacher:
    """Add to a folder the vectors of texts by a sentence-transformers model, cut to `max_length` tokens.

    The model computes under bfloat16 autocast, but in float32 on a CPU, where few are fast in bfloat16. It is loaded
    only if a vector is missing.

    Args:
        device: where it computes; None: where sentence-transformers or `ColBERT` does if nothing is named.

    Raises:
        ValueError, FileExistsError: as `fill`. ModuleNotFoundError: sentence-transformers is not installed.
    """
    encoders = []

    def answer(part: list[str]) -> Tensor:
        if not encoders:
            encoders.append(_sentence_transformer(model, max_length, device))
        (encoder,) = encoders
        kind = encoder.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu"):
            return encoder.encode(part, batch_size=128, convert_to_tensor=True)

    return fill(folder, texts, answer, identity_of_vectors(model, max_length))


def write_scores(
    pairs: Iterable[tuple[str, str]],
    model: str,
    folder: str | os.PathLike[str],
    *,
    max_length: int = 512,
    device: str | None = None,
) -> Teacher:
    """Add to a folder the scores of pairs of a query and a document, by a cross-encoder or by a `ColBERT` of ours.

    Those of a cross-encoder are logits, for a pair of at most `max_length` tokens. Those of a ColBERT are MaxSim, at
    the lengths of its folder.

    Args:
        model: the folder of a `ColBERT`; or the folder or the name of a cross-encoder of sentence-transformers.
        device: where it computes; None: where sentence-transformers or `ColBERT` does if nothing is named.

    Raises:
        ValueError, FileExistsError: as `fill`.
        ValueError: the model is not a cross-encoder: its scores would be those of a new, random head.
        ModuleNotFoundError: sentence-transformers is not installed.
    """
    scorers: list[Callable[[list[tuple[str, str]]], Tensor]] = []

    def answer(part: list[tuple[str, str]]) -> Tensor:
        if not scorers:
            scorers.append(_colbert(model, device) if is_colbert(model) else _cross_encoder(model, max_length, device))
        return scorers[0](part)

    return fill(folder, pairs, answer, identity_of_scores(model, max_length))


def is_colbert(model: str) -> bool:
    """Whether it is a local folder that `ColBERT` reads."""
    return has_file(Path(model) / "config.json") and class_of(Path(model)) == "ColBERT"


def identity_of_scores(model: str, max_length: int) -> dict[str, object]:
    """What `write_scores` calls this teacher in its folder."""
    return identity_of_vectors(model, None if is_colbert(model) else max_length)


def identity_of_vectors(model: str, max_length: int | None) -> dict[str, object]:
    """What `write_teacher` calls this teacher in its folder: the name of a model on the hub, or a hash of its files."""
    path = Path(model)
    if path.is_dir():
        return {"model": path.name, "hash": digest_folder(path), "max_length": max_length}
    return {"model": model, "hash": None, "max_length": max_length}


def _sentence_transformer(model: str, max_length: int, device: str | None) -> SentenceTransformer:
    encoder = _sentence_transformers().SentenceTransformer(model, device=device)
    encoder.max_seq_length = max_length
    return encoder


def _cross_encoder(model: str, max_length: int, device: str | None) -> Callable[[list[tuple[str, str]]], Tensor]:
    scorer = _sentence_transformers().CrossEncoder(model, max_length=max_length, device=device)
    # transformers puts a new head on a model of another class, and warns.
    there, used = scorer.config.architectures, type(scorer[0].model).__name__
    if there and used not in there:
        raise ValueError(
            f"{model} holds a {there[0]}, not a cross-encoder, whose class is {used}: give another teacher"
        )
    # Logits: a sigmoid, the default of many, has no differences left between good documents.
    logits = torch.nn.Identity()

    def answer(part: list[tuple[str, str]]) -> Tensor:
        found = scorer.predict(part, activation_fn=logits, convert_to_tensor=True, show_progress_bar=False)
        if found.numel() != len(part):
            raise ValueError(f"{model} gives {found.numel() // len(part)} numbers for a pair, not one score")
        return found.reshape(len(part))

    return answer


def _sentence_transformers() -> ModuleType:
    try:
        import sentence_transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the teacher needs it: pip install sentence-transformers") from error
    return sentence_transformers


def _colbert(model: str, device: str | None) -> Callable[[list[tuple[str, str]]], Tensor]:
    colbert = ColBERT.from_pretrained(model, device=device)

    def answer(part: list[tuple[str, str]]) -> Tensor:
        encoded = []
        for side, encode in zip(
            zip(*part, strict=True), (colbert.encode_queries, colbert.encode_documents), strict=True
        ):
            texts = list(dict.fromkeys(side))
            vectors = dict(zip(texts, encode(texts, progress=False), strict=True))
            encoded.append(Ragged.from_list([vectors[text] for text in side]).to(colbert.device))
        return maxsim(*encoded, paired=True)

    return answer


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
