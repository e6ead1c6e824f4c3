"""Folders that would take memory or time beyond their files, or mean two things: each is refused in a sentence."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import modernbert.weights
from modernbert import ColBERT, Encoder, EncoderConfig, Tokenizer
from modernbert.checkpoint import load_state_dict, locate, read_json, read_state_dict
from modernbert.heads.colbert import ColBERTConfig

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Encoder.from_config(EncoderConfig(**SHAPE)).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def colbert(tmp_path: Path) -> Path:
    model = ColBERT.from_encoder(Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE), dim=24)
    model.save_pretrained(tmp_path / "colbert")
    return tmp_path / "colbert"


def pickled(folder: Path, state: dict[str, Tensor], *, zipped: bool = True) -> Path:
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are read."""
    names: list[str] = []
    read = modernbert.weights.read
    monkeypatch.setattr(modernbert.weights, "read", lambda name, *args: names.append(name) or read(name, *args))
    return names


# Weights


@pytest.mark.parametrize("zipped", [True, False])
def test_views_of_one_array_under_wrong_names_are_not_read(folder: Path, reads: list[str], zipped: bool) -> None:
    one = torch.zeros(1 << 16, dtype=torch.bfloat16)
    pickled(folder, {f"x{i}": one for i in range(100)}, zipped=zipped)
    with pytest.raises(ValueError, match=r"(?s)missing \(20\).*unexpected \(100\)"):
        Encoder.from_pretrained(folder)
    assert reads == []


def test_one_wrong_name_shape_or_dtype_is_enough(folder: Path, reads: list[str]) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    name = "layers.1.mlp.Wi.weight"
    for wrong in (
        {**state, "more": torch.zeros(1)},
        {key: value for key, value in state.items() if key != name},
        {**state, name: torch.zeros(16, 32)},
        {**state, name: torch.zeros(32, 16, dtype=torch.int64)},
    ):
        for save in (
            lambda x: safetensors.torch.save_file(x, folder / "model.safetensors"),
            lambda x: pickled(folder, x),
        ):
            save(wrong)
            with pytest.raises(ValueError, match="do not fit this Encoder"):
                Encoder.from_pretrained(folder)
    assert reads == []


def test_a_head_that_is_left_out_is_not_read(folder: Path, reads: list[str]) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    headed = {f"model.{name}": tensor for name, tensor in state.items()} | {"decoder.weight": torch.zeros(4)}
    safetensors.torch.save_file(headed, folder / "model.safetensors")
    Encoder.from_pretrained(folder)
    assert "decoder.weight" not in reads
    assert len(reads) == len(state)


def test_layers_that_are_one_array_in_the_file_are_refused(folder: Path, reads: list[str]) -> None:
    """All names and shapes are right: a config of a thousand layers would make gigabytes of one matrix."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["layers.2.mlp.Wi.weight"] = state["layers.1.mlp.Wi.weight"]
    pickled(folder, state)
    words = r"layers\.2\.mlp\.Wi\.weight \(one tensor with layers\.1\.mlp\.Wi\.weight in the file"
    with pytest.raises(ValueError, match=words):
        Encoder.from_pretrained(folder)
    assert reads == []


def test_tied_names_of_one_array_load(tmp_path: Path) -> None:
    """As in the files of a language model with a tied head."""
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, bias=False), "b": torch.nn.Linear(3, 3, bias=False)})
    module["b"].weight = module["a"].weight
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    state = read_state_dict(tmp_path, dtype=torch.float64)
    assert torch.equal(state["a.weight"], module["a"].weight.double())
    load_state_dict(module, state)
    assert module["a"].weight is module["b"].weight


OVERLAPS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "shifted": lambda one: {f"x{i}": one[i : i + 900] for i in range(100)},
    "expanded": lambda one: {"x": one[:1].expand(10**6)},
    "expanded within the size of its array": lambda one: {f"x{i}": one[i : i + 1].expand(1000) for i in range(100)},
    "strided": lambda one: {f"x{i}": one.as_strided((30, 30), (1, i)) for i in range(30)},
    "turned": lambda one: {f"x{i}": one[: i * i].view(i, i).T for i in range(2, 32)},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", OVERLAPS)
def test_overlapping_views_are_refused(tmp_path: Path, name: str, zipped: bool) -> None:
    pickled(tmp_path, OVERLAPS[name](torch.zeros(1000)), zipped=zipped)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin (is not a state dict|has .* because they overlap)"):
        read_state_dict(tmp_path, dtype=torch.float64)


def test_an_endless_pickle_is_not_read_to_its_end(tmp_path: Path) -> None:
    """Twenty million opcodes, a byte each, took a minute."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02" + b"N0" * 10_000_000 + b".")
    with pytest.raises(ValueError, match="it has more than 500,000 opcodes"):
        read_state_dict(tmp_path)


def header(folder: Path, **entries: dict[str, Any]) -> None:
    text = json.dumps(entries).encode()
    size = max([entry["data_offsets"][1] for entry in entries.values()], default=0)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "C64", "U64"])
def test_a_dtype_without_plain_numbers_is_named(tmp_path: Path, dtype: str) -> None:
    header(tmp_path, w={"dtype": dtype, "shape": [16], "data_offsets": [0, {"F4": 8, "F8_E8M0": 16}.get(dtype, 128)]})
    with pytest.raises(ValueError, match=rf"model\.safetensors: w has dtype {dtype}; known: F64, F32"):
        read_state_dict(tmp_path, dtype=torch.float32)


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modernbert.weights, "MOST_TENSORS", 3)
    safetensors.torch.save_file({f"x{i}": torch.zeros(1) for i in range(4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has 4 tensors; at most 3 are read"):
        read_state_dict(tmp_path)


def test_a_long_list_of_names_is_cut(folder: Path) -> None:
    safetensors.torch.save_file({f"x{i}": torch.zeros(1) for i in range(1000)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected \(1000\): .*, \.\.\.") as caught:
        Encoder.from_pretrained(folder)
    assert len(str(caught.value)) < 5000


# JSON


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": {"c": 2, "c": 2}}', "'c' is there twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": [-Infinity]}', "-Infinity is not a JSON number"),
        ('\ufeff{"a": 1}', "BOM"),
        ("[" * 100_000, "recursion"),
        ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
    ],
)
def test_json_that_readers_understand_differently_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"config\.json is not valid JSON: .*{words}"):
        read_json(tmp_path, "config.json")


def test_utf_16_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-16")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_json(tmp_path, "config.json")


def edited(folder: Path, file: str, **values: object) -> Path:
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | values))
    return folder


CONFIG_VALUES = [
    ("norm_eps", 10**400),
    ("initializer_range", 10**400),
    ("initializer_cutoff_factor", 10**4000),
    ("vocab_size", 10**400),
    ("vocab_size", 2**40),
    ("vocab_size", True),
    ("vocab_size", 50.0),
    ("num_hidden_layers", -1),
    ("intermediate_size", 0),
    ("cls_token_id", 10**400),
    ("hidden_size", 17),
    ("attention_bias", "false"),
    ("mlp_bias", 0),
    ("attention_dropout", 10**400),
    ("rope_scaling", False),
    ("quantization_config", 0),
    ("model_type", None),
]


@pytest.mark.parametrize(("name", "value"), CONFIG_VALUES, ids=range(len(CONFIG_VALUES)))
def test_a_value_of_the_config_is_refused_by_name(folder: Path, name: str, value: object) -> None:
    named = "num_attention_heads" if name == "hidden_size" else name  # 17 is a size, but cannot be cut into heads
    with pytest.raises(ValueError, match=rf"config: {named} is .*, but must be"):
        Encoder.from_pretrained(edited(folder, "config.json", **{name: value}))


def test_a_theta_beyond_any_float_is_refused_by_name(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["full_attention"]["rope_theta"] = 10**400
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config: rope_parameters\.full_attention\.rope_theta is 1000.*, but must be"):
        Encoder.from_pretrained(folder)


def test_the_empty_string_is_not_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert locate(".") == Path()
    with pytest.raises(FileNotFoundError, match="empty string"):
        Encoder.from_pretrained("")


# Tokenizers


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        (
            "tokenizer_config.json",
            {"do_lower_case": "false"},
            "er_config.json: do_lower_case is 'false', but must",
        ),
        ("tokenizer_config.json", {"do_lower_case": 1}, "do_lower_case is 1, but must be true, false or null"),
        (
            "sentence_bert_config.json",
            {"do_lower_case": "false"},
            "bert_config.json: do_lower_case is 'false'",
        ),
        ("tokenizer_config.json", {"truncation_side": "lfet"}, "truncation_side is 'lfet', but must be left or right"),
        ("tokenizer_config.json", {"model_max_length": False}, "model_max_length is False, but must be"),
        ("tokenizer_config.json", {"model_max_length": 0}, "model_max_length is 0, but must be"),
        ("tokenizer_config.json", {"cls_token": 5}, "cls_token is 5, but must be"),
    ],
)
def test_a_setting_of_the_tokenizer_is_refused_by_name(
    tmp_path: Path, file: str, values: dict[str, object], words: str
) -> None:
    shutil.copytree(BACKBONE, tmp_path / "model")
    with pytest.raises(ValueError, match=words):
        Tokenizer.from_pretrained(edited(tmp_path / "model", file, **values))


def test_a_large_tokenizer_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(100 << 20)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"tokenizer\.json has 104,857,600 bytes; JSON files of at most 50,331,648"):
        Tokenizer.from_pretrained(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


PIECE, TEXT = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
TEMPLATES = {
    "pieces": ([PIECE] * 101 + [TEXT], 1),
    "ids": ([PIECE, TEXT], 1000),
    "pieces of many ids": ([PIECE] * 50 + [TEXT], 100),
    "the text again and again": ([TEXT] * 1000, 1),
}


@pytest.mark.parametrize("which", ["single", "pair"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_makes_long_texts_of_short_ones_is_refused(tmp_path: Path, name: str, which: str) -> None:
    pieces, ids = TEMPLATES[name]
    shutil.copytree(BACKBONE, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"][which] = pieces
    special = content["post_processor"]["special_tokens"]["[CLS]"]
    special |= {"ids": special["ids"] * ids, "tokens": special["tokens"] * ids}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged, .*: its post_processor has .* special tokens"):
        Tokenizer.from_pretrained(tmp_path / "model")


# ColBERT folders


def modules(*entries: tuple[str, str]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = [{"path": path, "type": f"x.{kind}"} for path, kind in entries]
        (folder / "modules.json").write_text(json.dumps(content))

    return change


def square(count: int) -> Callable[[Path], None]:
    """A layer that is its own successor, many times."""

    def change(folder: Path) -> None:
        modules(("", "Transformer"), *[("2_Dense", "Dense")] * count)(folder)
        shutil.copytree(folder / "1_Dense", folder / "2_Dense")
        edited(folder, "2_Dense/config.json", out_features=64)
        safetensors.torch.save_file({"linear.weight": torch.zeros(64, 64)}, folder / "2_Dense" / "model.safetensors")

    return change


TOP, DENSE = ("", "Transformer"), ("1_Dense", "Dense")
CONTRADICTIONS = {
    "the encoder elsewhere": (modules(("0_Transformer", "Transformer"), DENSE), "only the first is a Transformer"),
    "no encoder": (modules(DENSE), "only the first is a Transformer"),
    "two encoders": (modules(TOP, TOP, DENSE), "only the first is a Transformer"),
    "the head before the encoder": (modules(DENSE, TOP), "only the first is a Transformer"),
    "a head in the folder of the encoder": (modules(TOP, ("", "Dense")), "only the first is a Transformer"),
    "a layer after the normalisation": (modules(TOP, ("2", "Normalize"), DENSE), "a Dense after a Normalize"),
    "one layer twice": (square(2), "lists '2_Dense' twice"),
    "one layer under two names": (modules(TOP, DENSE, ("./1_Dense", "Dense")), "lists './1_Dense' twice"),
    "20,000 layers": (square(20_000), "lists 20,001 modules; at most 32 are read"),
    "a layer that is not there": (modules(TOP, ("3_Dense", "Dense")), "3_Dense/config.json is missing"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_modules_that_contradict_their_folder_are_refused(colbert: Path, name: str) -> None:
    change, words = CONTRADICTIONS[name]
    change(colbert)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        ColBERT.from_pretrained(colbert)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"document_length": 1}, "document_length: a length of 1 has no room for the 3 tokens around a text"),
        ({"query_length": 2}, "query_length: a length of 2 has no room"),
        ({"query_length": 10**400}, "query_length is 1000.*, but must be a whole number"),
        ({"do_query_expansion": "false"}, "do_query_expansion is 'false', but must be true or false"),
        ({"default_prompt_name": "gone"}, "default_prompt_name is 'gone', but prompts has only"),
    ],
)
def test_a_setting_of_a_colbert_is_refused_by_name(colbert: Path, values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ColBERT.from_pretrained(edited(colbert, "config_sentence_transformers.json", **values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"document_length": False}, "document_length is False, but must be a whole number .*, or null"),
        ({"query_length": ""}, "query_length is '', but must be a whole number .*, or null"),
    ],
)
def test_a_setting_of_sentence_transformers_is_refused_by_name(
    colbert: Path, values: dict[str, object], words: str
) -> None:
    edited(colbert, "config_sentence_transformers.json", model_type="MultiVectorEncoder")
    with pytest.raises(ValueError, match=words):
        ColBERT.from_pretrained(edited(colbert, "sentence_bert_config.json", **values))


def test_lengths_are_checked_when_a_model_is_made() -> None:
    encoder, tokenizer = Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)
    with pytest.raises(ValueError, match="document_length: a length of 1 has no room"):
        ColBERT.from_encoder(encoder, tokenizer, config=ColBERTConfig(document_length=1))
