"""SequenceClassifier: labels or numbers for each text, as transformers' `ModernBertForSequenceClassification`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..encoder import Encoder
from ..outputs import HeadOutput
from ..packing import Packed
from ..pretrained import Pretrained
from .prediction import PredictionHead


class SequenceClassifier(Pretrained):
    """`SequenceClassifier(encoder, labels=("no", "yes"))`: a new classifier on an encoder, which is taken over.

    Warm start from a `MaskedLM`: `SequenceClassifier(mlm.model, labels=..., head=mlm.head)`. Regression: one label.
    Pooling: `config.classifier_pooling` (`Encoder.from_pretrained(..., classifier_pooling="mean")`).
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        labels: Sequence[str] | int | None = None,
        problem_type: str | None = None,
        head: PredictionHead | None = None,
    ) -> None:
        raise NotImplementedError

    def forward(
        self,
        batch: Packed | Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Tensor | HeadOutput:
        """Packed: `model(batch)` -> logits `[B, C]`; with `labels` (`[B]` int64; `[B, C]` floats; `[B]` floats) ->
        `HeadOutput(loss, logits)`. Padded: always a `HeadOutput`.
        """
        raise NotImplementedError
