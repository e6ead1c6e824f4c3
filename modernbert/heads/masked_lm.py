"""MaskedLM: which token is at a masked place, as transformers' `ModernBertForMaskedLM`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

import modernbert_kernels as ops
from modernbert_kernels.reference import Reduction

from ..checkpoint import Content
from ..config import EncoderConfig
from ..encoder import Encoder
from ..modules import Linear, is_plain
from ..outputs import HeadOutput
from ..packing import Packed, unpack
from ..padded import pack_padded
from ..pretrained import Pretrained
from . import prediction
from .prediction import PredictionHead

if TYPE_CHECKING:
    from typing_extensions import Self

TABLE, DECODER = "model.embeddings.tok_embeddings.weight", "decoder.weight"


class MaskedLM(Pretrained):
    """An encoder, and a head that scores every token of the vocabulary at the places that are asked for.

    Parameter names are those of `ModernBertForMaskedLM`, which loads what this saves, and the reverse. With
    `config.tie_word_embeddings` the weight of the decoder is the embedding table.

    Args:
        encoder: taken over, not copied. New layers get its device, dtype and mode.
        head: the trained first layer of another head; None: a new one.

    Attributes:
        model: the encoder. head: the first layer. decoder: the last one, `[D]` to `[V]`.
    """

    accepts_loss_kwargs = True  # transformers' Trainer then passes num_items_in_batch

    def __init__(self, encoder: Encoder, *, head: PredictionHead | None = None) -> None:
        super().__init__()
        config = encoder.config
        table = encoder.embeddings.tok_embeddings if config.tie_word_embeddings else None
        self.model = encoder
        self.head = prediction.beside(encoder, partial(PredictionHead, config)) if head is None else head
        self.decoder: nn.Module = prediction.beside(encoder, partial(_decoder, config, table))
        self.training = encoder.training
        self.register_state_dict_post_hook(_with_own_memory)

    @classmethod
    def from_config(cls, config: EncoderConfig | str) -> Self:
        """A freshly initialised model from an `EncoderConfig` or the name of a preset such as `"ettin-17m"`."""
        return cls(Encoder.from_config(config))

    @classmethod
    def _read(cls, folder: Path, config: EncoderConfig, *, device: torch.device, dtype: torch.dtype) -> Self:
        return prediction.read(cls, "MaskedLM", folder, config, device=device, dtype=dtype)

    def _content(self, state: Mapping[str, Tensor] | None) -> Content:
        content = prediction.content(self, "MaskedLM", self.config, state)
        tensors = dict(content.state)
        both = self.config.tie_word_embeddings and {TABLE, DECODER} <= tensors.keys()
        if both and torch.equal(tensors[TABLE], tensors[DECODER]):
            del tensors[DECODER]  # as transformers; if they differ, loading the new folder refuses it
        return Content(content.config, tensors)

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
        """`[T]` tokens to logits `[T, V]`; with `rows` `[Q]` to the `[Q, V]` of these, which are computed alone.

        With `labels`, a `Packed` gives the loss of its rows without their logits, which take most of the memory.
        Padded ids `[B, S]` give both, unless the config has `sparse_prediction`, which is transformers' name for this.

        Args:
            batch: a `Packed`; or `[B, S]` token ids, with their `attention_mask`.
            rows: of a `Packed`, `[Q]` integers, increasing; None: all.
            labels: integers, the token of each row `[Q]`, or of all tokens, `[T]` or `[B, S]`; negative where a token
                has none. Those in padding are not read.
            input_ids: another name of `batch` for padded callers.
            num_items_in_batch: the loss is the sum over the labels divided by this; None: their mean.

        Raises:
            ValueError: labels of another shape, or beyond the vocabulary; what `Encoder` refuses.
        """
        if isinstance(batch, Packed):
            prediction.check_alone(attention_mask, input_ids)
            if labels is None:
                return self._logits(batch, rows)
            return HeadOutput(self._scaled_loss(batch, labels, rows, num_items_in_batch))
        ids_BS = prediction.given_ids(batch, input_ids, rows)
        packed = pack_padded(ids_BS, attention_mask, None, self.config)
        if labels is None:
            return HeadOutput(None, unpack(self._logits(packed, None), packed))
        labels_T = prediction.packed_labels(labels, packed)
        if self.config.others.get("sparse_prediction"):
            return HeadOutput(self._scaled_loss(packed, labels_T, None, num_items_in_batch))
        logits_TV = self._logits(packed, None)
        return HeadOutput(prediction.label_loss(logits_TV, labels_T, num_items_in_batch), unpack(logits_TV, packed))

    def loss(
        self, batch: Packed, labels: Tensor, rows: Tensor | None = None, *, reduction: Reduction = "mean"
    ) -> Tensor:
        """The cross-entropy of `rows` `[Q]` with `labels` `[Q]`, or of the rows that have one among `labels` `[T]`.

        Logits are not kept, unless the decoder has an adapter or a hook: see `ops.linear_cross_entropy`.

        Args:
            reduction: "mean" or "sum", a scalar in float32 or better; "none": `[Q]`.

        Raises:
            ValueError: labels of another shape, or beyond the vocabulary.
        """
        if rows is None:
            prediction.check_labels(labels, (batch.num_tokens,), self.config.vocab_size)
            rows = (labels >= 0).nonzero().squeeze(1)
            labels = labels[rows]
        prediction.check_labels(labels, tuple(rows.shape), self.config.vocab_size)
        x_QD, decoder = self.head(self.model(batch, rows=rows)), self.decoder
        if is_plain(decoder, Linear):
            return ops.linear_cross_entropy(x_QD, decoder.weight, decoder.bias, labels.long(), reduction=reduction)
        return prediction.cross_entropy(decoder(x_QD), labels, reduction)

    def _logits(self, batch: Packed, rows: Tensor | None) -> Tensor:
        return self.decoder(self.head(self.model(batch, rows=rows)))

    def _scaled_loss(self, batch: Packed, labels: Tensor, rows: Tensor | None, count: Tensor | float | None) -> Tensor:
        loss = self.loss(batch, labels, rows, reduction="mean" if count is None else "sum")
        return prediction.divided(loss, count)

    def get_output_embeddings(self) -> nn.Module:
        """The decoder, under transformers' name."""
        return self.decoder

    def resize_token_embeddings(self, vocab_size: int, *, pad_to_multiple_of: int | None = None) -> nn.Module:
        """Grow or cut the vocabulary in place, of the decoder too. New rows are drawn as those of a new model.

        Raises:
            ValueError: a decoder that was replaced or wrapped; what `Encoder.resize_token_embeddings` refuses.
        """
        decoder = self._plain_decoder()
        table = super().resize_token_embeddings(vocab_size, pad_to_multiple_of=pad_to_multiple_of)
        self._fit(decoder)
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table; the decoder gets its number of rows and, if it is tied, its weight."""
        decoder = self._plain_decoder()
        super().set_input_embeddings(value)
        self._fit(decoder)

    def _plain_decoder(self) -> nn.Linear:
        if not isinstance(self.decoder, nn.Linear) or "weight" not in self.decoder._parameters:
            kind = type(self.decoder).__name__
            raise ValueError(f"the decoder is a {kind} that was replaced, wrapped or pruned: resize it before")
        return self.decoder

    def _fit(self, decoder: nn.Linear) -> None:
        """Give the decoder as many rows as the vocabulary has."""
        rows = self.config.vocab_size
        if self.config.tie_word_embeddings:
            weight = getattr(self.get_input_embeddings(), "weight", None)
            decoder.weight = weight if isinstance(weight, nn.Parameter) else decoder.weight
        elif rows != decoder.out_features:
            new = nn.Linear(decoder.in_features, rows, bias=False, device=decoder.weight.device)
            prediction.draw(new, self.config, prediction.output_std(self.config))
            decoder.weight = _longer(decoder.weight, new.weight)
        if decoder.bias is not None and rows != decoder.out_features:
            decoder.bias = _longer(decoder.bias, torch.zeros(rows, device=decoder.bias.device))
        decoder.out_features = rows


def _decoder(config: EncoderConfig, table: nn.Embedding | None) -> Linear:
    """A new decoder; of a tied one only the bias is new."""
    if table is None:
        layer = Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        prediction.draw(layer, config, prediction.output_std(config))
        return layer
    bias = nn.Parameter(table.weight.new_zeros(config.vocab_size)) if config.decoder_bias else None
    with torch.device("meta"):
        layer = Linear(config.hidden_size, config.vocab_size, bias=False)
    layer.weight = cast("nn.Parameter", table.weight)
    layer.register_parameter("bias", bias)
    return layer


@torch.no_grad()
def _longer(old: Tensor, new: Tensor) -> nn.Parameter:
    """The numbers of `new` with those of `old` in front, as far as both go."""
    kept = min(len(old), len(new))
    new = new.detach().to(old.dtype)
    new[:kept] = old[:kept]
    return nn.Parameter(new, requires_grad=old.requires_grad)


def _with_own_memory(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """Give a tied decoder memory of its own in a state dict, not in the module.

    transformers' Trainer writes state dicts with safetensors, which refuses tensors that share memory.
    """
    tensor = state.get(prefix + DECODER)
    if tensor is None or isinstance(tensor, nn.Parameter):  # with keep_vars, which shows what is tied
        return
    assert isinstance(module, MaskedLM)
    if getattr(module.get_input_embeddings(), "weight", None) is getattr(module.decoder, "weight", tensor):
        state[prefix + DECODER] = tensor.clone()
