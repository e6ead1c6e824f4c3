"""Scores of predictions against labels, as GLUE and CoNLL define them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..heads.token_labels import entities


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The share of `[n]` predictions that are right."""
    _check(predicted, labels)
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The harmonic mean of precision and recall of class 1, of `[n]` classes; 0 if neither has one."""
    _check(predicted, labels)
    right = ((predicted == 1) & (labels == 1)).sum()
    return _f1(int(right), int((predicted == 1).sum()), int((labels == 1).sum()))


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of `[n]` classes; 0 where one side is constant, as scikit-learn has it."""
    _check(predicted, labels)
    classes = np.union1d(predicted, labels)
    one_hot = [(side[:, None] == classes).astype(np.float64) for side in (predicted, labels)]
    (x, y) = (side - side.mean(0) for side in one_hot)
    scale = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale > 0 else 0.0


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The linear correlation of `[n]` numbers; 0 where one side is constant."""
    _check(predicted, labels)
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predicted, labels)[0, 1])


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The correlation of the ranks of `[n]` numbers; equal numbers share the mean of their ranks."""
    _check(predicted, labels)
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(x: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def entity_f1(predicted: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> float:
    """F1 over whole entities: a predicted one is right if its first word, its last and its type are.

    Args:
        predicted, labels: the BIO tags of the words of each sentence.

    Raises:
        ValueError: another number of sentences, or of tags in one.
    """
    if len(predicted) != len(labels):
        raise ValueError(f"predicted has {len(predicted)} sentences, labels {len(labels)}")
    found, wanted = set(), set()
    for number, (ours, theirs) in enumerate(zip(predicted, labels, strict=True)):
        if len(ours) != len(theirs):
            raise ValueError(f"sentence {number}: predicted has {len(ours)} tags, labels {len(theirs)}")
        found |= {(number, entity) for entity in entities(ours)}
        wanted |= {(number, entity) for entity in entities(theirs)}
    return _f1(len(found & wanted), len(found), len(wanted))


def _f1(right: int, predicted: int, labels: int) -> float:
    return 2 * right / (predicted + labels) if predicted + labels else 0.0


def _check(predicted: np.ndarray, labels: np.ndarray) -> None:
    if predicted.shape != labels.shape or predicted.ndim != 1 or not len(labels):
        raise ValueError(f"predicted has shape {predicted.shape}, labels {labels.shape}: both must be [n], n above 0")
