"""A ColBERT in the formats of other libraries: the same bits after each round trip, and loaded by its own library."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modernbert import ColBERT, Embedder, Encoder, Reranker, SequenceClassifier, TokenClassifier, Tokenizer
from modernbert.cli import main
from modernbert.heads.colbert_files import ColBERTConfig
from modernbert.heads.convert import FORMATS, convert
from modernbert.heads.dense import Dense
from modernbert.pretrained import Pretrained

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
TEXTS = ["How do I fold a tensor?", "the gradient, of the norm.", "", "say [Q] or [MASK]?"]


def make(lower: bool = False, **settings: Any) -> ColBERT:
    torch.manual_seed(0)
    encoder, tokenizer = Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)
    if lower:
        tokenizer.do_lower_case = True
        tokenizer._config["do_lower_case"] = True
    config = ColBERTConfig(**{"do_query_expansion": True, "query_length": 20, "document_length": 30} | settings)
    return ColBERT.from_encoder(encoder, tokenizer, dim=24, config=config).eval()


def residual(model: ColBERT) -> ColBERT:
    model.dense = torch.nn.ModuleList([Dense(64, 48, bias=True, activation="GELU", residual=True), Dense(48, 24)])
    return model


def vectors(model: ColBERT) -> list[torch.Tensor]:
    return [model.encode_queries(TEXTS).values, model.encode_documents(TEXTS).values]


def assert_same_bits(got: Pretrained, wanted: Pretrained) -> None:
    ours, theirs = got.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, torch.equal(ours[name], tensor)) == (tensor.dtype, True), name


def test_the_three_formats_of_late_interaction(tmp_path: Path) -> None:
    """Through all three and back, in both directions: the same bits, settings and vectors."""
    model = make().bfloat16()
    model.save_pretrained(tmp_path / "pylate")
    path = ["pylate", "sentence-transformers", "stanford", "pylate", "stanford", "sentence-transformers", "pylate"]
    for step, (before, after) in enumerate(pairwise(path)):
        source = tmp_path / (before if step == 0 else f"{step}-{before}")
        assert convert(source, tmp_path / f"{step + 1}-{after}", to=after) == "ColBERT"
        loaded = ColBERT.from_pretrained(tmp_path / f"{step + 1}-{after}", dtype="auto")
        assert_same_bits(loaded, model)
        for got, wanted in zip(vectors(loaded), vectors(model), strict=True):
            assert torch.equal(got, wanted)
    same = replace(ColBERT.from_pretrained(tmp_path / "6-pylate").config, skip_unknown=True, strip=True)
    assert same == model.config


def test_what_a_folder_for_sentence_transformers_holds(tmp_path: Path) -> None:
    """The names that sentence-transformers 6.2 writes and reads, without sentence-transformers."""
    residual(make(lower=True)).save_pretrained(tmp_path, format="sentence-transformers")
    modules = json.loads((tmp_path / "modules.json").read_text())
    home = "sentence_transformers.base.modules"
    assert [(entry["path"], entry["type"]) for entry in modules] == [
        ("", f"{home}.transformer.Transformer"),
        ("1_Dense", f"{home}.dense.Dense"),
        ("2_Dense", f"{home}.dense.Dense"),
        ("3_MultiVectorMask", "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"),
        ("4_Normalize", f"{home}.normalize.Normalize"),
    ]
    dense = json.loads((tmp_path / "1_Dense" / "config.json").read_text())
    assert (dense["module_input_name"], dense["use_residual"], dense["bias"]) == ("token_embeddings", True, True)
    settings = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert (settings["model_type"], settings["prompts"]) == (
        "MultiVectorEncoder",
        {"query": "[Q] ", "document": "[D] "},
    )
    transformer = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    assert transformer["query_expansion"] == {"strategy": "fixed", "attend": False, "token": None, "length": 20}
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    assert tokenizer["normalizer"]["normalizers"][0] == {"type": "Lowercase"}
    (prefix,) = [token for token in tokenizer["added_tokens"] if token["content"] == "[Q] "]
    assert (prefix["special"], prefix["normalized"]) == (True, False)


MODELS = {
    "expansion": lambda: make(),
    "attended": lambda: make(attend_to_expansion_tokens=True),
    "residual head, lower-casing": lambda: residual(make(lower=True, do_query_expansion=False)),
    "prompts": lambda: make(query_prompt="find: ", document_prompt="text: ", query_prefix=""),
    "own skiplist": lambda: make(skiplist_words=(",", "?", "no such token"), do_query_expansion=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_sentence_transformers_reads_what_we_write_for_it(name: str, tmp_path: Path) -> None:
    library: Any = pytest.importorskip("sentence_transformers", minversion="6.2")
    model = MODELS[name]()
    model.save_pretrained(tmp_path, format="sentence-transformers")
    theirs, ours = library.MultiVectorEncoder(str(tmp_path), device="cpu"), ColBERT.from_pretrained(tmp_path)
    assert_same_bits(ours, model)
    for encode, other in ((ours.encode_queries, theirs.encode_query), (ours.encode_documents, theirs.encode_document)):
        for got, wanted in zip(encode(TEXTS), other(TEXTS, convert_to_numpy=True), strict=True):
            np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=2e-6)


def test_what_a_folder_for_stanford_holds(tmp_path: Path) -> None:
    """The names that stanford-futuredata/ColBERT 0.2.22 writes and reads, without it."""
    model = make(attend_to_expansion_tokens=True)
    assert model.tokenizer.pad_token_id == model.tokenizer.mask_token_id  # as PyLate sets it
    model.save_pretrained(tmp_path, format="stanford")
    assert json.loads((tmp_path / "artifact.metadata").read_text()) == {
        "query_token_id": "[Q] ",
        "doc_token_id": "[D] ",
        "query_maxlen": 20,
        "doc_maxlen": 30,
        "attend_to_mask_tokens": True,
        "mask_punctuation": True,
        "dim": 24,
        "similarity": "cosine",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["HF_ColBERT"], "modernbert")
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(weights.pop("linear.weight"), model.state_dict()["dense.0.linear.weight"])
    assert {name.removeprefix("model.") for name in weights} == set(model.encoder.state_dict())
    assert all(name.startswith("model.") for name in weights)
    # Rows of the pad token get no vector there, so it must not be [MASK].
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((tmp_path / name).read_text())["pad_token"] == "[PAD]"
    assert not (tmp_path / "modules.json").exists()


def test_pylate_reads_what_we_write_for_stanford(tmp_path: Path) -> None:
    models: Any = pytest.importorskip("pylate.models")
    ours = make()
    ours.save_pretrained(tmp_path, format="stanford")
    theirs = models.ColBERT(str(tmp_path), device="cpu", model_kwargs={"attn_implementation": "sdpa"}).eval()
    for is_query, encode in ((True, ours.encode_queries), (False, ours.encode_documents)):
        for got, wanted in zip(encode(TEXTS), theirs.encode(TEXTS, is_query=is_query), strict=True):
            np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=2e-6)


def test_stanfords_colbert_reads_what_we_write_for_it(tmp_path: Path) -> None:
    """colbert-ai 0.2.22, which needs transformers 4: its class loads the model, and its tokenizers give our ids."""
    base: Any = pytest.importorskip("colbert.modeling.base_colbert")
    tokenization: Any = pytest.importorskip("colbert.modeling.tokenization")
    ours = make()
    ours.save_pretrained(tmp_path, format="stanford")
    theirs = base.BaseColBERT(str(tmp_path))
    assert torch.equal(theirs.linear.weight, ours.state_dict()["dense.0.linear.weight"])
    state = theirs.bert.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in ours.encoder.state_dict().items())
    ids, mask = tokenization.DocTokenizer(theirs.colbert_config).tensorize(TEXTS)
    assert ids[mask.bool()].tolist() == ours.tokenize_documents(TEXTS).batch.input_ids.tolist()
    ids, mask = tokenization.QueryTokenizer(theirs.colbert_config, verbose=0).tensorize(TEXTS)
    assert ids.flatten().tolist() == ours.tokenize_queries(TEXTS).batch.input_ids.tolist()
    rows = torch.nn.functional.normalize(theirs.linear(theirs.bert(ids, attention_mask=mask)[0]), dim=-1)
    torch.testing.assert_close(ours.encode_queries(TEXTS).values, rows.detach().flatten(0, 1), rtol=0, atol=4e-6)


def no_pad(model: ColBERT) -> ColBERT:
    backend = json.loads(model.tokenizer.files()["tokenizer.json"].decode().replace("[PAD]", "[NONE]"))
    import tokenizers

    model.tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(backend)), {"pad_token": "[MASK]"})
    return model


REFUSED = {
    "several layers": (lambda: residual(make()), "the head of Stanford's ColBERT is one matrix"),
    "no expansion": (lambda: make(do_query_expansion=False), "do_query_expansion=False"),
    "a skiplist": (lambda: make(skiplist_words=()), "another skiplist"),
    "more than its skiplist": (lambda: make(skiplist_words=(*string.punctuation, "the")), "another skiplist"),
    "prompts": (lambda: make(query_prompt="find "), "has no prompts"),
    "no prefix": (lambda: make(query_prefix=""), "name both"),
    "lower-casing": (lambda: make(lower=True), "lower-cases nothing outside of tokenizer.json"),
    "no token for padding": (lambda: no_pad(make()), "a pad token that is not the mask token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stanfords_format_cannot_say_is_refused(name: str, tmp_path: Path) -> None:
    model, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        model().save_pretrained(tmp_path / "new", format="stanford")
    assert not (tmp_path / "new").exists()


def test_a_folder_of_one_format_is_not_overwritten_by_another(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of several modules"):
        make().save_pretrained(tmp_path, format="stanford")


# Which formats there are for which class


def save_each(folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    encoder, tokenizer = Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)
    models: dict[str, Pretrained] = {
        "ColBERT": make(),
        "Embedder": Embedder(encoder, tokenizer),
        "Encoder": encoder,
        "Reranker": Reranker(SequenceClassifier(Encoder.from_pretrained(BACKBONE), labels=1), tokenizer),
        "TokenClassifier": TokenClassifier(Encoder.from_pretrained(BACKBONE), labels=2),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


WRITTEN = {
    "ColBERT": "sentence-transformers pylate stanford",
    "Embedder": "sentence-transformers",
    "Encoder": "transformers",
    "Reranker": "transformers sentence-transformers",
    "TokenClassifier": "transformers",
}


def test_each_class_has_its_formats(tmp_path: Path) -> None:
    """Nothing loses its head in silence: a format for another class of model is refused, with those that there are."""
    for name, folder in save_each(tmp_path / "from").items():
        for to in FORMATS[:-1] if name == "Reranker" else FORMATS:  # see test_composer.py
            target = tmp_path / to / name
            target.parent.mkdir(exist_ok=True)
            if to in WRITTEN[name].split():
                convert(folder, target, to=to)
                continue
            with pytest.raises(ValueError, match=f"holds a model of .*, and not for {to}"):
                convert(folder, target, to=to)
            assert not target.exists()
    reranker = Reranker.from_pretrained(tmp_path / "sentence-transformers" / "Reranker")
    assert_same_bits(reranker, Reranker.from_pretrained(tmp_path / "from" / "Reranker"))
    plain = tmp_path / "transformers" / "Reranker"
    assert not (plain / "modules.json").exists()
    assert (plain / "tokenizer.json").read_bytes() == (tmp_path / "from" / "Reranker" / "tokenizer.json").read_bytes()
    assert torch.equal(Reranker.from_pretrained(plain).score("owl", ["An owl."]), reranker.score("owl", ["An owl."]))


@pytest.mark.parametrize("format", ColBERT.formats)
def test_a_colbert_of_any_format_is_refused_by_name_elsewhere(format: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path, format=format)
    for kind in (Embedder, Reranker, TokenClassifier):
        with pytest.raises(ValueError, match=rf"holds a ColBERT, not an? {kind.__name__}: load it with ColBERT"):
            kind.from_pretrained(tmp_path)


def test_old_configs_of_transformers_become_both_generations(tmp_path: Path) -> None:
    """transformers 4.48 reads the first three keys of these, and transformers 5 the last two."""
    encoder = Encoder.from_pretrained(BACKBONE)
    encoder.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    hf = json.loads(file.read_text())
    for key in ("layer_types", "rope_parameters"):
        del hf[key]
    file.write_text(json.dumps(hf))
    convert(tmp_path / "old", tmp_path / "new", to="transformers")
    hf = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (hf["global_attn_every_n_layers"], hf["global_rope_theta"], hf["local_rope_theta"]) == (3, 160_000, 10_000)
    assert hf["layer_types"] == encoder.config.layer_types
    assert {kind: rope["rope_theta"] for kind, rope in hf["rope_parameters"].items()} == {
        "full_attention": 160_000,
        "sliding_attention": 10_000,
    }
    assert_same_bits(Encoder.from_pretrained(tmp_path / "new"), encoder)


def test_modules_of_several_dtypes_lose_no_number(tmp_path: Path) -> None:
    """A head in float32 on an encoder in bfloat16: all of it becomes float32."""
    model = make()
    model.encoder.bfloat16()
    model.save_pretrained(tmp_path / "mixed")
    convert(tmp_path / "mixed", tmp_path / "new", to="stanford")
    assert_same_bits(ColBERT.from_pretrained(tmp_path / "new"), model.float())


def test_convert_names_what_it_cannot_do(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="to is 'onnx', but must be one of transformers, "):
        convert(tmp_path / "model", tmp_path / "new", to="onnx")
    with pytest.raises(FileExistsError, match="is there already: give the name of a folder"):
        convert(tmp_path / "model", tmp_path / "model", to="pylate")
    with pytest.raises(ValueError, match="format is 'stanford', but models of Encoder are written for transformers"):
        Encoder.from_pretrained(BACKBONE).save_pretrained(tmp_path / "new", format="stanford")
    config = tmp_path / "model" / "config.json"
    written = json.loads(config.read_text())
    (tmp_path / "model" / "modules.json").unlink()
    for named, words in ((None, "names no class"), (["ModernBertForSpans"], "ModernBertForSpans, which no class here")):
        config.write_text(json.dumps(written | {"architectures": named}))
        with pytest.raises(ValueError, match=words):
            convert(tmp_path / "model", tmp_path / "new", to="transformers")
    assert not (tmp_path / "new").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as end:
        main(["convert", str(tmp_path / "model"), str(tmp_path / "new"), "--to", "stanford"])
    assert not end.value.code
    assert "holds the ColBERT for stanford" in capsys.readouterr().err
    assert (tmp_path / "new" / "artifact.metadata").exists()
    with pytest.raises(SystemExit) as end:
        main(["convert", str(tmp_path / "model"), str(tmp_path / "new"), "--to", "stanford"])
    assert end.value.code == 2
    assert "is there already" in capsys.readouterr().err
