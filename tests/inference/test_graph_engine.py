"""A graph engine gives the numbers of the modules, refuses what it cannot compute, and keeps nothing per shape."""

from __future__ import annotations

import gc
import json
import pickle
import random
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_twin import TINY, random_ids, twins
from torch import Tensor, nn

from modernbert import ColBERT, Encoder, EncoderConfig, Packed, Session, pack
from modernbert.heads.colbert_files import ColBERTConfig
from modernbert.heads.dense import Dense
from modernbert.heads.module_files import ACTIVATIONS
from modernbert.inference import session as module
from modernbert.inference.graph_engine import GraphEngine

onnx = pytest.importorskip("onnx")
EXACT = ("onnxruntime", "openvino")
for name in EXACT:
    pytest.importorskip(name)


def random_config(seed: int) -> EncoderConfig:
    """A config of any kind: biases, both activations, thetas, windows, odd widths."""
    pick = random.Random(seed)
    heads, width = pick.choice([(1, 10), (2, 14), (3, 8), (4, 16)])
    kinds = ("full_attention", "sliding_attention")
    return EncoderConfig(
        vocab_size=100,
        hidden_size=heads * width,
        num_attention_heads=heads,
        intermediate_size=pick.choice([7, 33, 64]),
        num_hidden_layers=pick.randint(1, 5),
        hidden_activation=pick.choice(["gelu", "silu"]),
        norm_eps=pick.choice([1e-5, 1e-3]),
        norm_bias=pick.random() < 0.5,
        attention_bias=pick.random() < 0.5,
        mlp_bias=pick.random() < 0.5,
        layer_pattern=tuple(pick.choice(kinds) for _ in range(pick.randint(1, 3))),
        local_attention=pick.choice([1, 2, 9, 16, 128]),
        global_rope_theta=pick.choice([160_000.0, 80_000.0]),
        local_rope_theta=pick.choice([160_000.0, 10_000.0, 1.0]),
    )


def loud(config: EncoderConfig) -> Encoder:
    """With random norms and biases too."""
    encoder = twins(config)[1].eval()
    for parameter in encoder.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
    return encoder


def batches() -> Iterator[tuple[Packed, Tensor | None]]:
    """One text, several, query-only rows (also with no key in reach), positions of one's own; all rows, some, none."""
    one, many = pack(random_ids([40], 100)), pack(random_ids([5, 0, 90, 1, 33, 70], 100))
    yield one, None
    yield one, torch.tensor([0, 7, 39])
    yield many, None
    yield many, torch.arange(0, 199, 3)
    yield many, torch.zeros(0, dtype=torch.int64)
    yield replace(many, key_lengths=torch.tensor([5, 0, 3, 0, 33, 1], dtype=torch.int32)), None
    yield replace(one, positions=torch.arange(40) * 3 + 7), None


@torch.no_grad()
def compare(model: nn.Module, session: Session[nn.Module]) -> None:
    """Float32 on both sides: only the order of the sums differs."""
    for batch, rows in batches():
        torch.testing.assert_close(session(batch, rows=rows), model(batch, rows=rows), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("seed", range(12))
def test_any_config(seed: int, engine: str) -> None:
    encoder = loud(random_config(seed))
    compare(encoder, Session(encoder, engine=engine))


def head(*layers: Dense) -> ColBERT:
    default = ColBERT.default()
    encoder = loud(replace(TINY, vocab_size=default.tokenizer.vocab_size))
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, 0.0, 0.2)
    config = ColBERTConfig(query_length=24, document_length=200, do_query_expansion=True)
    return ColBERT(encoder, default.tokenizer, layers, config).eval()


@pytest.mark.parametrize("activation", ACTIVATIONS.split())
def test_every_layer_of_a_head(activation: str) -> None:
    """Activations with and without bias; residuals of the same width and of another one."""
    for bias in (False, True):
        model = head(Dense(64, 64, bias, activation, residual=True), Dense(64, 20, bias, activation, residual=bias))
        compare(model, Session(model, engine="onnxruntime"))


@pytest.mark.parametrize("scale", [1e-3, 0.0])
def test_short_vectors_get_length_one(scale: float) -> None:
    """Vectors of a head with small weights, and of one with none, which stay zero as in `torch.nn.functional`."""
    model = head(Dense(64, 32))
    with torch.no_grad():
        model.dense[0].get_parameter("linear.weight").mul_(scale)
    session = Session(model, engine="onnxruntime")
    compare(model, session)
    lengths = session(pack([[5, 6, 7]])).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full((3,), 1.0 if scale else 0.0))


@pytest.mark.parametrize("engine", EXACT)
def test_from_text_to_vectors(engine: str) -> None:
    """Queries filled up with [MASK] rows that are not attended to; documents without their punctuation."""
    for model in (ColBERT.default(), head(Dense(64, 32))):
        session = Session(model, engine=engine)
        texts = ["where does a cell get its energy?", "", "a, b. c!", *("one word more " * n for n in range(60))]
        for name in ("encode_queries", "encode_documents"):
            found, wanted = getattr(session, name)(texts), getattr(model, name)(texts)
            assert torch.equal(found.offsets, wanted.offsets)
            torch.testing.assert_close(found.values, wanted.values, rtol=1e-4, atol=1e-5)


def test_long_texts_run_as_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text above the limit beside short ones, and one alone: the limit is where the two ways meet."""
    monkeypatch.setattr(module, "LONGEST_TEXT", 50)
    taken: list[int] = []
    run = GraphEngine.__call__

    def counted(engine: GraphEngine, batch: Packed, *, rows: Tensor | None = None) -> Tensor:
        taken.extend(batch.lengths)
        return run(engine, batch, rows=rows)

    encoder = loud(TINY)
    session = Session(encoder, engine="onnxruntime")
    monkeypatch.setattr(GraphEngine, "__call__", counted)
    compare(encoder, session)
    assert 40 in taken
    assert max(taken) <= 50


@pytest.mark.parametrize("engine", EXACT)
def test_threads_share_a_session(engine: str) -> None:
    model = ColBERT.default()
    session = Session(model, engine=engine)
    texts = [f"text {n} " * (n % 17 + 1) for n in range(64)]
    wanted = model.encode_documents(texts)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda n: session.encode_documents(texts[n : n + 4]), range(60)):
            assert len(found) == 4
        alone = list(pool.map(lambda n: session.encode_documents([texts[n]])[0], range(64)))
    torch.testing.assert_close(torch.cat(alone), wanted.values, rtol=1e-4, atol=1e-5)


def test_int8_is_near_and_does_not_depend_on_the_batch() -> None:
    """Cosines with float32 of a trained model; and a text beside others that are longer, or alone."""
    model = ColBERT.default()
    session = Session(model, engine="onnxruntime-int8")
    texts = ["where does a cell get its energy?", *("some more words " * n for n in range(1, 30, 7))]
    found, wanted = session.encode_documents(texts), model.encode_documents(texts)
    assert (found.values * wanted.values).sum(1).min() > 0.99
    assert not torch.allclose(found.values, wanted.values, atol=1e-4)
    torch.testing.assert_close(session.encode_documents(texts[:1])[0], found[0], rtol=1e-4, atol=1e-5)
    biased = loud(replace(TINY, attention_bias=True, mlp_bias=True, norm_bias=True))
    with torch.no_grad():
        for batch, rows in batches():
            got, want = Session(biased, engine="onnxruntime-int8")(batch, rows=rows), biased(batch, rows=rows)
            assert (got - want).norm() <= 0.05 * want.norm()


# What is refused


def test_what_the_graph_does_not_compute_is_refused() -> None:
    """Hooks, a module of one's own, another dtype, another model, an engine that does not exist."""
    hooked = loud(TINY)
    hooked.layers[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="leave out engine"):
        Session(hooked, engine="onnxruntime")
    changed = loud(TINY)
    changed.layers[2].mlp.Wi = nn.Sequential(nn.Linear(64, 192))
    with pytest.raises(ValueError, match="a graph has no Sequential"):
        Session(changed, engine="onnxruntime")
    with pytest.raises(ValueError, match="float32"):
        Session(loud(TINY).double(), engine="onnxruntime")
    with pytest.raises(TypeError, match="not of ModuleList"):
        Session(nn.ModuleList([loud(TINY)]), engine="onnxruntime")
    with pytest.raises(ValueError, match="onnxruntime, onnxruntime-int8, openvino"):
        Session(loud(TINY), engine="tensorrt")


@pytest.mark.parametrize("name", ["embeddings.tok_embeddings", "embeddings.norm", "final_norm", ""])
def test_hooks_and_replaced_modules_are_in_no_graph(name: str, tmp_path: Path) -> None:
    """A hook without an effect on the comparison was lost, and a file was written without one."""
    encoder = loud(TINY)
    session = Session(encoder, engine="onnxruntime")
    handle = encoder.get_submodule(name).register_forward_hook(lambda module, args, out: out + 1e-5)
    with pytest.raises(RuntimeError, match="a module has a hook"):
        session(pack([[1, 2, 3]]))
    calls = [
        lambda: Session(encoder, engine="onnxruntime-int8"),
        lambda: Session(encoder).save(tmp_path / "model.onnx"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"a graph has no \w+ with hooks or a forward of its own"):
            call()
    handle.remove()
    session(pack([[1, 2, 3]]))
    if name:
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, nn.Sequential(encoder.get_submodule(name)))
        for call in calls:
            with pytest.raises(ValueError, match=f"a graph has no Sequential as {name}"):
                call()
    assert not list(tmp_path.iterdir())


def test_hooks_on_a_head_are_in_no_graph(tmp_path: Path) -> None:
    model = head(Dense(64, 32))
    for part in (model, model.dense[0], model.dense[0].linear):
        handle = part.register_forward_hook(lambda module, args, out: 2 * out)
        with pytest.raises(ValueError, match="a graph has no"):
            Session(model).save(tmp_path / "model.onnx")
        handle.remove()


@pytest.mark.parametrize(("engine", "package"), [("onnxruntime", "onnx"), *((name, name) for name in EXACT)])
def test_a_missing_package_names_the_extra(engine: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "modernbert.inference.onnx_graph", raising=False)
    with pytest.raises(
        ImportError, match=r"modernbert\[cpu\]" if engine == "onnxruntime" else r"modernbert\[openvino\]"
    ):
        Session(loud(TINY), engine=engine)


def test_changed_weights_are_an_error() -> None:
    encoder = loud(TINY)
    session = Session(encoder, engine="onnxruntime")
    with torch.no_grad():
        encoder.layers[1].mlp.Wi.weight.mul_(2)
    with pytest.raises(RuntimeError, match="make a new one"):
        session(pack([[1, 2, 3]]))
    compare(encoder, Session(encoder, engine="onnxruntime"))


def test_a_copy_has_the_engine() -> None:
    session = pickle.loads(pickle.dumps(Session(loud(TINY), engine="onnxruntime")))
    assert session.engine == "onnxruntime"
    compare(session.model, session)


# Files


@pytest.mark.parametrize("engine", EXACT)
def test_a_saved_graph_gives_the_vectors(engine: str, tmp_path: Path) -> None:
    model, path = head(Dense(64, 32)), tmp_path / "model.onnx"
    Session(model).save(path)
    onnx.checker.check_model(path, full_check=True)
    graph = GraphEngine.load(path, engine)
    for batch, rows in batches():
        torch.testing.assert_close(graph(batch, rows=rows), model(batch, rows=rows).detach(), rtol=1e-4, atol=5e-5)
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert found["model"] == "ColBERT"
    assert EncoderConfig.from_hf(json.loads(found["config"])) == model.encoder.config
    assert len(found["fingerprint"]) == 64


def test_a_file_with_another_content_is_refused(tmp_path: Path) -> None:
    """At once and by its name, not at the first call by an error of the engine: junk, half a file, another graph."""
    path = tmp_path / "model.onnx"
    Session(loud(TINY)).save(path)
    whole = path.read_bytes()
    number = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N"]) for name in "xy"]
    relu = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", number[:1], number[1:])
    other = onnx.helper.make_model(relu, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    for content in (b"", b"junk", whole[: len(whole) // 2], other.SerializeToString()):
        path.write_bytes(content)
        for engine in EXACT:
            with pytest.raises(ValueError, match=r"model\.onnx is damaged, or no graph that Session\.save wrote"):
                GraphEngine.load(path, engine)


class Doubled(ColBERT):
    """A head with a forward pass of its own."""

    def _vectors(self, batch: Packed, rows: Tensor | None) -> Tensor:
        return 2 * super()._vectors(batch, rows)


def wrong(kind: str) -> nn.Module:
    """A model that computes something else than its graph."""
    model = head(Dense(64, 32, activation="LeakyReLU", residual=True))
    layer = model.dense[0]
    assert isinstance(layer, Dense)
    if kind == "subclass":
        model.__class__ = Doubled
    elif kind == "setting":
        layer.activation = nn.LeakyReLU(0.3)
    elif kind == "activation":
        layer.activation = nn.PReLU()
    elif kind == "residual":
        layer.residual = nn.Sequential(nn.Linear(64, 32))
    elif kind == "layer":
        model.dense[0] = nn.Sequential(layer)
    elif kind == "NaN":
        nn.init.constant_(model.encoder.layers[1].mlp.Wi.weight[:1], torch.nan)
    else:
        return model.to(getattr(torch, kind))
    return model


WRONG = ["subclass", "setting", "activation", "residual", "layer", "NaN", "float16", "bfloat16", "float64"]


@pytest.mark.parametrize("kind", WRONG)
def test_a_model_that_its_graph_does_not_compute_is_not_written(kind: str, tmp_path: Path) -> None:
    """Only `Session(engine=)` compared its numbers: a file was written with those of another model, or a broken one."""
    (tmp_path / "model.onnx").write_bytes(b"the old one")
    model = wrong(kind)
    calls = [lambda engine=engine: Session(model, engine=engine) for engine in (*EXACT, "onnxruntime-int8")]
    for call in [*calls, lambda: Session(model).save(tmp_path / "model.onnx")]:
        with pytest.raises(ValueError, match="leave out engine"):
            call()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the old one"]


@pytest.mark.parametrize("engine", EXACT)
def test_any_kind_of_integers(engine: str) -> None:
    """A batch with numbers of 32 bits, which the modules take, was an error of the engine."""
    encoder = loud(TINY)
    batch, rows = pack([[5, 6, 7], [8, 9]]), torch.tensor([0, 3], dtype=torch.int32)
    small = replace(batch, input_ids=batch.input_ids.int(), positions=batch.positions.int())
    found = Session(encoder, engine=engine)(small, rows=rows)
    torch.testing.assert_close(found, encoder(batch, rows=rows.long()).detach(), rtol=1e-4, atol=5e-5)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.onnx"):
        GraphEngine.load(tmp_path / "nothing.onnx")


def test_saving_takes_weights_that_are_not_packed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a session packs its weights for oneDNN, with AVX-512; and under another default device."""
    monkeypatch.setattr(module.linear, "FASTER_THAN_MKL", True)
    encoder, path = loud(TINY), tmp_path / "model.onnx"
    with torch.device("meta"):
        Session(encoder).save(path)
        session = Session(encoder, engine="onnxruntime")
    compare(encoder, session)
    batch = pack([[1, 2, 3]])
    torch.testing.assert_close(GraphEngine.load(path)(batch), encoder(batch).detach(), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("engine", EXACT)
def test_a_session_that_is_dropped_is_freed(engine: str) -> None:
    session = Session(Encoder.from_config(TINY).eval(), engine=engine)
    session(pack([[1, 2, 3]]))
    references = [weakref.ref(kept) for kept in (session.model, session._graph_engine)]
    del session
    gc.collect()
    assert [reference() for reference in references] == [None, None]
