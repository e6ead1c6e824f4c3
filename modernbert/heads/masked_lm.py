"""MaskedLM: the token at each masked place, as transformers' `ModernBertForMaskedLM`."""

from __future__ import annotations

from torch import Tensor

from ..config import EncoderConfig
from ..encoder import Encoder
from ..outputs import HeadOutput
from ..packing import Packed
from ..pretrained import Pretrained
from .prediction import PredictionHead


class MaskedLM(Pretrained):
    """`MaskedLM(encoder)`: a new head on an encoder, which is taken over. Attributes: model (the encoder), head, decoder.

    `MaskedLM.from_config("ettin-17m")` or of an `EncoderConfig`; `MaskedLM.from_pretrained(folder)`.
    """

    def __init__(self, encoder: Encoder, *, head: PredictionHead | None = None) -> None:
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: EncoderConfig | str) -> MaskedLM:
        raise NotImplementedError

    def forward(
        self,
        batch: Packed | Tensor | None = None,
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | HeadOutput:
        """Packed: `model(batch, rows=rows_Q)` -> logits `[Q, V]`; `model(batch, rows=rows_Q, labels=labels_Q)` ->
        `HeadOutput(loss)`, without logits. Padded: `model(input_ids, attention_mask, labels=labels_BS)`.
        """
        raise NotImplementedError

    def loss(
        self,
        batch: Packed,
        rows: Tensor | None,
        labels: Tensor,
        *,
        reduction: str = "mean",
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The loss of these rows `[Q]` (None: of all, `labels` `[T]`), through `linear_cross_entropy`."""
        raise NotImplementedError
