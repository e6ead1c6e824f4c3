"""SequenceClassifier: labels or numbers of each text, as transformers' `ModernBertForSequenceClassification`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import dropout

from ..checkpoint import Content
from ..config import EncoderConfig
from ..encoder import Encoder
from ..outputs import HeadOutput
from ..packing import Packed, pack, padded_ids
from ..pretrained import Pretrained
from . import prediction
from .labels import MULTI, REGRESSION, SINGLE, label_names, problem_type, with_labels
from .pooling import encode_and_pool
from .prediction import PredictionHead

if TYPE_CHECKING:
    from typing_extensions import Self


class SequenceClassifier(Pretrained):
    """An encoder, the pooling of `config.classifier_pooling`, and a classifier of texts: `[B, C]` logits.

    Parameter names are those of `ModernBertForSequenceClassification`, which loads what this saves, and the reverse.
    The config names the labels (`id2label`) and the problem; where it has no `problem_type`, the labels decide as in
    transformers: one label is a number to predict, integers are one label a text, and floats are any number of labels.

    Args:
        encoder: taken over, not copied; its config gets the labels. New layers get its device, dtype and mode.
        labels: their names, or how many there are; None: those of the config.
        problem_type: "regression", "single_label_classification" or "multi_label_classification"; None: as above.
        head: the trained first layer of another head, such as `masked_lm.head`; None: a new one.

    Attributes:
        model: the encoder. head: the first layer. classifier: the last one, `[D]` to `[C]`.
        labels: the names of the C labels.
    """

    accepts_loss_kwargs = False  # its loss is a mean over texts, which transformers' Trainer divides itself

    def __init__(
        self,
        encoder: Encoder,
        *,
        labels: Sequence[str] | int | None = None,
        problem_type: str | None = None,
        head: PredictionHead | None = None,
    ) -> None:
        super().__init__()
        config = encoder.config = with_labels(encoder.config, labels, problem_type)
        self.labels = label_names(config)
        self.model = encoder
        self.head = prediction.beside(encoder, partial(PredictionHead, config)) if head is None else head
        self.classifier = prediction.beside(encoder, partial(prediction.classifier, config, len(self.labels)))
        self.training = encoder.training

    @classmethod
    def _read(cls, folder: Path, config: EncoderConfig, *, device: torch.device, dtype: torch.dtype) -> Self:
        return prediction.read(cls, "SequenceClassifier", folder, config, device=device, dtype=dtype)

    def _content(self, state: Mapping[str, Tensor] | None) -> Content:
        return prediction.content(self, "SequenceClassifier", self.config, state)

    @property
    def config(self) -> EncoderConfig:
        return self.base_model.config

    @overload
    def forward(self, batch: Packed, *, rows: None = None) -> Tensor: ...
    @overload
    def forward(self, batch: Packed, *, labels: Tensor) -> HeadOutput: ...
    @overload
    def forward(
        self,
        batch: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> HeadOutput: ...

    def forward(
        self,
        batch: Packed | Tensor | None = None,
        attention_mask: Tensor | None = None,
        rows: None = None,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Tensor | HeadOutput:
        """B packed texts to logits `[B, C]`; with `labels`, or for padded ids `[B, S]`, a `HeadOutput` with them.

        With the pooling "cls" the last layer computes only the first row of each text. That is the first real token,
        on whichever side the padding is; transformers takes the first column, which may be padding.

        Args:
            batch: a `Packed`; or `[B, S]` token ids, with their `attention_mask`.
            rows: None: a text has one result. `Session` passes it.
            labels: `[B]` integers, a negative one where a text has none; `[B, C]` numbers from 0 to 1, for any number
                of labels; `[B]` or `[B, C]` numbers to predict.
            input_ids: another name of `batch` for padded callers.

        Raises:
            ValueError: labels of another shape, or without a class; what `Encoder` refuses.
        """
        if rows is not None:
            raise ValueError("a SequenceClassifier gives one result for each text: leave out rows")
        if isinstance(batch, Packed):
            prediction.check_alone(attention_mask, input_ids)
            packed = batch
        else:
            ids_BS = padded_ids(prediction.given_ids(batch, input_ids), None)
            packed = pack(ids_BS, attention_mask, vocab_size=self.config.vocab_size)
        x_BD = self.head(encode_and_pool(self.model, packed, [self.config.classifier_pooling]))
        logits_BC = self.classifier(dropout(x_BD, self.config.classifier_dropout, self.training))
        if labels is not None:
            return HeadOutput(self._loss(logits_BC, labels), logits_BC)
        return logits_BC if packed is batch else HeadOutput(None, logits_BC)

    def _loss(self, logits_BC: Tensor, labels: Tensor) -> Tensor:
        problem, whole = problem_type(self.config), not labels.is_floating_point()
        if problem is None:
            problem = REGRESSION if len(self.labels) == 1 else SINGLE if whole else MULTI
        if problem == SINGLE:
            labels_B = labels.flatten() if labels.shape == (len(logits_BC), 1) else labels
            prediction.check_labels(labels_B, (len(logits_BC),), len(self.labels))
            return prediction.cross_entropy(logits_BC, labels_B)
        shapes = [tuple(logits_BC.shape), *([(len(logits_BC),)] if len(self.labels) == 1 else [])]
        if tuple(labels.shape) not in shapes:
            raise ValueError(f"labels for {problem} must be {list(shapes[-1])}, got shape {tuple(labels.shape)}")
        logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
        wanted_BC = labels.reshape(logits_BC.shape).to(logits_BC.dtype)
        measure = F.mse_loss if problem == REGRESSION else F.binary_cross_entropy_with_logits
        return measure(logits_BC, wanted_BC, reduction="sum") / max(1, wanted_BC.numel())
