"""A model made ready to train: layers that are recomputed or compiled, and the ranks that share its weights."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from ..encoder import Encoder, Layer
from .distributed import ALONE, Ranks


def prepare(
    model: nn.Module,
    ranks: Ranks = ALONE,
    *,
    parallel: Literal["ddp", "fsdp"] = "ddp",
    gradient_checkpointing: bool = False,
    compile: bool = False,
) -> None:
    """Change a model in place for training, before its optimizer is made. Its methods and names stay as they are.

    Data parallel, each rank with its own batches. Nothing wraps the model, so a recipe calls its methods as ever:

    - "ddp": every rank has all weights, and `fit` adds the gradients up after the last backward pass of a step, in
      few messages. They do not overlap with the backward pass as in `DistributedDataParallel`. In return, batches that
      are accumulated and chunks of GradCache send nothing, and no forward pass has to be the one that was announced.
      An encoder is small beside its batch: the 0.6 GB of gradients of a base take some 5 ms of a step on NVLink.
    - "fsdp": weights, gradients and the optimizer's state are in parts on the ranks (`fully_shard`), each layer
      gathered while it computes. Slower, for models whose weights and state do not fit. The model is then called
      itself, not a module inside of it.

    All ranks get the weights of the first one. Random numbers, such as those of dropout, then differ between ranks.

    Args:
        model: on `ranks.device`.
        gradient_checkpointing: recompute each layer of the encoder in the backward pass instead of keeping it.
        compile: compile the layers of the encoder with `torch.compile`, or the model if it has none of ours.
            The first steps take minutes. Results differ by rounding.

    Raises:
        ValueError: a `parallel` that is neither, or `gradient_checkpointing` of a model without our encoder.
    """
    if parallel not in ("ddp", "fsdp"):
        raise ValueError(f"parallel is {parallel!r:.80}, but must be ddp or fsdp")
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    if gradient_checkpointing:
        encoders = [module for module in model.modules() if isinstance(module, Encoder)]
        if not encoders:
            raise ValueError("gradient_checkpointing needs a model with an Encoder of this package")
        for encoder in encoders:
            encoder.gradient_checkpointing = True
    for module in (layers or [model]) if compile else ():
        # Not the whole model: the lengths of a batch, which each batch has others of, would be constants of the graph.
        module.compile(dynamic=True)
    if ranks.is_alone:
        return
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor, src=0)
    torch.manual_seed(torch.initial_seed() + ranks.rank)
    if parallel == "fsdp":
        _shard(model, layers, ranks)


def _shard(model: nn.Module, layers: list[Layer], ranks: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for module in (*layers, model):
        fully_shard(module, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums, as of "ddp": `fit` divides by what the batches count.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
