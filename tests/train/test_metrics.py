"""Against scikit-learn and scipy where they are installed, and against counts made by hand."""

import numpy as np
import pytest

from modernbert.train import metrics

DRAW = np.random.default_rng(0)
CLASSES = [(DRAW.integers(0, k, 57), DRAW.integers(0, k, 57)) for k in (2, 2, 3, 5)]
NUMBERS = [(DRAW.normal(size=57), DRAW.normal(size=57)), (DRAW.integers(0, 4, 57) * 1.0, DRAW.normal(size=57))]


@pytest.mark.parametrize(("predicted", "labels"), CLASSES)
def test_classes_equal_scikit_learn(predicted, labels):
    sklearn = pytest.importorskip("sklearn.metrics")
    assert metrics.accuracy(predicted, labels) == pytest.approx(sklearn.accuracy_score(labels, predicted))
    assert metrics.matthews(predicted, labels) == pytest.approx(sklearn.matthews_corrcoef(labels, predicted))
    wanted = sklearn.f1_score(labels, predicted, labels=[1], average="macro")
    assert metrics.f1(predicted, labels) == pytest.approx(wanted)


@pytest.mark.parametrize(("predicted", "labels"), NUMBERS)
def test_numbers_equal_scipy(predicted, labels):
    stats = pytest.importorskip("scipy.stats")
    assert metrics.pearson(predicted, labels) == pytest.approx(stats.pearsonr(predicted, labels).statistic)
    assert metrics.spearman(predicted, labels) == pytest.approx(stats.spearmanr(predicted, labels).statistic)


def test_a_constant_side_correlates_with_nothing():
    same, other = np.ones(4), np.arange(4)
    for metric in (metrics.matthews, metrics.pearson, metrics.spearman):
        assert metric(same, other) == metric(other, same) == 0.0
    assert metrics.f1(np.zeros(4), np.zeros(4)) == 0.0


TAGS = {
    "one": (["O", "B-x", "I-x", "O"], {(1, 3, "x")}),
    "adjacent": (["B-x", "B-x", "I-x"], {(0, 1, "x"), (1, 3, "x")}),
    "another type goes on": (["B-x", "I-y"], {(0, 1, "x"), (1, 2, "y")}),
    "an inside without a beginning": (["O", "I-x", "I-x"], {(1, 3, "x")}),
    "to the end": (["B-x"], {(0, 1, "x")}),
    "a hyphen in the type": (["B-creative-work", "I-creative-work"], {(0, 2, "creative-work")}),
    "none": (["O", "O"], set()),
    "empty": ([], set()),
}


@pytest.mark.parametrize("name", TAGS)
def test_entities_of_tags(name):
    tags, wanted = TAGS[name]
    assert set(metrics.entities(tags)) == wanted


def test_entity_f1_counts_whole_entities():
    labels = [["B-x", "I-x", "O"], ["B-y", "O", "B-x"]]
    predicted = [["B-x", "I-x", "O"], ["B-x", "O", "O"]]  # one right of two found, three wanted
    assert metrics.entity_f1(predicted, labels) == pytest.approx(2 * 1 / (2 + 3))
    assert metrics.entity_f1(labels, labels) == 1.0
    # The same entity in another sentence is not the same.
    assert metrics.entity_f1([["B-x"], ["O"]], [["O"], ["B-x"]]) == 0.0


def test_sizes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="shape"):
        metrics.accuracy(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="shape"):
        metrics.matthews(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="2 sentences, labels 1"):
        metrics.entity_f1([["O"], ["O"]], [["O"]])
    with pytest.raises(ValueError, match="sentence 0: predicted has 1 tags, labels 2"):
        metrics.entity_f1([["O"]], [["O", "O"]])
