"""Checkpoints of published shapes with seeded random weights, in a folder that transformers and we both read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from modernbert import Encoder
from modernbert.config import EncoderConfig


def save_seeded(model: str | EncoderConfig, folder: Path) -> None:
    """Write config.json and model.safetensors (float32) of a preset, or of a config.

    The weights are larger than those of an initialisation, so that attention is not uniform and errors show. The speed
    is that of the trained model.
    """
    config = EncoderConfig.preset(model) if isinstance(model, str) else model
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Encoder(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        weight = torch.empty(shape)
        if name.endswith("bias"):
            weight.zero_()
        elif "norm" in name:
            weight.uniform_(0.7, 1.3, generator=generator)
        else:
            spread = 1.0 if "tok_embeddings" in name else 1.2 / math.sqrt(shape[1])
            weight.normal_(0, spread, generator=generator)
        weights[name] = weight
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
