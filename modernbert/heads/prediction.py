"""What the heads of Hugging Face's ModernBERT share: their first layer, how they are made, called, read and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernbert_kernels.reference import Reduction

from ..checkpoint import Content, load_weights, state_of
from ..config import EncoderConfig
from ..encoder import Encoder
from ..modules import Linear, Norm
from ..packing import Packed
from ..pretrained import Pretrained
from .folders import ARCHITECTURES, check_class

M = TypeVar("M", bound=nn.Module)
P = TypeVar("P", bound=Pretrained)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}
IGNORED = -100
"""The label of a token that has none; every negative number is one."""


class PredictionHead(nn.Module):
    """`norm(activation(W x + b))`, `[Q, D]` to `[Q, D]`: the layer in front of a decoder or a classifier."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.norm = Norm(config)
        self.activation = config.classifier_activation
        draw(self.dense, config, output_std(config))

    def forward(self, x_QD: Tensor) -> Tensor:
        return self.norm(ACTIVATIONS[self.activation](self.dense(x_QD)))


def output_std(config: EncoderConfig) -> float:
    """The standard deviation of new weights whose outputs are summed or decoded, as Hugging Face draws them."""
    return config.initializer_range / (2 * config.num_hidden_layers) ** 0.5


@torch.no_grad()
def draw(layer: nn.Linear, config: EncoderConfig, std: float) -> None:
    """New weights of a normal distribution, cut as those of the encoder, and a bias of zero."""
    limit = config.initializer_cutoff_factor * std
    nn.init.trunc_normal_(layer.weight, std=std, a=-limit, b=limit)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def classifier(config: EncoderConfig, labels: int) -> Linear:
    layer = Linear(config.hidden_size, labels)
    draw(layer, config, config.hidden_size**-0.5)
    return layer


def beside(encoder: Pretrained, make: Callable[[], M]) -> M:
    """A new module on the device of the encoder, in its dtype and mode, with the same numbers on every device."""
    like = next(encoder.parameters())
    with torch.device("meta" if like.is_meta else "cpu"):
        module = make()
    return module.to(like.device, like.dtype).train(encoder.training)


def read(
    make: Callable[[Encoder], P],
    name: str,
    folder: Path,
    config: EncoderConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> P:
    """The model that `make` puts around an encoder, with the weights of a folder of Hugging Face, strictly.

    Args:
        name: of the class. A folder of another one is refused with the name of that one.
    """
    check_class(folder, name)
    with torch.device("meta"):
        model = make(Encoder(config))
    load_weights(model, folder, device=device, dtype=dtype, prefix="", ignore=())
    return model


def content(model: nn.Module, name: str, config: EncoderConfig, state: Mapping[str, Tensor] | None) -> Content:
    """What `ModernBertFor...` of transformers reads; `name` is that of our class."""
    architecture = next(theirs for theirs, ours in ARCHITECTURES.items() if ours == name)
    return Content(config.to_hf() | {"architectures": [architecture]}, state_of(model, state))


def given_ids(batch: Tensor | None, input_ids: Tensor | None, rows: Tensor | None = None) -> Tensor | None:
    """The `[B, S]` ids of a padded caller, which have two names."""
    if batch is not None and input_ids is not None:
        raise ValueError("input_ids is another name of batch for padded callers: pass one of them")
    if rows is not None:
        raise ValueError("rows count the tokens of a Packed; index the logits of a padded batch instead")
    return batch if input_ids is None else input_ids


def check_alone(attention_mask: Tensor | None, input_ids: Tensor | None) -> None:
    """Raise a ValueError for what a `Packed` has itself."""
    if attention_mask is not None or input_ids is not None:
        raise ValueError("a Packed carries its own ids and mask: leave out attention_mask and input_ids")


def check_labels(labels: Tensor, shape: tuple[int, ...], classes: int) -> None:
    """Raise a ValueError for class labels of another dtype or shape, or, if they are on the CPU, without a class."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool or labels.shape != shape:
        what = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"labels must be integers of shape {list(shape)}, got {what}")
    if torch.compiler.is_compiling() or not labels.is_cpu or not labels.numel():
        return
    if (largest := int(labels.max())) >= classes:
        place = tuple((labels == largest).nonzero()[0].tolist())
        raise ValueError(f"labels{list(place)} is {largest}, but there are {classes} classes, from 0")


def packed_labels(labels_BS: Tensor, batch: Packed) -> Tensor:
    """`[T]`, the labels of the tokens of a batch that a padded caller has given."""
    if batch.padded_rows is None or labels_BS.shape != (len(batch), batch.padded_length):
        wanted = [len(batch), batch.padded_length]
        raise ValueError(f"labels must be {wanted} as input_ids, got shape {tuple(labels_BS.shape)}")
    return labels_BS.flatten()[batch.padded_rows]


def cross_entropy(logits_QC: Tensor, labels_Q: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Of the rows whose label is not negative, in float32 or better: a scalar, 0 without any; with "none" `[Q]`."""
    logits_QC = logits_QC.to(torch.promote_types(logits_QC.dtype, torch.float32))
    labels_Q = labels_Q.long().masked_fill(labels_Q < 0, IGNORED)
    loss_Q = F.cross_entropy(logits_QC, labels_Q, ignore_index=IGNORED, reduction="none")
    if reduction == "none":
        return loss_Q
    return loss_Q.sum() / ((labels_Q >= 0).sum().clamp(min=1) if reduction == "mean" else 1)


def label_loss(logits_QC: Tensor, labels_Q: Tensor, count: Tensor | float | None) -> Tensor:
    """The mean cross-entropy of the rows with a label (None), or their sum as a part of `count` labels.

    Raises:
        ValueError: as `check_labels`.
    """
    check_labels(labels_Q, (len(logits_QC),), logits_QC.shape[1])
    return divided(cross_entropy(logits_QC, labels_Q, "mean" if count is None else "sum"), count)


def divided(loss: Tensor, count: Tensor | float | None) -> Tensor:
    """A mean loss as it is (None), or a sum over a part of `count` labels as its part of their mean."""
    return loss if count is None else loss / count
