"""What is encoded: the lengths of the ModernBERT paper, token ids, and checkpoints of seeded weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from modernbert import Encoder, EncoderConfig

DOCUMENTS = 8192
"""Of each set of the paper."""


def variable(count: int, *, mean: int, spread: int = 64, low: int = 32, longest: int) -> tuple[int, ...]:
    """The first lengths of a set of the ModernBERT paper: normal, clipped, seed 42."""
    generator = torch.Generator().manual_seed(42)
    drawn = torch.randn(max(count, DOCUMENTS), generator=generator)[:count] * spread + mean
    return tuple(drawn.round().clamp(low, longest).int().tolist())


LENGTHS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "fixed 512": lambda count: (512,) * count,
    "variable short": lambda count: variable(count, mean=256, longest=512),
    "fixed 8192": lambda count: (8192,) * count,
    "variable long": lambda count: variable(count, mean=4096, spread=1024, longest=8192),
}
"""The four sets of the paper: from the number of documents to their lengths."""

MEAN = {"fixed 512": 512, "variable short": 256, "fixed 8192": 8192, "variable long": 4096}
WORDS = {
    "fixed 512": "512 tokens each",
    "variable short": "N(256, 64) tokens, clipped to [32, 512]",
    "fixed 8192": "8192 tokens each",
    "variable long": "N(4096, 1024) tokens, clipped to [32, 8192]",
}


def is_long(name: str) -> bool:
    return MEAN[name] > 512


def in_set(name: str, count: int, *, short: bool = False) -> tuple[int, ...]:
    """Lengths of the first `count` documents of a set; `short` cuts those of long sets to an eighth, for a try-out."""
    lengths = LENGTHS[name](count)
    return tuple(max(1, length // 8) for length in lengths) if short and is_long(name) else lengths


def words(name: str, *, short: bool = False) -> str:
    """A set in words."""
    return f"an eighth of {WORDS[name]}" if short and is_long(name) else WORDS[name]


def ids(index: int, length: int) -> Tensor:
    """Token ids of the text at `index`, uniform in [100, 16000) as in the paper: `[length]` int64."""
    return torch.randint(100, 16_000, (length,), generator=torch.Generator().manual_seed(index))


def cotangent(index: int, length: int, width: int) -> Tensor:
    """The gradient of the hidden states of the text at `index`: `[length, width]` float32, the same in every dtype."""
    return torch.randn(length, width, generator=torch.Generator().manual_seed(index)).bfloat16().float()


def padded(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Input ids and attention mask `[B, S]` of these texts' ids, right-padded; no mask where nothing is padded."""
    ids_BS = nn.utils.rnn.pad_sequence([*texts], batch_first=True)
    mask_BS = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return {"input_ids": ids_BS} | ({} if bool(mask_BS.all()) else {"attention_mask": mask_BS})


def groups(lengths: Sequence[int], size: int, *, by_length: bool = False) -> list[list[int]]:
    """Indices in batches of `size`, in order or length-sorted."""
    indices = list(range(len(lengths)))
    if by_length:
        indices.sort(key=lambda index: lengths[index])
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def within(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in batches of at most `tokens` tokens, and at least one text."""
    batches: list[list[int]] = []
    left = 0
    for index, length in enumerate(lengths):
        if length > left:
            batches.append([])
            left = tokens
        batches[-1].append(index)
        left -= length
    return batches


def save_seeded(config: EncoderConfig, folder: Path) -> None:
    """Write config.json and model.safetensors (float32) of a config, seeded, for transformers and for us.

    The weights are larger than those of an initialisation, so that attention is not uniform and errors show. The speed
    is that of the trained model.
    """
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
