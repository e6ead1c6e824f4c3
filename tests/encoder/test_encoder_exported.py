"""The padded entrance in ONNX files of both exporters and under torch.jit.trace: right for every mask, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_twin import BIASES, TINY, pad, random_ids, twins
from torch import Tensor, nn

from modernbert import ColBERT, Encoder, Tokenizer, maxsim, pack, unpack
from modernbert.config import FULL, SLIDING
from modernbert.encoder import EncoderOutput
from modernbert.heads.colbert import ColBERTConfig
from modernbert.integrations.transformers import TransformersEncoder
from modernbert_kernels import pool

SMALL = replace(TINY, num_hidden_layers=2, layer_pattern=(FULL, SLIDING), **BIASES)
BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
BATCHES = [[3, 40, 17], [100, 2], [5, 7, 64, 65, 130], [33], [1, 1], [0, 9]]
EXAMPLE = pad(random_ids([3, 40, 17], 100), "left")
Run = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Exporters warn of their own future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", torch.jit.TracerWarning)
        yield


class Rows(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids, attention_mask).last_hidden_state


class Queries(nn.Module):
    """What a server of ColBERT needs: vectors of padded queries with unattended [MASK] rows."""

    def __init__(self, colbert: ColBERT) -> None:
        super().__init__()
        self.colbert = colbert

    def forward(self, input_ids: Tensor, attention_mask: Tensor, query_mask: Tensor) -> Tensor:
        batch = pack(input_ids, attention_mask, query_mask=query_mask)
        return unpack(self.colbert(batch), batch)


def write_onnx(model: nn.Module, arguments: tuple[Tensor, ...], path: Path, *, dynamo: bool) -> Path:
    """An ONNX file whose batch and length are open."""
    names = ["input_ids", "attention_mask", "query_mask"][: len(arguments)]
    sizes = {0: "batch", 1: "length"}
    if dynamo:
        open_sizes: dict[str, Any] = {"dynamic_shapes": tuple(sizes for _ in names)}
    else:
        open_sizes = {"dynamic_axes": dict.fromkeys([*names, "rows"], sizes)}
    with torch.no_grad():
        torch.onnx.export(
            model, arguments, path, dynamo=dynamo, input_names=names, output_names=["rows"], verbose=False, **open_sizes
        )
    return path


def onnxruntime(path: Path) -> Run:
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return lambda *xs: torch.tensor(session.run(None, {n: x.numpy() for n, x in zip(names, xs, strict=True)})[0])


def openvino(path: Path) -> Run:
    core = pytest.importorskip("openvino").Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda *xs: torch.tensor(compiled([x.numpy() for x in xs])[0])


def assert_right_for_every_mask(run: Run, theirs: nn.Module, ours: Encoder) -> None:
    """Beside eager and, at the tokens, beside transformers."""
    for lengths in BATCHES:
        for side in ("left", "right"):
            ids, mask = pad(random_ids(lengths, 100), side, extra=3)
            with torch.no_grad():
                got, wanted = run(ids, mask), ours(ids, mask).last_hidden_state
                reference = theirs(ids, attention_mask=mask).last_hidden_state
            tolerance = 1e-5 * (1 + wanted.abs().max().item())
            torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
            torch.testing.assert_close(got[mask == 1], reference[mask == 1], rtol=0, atol=tolerance)
            assert got[mask == 0].eq(0).all()


# ONNX


@pytest.fixture(scope="module", params=[True, False], ids=["dynamo", "torchscript"])
def dynamo(request: pytest.FixtureRequest) -> bool:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    return request.param


@pytest.fixture(scope="module")
def rows_file(dynamo: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(Rows(twins(SMALL)[1]), EXAMPLE, tmp_path_factory.mktemp("onnx") / "rows.onnx", dynamo=dynamo)


@pytest.mark.parametrize("engine", [onnxruntime, openvino])
def test_an_onnx_file_is_right_for_every_mask(rows_file: Path, engine: Callable[[Path], Run]) -> None:
    """`aten.sort.stable` had no ONNX function."""
    assert_right_for_every_mask(engine(rows_file), *twins(SMALL))


def expanded_queries(colbert: ColBERT, texts: list[str], extra: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Padded queries, their two masks, and what `encode_queries` gives, `[n, E]`."""
    batch = colbert.tokenize_queries(texts).batch
    assert batch.key_lengths is not None
    ids = torch.nn.functional.pad(batch.input_ids.unflatten(0, (len(texts), -1)), (0, extra))
    place = torch.arange(ids.shape[1])
    mask = place < batch.key_lengths[:, None]
    return ids, mask, ~mask & (place < batch.max_seqlen), colbert.encode_queries(texts).values


def test_colbert_queries_with_expansion_in_an_onnx_file(tmp_path: Path) -> None:
    """`query_mask cannot be exported` was the answer."""
    pytest.importorskip("onnx")
    config = ColBERTConfig(do_query_expansion=True, query_length=24)
    encoder, tokenizer = Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)
    colbert = ColBERT.from_encoder(encoder, tokenizer, dim=24, config=config).eval()
    *example, _ = expanded_queries(colbert, ["How do I fold a tensor?", "a"], 2)
    run = onnxruntime(write_onnx(Queries(colbert), (*example,), tmp_path / "queries.onnx", dynamo=False))
    for texts, extra in ((["the norm", "a", "fold"], 0), (["How does the gradient of the norm fold a tensor?"], 5)):
        ids, keys, queries, wanted = expanded_queries(colbert, texts, extra)
        got = run(ids, keys, queries)
        torch.testing.assert_close(got[keys | queries], wanted, rtol=0, atol=1e-5)
        assert got[~(keys | queries)].eq(0).all()


# torch.jit.trace


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("example", [EXAMPLE, pad(random_ids([30, 30], 100)), pad(random_ids([20, 30], 100))])
def test_a_trace_is_right_for_every_mask(example: tuple[Tensor, Tensor], gradients: bool) -> None:
    """It kept the lengths of its example without a warning; without gradients it failed in oneDNN's product."""
    theirs, ours = twins(SMALL)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(Rows(ours), example)
    assert_right_for_every_mask(traced, theirs, ours)


def test_a_trace_of_the_encoder_without_a_wrapper() -> None:
    ours = twins(SMALL)[1]
    with torch.no_grad():
        for model in (ours, TransformersEncoder(ours)):
            traced = torch.jit.trace(model, EXAMPLE)
            ids, mask = pad(random_ids([9, 2], 100))
            torch.testing.assert_close(traced(ids, mask)[0], ours(ids, mask)[0], rtol=0, atol=2e-5)
    assert isinstance(ours(*EXAMPLE), EncoderOutput)
    assert ours(*EXAMPLE).hidden_states is None


class FromEmbeddings(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask)[0]


def test_a_trace_from_embeddings_keeps_the_rows_under_the_mask() -> None:
    """Without ids nothing tells padding from rows that a library may score: all rows have numbers, traced or not."""
    model = FromEmbeddings(twins(SMALL)[1])
    table = model.encoder.embeddings.tok_embeddings
    with torch.no_grad():
        traced = torch.jit.trace(model, (table(EXAMPLE[0]), EXAMPLE[1]))
        ids, mask = pad(random_ids([9, 2], 100))
        wanted = model(table(ids), mask)
        torch.testing.assert_close(traced(table(ids), mask), wanted, rtol=0, atol=2e-5)
        assert wanted[1, 2:].ne(0).any(1).all()


def test_what_cannot_be_followed_is_refused_by_name() -> None:
    ours = twins(SMALL)[1]
    for model in (ours, Rows(ours), TransformersEncoder(ours)):
        with pytest.raises(TypeError, match=r"torch\.jit\.script"):
            torch.jit.script(model)
    for model in (ours, TransformersEncoder(ours)):
        with pytest.raises(TypeError, match=r"torch\.fx"):
            torch.fx.symbolic_trace(model)


def test_what_depends_on_lengths_is_not_traced() -> None:
    """Late interaction and pooling split their rows on the host: a trace would keep the lengths of its example."""
    values, cu_seqlens = torch.randn(5, 4), torch.tensor([0, 2, 5], dtype=torch.int32)
    calls = {
        "pool": lambda x: pool(x, cu_seqlens, "mean"),
        "maxsim": lambda x: maxsim([x], [x[:2], x[2:]]),
    }
    for call in calls.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            with pytest.raises(ValueError, match=r"torch\.jit\.trace"):
                torch.jit.trace(call, (values,))
