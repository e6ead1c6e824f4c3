"""Our encoder with int8 products: a few lines around `torch.ops.quantized`, which a user can copy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.cpu.contenders import OURS, our_encoder
from benchmarks.harness import Contender
from benchmarks.inputs import Ids
from modernbert import pack
from modernbert.encoder import Linear

Model = TypeVar("Model", bound=nn.Module)


class Int8Linear(nn.Module):
    """A `Linear` for inference on a CPU: int8 weights, inputs quantised as they come. `[T, D]` to `[T, F]` float32.

    Weights have a scale for each output, inputs one for all of a call. PyTorch's own module of this kind always leaves
    a bit of the inputs unused. Only processors without VNNI need that, whose sums of products would overflow. torch
    2.13 warns that it means to drop quantised tensors, which weights are here on their way into `packed`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_FD = linear.weight.detach()
        scale_F = weight_FD.abs().amax(1).clamp(min=1e-12).double() / 127
        zero_F = torch.zeros(len(weight_FD), dtype=torch.int64)
        quantised_FD = torch.quantize_per_channel(weight_FD, scale_F, zero_F, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantised_FD, linear.bias)
        self.reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x_TD, self.packed, self.reduce_range)


def with_int8(model: Model) -> Model:
    """A copy whose linear layers are int8: all of an encoder's."""
    model = copy.deepcopy(model)
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, Linear):
                setattr(parent, name, Int8Linear(child))
    return model.eval()


def ours(folder: Path, sequences: Ids) -> Contender:
    encoder = with_int8(our_encoder(folder))

    def run() -> Tensor:
        with torch.inference_mode():
            return encoder(pack(sequences))

    settings = "packed; packing is timed; scales per channel"
    return Contender(f"{OURS}, int8", settings, run, lambda x_TD: x_TD)
