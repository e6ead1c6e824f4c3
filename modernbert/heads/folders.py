"""Which of our classes reads a folder, so that a folder of another one is refused by name."""

from __future__ import annotations

from pathlib import Path

from .. import checkpoint

SETTINGS = "config_sentence_transformers.json"
# The architectures of config.json, and the class that reads each.
ARCHITECTURES = {
    "ModernBertModel": "Encoder",
    "ModernBertForMaskedLM": "MaskedLM",
    "ModernBertForSequenceClassification": "SequenceClassifier",
    "ModernBertForTokenClassification": "TokenClassifier",
    "ModernBertForQuestionAnswering": "QuestionAnswering",
    "ModernBertForMultipleChoice": "MultipleChoice",
    "HF_ColBERT": "ColBERT",
}
# The kinds of models of sentence-transformers and PyLate, as SETTINGS names them.
MODELS = {"ColBERT": "ColBERT", "MultiVectorEncoder": "ColBERT", "SentenceTransformer": "Embedder"}
ALSO = {"Reranker": "SequenceClassifier"}  # classes that read the folders of another one too
NEW_HEAD = {
    "MaskedLM": "MaskedLM(encoder)",
    "MultipleChoice": "MultipleChoice(encoder)",
    "QuestionAnswering": "QuestionAnswering(encoder)",
    "Reranker": "Reranker(SequenceClassifier(encoder, labels=1), tokenizer)",
    "SequenceClassifier": "SequenceClassifier(encoder, labels=[...])",
    "TokenClassifier": "TokenClassifier(encoder, labels=[...])",
}


def class_of(folder: Path) -> str | None:
    """The class that reads the folder; for a head that none reads, its name in the folder; None if it has no name."""
    found = checkpoint.read_json(folder, "config.json").get("architectures")
    named = str(found[0]) if isinstance(found, list) and found else None
    of_weights = None if named is None else ARCHITECTURES.get(named, named)
    if named == "HF_ColBERT" or not checkpoint.has_file(folder / "modules.json"):
        return of_weights
    settings = checkpoint.read_json(folder, SETTINGS) if checkpoint.has_file(folder / SETTINGS) else {}
    written = settings.get("model_type")
    if written == "CrossEncoder" and of_weights not in (None, "Encoder"):
        return of_weights
    if written is not None:
        return MODELS.get(str(written), str(written))
    # Before the settings had its name, a dense model had a Pooling, and one of PyLate had none.
    entries = checkpoint.read_json(folder, "modules.json", list)
    kinds = {str(entry.get("type")).rsplit(".", 1)[-1] for entry in entries if isinstance(entry, dict)}
    return "ColBERT" if "Dense" in kinds and "Pooling" not in kinds else "Embedder"


def check_class(folder: Path, wanted: str) -> None:
    """Raise a ValueError with the name of the class that reads the folder, unless it is `wanted` or not known.

    An encoder alone is refused for the classes in `NEW_HEAD`; the others say what it lacks.
    """
    found = class_of(folder)
    if found in (None, wanted, ALSO.get(wanted)) or (found == "Encoder" and wanted not in NEW_HEAD):
        return
    todo = f": load it with {found}.from_pretrained" if found in {*ARCHITECTURES.values(), *MODELS.values()} else ""
    if wanted in NEW_HEAD:
        new = f"put a new head on its encoder with {NEW_HEAD[wanted]} of Encoder.from_pretrained"
        todo = f": {new}" if found == "Encoder" else f"{todo}, or {new}" if todo else f": {new}"
    raise ValueError(f"{folder} holds {_article(found)} {found}, not {_article(wanted)} {wanted}{todo}")


def _article(name: str) -> str:
    return "an" if name[0] in "AEIO" else "a"
