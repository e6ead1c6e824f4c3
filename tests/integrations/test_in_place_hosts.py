"""`pack_in_place` on every model of sentence-transformers 6.2: vectors, scores and files as before."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import tree
from hf_twin import make_loud
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.multi_vector_encoder import modules as vector_modules
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.sparse_encoder import modules as sparse_modules
from torch import Tensor, nn

from modernbert import Embedder
from modernbert.integrations.transformers import pack_in_place, unpack_in_place

FIXTURES = Path(__file__).parents[1] / "fixtures" / "colbert"
TEXTS = ["How do I fold a tensor?", "", "the gradient of the norm, with respect to x.", "a " * 60, "x"]
PAIRS = [(TEXTS[0], text) for text in TEXTS]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A folder of the named class of transformers, with loud weights, and a tokenizer that pads with [PAD]."""

    def make(name: str) -> str:
        path = tmp_path_factory.mktemp("models") / name
        tokenizer = transformers.AutoTokenizer.from_pretrained(FIXTURES / "backbone", pad_token="[PAD]")
        tokenizer.save_pretrained(path)
        config = transformers.AutoConfig.from_pretrained(FIXTURES / "backbone", num_labels=1)
        torch.manual_seed(0)
        model = getattr(transformers, name)(config)
        make_loud(model)
        model.save_pretrained(path)
        return str(path)

    return make


def vectors_of(model: Any) -> list[Tensor]:
    """What the model gives for texts of very different lengths, together and alone."""
    if isinstance(model, CrossEncoder):
        return [torch.as_tensor(model.predict(pairs)) for pairs in (PAIRS, PAIRS[:1])]
    if isinstance(model, MultiVectorEncoder):
        both = [encode(TEXTS) for encode in (model.encode_query, model.encode_document)]
        return [torch.as_tensor(rows) for rows in (*both[0], *both[1], model.encode_query(TEXTS[0]))]
    found = [model.encode(texts, convert_to_tensor=True) for texts in (TEXTS, TEXTS[:1])]
    return [rows.to_dense() if rows.is_sparse else rows for rows in found]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, yours in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=TOLERANCE * max(1.0, yours.abs().max().item()))


def check(model: Any, tmp_path: Path, sides: tuple[str, ...] = ("right", "left")) -> None:
    """Encoding, a copy, a saved folder that loads without us, and the way back; padded on both sides."""
    for side in sides:
        model.tokenizer.padding_side = side
        wanted = vectors_of(model)
        assert wanted[0].std() > 1e-3, "the weights are so quiet that the test says nothing"
        assert pack_in_place(model) is model
        assert_same(vectors_of(model), wanted)
        assert_same(vectors_of(copy.deepcopy(model)), wanted)
        unpack_in_place(model)
    model.tokenizer.padding_side = "right"
    wanted = vectors_of(model)
    model.save_pretrained(str(tmp_path / "before"), create_model_card=False)
    pack_in_place(model).save_pretrained(str(tmp_path / "after"), create_model_card=False)
    assert tree(tmp_path / "before") == tree(tmp_path / "after")
    loaded = type(model)(str(tmp_path / "after"), device="cpu")
    assert not any(hasattr(module, "in_place") for module in loaded.modules())
    assert_same(vectors_of(loaded), wanted)


MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@pytest.mark.parametrize("pooling", [*MODES, ("cls", "mean")])
def test_sentence_transformer(pooling: Any, folder: Callable[[str], str], tmp_path: Path) -> None:
    layers = [modules.Transformer(folder("ModernBertModel")), modules.Pooling(64, pooling), modules.Normalize()]
    model = SentenceTransformer(modules=layers, device="cpu")
    check(model, tmp_path)
    assert_same([Embedder.from_pretrained(tmp_path / "after").encode(TEXTS)], vectors_of(model)[:1])


def test_prompts_that_pooling_leaves_out(folder: Callable[[str], str]) -> None:
    pooling = modules.Pooling(64, "mean", include_prompt=False)
    layers = [modules.Transformer(folder("ModernBertModel")), pooling]
    model = SentenceTransformer(modules=layers, prompts={"query": "find this: "}, device="cpu")
    wanted = model.encode_query(TEXTS, convert_to_tensor=True)
    assert_same([pack_in_place(model).encode_query(TEXTS, convert_to_tensor=True)], [wanted])


def test_cross_encoder(folder: Callable[[str], str], tmp_path: Path) -> None:
    check(CrossEncoder(folder("ModernBertForSequenceClassification"), device="cpu"), tmp_path)


def test_sparse_encoder(folder: Callable[[str], str], tmp_path: Path) -> None:
    layers = [sparse_modules.MLMTransformer(folder("ModernBertForMaskedLM")), sparse_modules.SpladePooling()]
    check(SparseEncoder(modules=layers, device="cpu"), tmp_path)


@pytest.mark.parametrize("strategy", ["fixed", "min"])
@pytest.mark.parametrize("attend", [False, True])
def test_multi_vector_encoder(strategy: str, attend: bool, folder: Callable[[str], str], tmp_path: Path) -> None:
    """Most rows of a short query come from tokens under the mask: zeros there were pylate#109 and #125."""
    first = modules.Transformer(folder("ModernBertModel"), document_length=40)
    layers = [first, modules.Dense(64, 16, bias=False, module_input_name="token_embeddings")]
    layers += [vector_modules.MultiVectorMask([".", ","]), modules.Normalize(module_input_name="token_embeddings")]
    model = MultiVectorEncoder(modules=layers, device="cpu")
    model[0].query_expansion = {"strategy": strategy, "length": 32, "attend": attend}
    # On the left, padding is between expansion and text: a mask with holes, which is refused.
    check(model, tmp_path, ("right",) if (strategy, attend) == ("min", True) else ("right", "left"))


@pytest.mark.parametrize("name", ["expansion", "expansion_far", "expansion_attended", "plain", "window_16"])
def test_multi_vector_encoder_of_a_pylate_folder(name: str, tmp_path: Path) -> None:
    """PyLate's tokenizer pads with [MASK], documents too. Their padding is not computed, and that of queries is."""
    shutil.copytree(FIXTURES / "backbone", tmp_path / "model")
    shutil.copytree(FIXTURES / "cases" / name, tmp_path / "model", dirs_exist_ok=True)
    model = MultiVectorEncoder(str(tmp_path / "model"), device="cpu")
    wanted = vectors_of(model)
    pack_in_place(model)
    assert_same(vectors_of(model), wanted)
    rows = computed_rows(model[0].model)
    features = model.preprocess(TEXTS, prompt=model.prompts["document"], task="document")
    tokens = int(features["attention_mask"].sum())
    model(features, task="document")
    assert rows == [tokens]


def joined(model: Any) -> Any:
    """As sentence-transformers sets it where it finds FlashAttention: texts come as one row, without padding."""
    model[0].data_collator = transformers.DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
    )
    model[0].can_flatten_inputs, model[0]._flatten_position_offset = True, 0
    return model


@pytest.mark.parametrize("kind", ["one vector", "many vectors", "sparse"])
def test_texts_that_the_host_joins_stay_joined(kind: str, folder: Callable[[str], str]) -> None:
    torch.manual_seed(0)
    if kind == "sparse":
        layers = [sparse_modules.MLMTransformer(folder("ModernBertForMaskedLM")), sparse_modules.SpladePooling()]
        model = SparseEncoder(modules=layers, device="cpu")
    elif kind == "one vector":
        layers = [modules.Transformer(folder("ModernBertModel")), modules.Pooling(64, ("cls", "mean", "lasttoken"))]
        model = SentenceTransformer(modules=layers, device="cpu")
    else:
        layers = [modules.Transformer(folder("ModernBertModel")), vector_modules.MultiVectorMask([".", ","])]
        model = MultiVectorEncoder(modules=layers, device="cpu")
    wanted = vectors_of(model)
    features = joined(pack_in_place(model)).preprocess(TEXTS)
    assert features["input_ids"].shape == (1, int(features["cu_seq_lens_q"][-1]))
    assert_same(vectors_of(model), wanted)


def computed_rows(model: nn.Module) -> list[int]:
    rows = []
    model.layers[1].mlp.Wi.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    return rows


def test_a_module_of_ones_own_with_two_models(folder: Callable[[str], str]) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.document = (
                transformers.AutoModel.from_pretrained(folder("ModernBertModel")) for _ in range(2)
            )

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.query(ids, mask)[0][:, 0] @ self.document(ids, attention_mask=mask)[0][:, 0].T

    model = Pair()
    ids = torch.tensor([[494, 30, 31, 495], [494, 32, 495, 496]])
    wanted = model(ids, (ids != 496).long())
    assert_same([pack_in_place(model)(ids, (ids != 496).long())], [wanted])
    assert hasattr(model.query, "in_place")
    assert hasattr(model.document, "in_place")
