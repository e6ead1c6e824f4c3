"""A folder of another class is refused by name, and `modernbert info` names the class that reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from head_twin import SMALL, head_twins
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as models

from modernbert import (
    ColBERT,
    Embedder,
    Encoder,
    MaskedLM,
    MultipleChoice,
    QuestionAnswering,
    Reranker,
    SequenceClassifier,
    TokenClassifier,
    Tokenizer,
)
from modernbert.cli import main
from modernbert.heads.dense import Dense
from modernbert.heads.embedder import EmbedderConfig
from modernbert.heads.folders import class_of
from modernbert.pretrained import Pretrained

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
CLASSES: dict[str, type[Pretrained]] = {
    kind.__name__: kind
    for kind in (
        ColBERT,
        Embedder,
        MaskedLM,
        MultipleChoice,
        QuestionAnswering,
        SequenceClassifier,
        TokenClassifier,
    )
}


def save(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    encoder, tokenizer = Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)
    if name == "ColBERT":
        ColBERT.from_encoder(encoder, tokenizer, dim=8).save_pretrained(folder)
    elif name == "Embedder":
        config = EmbedderConfig(pooling=("cls", "mean"), prompts={"query": "q: "}, width=10)
        Embedder(encoder, tokenizer, [Dense(128, 12, bias=True)], config).save_pretrained(folder)
    elif name in ("MaskedLM", "MultipleChoice", "QuestionAnswering"):
        CLASSES[name](encoder).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    else:
        CLASSES[name](encoder, labels=["no", "yes"]).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(name, tmp_path_factory.mktemp(name)) for name in CLASSES}


@pytest.mark.parametrize("wanted", CLASSES)
@pytest.mark.parametrize("found", CLASSES)
def test_each_class_reads_its_own_folders_only(found: str, wanted: str, folders: dict[str, Path]) -> None:
    assert class_of(folders[found]) == found
    if found == wanted:
        CLASSES[wanted].from_pretrained(folders[found])
        return
    words = rf"holds an? {found}, not an? {wanted}: load it with {found}\.from_pretrained"
    with pytest.raises(ValueError, match=words):
        CLASSES[wanted].from_pretrained(folders[found])


@pytest.mark.parametrize("name", [None, "SentenceTransformer"])
@pytest.mark.parametrize("dense", [True, False])
def test_a_dense_model_is_not_read_as_late_interaction(name: str | None, dense: bool, tmp_path: Path) -> None:
    """A projection behind a pooling was taken for the head of a ColBERT, and its pooling was dropped in silence."""
    layers = [models.Transformer(str(BACKBONE)), models.Pooling(64, "mean"), *([models.Dense(64, 8)] if dense else [])]
    SentenceTransformer(modules=layers, device="cpu").save_pretrained(str(tmp_path), create_model_card=False)
    path = tmp_path / "config_sentence_transformers.json"
    settings = json.loads(path.read_text())
    del settings["model_type"]
    path.write_text(json.dumps(settings | ({} if name is None else {"model_type": name})))
    with pytest.raises(ValueError, match=r"holds an Embedder, not a ColBERT: load it with Embedder\.from_pretrained"):
        ColBERT.from_pretrained(tmp_path)
    assert class_of(tmp_path) == "Embedder"


def test_a_cross_encoder_is_a_classifier(tmp_path: Path) -> None:
    """sentence-transformers saves one with modules.json, and the weights of a classifier."""
    _, model = head_twins("SequenceClassification", SMALL)
    model.save_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "CrossEncoder"}))
    assert class_of(tmp_path) == "SequenceClassifier"
    SequenceClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("found", [name for name in CLASSES if name != "SequenceClassifier"])
def test_a_reranker_is_read_from_classifiers_alone(found: str, folders: dict[str, Path], tmp_path: Path) -> None:
    words = rf"holds an? {found}, not a Reranker: load it with {found}\.from_pretrained, or put a new head"
    with pytest.raises(ValueError, match=words):
        Reranker.from_pretrained(folders[found])
    encoder, tokenizer = Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)
    Reranker(SequenceClassifier(encoder, labels=1), tokenizer).save_pretrained(tmp_path)
    assert class_of(tmp_path) == "SequenceClassifier"
    if found not in ("ColBERT", "Embedder"):
        with pytest.raises(ValueError, match=rf"holds a SequenceClassifier, not a {found}"):
            CLASSES[found].from_pretrained(tmp_path)


INFO = {
    "ColBERT": ["head +64 -> 8", "query +prefix"],
    "Embedder": [
        "head +Embedder",
        r"pooling +cls \+ mean",
        r"projection +128 -> 12 \+ bias",
        "vector +10 numbers",
        "q: ",
    ],
    "MaskedLM": ["head +MaskedLM"],
    "MultipleChoice": ["head +MultipleChoice", "pooling +cls"],
    "QuestionAnswering": ["head +QuestionAnswering"],
    "SequenceClassifier": ["head +SequenceClassifier", "labels +no, yes", "pooling +cls"],
    "TokenClassifier": ["head +TokenClassifier", "labels +no, yes"],
}


def info(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(["info", str(folder)])
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("name", CLASSES)
def test_info_names_the_head(name: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = info(folders[name], capsys)
    for words in INFO[name]:
        assert re.search(words, out), out


def test_info_of_a_head_that_no_class_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("TokenClassifier", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["ModernBertForSpans"]}))
    assert "ModernBertForSpans" in info(tmp_path, capsys)
