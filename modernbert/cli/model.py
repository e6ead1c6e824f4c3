"""`modernbert encode` and `modernbert info`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .search import Model
from .show import note, print_facts

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import EncoderConfig
    from ..heads.colbert import ColBERT
    from ..late_interaction import Ragged

DEFAULT = Path(__file__).parents[1] / "assets" / "default"


def encode(
    texts: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="JSON lines with a text field (BEIR), or lines of text."),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="A name ending in .npz or .safetensors.")],
    queries: Annotated[bool, typer.Option("--queries", help="Encode as queries, not as documents.")] = False,
    model: Model = None,
) -> None:
    """Encode texts to token vectors.

    The file holds the rows of all texts in `values`, their `ids`, and `offsets`: text i owns the rows from
    offset i to offset i + 1. In a safetensors file the ids are a JSON list in the metadata.
    """
    from ..heads.colbert import ColBERT
    from ..retrieval.documents.find import read_texts

    if output.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"--output is {output}, but its name must end in .npz or .safetensors")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output is {output}, but there is no folder {output.parent}")
    documents = list(read_texts(texts, note=note))
    if not documents:
        raise ValueError(f"{texts} holds no text to encode")
    colbert = ColBERT.default() if model is None else ColBERT.from_pretrained(model)
    encode_texts = colbert.encode_queries if queries else colbert.encode_documents
    vectors = encode_texts([document.content for document in documents])
    _write(output, vectors, [document.id for document in documents])
    rows, width = vectors.values.shape
    note(f"wrote {len(vectors):,} texts, {rows:,} vectors of width {width}, to {output}")


def info(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Folder, hub id or preset; if not given, the built-in model.")
    ] = None,
) -> None:
    """Show what a checkpoint is: its sizes, what each layer uses, and how a ColBERT model reads text."""
    from ..checkpoint import locate, read_json, read_state_dict
    from ..config import PRESETS, EncoderConfig
    from ..encoder import Encoder
    from ..heads.colbert import ColBERT

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
    if (folder / "modules.json").is_file():
        print_facts(console, _colbert_facts(ColBERT.from_pretrained(folder)))


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


def _colbert_facts(colbert: ColBERT) -> dict[str, str]:
    config = colbert.config
    attended = "attended" if config.attend_to_expansion_tokens else "not attended"
    expansion = f", filled up with [MASK], {attended}" if config.do_query_expansion else ""
    return {
        "query": f"prefix {config.query_prefix!r}, at most {config.query_length} tokens{expansion}",
        "document": f"prefix {config.document_prefix!r}, at most {config.document_length} tokens",
        "skipped": " ".join(config.skiplist_words) or "no token",
        "head": ", then ".join(_dense(layer) for layer in colbert.dense),
    }


def _dense(layer: Any) -> str:
    parts = {
        type(layer.activation).__name__: True,
        "bias": layer.linear.bias is not None,
        "residual": layer.residual is not None,
    }
    named = [name for name, there in parts.items() if there and name != "Identity"]
    return f"{layer.linear.in_features} -> {layer.linear.out_features}" + "".join(f" + {name}" for name in named)


def _write(output: Path, vectors: Ragged, ids: list[str]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    from ..retrieval.store.format import replacing

    values, offsets = vectors.values.numpy(), vectors.offsets.numpy()
    with replacing(output) as beside:
        if output.suffix == ".npz":
            with beside.open("wb") as file:
                np.savez(file, values=values, offsets=offsets, ids=np.array(ids))
        else:
            save_file({"values": values, "offsets": offsets}, beside, metadata={"ids": json.dumps(ids)})
