"""Labelled texts and words as token ids: the batches that a classifier learns from, and its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..heads.classifier import SequenceClassifier
from ..heads.token_classifier import TokenClassifier
from ..heads.token_labels import labels_of_words, scores_of_words
from ..inference.batches import plan
from ..packing import pack
from ..tokenizer import TextWindow, Tokenizer
from . import metrics
from .batch_loss import BatchLoss
from .examples import Labelled, Tagged
from .ragged import RaggedIds, tokenize_texts

Classifier = SequenceClassifier | TokenClassifier

EVALUATED = 16_384
"""Tokens of a batch that is scored."""

KINDS = {True: "classes, such as 1", False: "numbers to predict, such as 1.0"}


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts or pairs of texts with one label each.

    Attributes:
        ids: of each text, special tokens included.
        values: int64 [N], the class of each; float32 [N], the number of each, where there are no classes.
        labels: the names of the classes; none: `values` are numbers to predict.
        measured: names of functions of `metrics` that score predictions.
    """

    ids: RaggedIds
    values: np.ndarray
    labels: tuple[str, ...]
    measured: tuple[str, ...]

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Labelled],
        tokenizer: Tokenizer,
        *,
        labels: Sequence[str] | None = None,
        measured: Sequence[str] = (),
        max_length: int,
    ) -> Texts:
        """Tokenise rows of one kind: all with a class, or all with a number.

        Args:
            labels: names of the classes; none: numbers; None: as many classes as the rows have, by their numbers.
            measured: as the attribute; none: accuracy of classes, both correlations of numbers.

        Raises:
            ValueError: no row, rows of several kinds, or a class that `labels` lacks.
        """
        kinds = {type(row.label) for row in rows}
        if kinds != {int} and kinds != {float}:
            found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no rows"
            raise ValueError(f"each text must have a class, or each a number, got {found}")
        is_class = kinds == {int}
        largest = max(float(row.label) for row in rows if not isinstance(row.label, tuple))
        if labels is None and is_class and largest >= len(rows):
            raise ValueError(
                f"{len(rows)} texts have classes up to {largest:g}: number them from 0, or give their names"
            )
        names = tuple(map(str, range(1 + int(largest) if is_class else 0))) if labels is None else tuple(labels)
        if bool(names) != is_class:
            got, wanted = KINDS[is_class], KINDS[not is_class]
            raise ValueError(f"the labels are {got}, but {wanted} are wanted, as in the training")
        if names and largest >= len(names):
            raise ValueError(f"there are {len(names)} classes, but labels up to {largest:g}")
        values = np.array([row.label for row in rows], np.int64 if is_class else np.float32)
        measured = tuple(measured) or (("accuracy",) if names else ("pearson", "spearman"))
        ids = tokenize_texts((row.text for row in rows), tokenizer, max_length=max_length)
        return cls(ids, values, names, measured)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row of a batch, int [N]."""
        return self.ids.lengths

    def loss(self, model: Classifier, rows: np.ndarray) -> BatchLoss:
        """The mean over texts."""
        batch, labels = self.ids.packed(rows), torch.from_numpy(self.values[rows])
        loss = model(batch.to(model.device), labels=labels.to(model.device)).loss
        assert loss is not None
        return BatchLoss(loss, batch.num_tokens, {}, count=len(rows))

    @torch.no_grad()
    def scores(self, model: Classifier) -> dict[str, float]:
        """The metrics of the model's predictions, in its mode, and "score", their mean."""
        x_NC = np.zeros((len(self.ids), max(1, len(self.labels))), np.float32)
        for rows in plan(self.lengths.tolist(), EVALUATED):
            x_NC[rows] = model(self.ids.packed(rows).to(model.device)).float().cpu().numpy()
        predicted = x_NC.argmax(1) if self.labels else x_NC[:, 0]
        return _with_mean({name: getattr(metrics, name)(predicted, self.values) for name in self.measured})


@dataclass(frozen=True, eq=False)
class Words:
    """Sentences with a label for each word, in windows of what a model reads at once.

    Attributes:
        windows: of all sentences.
        tags: of each sentence, the label of each word by its number in `labels`.
    """

    windows: Sequence[TextWindow]
    tags: Sequence[Sequence[int]]
    labels: tuple[str, ...]

    @classmethod
    def from_rows(
        cls, rows: Sequence[Tagged], tokenizer: Tokenizer, *, labels: Sequence[str] | None = None, max_length: int
    ) -> Words:
        """Tokenise sentences. `labels`: names of the labels; None: those that the rows have, "O" first.

        Raises:
            ValueError: no row, or a tag that `labels` lacks.
        """
        found = {tag for row in rows for tag in row.tags}
        names = tuple(sorted(found, key=lambda tag: (tag != "O", tag))) if labels is None else tuple(labels)
        if not rows or not found <= set(names):
            raise ValueError(
                f"the tag {min(found - set(names))!r} is not one of {', '.join(names)}: name all of them in labels"
                if rows
                else "no rows"
            )
        number = {name: index for index, name in enumerate(names)}
        words = [list(row.words) for row in rows]
        windows = tokenizer.encode_windows(words, max_length=max_length, is_split_into_words=True)
        return cls(windows, [[number[tag] for tag in row.tags] for row in rows], names)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row of a batch, int [N]: a row is a window."""
        return np.array([len(window.ids) for window in self.windows])

    def loss(self, model: Classifier, rows: np.ndarray) -> BatchLoss:
        """The mean over words. The last layer computes only the first token of each."""
        windows = [self.windows[row] for row in rows]
        batch = pack([window.ids for window in windows])
        labels = [x for each in windows for x in labels_of_words(each, self.tags[each.text])]
        labels_T = torch.tensor(labels, device="cpu")
        rows_Q = (labels_T >= 0).nonzero().squeeze(1)
        labels_Q, device = labels_T[rows_Q], model.device
        loss = model(batch.to(device), rows=rows_Q.to(device), labels=labels_Q.to(device)).loss
        assert loss is not None
        return BatchLoss(loss, batch.num_tokens, {}, count=len(rows_Q))

    @torch.no_grad()
    def scores(self, model: Classifier) -> dict[str, float]:
        """F1 of whole entities, as "entity_f1" and as "score"."""
        logits: dict[int, Tensor] = {}
        for rows in plan(self.lengths.tolist(), EVALUATED):
            batch = pack([self.windows[row].ids for row in rows])
            parts = model(batch.to(model.device)).float().cpu().split(batch.lengths)
            logits |= zip(rows, parts, strict=True)
        of_text: list[list[int]] = [[] for _ in self.tags]
        for row, window in enumerate(self.windows):
            of_text[window.text].append(row)
        found = [
            scores_of_words([self.windows[row] for row in rows], [logits[row] for row in rows]).argmax(1).tolist()
            for rows in of_text
        ]
        predicted, wanted = ([[self.labels[tag] for tag in text] for text in side] for side in (found, self.tags))
        return _with_mean({"entity_f1": metrics.entity_f1(predicted, wanted)})


def _with_mean(scores: dict[str, float]) -> dict[str, float]:
    return {"score": sum(scores.values()) / len(scores), **scores}
