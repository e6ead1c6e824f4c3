"""nDCG@10 of the files that `modernbert export` writes, next to their model: the table in docs/compatibility.md.

`python -m benchmarks.exported FOLDER ...` writes it anew; each folder is a data set, as `modernbert evaluate` takes it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from benchmarks.inputs import default
from benchmarks.rows import ROOT
from modernbert import ColBERT, Packed
from modernbert.cli.temporary import temporary_store
from modernbert.inference.graph_engine import ENGINES, GraphEngine
from modernbert.integrations.onnx import export
from modernbert.retrieval.dataset import find_dataset, parts, read_qrels, read_queries
from modernbert.retrieval.evaluate import evaluate
from modernbert.retrieval.store.identity import LoadedModel, load_model

PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- nDCG@10: benchmarks/exported.py -->\n", "<!-- end of nDCG@10 -->"
FILES = {
    "onnx/model.onnx": "onnxruntime",
    "onnx/model_int8.onnx": "onnxruntime",
    "openvino/openvino_model.xml": "openvino",
    "openvino/openvino_model_int8.xml": "openvino",
}


class Padded(GraphEngine):
    """Calls an exported file with the rows of a batch."""

    def __call__(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor:
        mask = np.arange(batch.max_seqlen) < np.array(batch.lengths)[:, None]
        ids = np.zeros(mask.shape, np.int64)
        ids[mask] = batch.input_ids.numpy()
        found = torch.from_numpy(self._run()({"input_ids": ids, "attention_mask": mask.astype(np.int64)})[mask])
        return found if rows is None else found[rows]


def of_file(colbert: ColBERT, folder: Path, name: str) -> LoadedModel:
    """The model, whose vectors are those of a file."""
    engine, loaded = FILES[name], load_model(colbert, engine=FILES[name])
    loaded.session._graph_engine = Padded(ENGINES[engine](str(folder / name), engine))
    return loaded


def ndcg(dataset: Path, model: LoadedModel) -> float:
    corpus, queries, qrels = find_dataset(dataset)
    judged, texts = read_qrels(qrels), read_queries(queries)
    with temporary_store(parts(corpus), model, print) as store:
        found = store.run({name: text for name, text in texts.items() if name in judged}, top_k=1001)
    return next(one.mean for one in evaluate(found, judged) if one.name == "nDCG@10")


def table(datasets: list[Path], rows: Mapping[str, list[float]]) -> str:
    lines = [["", *(one.name for one in datasets)], ["---"] * (1 + len(datasets))]
    lines += [[name, *(f"{one:.4f}" for one in found)] for name, found in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(datasets: list[Path]) -> None:
    colbert, rows = default(), {}
    with TemporaryDirectory() as scratch:
        for kind in ("onnx", "openvino"):
            export(colbert, Path(scratch, kind), kind=kind)
        rows["the modules, float32"] = [ndcg(one, load_model(colbert)) for one in datasets]
        for name in FILES:
            model = of_file(colbert, Path(scratch, name.split("/")[0]), name)
            rows[f"`{name}`"] = [ndcg(one, model) for one in datasets]
            print(name, rows[f"`{name}`"], flush=True)
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table(datasets, rows) + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or sys.exit(__doc__))
