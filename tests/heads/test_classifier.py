"""SequenceClassifier: the three problems, poolings, labels of the config."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from head_twin import CONFIGS, SMALL, head_twins
from hf_twin import pad, random_ids
from torch import Tensor

from modernbert import Encoder, SequenceClassifier, TokenClassifier, pack

TEXTS = random_ids([3, 40, 17, 5], 100)
IDS, MASK = pad(TEXTS)
ONE = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
PROBLEMS: dict[str, tuple[dict[str, object], Tensor]] = {
    "single": ({}, torch.tensor([2, 0, 1, 1])),
    "single, named": ({"problem_type": "single_label_classification"}, torch.tensor([2, 0, 1, 1])),
    "single, some without a label": ({}, torch.tensor([2, -100, 1, -100])),
    "multi": ({}, torch.tensor([[1.0, 0, 1], [0, 0, 0], [0.2, 1, 1], [1, 1, 1]])),
    "regression": (ONE, torch.tensor([0.5, -2.0, 3.0, 0.1])),
    "regression of several": ({"problem_type": "regression"}, torch.randn(4, 3)),
    "int32": ({}, torch.tensor([2, 0, 1, 1], dtype=torch.int32)),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("config", ["tied", "untied"])
def test_each_problem_has_the_loss_of_transformers(name: str, config: str) -> None:
    settings, labels = PROBLEMS[name]
    theirs, ours = head_twins("SequenceClassification", CONFIGS[config], **settings)
    theirs_labels = labels.double() if labels.is_floating_point() else labels.long()
    wanted = theirs.double()(IDS, attention_mask=MASK, labels=theirs_labels)
    for got in (ours.double()(IDS, MASK, labels=labels), ours(pack(TEXTS), labels=labels)):
        torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=1e-5)


def test_a_problem_that_the_config_names_decides() -> None:
    _, ours = head_twins("SequenceClassification", problem_type="multi_label_classification")
    whole = torch.tensor([[1, 0, 1]] * 4)
    assert torch.equal(ours(IDS, MASK, labels=whole).loss, ours(IDS, MASK, labels=whole.float()).loss)
    with pytest.raises(ValueError, match=r"labels for multi_label_classification must be \[4, 3\], got shape \(4,\)"):
        ours(IDS, MASK, labels=torch.tensor([1, 0, 1, 1]))
    _, ours = head_twins("SequenceClassification", problem_type="single_label_classification")
    with pytest.raises(ValueError, match="labels must be integers of shape"):
        ours(IDS, MASK, labels=torch.rand(4, 3))
    _, ours = head_twins("SequenceClassification", **ONE)
    with pytest.raises(ValueError, match=r"labels for regression must be \[4\], got shape \(3,\)"):
        ours(IDS, MASK, labels=torch.rand(3))
    assert ours(IDS, MASK, labels=torch.rand(4, 1)).loss.isfinite()
    assert ours(IDS, MASK, labels=torch.tensor([1, 2, 3, 4])).loss.isfinite()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_left_padding_and_query_only_rows(pooling: str) -> None:
    """The first real token is [CLS] on either side, and rows under the mask are not part of a mean."""
    _, ours = head_twins("SequenceClassification", replace(SMALL, classifier_pooling=pooling))
    with torch.inference_mode():
        wanted = ours(pack(TEXTS))
        torch.testing.assert_close(ours(*pad(TEXTS, "left", extra=3)).logits, wanted, rtol=0, atol=1e-5)
        filled = IDS.masked_fill(MASK == 0, 7)
        torch.testing.assert_close(ours(filled, MASK).logits, wanted, rtol=0, atol=1e-5)
        expanded = pack(filled, MASK, query_mask=1 - MASK)
        torch.testing.assert_close(ours(expanded), wanted, rtol=0, atol=1e-5)


def test_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="one result for each text: leave out rows"):
        head_twins("SequenceClassification")[1](pack(TEXTS), rows=torch.tensor([0]))


# Labels


@pytest.mark.parametrize("kind", [SequenceClassifier, TokenClassifier])
def test_labels_are_those_of_the_config_or_new_ones(kind: type, tmp_path: Path) -> None:
    assert kind(Encoder(SMALL)).labels == ("LABEL_0", "LABEL_1")
    assert kind(Encoder(SMALL), labels=3).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    model = kind(Encoder(replace(SMALL, others={"num_labels": 7})), labels=["O", "B-x"])
    assert model.labels == ("O", "B-x")
    assert (model.config.num_labels, model.config.label2id) == (2, {"O": 0, "B-x": 1})
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert loaded.labels == ("O", "B-x")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.num_labels, theirs.id2label) == (2, {0: "O", 1: "B-x"})


@pytest.mark.parametrize("kind", [SequenceClassifier, TokenClassifier])
def test_wrong_labels_of_a_config_are_named(kind: type, tmp_path: Path) -> None:
    for labels, error, words in (
        ("no", TypeError, "labels is one str, 'no'"),
        ([], ValueError, "labels is 0"),
        (0, ValueError, "labels is 0"),
        (["a", "b", "a"], ValueError, "labels has 'a' twice"),
    ):
        with pytest.raises(error, match=words):
            kind(Encoder(SMALL), labels=labels)
    kind(Encoder(SMALL), labels=["no", "yes"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, words in (
        ({"id2label": {"0": "no", "2": "yes"}}, "id2label is .* but must be an object with the keys 0, 1, 2"),
        ({"id2label": ["no", "yes"]}, "id2label is"),
        ({"id2label": {}}, "id2label is"),
        ({"num_labels": 3}, "num_labels is 3, but id2label has 2 labels"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, r"classifier\.weight \(float32\[2, 64\] instead of float32\[3"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=words):
            kind.from_pretrained(tmp_path)
    path.write_text(json.dumps(config | {"id2label": None, "num_labels": 2}))
    assert kind.from_pretrained(tmp_path).labels == ("LABEL_0", "LABEL_1")


def test_a_problem_is_checked_written_and_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="problem_type is 'ranking', but must be one of regression"):
        SequenceClassifier(Encoder(SMALL), problem_type="ranking")
    model = SequenceClassifier(Encoder(SMALL), labels=3, problem_type="multi_label_classification")
    model.save_pretrained(tmp_path)
    assert SequenceClassifier.from_pretrained(tmp_path).config.problem_type == "multi_label_classification"
    changed = SequenceClassifier.from_pretrained(tmp_path, problem_type="single_label_classification")
    assert changed.config.problem_type == "single_label_classification"


def test_dropout_of_the_classifier_is_that_of_training() -> None:
    _, ours = head_twins("SequenceClassification", replace(SMALL, classifier_dropout=0.5))
    assert torch.equal(ours(pack(TEXTS)), ours(pack(TEXTS)))
    ours.train()
    assert not torch.equal(ours(pack(TEXTS)), ours(pack(TEXTS)))
