"""MultipleChoice: which text of several is right, as transformers' `ModernBertForMultipleChoice`."""

from __future__ import annotations

from collections.abc import Mapping
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
from ..packing import Packed, pack
from ..pretrained import Pretrained
from . import prediction
from .pooling import encode_and_pool
from .prediction import PredictionHead

if TYPE_CHECKING:
    from typing_extensions import Self


class MultipleChoice(Pretrained):
    """An encoder, the pooling of `config.classifier_pooling`, and one logit for each choice, which is a text.

    Parameter names are those of `ModernBertForMultipleChoice`, which loads what this saves, and the reverse.
    `choose.py` turns a prompt and choices into texts, and logits into probabilities.

    Args:
        encoder: taken over, not copied. New layers get its device, dtype and mode.
        head: the trained first layer of another head, such as `masked_lm.head`; None: a new one.

    Attributes:
        model: the encoder. head: the first layer. classifier: the last one, `[D]` to `[1]`.
    """

    accepts_loss_kwargs = False  # its loss is a mean over questions, which transformers' Trainer divides itself

    def __init__(self, encoder: Encoder, *, head: PredictionHead | None = None) -> None:
        super().__init__()
        config = encoder.config
        self.model = encoder
        self.head = prediction.beside(encoder, partial(PredictionHead, config)) if head is None else head
        self.classifier = prediction.beside(encoder, partial(prediction.classifier, config, 1))
        self.training = encoder.training

    @classmethod
    def _read(cls, folder: Path, config: EncoderConfig, *, device: torch.device, dtype: torch.dtype) -> Self:
        return prediction.read(cls, "MultipleChoice", folder, config, device=device, dtype=dtype)

    def _content(self, state: Mapping[str, Tensor] | None) -> Content:
        return prediction.content(self, "MultipleChoice", self.config, state)

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
        """N packed texts, each a choice, to logits `[N, 1]`.

        With `labels` of B questions a `HeadOutput` with logits `[B, C]`: each question has C = N / B choices, one after
        another. For padded ids `[B, C, S]` too. With the pooling "cls" the last layer computes one row of each text.

        Args:
            batch: a `Packed`; or `[B, C, S]` token ids, with their `attention_mask`.
            rows: None: a text has one logit. `Session` passes it.
            labels: `[B]` integers, the right choice of each question, a negative one where it has none.
            input_ids: another name of `batch` for padded callers.

        Raises:
            ValueError: labels of another shape, or beyond the choices; texts that are not as many for each question;
                what `Encoder` refuses.
        """
        if rows is not None:
            raise ValueError("a MultipleChoice gives one logit for each text: leave out rows")
        if isinstance(batch, Packed):
            prediction.check_alone(attention_mask, input_ids)
            logits_N1 = self._logits(batch)
            return logits_N1 if labels is None else _output(logits_N1, labels, len(labels))
        ids_BCS = prediction.given_ids(batch, input_ids)
        if ids_BCS is None or ids_BCS.dim() != 3:
            got = "nothing" if ids_BCS is None else f"shape {tuple(ids_BCS.shape)}"
            raise ValueError(f"input_ids must be [questions, choices, length], got {got}")
        mask_NS = None if attention_mask is None else attention_mask.flatten(0, 1)
        packed = pack(ids_BCS.flatten(0, 1), mask_NS, vocab_size=self.config.vocab_size)
        return _output(self._logits(packed), labels, len(ids_BCS))

    def _logits(self, batch: Packed) -> Tensor:
        x_ND = self.head(encode_and_pool(self.model, batch, [self.config.classifier_pooling]))
        return self.classifier(dropout(x_ND, self.config.classifier_dropout, self.training))


def _output(logits_N1: Tensor, labels: Tensor | None, questions: int) -> HeadOutput:
    if len(logits_N1) % max(1, questions):
        raise ValueError(f"labels are of {questions} questions, but {len(logits_N1)} texts are not as many for each")
    logits_BC = logits_N1.reshape(questions, len(logits_N1) // max(1, questions))
    if labels is None:
        return HeadOutput(None, logits_BC)
    prediction.check_labels(labels, (questions,), logits_BC.shape[1])
    return HeadOutput(prediction.cross_entropy(logits_BC, labels), logits_BC)
