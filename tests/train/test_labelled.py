"""Predictions of labelled texts and words do not depend on which rows are scored together."""

import random

import numpy as np
import pytest
import torch

from modernbert import ColBERT, Encoder, EncoderConfig
from modernbert.heads.classifier import SequenceClassifier
from modernbert.heads.token_classifier import TokenClassifier
from modernbert.train import labelled, metrics
from modernbert.train.examples import Labelled, Tagged
from modernbert.train.labelled import Texts, Words

SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TAGS = ("O", "B-person", "I-person")


@pytest.fixture
def tokenizer():
    return ColBERT.default().tokenizer


@pytest.fixture
def encoder(tokenizer):
    return Encoder(EncoderConfig(vocab_size=tokenizer.vocab_size, **SHAPE)).eval()


def sentences():
    """Of 1 to 9 words, in an order that is not that of their lengths."""
    draw = random.Random(0)
    words = ("river", "Ada", "mountain", "bridge", "London", "glacier", "engine")
    return [tuple(draw.choices(words, k=draw.randint(1, 9))) for _ in range(20)]


@pytest.fixture
def predicted(monkeypatch):
    """What the metrics are given, in turn."""
    seen = []
    for name in ("accuracy", "entity_f1"):
        monkeypatch.setattr(metrics, name, lambda found, wanted: seen.append(found) or 0.0)
    return seen


def test_words(tokenizer, encoder, predicted, monkeypatch):
    model = TokenClassifier(encoder, labels=TAGS).eval()
    torch.nn.init.normal_(model.classifier.weight)  # predictions that differ from word to word
    rows = [Tagged(words, ("O",) * len(words)) for words in sentences()]
    options = {"labels": TAGS, "max_length": 8}  # windows, where a sentence is longer
    for row in rows:
        Words.from_rows([row], tokenizer, **options).scores(model)
    alone = [tags for (tags,) in predicted]
    predicted.clear()
    monkeypatch.setattr(labelled, "EVALUATED", 30)
    Words.from_rows(rows, tokenizer, **options).scores(model)
    assert predicted == [alone]
    assert len({tag for tags in alone for tag in tags}) > 1


def test_texts(tokenizer, encoder, predicted, monkeypatch):
    """Numbers, because classes of an untrained model are all the same."""
    model = SequenceClassifier(encoder, labels=1).eval()
    rows = [Labelled(" ".join(words), 0.0) for words in sentences()]
    options = {"labels": (), "measured": ("accuracy",), "max_length": 16}
    for row in rows:
        Texts.from_rows([row], tokenizer, **options).scores(model)
    alone = np.concatenate(predicted)
    predicted.clear()
    monkeypatch.setattr(labelled, "EVALUATED", 30)
    Texts.from_rows(rows, tokenizer, **options).scores(model)
    np.testing.assert_allclose(predicted[0], alone, rtol=0, atol=1e-5)  # float32, in another order
    assert np.ptp(alone) > 1e-3
