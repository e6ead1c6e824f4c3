"""QuestionAnswering: where in a text an answer starts and ends, as transformers' `ModernBertForQuestionAnswering`."""

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
from ..masks import is_whole
from ..outputs import SpanOutput
from ..packing import Packed, pack, padded_ids, unpack
from ..pretrained import Pretrained
from . import prediction
from .labels import label_names, with_labels
from .pooling import places
from .prediction import IGNORED, PredictionHead

if TYPE_CHECKING:
    from typing_extensions import Self


class QuestionAnswering(Pretrained):
    """An encoder, and a classifier that gives every token two logits, of being the first and the last of the answer.

    Parameter names are those of `ModernBertForQuestionAnswering`, which loads what this saves, and the reverse.
    `answer.py` turns logits into answers.

    Args:
        encoder: taken over, not copied. New layers get its device, dtype and mode.
        head: the trained first layer of another head, such as `masked_lm.head`; None: a new one.

    Attributes:
        model: the encoder. head: the first layer. classifier: the last one, `[D]` to `[2]`.
    """

    accepts_loss_kwargs = False  # its loss is a mean over texts, which transformers' Trainer divides itself

    def __init__(self, encoder: Encoder, *, head: PredictionHead | None = None) -> None:
        super().__init__()
        if len(label_names(encoder.config)) != 2:  # of another task; transformers needs two
            encoder.config = with_labels(encoder.config, 2)
        config = encoder.config
        self.model = encoder
        self.head = prediction.beside(encoder, partial(PredictionHead, config)) if head is None else head
        self.classifier = prediction.beside(encoder, partial(prediction.classifier, config, 2))
        self.training = encoder.training

    @classmethod
    def _read(cls, folder: Path, config: EncoderConfig, *, device: torch.device, dtype: torch.dtype) -> Self:
        return prediction.read(cls, "QuestionAnswering", folder, config, device=device, dtype=dtype)

    def _content(self, state: Mapping[str, Tensor] | None) -> Content:
        return prediction.content(self, "QuestionAnswering", self.config, state)

    @property
    def config(self) -> EncoderConfig:
        return self.base_model.config

    @overload
    def forward(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor: ...
    @overload
    def forward(self, batch: Packed, *, start_positions: Tensor, end_positions: Tensor) -> SpanOutput: ...
    @overload
    def forward(
        self,
        batch: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> SpanOutput: ...

    def forward(
        self,
        batch: Packed | Tensor | None = None,
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Tensor | SpanOutput:
        """`[T]` tokens to logits `[T, 2]`; with `rows` `[Q]` to the `[Q, 2]` of these, which are computed alone.

        With positions, or for padded ids `[B, S]`, a `SpanOutput`. The loss is the mean of two cross-entropies over the
        tokens of a text. transformers counts padding among them, so that its loss depends on the longest text.

        Args:
            batch: a `Packed`; or `[B, S]` token ids, with their `attention_mask`.
            rows: of a `Packed`, `[Q]` integers, increasing; None: all.
            start_positions, end_positions: `[B]` integers, the first and the last token of the answer, counted from the
                first token of its text, or as a column of padded ids. As in transformers, a negative one is 0, and one
                behind the text, or in padding, has no loss.
            input_ids: another name of `batch` for padded callers.

        Raises:
            ValueError: one of the positions alone, with `rows`, or of another dtype or shape; what `Encoder` refuses.
        """
        positions = _checked(start_positions, end_positions)
        if isinstance(batch, Packed):
            prediction.check_alone(attention_mask, input_ids)
            if positions is None:
                return self._logits(batch, rows)
            if rows is not None:
                raise ValueError("the loss is over all tokens of a text: leave out rows")
            logits_T2 = self._logits(batch, None)
            text_T, place_T = places(batch)
            loss = _loss(logits_T2, text_T, place_T, (len(batch), batch.max_seqlen), positions)
            return SpanOutput(loss, *logits_T2.unbind(1))
        ids_BS = padded_ids(prediction.given_ids(batch, input_ids, rows), None)
        packed = pack(ids_BS, attention_mask, vocab_size=self.config.vocab_size)
        logits_T2, loss = self._logits(packed, None), None
        if positions is not None:
            assert packed.padded_rows is not None
            column_T = packed.padded_rows % ids_BS.shape[1]
            loss = _loss(logits_T2, packed.padded_rows // ids_BS.shape[1], column_T, tuple(ids_BS.shape), positions)
        return SpanOutput(loss, *unpack(logits_T2, packed).unbind(2))

    def _logits(self, batch: Packed, rows: Tensor | None) -> Tensor:
        x_QD = self.head(self.model(batch, rows=rows))
        return self.classifier(dropout(x_QD, self.config.classifier_dropout, self.training))


def _checked(start: Tensor | None, end: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if start is None and end is None:
        return None
    if start is None or end is None:
        raise ValueError("pass both start_positions and end_positions, or neither")
    for name, given in (("start_positions", start), ("end_positions", end)):
        if not is_whole(given) or given.shape[1:] not in ((), (1,)):
            raise ValueError(f"{name} must be integers of shape [B], got {given.dtype} of shape {tuple(given.shape)}")
    return start.flatten(), end.flatten()


def _loss(
    logits_T2: Tensor, text_T: Tensor, place_T: Tensor, shape: tuple[int, ...], positions: tuple[Tensor, Tensor]
) -> Tensor:
    """The loss of logits that are at `place_T` of `text_T` in a `[B, S]` batch with this `shape`."""
    grid_BS2 = logits_T2.new_full((shape[0], max(1, shape[1]), 2), -torch.inf)
    grid_BS2 = grid_BS2.index_put((text_T.long(), place_T.long()), logits_T2)
    losses = []
    for grid_BS, given_B in zip(grid_BS2.unbind(2), positions, strict=True):
        if len(given_B) != shape[0]:
            raise ValueError(f"there are {len(given_B)} positions, but {shape[0]} texts")
        position_B = given_B.long().clamp(min=0)
        at_B1 = position_B.clamp(max=grid_BS.shape[1] - 1)[:, None]
        real_B = (position_B < grid_BS.shape[1]) & (grid_BS.gather(1, at_B1)[:, 0] != -torch.inf)
        losses.append(prediction.cross_entropy(grid_BS, position_B.masked_fill(~real_B, IGNORED)))
    return (losses[0] + losses[1]) / 2
