"""`modernbert info`."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.table import Table

from .show import print_facts

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import EncoderConfig
    from ..heads.colbert import ColBERT
    from ..heads.dense import Dense
    from ..heads.embedder import Embedder

DEFAULT = Path(__file__).parents[1] / "assets" / "default"


def info(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Folder, hub id or preset.", show_default="the built-in model")
    ] = None,
) -> None:
    """Show a checkpoint: its sizes, the settings of each layer, and its head with how it reads text."""
    from ..checkpoint import locate, read_json, read_state_dict
    from ..config import PRESETS, EncoderConfig
    from ..encoder import Encoder

    console = Console(highlight=False)
    if checkpoint in PRESETS and not Path(checkpoint).is_dir():
        import torch

        with torch.device("meta"):
            state = Encoder.from_config(checkpoint).state_dict()
        _print_encoder(console, f"preset {checkpoint}, no weights", PRESETS[checkpoint], state)
        return
    folder = locate(checkpoint or DEFAULT)
    config = EncoderConfig.from_hf(read_json(folder, "config.json"))
    _print_encoder(console, str(folder), config, read_state_dict(folder))
    if facts := _head_facts(folder, config):
        print_facts(console, facts)


def _print_encoder(console: Console, name: str, config: EncoderConfig, state: dict[str, Tensor]) -> None:
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    facts = {
        "checkpoint": name,
        "parameters": f"{sum(tensor.numel() for tensor in state.values()):,} in {', '.join(dtypes)}",
        "layers": f"{config.num_hidden_layers} of width {config.hidden_size}, MLP {config.intermediate_size}",
        "heads": f"{config.num_attention_heads} of width {config.head_dim}",
        "vocabulary": f"{config.vocab_size:,}",
        "longest text": f"{config.max_position_embeddings:,} tokens",
    }
    print_facts(console, facts)
    layers = Table("layer", "attention", "RoPE theta", "activation", box=None, header_style="dim")
    for layer in range(config.num_hidden_layers):
        reach = "global" if config.is_global(layer) else f"local, {config.window} each side"
        layers.add_row(str(layer), reach, f"{config.rope_theta(layer):,.0f}", config.hidden_activation)
    console.print(layers)


def _head_facts(folder: Path, config: EncoderConfig) -> dict[str, str]:
    """What there is to say about the head of a folder; nothing of an encoder alone."""
    from ..heads.folders import class_of

    kind = class_of(folder)
    if kind == "ColBERT":
        from ..heads.colbert import ColBERT

        return _colbert_facts(ColBERT.from_pretrained(folder))
    if kind == "Embedder":
        from ..heads.embedder import Embedder

        return _embedder_facts(Embedder.from_pretrained(folder))
    if kind in (None, "Encoder"):
        return {}
    facts = {"head": kind}
    if kind in ("SequenceClassifier", "TokenClassifier"):
        from ..heads.labels import label_names

        facts["labels"] = ", ".join(label_names(config))
    if kind in ("SequenceClassifier", "MultipleChoice"):
        facts["pooling"] = config.classifier_pooling
    return facts


def _embedder_facts(embedder: Embedder) -> dict[str, str]:
    config = embedder.config
    prompts = (f"{name} {prompt!r}" for name, prompt in config.prompts.items() if prompt)
    return {
        "head": "Embedder",
        "pooling": " + ".join(config.poolings),
        "projection": ", then ".join(_dense(cast("Dense", layer)) for layer in embedder.projection) or "none",
        "vector": f"{embedder.dim} numbers" + ", of length one" * config.normalize,
        "prompts": ", ".join(prompts) or "none",
        "read": f"at most {embedder.max_length:,} tokens of a text",
    }


def _colbert_facts(colbert: ColBERT) -> dict[str, str]:
    from ..inference.graph_engine import ENGINES

    config = colbert.config
    attended = "attended" if config.attend_to_expansion_tokens else "not attended"
    expansion = f", filled up with [MASK], {attended}" if config.do_query_expansion else ""
    return {
        "query": f"prefix {config.query_prefix!r}, at most {config.query_length} tokens{expansion}",
        "document": f"prefix {config.document_prefix!r}, at most {config.document_length} tokens",
        "skipped": " ".join(config.skiplist_words) or "no token",
        "head": ", then ".join(_dense(cast("Dense", layer)) for layer in colbert.dense),
        "engines": ", ".join(["PyTorch", *(name for name in ENGINES if find_spec(name.removesuffix("-int8")))]),
    }


def _dense(layer: Dense) -> str:
    parts = {
        type(layer.activation).__name__: True,
        "bias": layer.linear.bias is not None,
        "residual": layer.residual is not None,
    }
    named = [name for name, present in parts.items() if present and name != "Identity"]
    return f"{layer.linear.in_features} -> {layer.linear.out_features}" + "".join(f" + {name}" for name in named)
