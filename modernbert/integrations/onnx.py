"""Models as ONNX and OpenVINO files, for sentence-transformers' and optimum's backends and for any other program."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from .. import checkpoint
from ..encoder import Encoder
from ..heads.colbert import ColBERT
from ..heads.embedder import Embedder
from ..heads.folders import class_of
from ..inference import graph_engine
from ..inference.replica import evaluated
from ..packing import pack
from ..pretrained import Pretrained

if TYPE_CHECKING:
    from ..inference.onnx_layers import DenseLayer, Graph

ENGINES = {"onnx": "onnxruntime", "openvino": "openvino"}
"""The formats, and the engine that tries the files of each."""

LENGTHS = (5, 0, 2, 9)
"""Of the texts on which a file is compared with its model."""

Exported = Encoder | Embedder | ColBERT
CLASSES: dict[str | None, type[Exported]] = {
    None: Encoder,
    "Encoder": Encoder,
    "Embedder": Embedder,
    "ColBERT": ColBERT,
}
"""By the name that `class_of` gives a folder; None: it has no name."""


def load(folder_or_hub_id: str | os.PathLike[str]) -> Exported:
    """The model in a folder, if it is one that `export` takes.

    Raises:
        ValueError: the folder of another class. FileNotFoundError, OSError: as `from_pretrained`.
    """
    folder = checkpoint.locate(folder_or_hub_id)
    if (kind := class_of(folder)) not in CLASSES:
        raise ValueError(f"{folder} holds a {kind}; an Encoder, an Embedder or a ColBERT can be exported")
    return CLASSES[kind].from_pretrained(folder)


def export(model: Pretrained, folder: str | os.PathLike[str], *, kind: str = "onnx") -> None:
    """Write a model as `save_pretrained` does, and beside its weights as graphs that run without PyTorch. Atomic.

    `SentenceTransformer(folder, backend="onnx")` runs an `Embedder`, and optimum's `ORTModelForFeatureExtraction` any
    model. All sizes are dynamic. The files:

    - `onnx/model.onnx` and `onnx/model_int8.onnx`, whose products are in int8: smaller, faster and less exact.
    - `openvino/openvino_model.xml` and `openvino/openvino_model_int8.xml`, each with a `.bin` beside it.

    Inputs are `input_ids` and `attention_mask`, `[B, S]` int64, padded on either side; a mask has no holes. Outputs are
    float32, and zero in padding: first `sentence_embedding` `[B, E]` of an `Embedder` (zeros for a text without
    tokens), or `vectors` `[B, S, E]` of a `ColBERT`; then `last_hidden_state` `[B, S, D]` of every model. If a ColBERT
    has expansion tokens that are not attended to, tokens under the mask are computed too, and are not zero.

    Args:
        model: an `Encoder`, an `Embedder` or a `ColBERT`, in float32 on the CPU. Its files are compared with it.
        kind: "onnx" (extra `cpu`) or "openvino" (extra `openvino`).

    Raises:
        TypeError: another model. ImportError: the extra is missing.
        ValueError: no such kind; weights in another dtype or on another device, or of more than 2 GB; a model that
            computes something else than its graph; a folder with graphs of another kind, which may be of another model.
        NotADirectoryError: `folder` is a file, or a link that leads nowhere.
    """
    if kind not in ENGINES:
        raise ValueError(f"kind is {kind!r:.80}, but must be one of {', '.join(ENGINES)}")
    if not isinstance(model, Encoder | Embedder | ColBERT):
        raise TypeError(f"an Encoder, an Embedder or a ColBERT can be exported, not a {type(model).__name__}")
    graph_engine.check_float32(model)
    for other in ENGINES.keys() - {kind}:
        if (checkpoint.output_folder(folder) / other).exists():
            raise ValueError(f"{folder} has graphs in {other}/, which may be of another model: choose another folder")
    graph_engine.imported("onnx", ENGINES[kind])
    files = FILES[kind](evaluated(model))
    content = model._content_in(model.formats[0], None)
    checkpoint.save(
        folder,
        config=content.config,
        state=content.state,
        files={**content.files, **files},
        check=partial(_compare, model, next(iter(files)), ENGINES[kind]),
    )


def graph_of(model: Exported, *, int8: bool = False) -> Graph:
    """The graph for hosts that pad: see `export`."""
    from ..inference.onnx_graph import check_plain
    from ..inference.onnx_layers import Graph, dense, normalized
    from ..inference.onnx_padded import pooled, unpacked, write_padded

    g, encoder = Graph(int8=int8), model if isinstance(model, Encoder) else model.encoder
    check_plain(model, encoder)
    query_only = _reads_query_only(model)
    padded = write_padded(g, encoder, query_only=query_only)
    if isinstance(model, Embedder):
        pools = [pooled(g, padded, mode) for mode in model.config.poolings]
        x_BE = dense(g, g("Concat", *pools, axis=-1), cast("Iterable[DenseLayer]", model.projection))
        x_BE = g("Slice", x_BE, g.constant([0]), g.constant([model.dim]), g.constant([-1]))
        g.output("sentence_embedding", normalized(g, x_BE) if model.config.normalize else x_BE, ["batch", model.dim])
    elif isinstance(model, ColBERT):
        vectors_TE = normalized(g, dense(g, padded.states, cast("Iterable[DenseLayer]", model.dense)))
        g.output("vectors", unpacked(g, padded, vectors_TE, query_only=query_only), ["batch", "sequence", model.dim])
    states_BSD = unpacked(g, padded, padded.states, query_only=query_only)
    g.output("last_hidden_state", states_BSD, ["batch", "sequence", encoder.config.hidden_size])
    return g


def _reads_query_only(model: Exported) -> bool:
    if not isinstance(model, ColBERT):
        return False
    return model.config.do_query_expansion and not model.config.attend_to_expansion_tokens


def _onnx(model: Exported) -> dict[str, bytes]:
    graphs = {"onnx/model.onnx": graph_of(model), "onnx/model_int8.onnx": graph_of(model, int8=True)}
    return {name: graph.file(weights=True).SerializeToString() for name, graph in graphs.items()}


def _openvino(model: Exported) -> dict[str, bytes]:
    openvino = graph_engine.imported("openvino", "openvino")
    core, found = graph_engine.core_of(os.getpid(), openvino.Core), {}
    for name, int8 in (("openvino_model", False), ("openvino_model_int8", True)):
        graph = core.read_model(graph_of(model, int8=int8).file(weights=True).SerializeToString())
        with tempfile.TemporaryDirectory() as folder:
            openvino.save_model(graph, path := Path(folder) / f"{name}.xml", compress_to_fp16=False)
            for file in (path, path.with_suffix(".bin")):
                found[f"openvino/{file.name}"] = file.read_bytes()
    return found


FILES: dict[str, Callable[[Exported], dict[str, bytes]]] = {"onnx": _onnx, "openvino": _openvino}


@torch.no_grad()
def _compare(model: Exported, name: str, engine: str, folder: Path) -> None:
    """Raise ValueError if a graph gives other numbers than the model, with padding on either side."""
    run = graph_engine.ENGINES[engine](str(folder / name), engine)(torch.get_num_threads())
    vocab_size = len(next(model.parameters()))
    texts = [[(7 * index + 1) % vocab_size for index in range(length)] for length in LENGTHS]
    wanted = evaluated(model)(pack(texts))
    for left in (False, True):
        ids, mask = (np.zeros((len(texts), max(LENGTHS)), np.int64) for _ in range(2))
        for row, text in enumerate(texts):
            columns = slice(ids.shape[1] - len(text), None) if left else slice(len(text))
            ids[row, columns], mask[row, columns] = text, 1
        found = torch.from_numpy(run({"input_ids": ids, "attention_mask": mask}))
        found = found if isinstance(model, Embedder) else found[torch.from_numpy(mask).bool()]
        graph_engine.check_graph(found, wanted, model)
