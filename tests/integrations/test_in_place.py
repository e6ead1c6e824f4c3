"""`pack_in_place` on transformers' models: numbers, losses and gradients as before, and all that users do with them."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from head_twin import CONFIGS, written
from hf_twin import BIASES, TINY, exact_rotary, make_loud, pad, random_ids
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import ModernBertConfig, ModernBertModel
from transformers.initialization import no_init_weights
from transformers.models.modernbert import modeling_modernbert

from modernbert.integrations import packed_classes
from modernbert.integrations.transformers import pack_in_place, unpack_in_place

TOLERANCE = 1e-5
"""Of numbers about 1: some hundred roundings of float32. Both sum in another order."""

LENGTHS = [3, 40, 17, 1, 66]
TASKS = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
SPAN = {"id2label": {"0": "start", "1": "end"}, "label2id": {"start": 0, "end": 1}}


def bare(**changes: Any) -> ModernBertModel:
    return model_of("ModernBertModel", replace(TINY, **BIASES), **changes)


def model_of(name: str, config: Any = TINY, **settings: Any) -> Any:
    """A model of transformers in evaluation mode with loud weights, whose pad token is 0 as in `pad`."""
    torch.manual_seed(0)
    hf = ModernBertConfig.from_dict(written(config, **{"pad_token_id": 0, **settings}))
    with no_init_weights():
        model = getattr(transformers, name)._from_config(hf, attn_implementation="sdpa").eval()
    make_loud(model)
    return model


def batches() -> dict[str, tuple[Tensor, Tensor]]:
    """Padded on either side, of very different lengths, one text, and rows without any real token."""
    empty = pad([*random_ids(LENGTHS, 100), [], []])
    return {
        "right": pad(random_ids(LENGTHS, 100), extra=2),
        "left": pad(random_ids(LENGTHS, 100), "left", extra=2),
        "one": pad(random_ids([30], 100)),
        "full": pad(random_ids([20, 20], 100)),
        "empty": (torch.where(empty[1] == 1, empty[0], 7), empty[1]),
        "empty of pads": empty,
    }


BATCHES = batches()


def labels_of(task: str, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if task in ("SequenceClassification", "MultipleChoice"):
        return {"labels": torch.arange(len(ids)) % 3 if task != "MultipleChoice" else torch.tensor([len(ids) - 1])}
    if task == "QuestionAnswering":
        return {"start_positions": torch.zeros(len(ids)).long(), "end_positions": torch.ones(len(ids)).long()}
    labels = torch.randint(3, ids.shape, generator=generator)
    return {"labels": labels.masked_fill(mask == 0, -100)}


def run(model: nn.Module, task: str, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The loss, what the head gives where it is read, and the gradient of every parameter."""
    labels = labels_of(task, ids, mask)
    shape = (lambda x: x[None]) if task == "MultipleChoice" else lambda x: x
    output = model(shape(ids), attention_mask=shape(mask), **labels)
    model.zero_grad()
    output.loss.backward()
    found = {"loss": output.loss.detach()}
    for name in ("logits", "start_logits", "end_logits"):
        if name in output:
            logits = output[name].detach()
            found[name] = logits[mask.bool()] if task in ("MaskedLM", "TokenClassification") else logits
    return found | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        # A gradient is a sum over all tokens, so it is compared by its own size.
        allowed = TOLERANCE * max(1.0, value.abs().nan_to_num().max().item())
        torch.testing.assert_close(
            got[name], value, rtol=0, atol=allowed, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


# Numbers


@pytest.mark.parametrize("batch", BATCHES)
def test_micro_batches_give_the_same(batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference on a CPU cuts a batch between its texts, also where one is longer than a part."""
    monkeypatch.setattr(packed_classes, "CPU_TOKENS", 50)
    model, (ids, mask) = bare(), BATCHES[batch]
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        found = pack_in_place(model)(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


CASES = [(batch, "tied") for batch in BATCHES] + [(batch, "untied") for batch in ("right", "left", "empty")]


@pytest.mark.parametrize(("batch", "config"), CASES)
@pytest.mark.parametrize("task", TASKS)
def test_every_head_gives_the_same_loss_and_gradients(task: str, batch: str, config: str) -> None:
    """Both poolings, with and without biases."""
    settings = SPAN if task == "QuestionAnswering" else {}
    model = model_of(f"ModernBertFor{task}", CONFIGS[config], **settings)
    wanted = run(model, task, *BATCHES[batch])
    assert_same(run(pack_in_place(model), task, *BATCHES[batch]), wanted)


def outputs(model: nn.Module, *arguments: Any, rows: Tensor | None = None, **options: Any) -> list[Tensor]:
    """The hidden states and the output, at these rows."""
    with torch.no_grad():
        output = model(*arguments, output_hidden_states=True, **options)
    states = [*output.hidden_states, output.last_hidden_state]
    return [state if rows is None else state[rows] for state in states]


def assert_close(got: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, yours in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=TOLERANCE * max(1.0, yours.abs().max().item()))


@pytest.mark.parametrize("batch", BATCHES)
def test_the_bare_model_gives_the_same_rows(batch: str) -> None:
    """Real tokens, and the first row, which heads read as [CLS]; layer by layer, and from embeddings too."""
    model = bare()
    packed = pack_in_place(copy.deepcopy(model))
    ids, mask = BATCHES[batch]
    rows = mask.bool()
    rows[:, 0] = True
    assert_close(outputs(packed, ids, mask, rows=rows), outputs(model, ids, mask, rows=rows))
    positions = torch.arange(ids.shape[1])[None] * 2
    for options in ({"position_ids": positions}, {"position_ids": positions.expand_as(ids)}):
        options |= {"input_ids": ids, "attention_mask": mask.bool()}
        assert_close(outputs(packed, rows=rows, **options), outputs(model, rows=rows, **options))
    if batch != "left":
        options = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
        assert_close(outputs(packed, rows=rows, **options), outputs(model, rows=rows, **options))
    assert_close(outputs(packed, ids), outputs(model, ids))


def test_tokens_of_expansion_get_their_numbers() -> None:
    """Under the mask, near and farther from the text than the window, and behind it or in front of it."""
    model = bare()
    packed = pack_in_place(copy.deepcopy(model))
    ids = torch.tensor([[5, 6, 7, 8, *[9] * 36], [5, *[9] * 39], [4, *range(5, 25), *[9] * 5, *[0] * 14]])
    mask = torch.tensor([[1] * 4 + [0] * 36, [1] + [0] * 39, [1] * 21 + [0] * 19])
    for flip in (False, True):
        if flip:
            ids, mask = ids.flip(1), mask.flip(1)
        rows = (mask == 1) | (ids == 9)
        assert_close(outputs(packed, ids, mask, rows=rows), outputs(model, ids, mask, rows=rows))


def test_only_what_is_read_is_computed() -> None:
    """Padding reaches no layer; with a mask on the left the first row is read, and so all between."""
    rows = []
    model = pack_in_place(bare())
    model.layers[1].mlp.Wi.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    ids, mask = pad(random_ids(LENGTHS, 100), extra=9)
    model(ids, mask)
    assert rows == [sum(LENGTHS)]


def test_texts_that_a_collator_has_joined() -> None:
    """transformers' DataCollatorWithFlattening: one row without padding, which sdpa alone would mix."""
    texts = random_ids(LENGTHS, 100)
    features = [{"input_ids": ids, "labels": ids} for ids in texts]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    model = model_of("ModernBertForMaskedLM")
    wanted = [model(torch.tensor([ids])).logits[0] for ids in texts]
    pack_in_place(model)
    joined = collator(features)
    joined.pop("labels")
    got = model(**joined).logits
    assert got.shape[:2] == (1, sum(LENGTHS))
    assert_close([got[0]], [torch.cat(wanted)])
    with pytest.raises(ValueError, match="max_length_q"):
        model(joined["input_ids"], cu_seq_lens_q=joined["cu_seq_lens_q"])
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(**joined | {"cu_seq_lens_q": joined["cu_seq_lens_q"] + 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_no_worse(dtype: torch.dtype) -> None:
    """Beside float64: at most twice transformers' own error, in its dtypes."""
    model = bare()
    ids, mask = BATCHES["right"]
    truth = copy.deepcopy(model).double()(ids, mask)[0][mask.bool()]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        wanted = model(ids, mask)[0]
        got = pack_in_place(model)(ids, mask)[0]
    assert got.dtype == wanted.dtype
    allowed = 2 * (wanted[mask.bool()] - truth).abs().max()
    assert (got[mask.bool()] - truth).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse(dtype: torch.dtype) -> None:
    model = bare().to(dtype)
    ids, mask = BATCHES["right"]
    truth = bare().double()(ids, mask)[0][mask.bool()]
    wanted, got = (each(ids, mask)[0] for each in (model, pack_in_place(copy.deepcopy(model))))
    assert got.dtype == wanted.dtype == dtype
    allowed = 2 * (wanted[mask.bool()] - truth).abs().max()
    assert (got[mask.bool()] - truth).abs().max() <= allowed


def test_equal_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", exact_rotary)
    model = model_of("ModernBertForMaskedLM").double()
    wanted = run(model, "MaskedLM", *BATCHES["left"])
    for name, value in run(pack_in_place(model), "MaskedLM", *BATCHES["left"]).items():
        tolerance = 1e-11 if name != "loss" else 1e-6  # transformers has the loss in float32
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=tolerance * max(1, wanted[name].abs().max()))


# What users do with a model


def same_as(model: nn.Module, other: nn.Module) -> bool:
    ids, mask = BATCHES["right"]
    with torch.no_grad():
        return torch.equal(model(ids, mask)[0], other(ids, mask)[0])


def through_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch])
@pytest.mark.parametrize("name", ["ModernBertModel", "ModernBertForMaskedLM"])
def test_a_copy_computes_with_its_own_weights(name: str, copied: Callable[[Any], Any]) -> None:
    """A teacher and an EMA are copies."""
    model = pack_in_place(model_of(name))
    other = copied(model)
    assert type(other) is type(model)
    assert same_as(other, model)
    before = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.1
    assert not same_as(other, model)
    assert same_as(model, before)
    assert_close(outputs_of(other), outputs_of(unpack_in_place(other)))


def outputs_of(model: nn.Module) -> list[Tensor]:
    ids, mask = BATCHES["right"]
    with torch.no_grad():
        output = model(ids, mask)[0]
    return [output[mask.bool()] if output.dim() == 3 else output]


def test_a_model_of_the_same_class_is_one_of_transformers(tmp_path: Path) -> None:
    """`type(model)(config)` and `type(model).from_pretrained` are how some libraries copy."""
    model = pack_in_place(bare())
    model.save_pretrained(tmp_path)
    for other in (type(model)(model.config), type(model).from_pretrained(tmp_path)):
        assert type(other) is ModernBertModel
        other.load_state_dict(model.state_dict())
        assert_close(outputs_of(other.eval()), outputs_of(model))


@pytest.mark.parametrize("name", ["ModernBertModel", "ModernBertForSequenceClassification"])
def test_files_and_names_are_as_before(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    keys, text, signature = list(model.state_dict()), repr(model), str(type(model.base_model))
    model.save_pretrained(tmp_path / "before")
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    assert pack_in_place(model) is model
    assert pack_in_place(model) is model
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert (list(model.state_dict()), repr(model), str(type(model.base_model))) == (keys, text, signature)
    assert isinstance(model.base_model, ModernBertModel)
    model.save_pretrained(tmp_path / "after")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()
    packed = outputs_of(model)
    assert not hasattr(unpack_in_place(model).base_model, "in_place")
    assert type(model.base_model) is ModernBertModel
    assert unpack_in_place(model) is model
    assert_close(packed, outputs_of(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_that_of_transformers(reentrant: bool) -> None:
    model = model_of("ModernBertForMaskedLM").train()
    wanted = run(model, "MaskedLM", *BATCHES["right"])
    pack_in_place(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.model.layers[2].mlp.Wi.register_forward_hook(lambda *_: calls.append(1))
    if reentrant:
        model.enable_input_require_grads()
    assert_same(run(model, "MaskedLM", *BATCHES["right"]), wanted)
    assert len(calls) == 2, "the layer was not computed again"


def test_changes_of_modules_are_followed() -> None:
    """Weights, dtypes, tables, hooks, frozen layers and other activations of dropout are looked up in each call."""
    model = bare()
    packed = pack_in_place(model)
    seen = []
    packed.layers[0].register_forward_hook(lambda *_: seen.append("layer"))
    packed.layers[1].attn_norm.register_forward_hook(lambda *_: seen.append("norm"))
    with torch.no_grad():
        packed.layers[2].attn.Wo = nn.Linear(64, 64)
        packed.resize_token_embeddings(130)
        packed.final_norm.weight *= 2
    got = outputs(packed, *BATCHES["right"], rows=BATCHES["right"][1].bool())
    assert seen == ["layer", "norm"]
    assert_close(got, outputs(unpack_in_place(packed), *BATCHES["right"], rows=BATCHES["right"][1].bool()))


def test_dropout_is_drawn_in_training_only() -> None:
    model = pack_in_place(bare(attention_dropout=0.3, mlp_dropout=0.3, embedding_dropout=0.3))
    assert same_as(model, model)
    model.train()
    assert not same_as(model, model)


@pytest.mark.parametrize("mode", ["compile(model)", "model.compile()", "before"])
def test_the_host_is_compiled(mode: str) -> None:
    """Padding is dropped in front of the graph, also of a model that was compiled before it was packed."""
    model = model_of("ModernBertModel", replace(TINY, num_hidden_layers=1))
    compiled = model if mode == "model.compile()" else torch.compile(model, backend="eager")
    if mode == "before":
        compiled(*BATCHES["right"])
    pack_in_place(model)
    wanted = {batch: model(*BATCHES[batch])[0] for batch in ("right", "one")}
    if mode == "model.compile()":
        model.compile(backend="eager")
    for batch, rows in wanted.items():
        got = compiled(*BATCHES[batch])[0]
        assert_close([got], [rows])
        grads = [list(torch.autograd.grad((x * x).sum(), list(model.parameters()))) for x in (got, rows)]
        assert_close(*grads)


def test_outputs_have_the_shape_that_the_config_asks_for() -> None:
    """Also where transformers has put its hooks for hidden states on the layers before."""
    model = bare()
    ids, mask = BATCHES["right"]
    wanted = outputs(model, ids, mask, rows=mask.bool())
    assert_close(outputs(pack_in_place(model), ids, mask, rows=mask.bool()), wanted)
    assert isinstance(model(ids, mask, return_dict=False), tuple)
    assert model(ids, mask).hidden_states is None
    model.config.output_hidden_states, model.config.return_dict = True, False
    last, states = model(ids, mask)
    assert len(states) == 5
    assert torch.equal(states[-1], last)


def test_noise_of_the_embeddings_is_refused() -> None:
    model = pack_in_place(bare())
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    with pytest.raises(ValueError, match=r"^neftune_noise_alpha"):
        model(*BATCHES["right"])


def test_keys_that_others_keep_in_a_config() -> None:
    """sentence-transformers writes its settings of a CrossEncoder there."""
    model = bare()
    model.config.sentence_transformers = {"version": "6.2.0"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack_in_place(model)


def test_a_table_that_the_host_has_cut() -> None:
    """PyLate cuts it to the vocabulary of the tokenizer, and the ids of special tokens stay in the config."""
    model = model_of("ModernBertModel", pad_token_id=99)
    model.resize_token_embeddings(80)
    ids, mask = pad(random_ids(LENGTHS, 80))
    rows, wanted = mask == 1, outputs(model, ids, mask, rows=mask == 1)
    assert_close(outputs(pack_in_place(model), ids, mask, rows=rows), wanted)
    assert model.config.pad_token_id == 99


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks(kind: str) -> None:
    """Wrapped and sharded after it was packed; before that, classes are others, and it is refused."""
    model = model_of("ModernBertForMaskedLM")
    wanted = run(model, "MaskedLM", *BATCHES["right"])
    pack_in_place(model)
    model.zero_grad()
    labels = labels_of("MaskedLM", *BATCHES["right"])
    ids, mask = BATCHES["right"]
    if kind == "ddp":
        loss = nn.parallel.DistributedDataParallel(model)(ids, attention_mask=mask, **labels).loss
    else:
        for part in (*model.model.layers, model):
            fully_shard(part)
        loss = model(ids, attention_mask=mask, **labels).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    grads = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    assert_same({"loss": loss.detach(), **grads}, {name: wanted[name] for name in ("loss", *grads)})
    if kind == "fsdp":
        with pytest.raises(TypeError, match=r"FSDPModernBertEncoderLayer .*sharding.* before"):
            unpack_in_place(model)


# What is refused


def test_arguments_that_are_refused() -> None:
    model = pack_in_place(bare())
    ids, mask = BATCHES["right"]
    ignored = {"token_type_ids": ids, "num_items_in_batch": 3, "batch_size": 5, "labels": None, "use_cache": False}
    assert torch.equal(model(ids, mask, output_attentions=False, **ignored)[0], model(ids, mask)[0])
    for name, value in (
        ("output_attentions", True),
        ("is_causal", True),
        ("past_key_values", [1]),
        ("sliding_window_mask", mask),
        ("output_hidden_states", [1]),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}.*unpack_in_place"):
            model(ids, mask, **{name: value})
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match=r"^output_attentions.*unpack_in_place"):
        model(ids, mask)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(5, 1, 68, 68), "3-D or 4-D"),
        (torch.ones(5, 60), "attention_mask has shape"),
        (torch.full((5, 68), 0.5), "pass 1 at tokens"),
        (torch.zeros(5, 68), "additive"),
        (torch.arange(68).expand(5, 68) % 2, "holes"),
        ({"full_attention": None, "sliding_attention": None}, "attention_mask must be a tensor"),
    ],
)
def test_masks_that_are_refused(mask: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        pack_in_place(bare())(BATCHES["right"][0], mask)


def test_models_that_are_refused() -> None:
    with pytest.raises(TypeError, match="Linear has no ModernBertModel"):
        pack_in_place(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="ModernBertConfig"):
        pack_in_place(ModernBertConfig())  # pyright: ignore[reportArgumentType]
    decoder = transformers.ModernBertDecoderConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    with pytest.raises(TypeError, match="ModernBertDecoderForCausalLM has no ModernBertModel"):
        pack_in_place(transformers.ModernBertDecoderForCausalLM(decoder))
    for refused in (pack_in_place, unpack_in_place):
        with pytest.raises(TypeError, match="no ModernBertModel"):
            refused(nn.Sequential())


def of_another_class(model: Any) -> None:
    class Own(ModernBertModel):
        pass

    model.model.__class__ = Own


def with_another_forward(model: Any) -> None:
    model.model.layers[1].mlp.forward = lambda x: x


def with_another_attention(model: Any) -> None:
    class Own(modeling_modernbert.ModernBertAttention):
        pass

    model.model.layers[0].attn = Own(model.config, 0)


def with_another_activation(model: Any) -> None:
    model.config.hidden_activation = "relu"


def with_longer_rotary_angles(model: Any) -> None:
    model.config.rope_parameters["full_attention"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_another_class, "^model: Own is a class of its own"),
        (with_another_forward, "^model: ModernBertMLP has another forward"),
        (with_another_attention, "^model: Own is a class of its own"),
        (with_another_activation, "hidden_activation is 'relu'"),
        (with_longer_rotary_angles, "only plain RoPE"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_changed_model_is_refused_and_stays_as_it_is(change: Callable[[Any], None], words: str) -> None:
    model = model_of("ModernBertForMaskedLM")
    change(model)
    types = [type(module) for module in model.modules()]
    with pytest.raises((TypeError, ValueError), match=words):
        pack_in_place(model)
    assert [type(module) for module in model.modules()] == types


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("packed_first", [False, True])
def test_quantised_layers_are_refused(packed_first: bool) -> None:
    model = bare()
    if packed_first:
        pack_in_place(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(TypeError, match="the model has a quantised"):
        quantised(*BATCHES["right"]) if packed_first else pack_in_place(quantised)
    if packed_first:
        assert unpack_in_place(quantised)(*BATCHES["right"])[0].isfinite().all()


def test_recording_is_refused() -> None:
    model = pack_in_place(bare())
    with pytest.raises(ValueError, match=r"recorded.*unpack_in_place"):
        torch.export.export(model, BATCHES["full"])
