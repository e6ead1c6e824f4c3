"""TokenClassifier: a label for each token, as transformers' `ModernBertForTokenClassification`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..encoder import Encoder
from ..outputs import HeadOutput
from ..packing import Packed
from ..pretrained import Pretrained
from .prediction import PredictionHead


class TokenClassifier(Pretrained):
    """`TokenClassifier(encoder, labels=("O", "B-person", ...))`: a new classifier on an encoder, which is taken over.

    `heads/token_labels.py` aligns labels of words and of characters to tokens, and predictions back to words.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        labels: Sequence[str] | int | None = None,
        head: PredictionHead | None = None,
    ) -> None:
        raise NotImplementedError

    def forward(
        self,
        batch: Packed | Tensor | None = None,
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Tensor | HeadOutput:
        """Packed: `model(batch, rows=rows_Q)` -> logits `[Q, C]`; with `labels` `[Q]` (`[T]` without rows; negative:
        none) -> `HeadOutput(loss, logits)`. Padded: `labels` `[B, S]` -> `HeadOutput`.
        """
        raise NotImplementedError
