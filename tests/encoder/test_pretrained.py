"""What users of transformers' `PreTrainedModel` do with a model: each works, or is refused in a sentence."""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from modernbert import ColBERT, Encoder, EncoderConfig, Tokenizer, pack
from modernbert.config import PRESETS
from modernbert.encoder import EncoderOutput

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
Model = Encoder | ColBERT


def make(kind: type[Model]) -> Model:
    torch.manual_seed(0)
    encoder = Encoder.from_pretrained(BACKBONE)
    return encoder if kind is Encoder else ColBERT.from_encoder(encoder, Tokenizer.from_pretrained(BACKBONE), dim=8)


@pytest.fixture(scope="module", params=[Encoder, ColBERT], ids=["Encoder", "ColBERT"])
def kind(request: pytest.FixtureRequest) -> type[Model]:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: type[Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16, in a subfolder too."""
    folder = tmp_path_factory.mktemp("model")
    for place in (folder, folder / "inner"):
        make(kind).bfloat16().save_pretrained(place)
    return folder


def edit(folder: Path, target: Path, **values: object) -> Path:
    """A copy of the folder with other values in config.json; None removes one."""
    for path in folder.rglob("*"):
        if path.is_file():
            (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(folder)).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | values
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


# Arguments of from_pretrained


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "torch.float16"}, torch.float16),
        ({"dtype": "half"}, torch.float16),
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"dtype": torch.float64, "torch_dtype": torch.float64}, torch.float64),
    ],
)
def test_dtypes_and_their_names(kind: type[Model], folder: Path, asked: dict, wanted: torch.dtype) -> None:
    model = kind.from_pretrained(folder, **asked)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert (model.dtype, model.device) == (wanted, torch.device("cpu"))


def test_auto_is_the_dtype_of_the_config_and_else_of_the_file(kind: type[Model], folder: Path, tmp_path: Path) -> None:
    """As in transformers."""
    older = edit(folder, tmp_path / "older", dtype=None, torch_dtype="float16")
    assert kind.from_pretrained(older, dtype="auto").dtype == torch.float16
    silent = edit(folder, tmp_path / "silent", dtype=None, torch_dtype=None)
    assert kind.from_pretrained(silent, dtype="auto").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is 'float7', but must be 'auto' or one of float32"):
        kind.from_pretrained(edit(folder, tmp_path / "odd", dtype="float7"), dtype="auto")


@pytest.mark.parametrize("dtype", ["int8", torch.int8, "float8_e4m3fn", "fp16", "nn", 16, "", torch.complex64])
def test_other_dtypes_are_refused(kind: type[Model], folder: Path, dtype: object) -> None:
    with pytest.raises(ValueError, match=r"dtype is .*, but must be 'auto' or one of float32, float16, bfloat16"):
        kind.from_pretrained(folder, dtype=dtype)


def test_fields_of_the_config_may_be_given(kind: type[Model], folder: Path) -> None:
    model = kind.from_pretrained(folder, attention_dropout=0.1, mlp_dropout=0.2, local_attention=8, num_labels=3)
    encoder = model.base_model
    assert isinstance(encoder, Encoder)
    assert {layer.attn.dropout_p for layer in encoder.layers} == {0.1}
    assert {layer.mlp.dropout_p for layer in encoder.layers} == {0.2}
    assert {layer.attn.window for layer in encoder.layers} == {None, 4}
    assert (encoder.config.attention_dropout, encoder.config.window, encoder.config.num_labels) == (0.1, 4, 3)
    with pytest.raises(ValueError, match="attention_dropout is 2, but must be a probability"):
        kind.from_pretrained(folder, attention_dropout=2)
    with pytest.raises(ValueError, match=r"do not fit this Encoder(.|\n)*unexpected"):
        kind.from_pretrained(folder, num_hidden_layers=1)
    for name in ("atention_dropout", "layer_types", "others"):
        with pytest.raises(TypeError, match=f"{name}: .*attention_dropout"):
            kind.from_pretrained(folder, **{name: 1})


REFUSED = {
    "attn_implementation": "sdpa",
    "config": EncoderConfig(),
    "device_map": "auto",
    "force_download": True,
    "from_tf": True,
    "gradient_checkpointing": True,
    "ignore_mismatched_sizes": True,
    "load_in_8bit": True,
    "max_memory": {0: "1GB"},
    "output_attentions": True,
    "output_hidden_states": True,
    "output_loading_info": True,
    "quantization_config": {"load_in_4bit": True},
    "return_dict": False,
    "state_dict": {},
    "tp_plan": "auto",
    "use_auth_token": "hf_x",
    "use_safetensors": False,
    "variant": "fp16",
}


ADVICE = "(pass|leave|call|give|delete|load|wrap|make|rename|save|index)"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(kind: type[Model], folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.*: .*{ADVICE}"):
        kind.from_pretrained(folder, **{name: REFUSED[name]})
    kind.from_pretrained(folder, **{name: None})


TAKEN = {
    "device_map": ["cpu", torch.device("cpu"), {"": "cpu"}],
    "trust_remote_code": [True, False],
    "low_cpu_mem_usage": [True, False],
    "use_safetensors": [True],
    "weights_only": [True],
    "reference_compile": [False, True],
    "output_hidden_states": [False],
    "return_dict": [True],
    "force_download": [False],
    "subfolder": ["", "inner", "./inner/"],
    "cache_dir": ["anywhere"],
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_changes_nothing_is_taken(kind: type[Model], folder: Path, name: str) -> None:
    wanted = kind.from_pretrained(folder).state_dict()
    for value in TAKEN[name]:
        got = kind.from_pretrained(folder, **{name: value}).state_dict()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    "device", [{"device": "cuda"}, {"device": torch.device("cuda", 1)}, {"device_map": {"": "cuda"}}]
)
def test_float32_on_a_gpu_is_a_visible_choice(
    kind: type[Model], folder: Path, device: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensor cores are idle then. The stand-in for loading needs no GPU."""
    loaded = []
    monkeypatch.setattr(kind, "_load", lambda _, dtype, where, __: loaded.append((dtype, where.type)))
    with pytest.warns(UserWarning, match=r"leaves the tensor cores of a GPU idle: pass dtype=torch.bfloat16"):
        kind.from_pretrained(folder, **device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind.from_pretrained(folder, dtype="bfloat16", **device)
        kind.from_pretrained(folder, torch_dtype=torch.float32, **device)
        kind.from_pretrained(folder)
    assert loaded == [(None, "cuda"), ("bfloat16", "cuda"), (torch.float32, "cuda"), (None, "cpu")]


def test_one_device(kind: type[Model], folder: Path) -> None:
    for device_map in ("balanced", {"embeddings": 0, "layers": 1}, "no-device", ["cpu"]):
        with pytest.raises(ValueError, match=r"device_map=.*one device; pass device"):
            kind.from_pretrained(folder, device_map=device_map)
    with pytest.raises(ValueError, match=r"device is cpu and device_map cuda:0"):
        kind.from_pretrained(folder, device="cpu", device_map="cuda:0")
    with pytest.raises(ValueError, match=r"dtype is float16 and torch_dtype"):
        kind.from_pretrained(folder, dtype="float16", torch_dtype=torch.float32)


def test_a_subfolder_is_inside(kind: type[Model], folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no folder 'outer'"):
        kind.from_pretrained(folder, subfolder="outer")
    for outside in ("..", "inner/../..", "/"):
        with pytest.raises(ValueError, match="is outside the checkpoint"):
            kind.from_pretrained(folder, subfolder=outside)


def test_safetensors_are_there_if_they_are_asked_for(tmp_path: Path) -> None:
    encoder = make(Encoder)
    encoder.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(encoder.state_dict(), tmp_path / "pytorch_model.bin")
    Encoder.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="use_safetensors=True"):
        Encoder.from_pretrained(tmp_path, use_safetensors=True)


# Arguments of save_pretrained


@pytest.mark.parametrize(
    ("name", "value"), [("safe_serialization", False), ("push_to_hub", True), ("variant", "fp16"), ("token", "hf_x")]
)
def test_what_saving_does_not_do_is_refused(kind: type[Model], tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.*: .*(leave|upload)"):
        make(kind).save_pretrained(tmp_path / "new", **{name: value})
    with pytest.raises(TypeError, match="safe_serialisation=True is not an argument"):
        make(kind).save_pretrained(tmp_path / "new", safe_serialisation=True)
    assert list(tmp_path.iterdir()) == []


def test_the_way_of_accelerate(kind: type[Model], tmp_path: Path) -> None:
    model = make(kind)
    options = {"save_function": torch.save, "state_dict": model.state_dict(), "safe_serialization": True}
    model.save_pretrained(tmp_path / "no", is_main_process=False, **options)
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path / "yes", is_main_process=True, **options, max_shard_size="40KB")
    assert (tmp_path / "yes" / "model.safetensors.index.json").exists()
    got = kind.from_pretrained(tmp_path / "yes").state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in model.state_dict().items())


# What a model can be asked


def test_parameters_and_the_table(kind: type[Model]) -> None:
    model = make(kind)
    encoder = model.base_model
    assert isinstance(encoder, Encoder)
    table = model.get_input_embeddings()
    assert table is encoder.embeddings.tok_embeddings
    count = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters() == count
    assert model.num_parameters(exclude_embeddings=True) == count - table.weight.numel()
    table.weight.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == count - table.weight.numel()
    width = encoder.config.hidden_size
    model.set_input_embeddings(nn.Embedding(500, width))
    assert encoder.config.vocab_size == 500
    assert encoder(torch.tensor([[499]])).last_hidden_state.shape == (1, 1, width)
    with pytest.raises(ValueError, match=rf"the table has width 7, the model {width}"):
        model.set_input_embeddings(nn.Embedding(500, 7))
    assert model.resize_token_embeddings(501, pad_to_multiple_of=8) is model.get_input_embeddings()
    assert encoder.config.vocab_size == model.get_input_embeddings().num_embeddings == 504


def test_a_compiled_encoder_is_asked_through_its_wrapper() -> None:
    model = make(ColBERT)
    encoder, model.encoder = model.encoder, torch.compile(model.encoder)
    assert model.base_model is encoder
    model.gradient_checkpointing_enable()
    assert encoder.gradient_checkpointing


def test_gradient_checkpointing(kind: type[Model]) -> None:
    """Every spelling switches it, layers are computed twice, and gradients are equal."""
    model = make(kind).train()
    encoder = model.base_model
    assert isinstance(encoder, Encoder)
    calls: list[int] = []
    encoder.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    batch = pack(IDS.tolist())

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(batch).square().sum().backward()
        return encoder.layers[0].mlp.Wi.weight.grad.clone()

    wanted = gradient()
    for enable, disable in (
        (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable),
        (model.activation_checkpointing_enable, model.activation_checkpointing_disable),
    ):
        for options in ({}, {"use_reentrant": False}, None):
            enable(options)
            assert model.is_gradient_checkpointing
            assert model.is_activation_checkpointing
            calls.clear()
            torch.testing.assert_close(gradient(), wanted)
            assert len(calls) == 2
            disable()
            assert not model.is_gradient_checkpointing
        for name, value in {"use_reentrant": True, "every_n_layers": 2, "offload": True}.items():
            with pytest.raises(ValueError, match=f"{name}={value} is not supported"):
                enable({name: value})
        with pytest.raises(TypeError, match="context_fn"):
            enable({"context_fn": None})
        assert not model.is_gradient_checkpointing


def test_an_output_answers_by_name_and_by_place() -> None:
    encoder = make(Encoder)
    assert isinstance(encoder, Encoder)
    output = encoder(IDS)
    rows = output.last_hidden_state
    assert output["last_hidden_state"] is output[0] is output.get("last_hidden_state") is rows
    assert list(output.keys()) == list(dict(output)) == ["last_hidden_state"]
    assert output.to_tuple() == tuple(output.values()) == output[:1] == (rows,)
    assert "last_hidden_state" in output
    assert "hidden_states" not in output
    assert output.get("hidden_states") is None
    with pytest.raises(KeyError):
        output["hidden_states"]
    with pytest.raises(IndexError):
        output[1]
    states = EncoderOutput(rows, (rows,))
    assert states["hidden_states"] == states[1] == states.to_tuple()[1] == (rows,)
    assert tuple(states) == (rows, (rows,))
    assert type(pickle.loads(pickle.dumps(output))) is EncoderOutput


# The config


def test_a_config_is_asked_as_one_of_transformers() -> None:
    config = EncoderConfig.preset("ettin-17m")
    assert (config.model_type, config.architectures) == ("modernbert", ["ModernBertModel"])
    assert (config.output_hidden_states, config.output_attentions, config.is_encoder_decoder) == (False, False, False)
    assert config.global_attn_every_n_layers == 3
    assert config.get_text_config() is config
    assert json.loads(config.to_json_string()) == config.to_dict() == config.to_hf()
    assert not hasattr(config, "no_such_field")
    assert not hasattr(config, "_attn_implementation")
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(dataclasses.replace(config)) == hash(config)


def test_hosts_may_set_what_no_computation_reads(kind: type[Model]) -> None:
    """transformers' Trainer sets `use_cache` and token ids, sentence-transformers `tokenizer_class`."""
    model = make(kind)
    model.config.use_cache = False
    model.config.tokenizer_class = "PreTrainedTokenizerFast"
    assert (model.config.use_cache, model.config.to_dict()["tokenizer_class"]) == (False, "PreTrainedTokenizerFast")
    assert model.config == make(kind).config


def test_what_a_model_was_built_from_is_fixed(tmp_path: Path) -> None:
    encoder = Encoder(EncoderConfig(**SMALL))
    encoder.config.eos_token_id = 7
    for name, value in {"attention_dropout": 0.1, "hidden_size": 3, "layer_types": [], "model_type": "bert"}.items():
        with pytest.raises(dataclasses.FrozenInstanceError, match=rf"{name} is fixed.*from_pretrained\(.*{name}="):
            setattr(encoder.config, name, value)
    encoder.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 7


SMALL = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_a_model_does_not_write_to_a_preset() -> None:
    with torch.device("meta"):
        encoder = Encoder.from_config("ettin-17m")
    encoder.config.use_cache = True
    encoder.config.pad_token_id = 1
    assert PRESETS["ettin-17m"].pad_token_id == 50283
    assert "use_cache" not in PRESETS["ettin-17m"].to_dict()


def test_a_config_of_transformers_is_refused_with_the_way() -> None:
    from transformers import ModernBertConfig

    with pytest.raises(TypeError, match=r"a ModernBertConfig; EncoderConfig\.from_hf\(config\.to_dict\(\)\)"):
        Encoder.from_config(ModernBertConfig())


KEPT = {
    "id2label": {"0": "no", "1": "yes"},
    "label2id": {"no": 0, "yes": 1},
    "problem_type": "single_label_classification",
    "_name_or_path": "answerdotai/ModernBERT-base",
    "transformers_version": "4.48.0",
    "task_specific_params": {"x": {"y": 1}},
    "my_own_field": [1, {"a": None}],
}


def test_other_fields_survive_a_round_trip(kind: type[Model], folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    edit(folder, tmp_path / "old", **KEPT, architectures=["ModernBertForSequenceClassification"])
    with pytest.warns(UserWarning, match="unknown keys: my_own_field"):
        model = kind.from_pretrained(tmp_path / "old")
    assert model.base_model.config.id2label == KEPT["id2label"]
    model.resize_token_embeddings(model.base_model.config.vocab_size + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "new")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert KEPT.items() <= written.items()
    assert written["architectures"] == ["ModernBertModel"]
    assert written["dtype"] == written["torch_dtype"] == "float32"  # of the file, not of the one that was loaded
    theirs = AutoConfig.from_pretrained(tmp_path / "new")
    assert (theirs.id2label, theirs.num_labels) == ({0: "no", 1: "yes"}, 2)


def test_a_dtype_is_written_only_where_there_is_one(tmp_path: Path) -> None:
    encoder = make(Encoder)
    encoder.base_model.layers[0].half()
    encoder.save_pretrained(tmp_path)
    assert not {"dtype", "torch_dtype"} & json.loads((tmp_path / "config.json").read_text()).keys()


# Heads that are left out


@pytest.mark.parametrize("task", ["MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_a_head_that_is_left_out_is_named_once(task: str, tmp_path: Path) -> None:
    import transformers

    config = transformers.ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1)
    model = getattr(transformers, f"ModernBertFor{task}")(config)
    model.save_pretrained(tmp_path)
    head = [name for name in model.state_dict() if not name.startswith("model.") and name != "decoder.weight"]
    with pytest.warns(UserWarning, match="are left out") as caught:
        encoder = Encoder.from_pretrained(tmp_path)
    (text,) = {str(each.message) for each in caught}
    assert all(name in text for name in head)
    assert "layers" not in text
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.save_pretrained(tmp_path)  # has no head to lose
        Encoder.from_pretrained(tmp_path)


# Hosts


def test_two_steps_of_transformers_trainer(kind: type[Model], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = make(kind)
    encoder = model.base_model
    assert isinstance(encoder, Encoder)
    calls: list[int] = []
    encoder.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))

    class Rows(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **_: object) -> object:
            return model(pack(inputs["input_ids"])).square().mean()

    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_checkpointing=True, use_cpu=True,
        report_to=[], remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Rows(model=model, args=arguments, train_dataset=[{"input_ids": row} for row in IDS.tolist() * 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        result = trainer.train()
    assert result.global_step == 2
    assert len(calls) == 4
    model.save_pretrained(tmp_path / "model")


def test_an_encoder_in_the_place_of_a_model_of_sentence_transformers(
    tmp_path: Path, modernbert_tokenizer_file: Path
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    config = EncoderConfig(**SMALL | {"vocab_size": 50368}, pad_token_id=50283, cls_token_id=50281, sep_token_id=50282)
    Encoder(config).save_pretrained(tmp_path / "model")
    Tokenizer.from_pretrained(modernbert_tokenizer_file.parent).save_pretrained(tmp_path / "model")
    module = Transformer(str(tmp_path / "model"))
    host = SentenceTransformer(modules=[module, Pooling(16, "mean")], device="cpu")
    texts = ["one text", "another, longer text"]
    wanted = host.encode(texts, convert_to_tensor=True)
    module.model = Encoder.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(host.encode(texts, convert_to_tensor=True), wanted, rtol=0, atol=1e-5)
    host.save(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(again.encode(texts, convert_to_tensor=True), wanted, rtol=0, atol=1e-5)
