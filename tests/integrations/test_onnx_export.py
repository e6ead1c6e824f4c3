"""Exported graphs give the numbers of the modules, to any host that pads, and stay with the model they were made of."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_twin import TINY, random_ids
from torch import Tensor, nn

from modernbert import ColBERT, Embedder, Encoder, MaskedLM, Tokenizer, pack
from modernbert.heads.colbert_files import ColBERTConfig
from modernbert.heads.dense import Dense
from modernbert.heads.embedder_files import EmbedderConfig
from modernbert.heads.pooling import POOLINGS
from modernbert.inference import graph_engine
from modernbert.integrations import onnx as exporting

runtime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
LENGTHS = (3, 0, 150, 1, 64, 90)
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 5e-5}
"""Float32 on both sides: only the order of the sums differs, in states of size 1."""


@functools.cache
def tokenizer() -> Tokenizer:
    return ColBERT.default().tokenizer


def encoder(**changes: Any) -> Encoder:
    """A window of 16 to each side, and norms that are not 1."""
    torch.manual_seed(0)
    model = Encoder(replace(TINY, vocab_size=tokenizer().vocab_size, local_attention=32, **changes))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model.eval()


def embedder(pooling: str | tuple[str, ...] = "mean", *layers: Dense, **settings: Any) -> Embedder:
    config = EmbedderConfig(pooling=pooling, **settings)
    return Embedder(encoder(), tokenizer(), [*layers], config).eval()


def colbert(**settings: Any) -> ColBERT:
    config = ColBERTConfig(query_length=24, document_length=200, **settings)
    return ColBERT(encoder(), tokenizer(), [Dense(64, 20)], config).eval()


def session_of(model: Any, *, int8: bool = False) -> Any:
    return runtime.InferenceSession(exporting.graph_of(model, int8=int8).file(weights=True).SerializeToString())


def padded(texts: list[list[int]], *, left: bool = False) -> dict[str, np.ndarray]:
    """With ids under the mask that any model has, so that they would count if they were seen."""
    longest = max(map(len, texts))
    ids, mask = np.full((len(texts), longest), 7), np.zeros((len(texts), longest), np.int64)
    for row, text in enumerate(texts):
        columns = slice(longest - len(text), None) if left else slice(len(text))
        ids[row, columns], mask[row, columns] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def run(session: Any, name: str, feed: dict[str, np.ndarray]) -> Tensor:
    return torch.from_numpy(session.run([name], feed)[0])


@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(left: bool) -> None:
    """A row that is all padding was NaN in other exports; here it is zero, as every row of padding."""
    model, texts = encoder(), random_ids(list(LENGTHS), 100)
    feed = padded(texts, left=left)
    states = run(session_of(model), "last_hidden_state", feed)
    real = torch.from_numpy(feed["attention_mask"]).bool()
    torch.testing.assert_close(states[real], model(pack(texts)), **TOLERANCE)
    assert not states[~real].any()
    assert not run(session_of(model), "last_hidden_state", padded([[5], []], left=left))[1].any()
    alone = {name: np.zeros((2, 3), np.int64) for name in feed}
    assert not run(session_of(model), "last_hidden_state", alone).any()


@pytest.mark.parametrize("pooling", [*POOLINGS, ("cls", "max", "mean")])
@torch.no_grad()
def test_every_pooling(pooling: str | tuple[str, ...]) -> None:
    """Also of a text without tokens, of padding on the left, and of int8, which a text's company does not change."""
    model, texts = embedder(pooling), random_ids(list(LENGTHS), 100)
    session, wanted = session_of(model), model(pack(texts))
    for left in (False, True):
        torch.testing.assert_close(run(session, "sentence_embedding", padded(texts, left=left)), wanted, **TOLERANCE)
    small = session_of(model, int8=True)
    found = run(small, "sentence_embedding", padded(texts))
    assert ((found - wanted).norm(dim=1) <= 0.1).all()
    torch.testing.assert_close(run(small, "sentence_embedding", padded(texts[:1])), found[:1], **TOLERANCE)


@torch.no_grad()
def test_layers_a_width_and_vectors_of_any_length() -> None:
    layers = [Dense(64, 48, activation="Tanh", residual=True), Dense(48, 32, bias=False)]
    texts = random_ids([5, 33], 100)
    for settings in ({"width": 10}, {"normalize": False}, {"width": 12, "normalize": False}):
        model = embedder("mean", *layers, **settings)
        torch.testing.assert_close(
            run(session_of(model), "sentence_embedding", padded(texts)), model(pack(texts)), **TOLERANCE
        )


@torch.no_grad()
def test_late_interaction_with_and_without_expansion() -> None:
    """Expansion that is not attended to is under the mask of hosts, and they score it (pylate#109, #125: zeros)."""
    model, texts = colbert(), random_ids([5, 33], 100)
    feed = padded(texts)
    real = torch.from_numpy(feed["attention_mask"]).bool()
    torch.testing.assert_close(run(session_of(model), "vectors", feed)[real], model(pack(texts)), **TOLERANCE)
    expanded = colbert(do_query_expansion=True)
    tokens = expanded.tokenize_queries(["one", "a longer query of some words", ""])
    assert tokens.batch.key_lengths is not None
    counts = tokens.batch.key_lengths[:, None]
    feed = {
        "input_ids": tokens.batch.input_ids.view(3, -1).numpy(),
        "attention_mask": (torch.arange(24) < counts).long().numpy(),
    }
    found = run(session_of(expanded), "vectors", feed)
    torch.testing.assert_close(found.flatten(0, 1), expanded(tokens.batch), **TOLERANCE)


def test_other_architectures() -> None:
    """SiLU, biases, heads of 8, a last layer that is local, one layer; and numbers of batches and tokens that vary."""
    texts = random_ids([40, 7], 100)
    for changes in (
        {"hidden_activation": "silu", "attention_bias": True, "mlp_bias": True, "norm_bias": True},
        {"num_attention_heads": 8, "num_hidden_layers": 2, "local_rope_theta": 10_000.0},
        {"num_hidden_layers": 1},
    ):
        model = encoder(**changes)
        session = session_of(model)
        for batch in (texts, texts[1:]):
            states = run(session, "last_hidden_state", padded(batch))
            real = torch.from_numpy(padded(batch)["attention_mask"]).bool()
            torch.testing.assert_close(states[real], model(pack(batch)).detach(), **TOLERANCE)


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_a_folder_has_the_model_and_its_graph(kind: str, tmp_path: Path) -> None:
    pytest.importorskip(exporting.ENGINES[kind])
    model, folder = embedder("cls"), tmp_path / "model"
    exporting.export(model, folder, kind=kind)
    stem, ends = {"onnx": ("model", ["onnx"]), "openvino": ("openvino_model", ["bin", "xml"])}[kind]
    wanted = [f"{stem}{middle}.{end}" for middle in ("", "_int8") for end in ends]
    assert sorted(path.name for path in (folder / kind).iterdir()) == sorted(wanted)
    small = graph_engine.ENGINES[exporting.ENGINES[kind]](str(folder / kind / wanted[-1]), kind)(1)
    near = torch.from_numpy(small(padded([[1, 2, 3], [4]])))
    assert (near - model(pack([[1, 2, 3], [4]])).detach()).abs().max() < 0.1
    again = exporting.load(folder)
    assert isinstance(again, Embedder)
    assert torch.equal(again.encode(["a text"]), model.encode(["a text"]))
    if kind == "onnx":
        onnx.checker.check_model(folder / "onnx" / "model.onnx", full_check=True)


def test_the_command_exports_models_and_names_what_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from modernbert.cli import main

    def command(*arguments: object) -> tuple[object, str]:
        with pytest.raises(SystemExit) as end:
            main(["export", *map(str, arguments)])
        return end.value.code, capsys.readouterr().err

    encoder().save_pretrained(tmp_path / "encoder")
    status, said = command(tmp_path / "encoder", f"onnx:{tmp_path / 'out'}")
    assert not status, said
    assert (tmp_path / "out" / "onnx" / "model.onnx").exists()
    MaskedLM(encoder()).save_pretrained(tmp_path / "masked-lm")
    for source, target, wanted in (
        ("masked-lm", "onnx:new", "holds a MaskedLM; an Encoder, an Embedder or a ColBERT can be exported"),
        ("encoder", "openvino:out", "out has graphs in onnx/, which may be of another model"),
        ("nowhere", "onnx:new", "nowhere"),
    ):
        status, said = command(tmp_path / source, target.replace(":", f":{tmp_path}/"))
        assert status == 2
        assert wanted in said
    assert command(tmp_path / "encoder", "onnx:")[0] == 2
    assert not (tmp_path / "new").exists()


def _hooked(model: Any) -> None:
    model.projection[0].register_forward_hook(lambda module, args, out: 2 * out)


def _changed(model: Any) -> None:
    model.encoder.layers[1].mlp.Wi = nn.Sequential(nn.Linear(64, 192))


class _Other(Embedder):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


def _subclass(model: Any) -> None:
    model.__class__ = _Other


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (_hooked, "a graph has no Dense with hooks"),
        (_changed, "a graph has no Sequential"),
        (_subclass, "is not what its graph computes"),
        (lambda model: model.half(), "float32"),
    ],
)
def test_what_the_graph_does_not_compute_is_not_written(
    change: Callable[[Any], object], wanted: str, tmp_path: Path
) -> None:
    model = embedder("mean", Dense(64, 32))
    change(model)
    with pytest.raises(ValueError, match=wanted):
        exporting.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_models_kinds_and_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="not a MaskedLM"):
        exporting.export(MaskedLM(encoder()), tmp_path / "out")
    with pytest.raises(ValueError, match="kind is 'tflite', but must be one of onnx, openvino"):
        exporting.export(encoder(), tmp_path / "out", kind="tflite")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"modernbert\[cpu\]"):
        exporting.export(encoder(), tmp_path / "out")


def test_sentence_transformers_runs_the_folder(tmp_path: Path) -> None:
    """Where optimum runs: sentence-transformers 5 with transformers 4.57 (see tests/compatibility.py)."""
    pytest.importorskip("optimum.onnxruntime", exc_type=ImportError)
    from sentence_transformers import SentenceTransformer

    model, texts = embedder(), ["How do I fold a tensor?", "", "a " * 60]
    exporting.export(model, tmp_path)
    for name, allowed in (("model.onnx", 1e-5), ("model_int8.onnx", 0.1)):
        options = {"file_name": name, "provider": "CPUExecutionProvider"}
        host = SentenceTransformer(str(tmp_path), backend="onnx", model_kwargs=options)
        assert abs(host.encode(texts) - model.encode(texts).numpy()).max() < allowed
