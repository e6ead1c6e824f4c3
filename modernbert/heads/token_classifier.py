"""TokenClassifier: a label for each token, as transformers' `ModernBertForTokenClassification`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor
from torch.nn.functional import dropout

from ..checkpoint import Content
from ..config import EncoderConfig
from ..encoder import Encoder
from ..outputs import HeadOutput
from ..packing import Packed, unpack
from ..padded import pack_padded
from ..pretrained import Pretrained
from . import prediction
from .labels import label_names, with_labels
from .prediction import PredictionHead

if TYPE_CHECKING:
    from typing_extensions import Self


class TokenClassifier(Pretrained):
    """An encoder, and a classifier of every token: `[T, C]` logits.

    Parameter names are those of `ModernBertForTokenClassification`, which loads what this saves, and the reverse.
    `token_labels.py` turns labels of words and of characters into those of tokens, and results back.

    Args:
        encoder: taken over, not copied; its config gets the labels. New layers get its device, dtype and mode.
        labels: their names, such as "O" and "B-person", or how many there are; None: those of the config.
        head: the trained first layer of another head, such as `masked_lm.head`; None: a new one.

    Attributes:
        model: the encoder. head: the first layer. classifier: the last one, `[D]` to `[C]`.
        labels: the names of the C labels.
    """

    accepts_loss_kwargs = True  # transformers' Trainer then passes num_items_in_batch

    def __init__(
        self,
        encoder: Encoder,
        *,
        labels: Sequence[str] | int | None = None,
        head: PredictionHead | None = None,
    ) -> None:
        super().__init__()
        config = encoder.config = with_labels(encoder.config, labels)
        self.labels = label_names(config)
        self.model = encoder
        self.head = prediction.beside(encoder, partial(PredictionHead, config)) if head is None else head
        self.classifier = prediction.beside(encoder, partial(prediction.classifier, config, len(self.labels)))
        self.training = encoder.training

    @classmethod
    def _read(cls, folder: Path, config: EncoderConfig, *, device: torch.device, dtype: torch.dtype) -> Self:
        return prediction.read(cls, "TokenClassifier", folder, config, device=device, dtype=dtype)

    def _content(self, state: Mapping[str, Tensor] | None) -> Content:
        return prediction.content(self, "TokenClassifier", self.config, state)

    @property
    def config(self) -> EncoderConfig:
        return self.base_model.config

    @overload
    def forward(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor: ...
    @overload
    def forward(
        self,
        batch: Packed,
        *,
        rows: Tensor | None = None,
        labels: Tensor,
        num_items_in_batch: Tensor | float | None = None,
    ) -> HeadOutput: ...
    @overload
    def forward(
        self,
        batch: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> HeadOutput: ...

    def forward(
        self,
        batch: Packed | Tensor | None = None,
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Tensor | HeadOutput:
        """`[T]` tokens to logits `[T, C]`; with `rows` `[Q]` to the `[Q, C]` of these, which are computed alone.

        With `labels`, or for padded ids `[B, S]`, a `HeadOutput`. Pass the first row of each word as `rows`, if words
        have labels: the last layer then computes no others.

        Args:
            batch: a `Packed`; or `[B, S]` token ids, with their `attention_mask`.
            rows: of a `Packed`, `[Q]` integers, increasing; None: all.
            labels: integers, of each row `[Q]`, or `[T]` or `[B, S]`; negative where a token has none. Those in padding
                are not read.
            input_ids: another name of `batch` for padded callers.
            num_items_in_batch: the loss is the sum over the labels divided by this; None: their mean.

        Raises:
            ValueError: labels of another shape, or without a class; what `Encoder` refuses.
        """
        if isinstance(batch, Packed):
            prediction.check_alone(attention_mask, input_ids)
            logits_QC = self._logits(batch, rows)
            if labels is None:
                return logits_QC
            return HeadOutput(prediction.label_loss(logits_QC, labels, num_items_in_batch), logits_QC)
        ids_BS = prediction.given_ids(batch, input_ids, rows)
        packed = pack_padded(ids_BS, attention_mask, None, self.config)
        logits_TC = self._logits(packed, None)
        labels_T = None if labels is None else prediction.packed_labels(labels, packed)
        loss = None if labels_T is None else prediction.label_loss(logits_TC, labels_T, num_items_in_batch)
        return HeadOutput(loss, unpack(logits_TC, packed))

    def _logits(self, batch: Packed, rows: Tensor | None) -> Tensor:
        x_QD = self.head(self.model(batch, rows=rows))
        return self.classifier(dropout(x_QD, self.config.classifier_dropout, self.training))
