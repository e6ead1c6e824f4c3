"""MaskedLM, SequenceClassifier and TokenClassifier are transformers' heads: values, losses, gradients, folders.

QuestionAnswering and MultipleChoice take other labels, so that their numbers have files of their own.
"""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accuracy import assert_accurate
from folders import check_refused, tree
from head_twin import CONFIGS, HEADS, SMALL, head_twins, some_labels, written
from hf_twin import exact_rotary, pad, random_ids
from torch import Tensor, nn
from transformers.models.modernbert import modeling_modernbert

from modernbert import Encoder, MaskedLM, Session, pack
from modernbert.outputs import HeadOutput
from modernbert_kernels import backend

TEXTS = random_ids([1, 2, 40, 17, 66], 100)
IDS, MASK = pad(TEXTS)
REAL = MASK.bool()
TASKS = ["MaskedLM", "SequenceClassification", "TokenClassification"]


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=HEADS)
def any_task(request: pytest.FixtureRequest) -> str:
    return request.param


def result(model: nn.Module, task: str) -> Tensor:
    """Of the padded texts, each a question with one choice."""
    if task == "MultipleChoice":
        return model(input_ids=IDS[:, None], attention_mask=MASK[:, None]).logits
    output = model(input_ids=IDS, attention_mask=MASK)
    return torch.stack([output.start_logits, output.end_logits]) if task == "QuestionAnswering" else output.logits


def classes(task: str) -> int:
    return SMALL.vocab_size if task == "MaskedLM" else 3


def per_token(task: str) -> bool:
    return task != "SequenceClassification"


def packed_labels(task: str) -> Tensor:
    labels = some_labels(task, MASK, classes(task))
    return labels[REAL] if per_token(task) else labels


def gradients(model: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """The loss, the logits if there are any, and the gradient of every parameter."""
    output = run()
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(output.loss, parameters)
    logits = {} if output.logits is None else {"logits": output.logits.detach()}
    return {"loss": output.loss.detach(), **logits, **dict(zip(names, grads, strict=True))}


def their_output(theirs: nn.Module, task: str, labels: Tensor) -> HeadOutput:
    """With the loss in the dtype of the logits: transformers gives that of masked tokens in float32."""
    if task == "MaskedLM":
        logits = theirs(IDS, attention_mask=MASK).logits
        return HeadOutput(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)
    output = theirs(IDS, attention_mask=MASK, labels=labels)
    return HeadOutput(output.loss, output.logits)


# Numbers


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(task: str, name: str) -> None:
    """Packed, padded on either side, and alone."""
    theirs, ours = head_twins(task, CONFIGS[name])
    left = pad(TEXTS, "left", extra=2)
    with torch.inference_mode():
        wanted = theirs(IDS, attention_mask=MASK).logits
        got = {"padded": ours(IDS, MASK).logits, "by name": ours(input_ids=IDS, attention_mask=MASK)["logits"]}
        if per_token(task):
            wanted = wanted[REAL]
            got = {way: logits[REAL] for way, logits in got.items()}
            assert ours(IDS, MASK).logits[~REAL].eq(0).all()
            got["left"] = ours(*left).logits[left[1].bool()]
        else:
            got["left"] = ours(*left).logits
        got["packed"] = ours(pack(TEXTS))
        got["alone"] = torch.cat([ours(pack([text])) for text in TEXTS])
        with backend("reference"):
            got["reference"] = ours(pack(TEXTS))
    assert wanted.std() > 0.3, "the weights are so quiet that the test says nothing"
    for way, logits in got.items():
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4, msg=lambda text, way=way: f"{way}: {text}")


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients(task: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal in float64; in float32 no worse than twice transformers' own float32. Every way in."""
    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", exact_rotary)
    theirs, ours = head_twins(task, CONFIGS[name])
    labels, packed = some_labels(task, MASK, classes(task)), packed_labels(task)
    runs: dict[str, Callable[[], HeadOutput]] = {
        "padded": lambda: ours(IDS, MASK, labels=labels),
        "packed": lambda: ours(pack(TEXTS), labels=packed),
    }
    if per_token(task):
        rows = (packed >= 0).nonzero().squeeze(1)
        runs["rows"] = lambda: ours(pack(TEXTS), rows=rows, labels=packed[rows])
    wanted = theirs(IDS, attention_mask=MASK, labels=labels).loss
    torch.testing.assert_close(ours(IDS, MASK, labels=labels).loss, wanted, rtol=1e-5, atol=0)
    plain = gradients(theirs, lambda: their_output(theirs, task, labels))
    singles = {way: gradients(ours, run) for way, run in runs.items()}
    ours.gradient_checkpointing_enable()
    singles["checkpointed"] = gradients(ours, runs["packed"])
    ours.gradient_checkpointing_disable()
    theirs.double(), ours.double()
    truth = gradients(theirs, lambda: their_output(theirs, task, labels))
    doubles = {way: gradients(ours, run) for way, run in runs.items()}
    if per_token(task):
        for found in (plain, truth):
            found["logits"] = found["logits"][REAL]
        for found in (singles["padded"], doubles["padded"]):
            found["logits"] = found["logits"][REAL]
        for found in (singles, doubles):
            found["rows"].pop("logits", None)
    assert set(truth) - {"logits", "loss"} == dict(ours.named_parameters()).keys()
    for key, value in truth.items():
        assert value.abs().max() > 1e-6, f"{key} is zero"
        for way, found in doubles.items():
            if key in found:
                assert (found[key] - value).abs().max() <= 1e-11 * max(1, value.abs().max()), f"{way} {key}"
        for way, found in singles.items():
            if key in found:
                assert_accurate(found[key], plain[key], value, f"{way} {key}")


def test_no_result_depends_on_the_batch(task: str) -> None:
    """A text's logits, and its loss and gradients alone, are those that it adds to a batch."""
    _, ours = head_twins(task)
    ours.double()
    labels = packed_labels(task)
    lengths = [len(text) for text in TEXTS]
    parts = labels.split(lengths) if per_token(task) else labels.split(1)
    whole = gradients(ours, lambda: ours(pack(TEXTS), labels=labels))
    count = int((labels >= 0).sum())
    total: dict[str, Tensor] = {}
    for text, part in zip(TEXTS, parts, strict=True):
        own = int((part >= 0).sum())
        if not own:
            continue
        for key, value in gradients(ours, lambda text=text, part=part: ours(pack([text]), labels=part)).items():
            if key != "logits":
                total[key] = total.get(key, 0) + value * own / count
    for key, value in total.items():
        torch.testing.assert_close(value, whole[key], rtol=1e-9, atol=1e-12)


def test_only_the_rows_that_are_read_leave_the_last_layer(task: str) -> None:
    _, ours = head_twins(task)
    seen: list[int] = []
    ours.model.layers[-1].mlp.Wi.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    labels = packed_labels(task)
    if per_token(task):
        rows = (labels >= 0).nonzero().squeeze(1)
        ours(pack(TEXTS), rows=rows)
        ours(pack(TEXTS), rows=rows, labels=labels[rows])
        wanted = [len(rows)] * 2
        if task == "MaskedLM":
            ours(pack(TEXTS), labels=labels)
            wanted.append(len(rows))
    else:
        ours(pack(TEXTS))
        wanted = [len(TEXTS)]
    assert seen == wanted


def test_an_empty_batch_and_empty_texts(task: str) -> None:
    """A rank without data takes part in a step; a text without a token has zeros, and does not move the others."""
    _, ours = head_twins(task)
    for batch in (pack([]), pack([[], []])):
        rows = len(batch) if not per_token(task) else 0
        labels = torch.full((rows,), -100)
        output = ours(batch, labels=labels)
        assert output.loss == 0
        output.loss.backward()
        assert ours(batch).shape == (rows, classes(task))
    with torch.inference_mode():
        wanted, got = ours(pack(TEXTS)), ours(pack([[], *TEXTS[:2], [], *TEXTS[2:], []]))
        got = got if per_token(task) else got[[1, 2, 4, 5, 6]]
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(task: str, dtype: torch.dtype) -> None:
    _, ours = head_twins(task)
    loss = ours.to(dtype)(IDS, MASK, labels=some_labels(task, MASK, classes(task))).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


# Labels and arguments


def test_wrong_labels_are_named(task: str) -> None:
    _, ours = head_twins(task)
    labels = some_labels(task, MASK, classes(task))
    wrong = labels.clone()
    wrong.view(-1)[(labels.view(-1) >= 0).nonzero()[0]] = classes(task)
    with pytest.raises(ValueError, match=rf"is {classes(task)}, but there are {classes(task)} classes"):
        ours(IDS, MASK, labels=wrong)
    for bad in (labels[:-1], labels.bool() if task != "SequenceClassification" else labels[:, None, None]):
        with pytest.raises(ValueError, match="labels must be"):
            ours(IDS, MASK, labels=bad)
    if per_token(task):
        with pytest.raises(ValueError, match="labels must be integers of shape"):
            ours(pack(TEXTS), labels=packed_labels(task)[1:])
        with pytest.raises(ValueError, match="rows count the tokens of a Packed"):
            ours(IDS, MASK, rows=torch.tensor([0]))


def test_arguments_that_contradict(task: str) -> None:
    _, ours = head_twins(task)
    with pytest.raises(ValueError, match="a Packed carries its own"):
        ours(pack(TEXTS), MASK)
    with pytest.raises(ValueError, match="input_ids is another name of batch"):
        ours(IDS, input_ids=IDS)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        ours()
    with pytest.raises(ValueError, match=r"token id \d+ is out of range"):
        ours(IDS + 100 * REAL)


# Folders


@pytest.mark.parametrize("name", CONFIGS)
def test_each_loads_what_the_other_saved(any_task: str, name: str, tmp_path: Path) -> None:
    theirs, ours = head_twins(any_task, CONFIGS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = HEADS[any_task].from_pretrained(tmp_path / "theirs")
    assert not loaded.training
    assert loaded.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in theirs.state_dict().items())
    loaded.save_pretrained(tmp_path / "ours")
    kind = getattr(transformers, f"ModernBertFor{any_task}")
    again, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in theirs.state_dict().items())
    assert again.config.architectures == [f"ModernBertFor{any_task}"]
    if any_task in TASKS[1:]:
        assert again.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    # MKL multiplies by one column in an order that depends on where the numbers are in memory.
    atol = 1e-6 if any_task == "MultipleChoice" else 0
    with torch.inference_mode():
        torch.testing.assert_close(result(loaded, any_task), result(ours, any_task), rtol=0, atol=atol)
        got, wanted = result(again.eval(), any_task), result(theirs, any_task)
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def test_a_round_trip_changes_no_byte(any_task: str, tmp_path: Path) -> None:
    _, ours = head_twins(any_task)
    ours.save_pretrained(tmp_path / "one")
    HEADS[any_task].from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize(("mine", "other"), [(mine, other) for mine in HEADS for other in HEADS if mine != other])
def test_a_folder_of_another_head_is_refused_by_name(mine: str, other: str, tmp_path: Path) -> None:
    head_twins(other)[1].save_pretrained(tmp_path)
    kind, name = HEADS[mine], HEADS[other].__name__
    todo = rf"load it with {name}\.from_pretrained, or put a new head on its encoder with {kind.__name__}\(encoder"
    with pytest.raises(ValueError, match=rf"holds an? {name}, not a {kind.__name__}: {todo}"):
        kind.from_pretrained(tmp_path)


def test_a_folder_of_a_head_that_no_class_reads_is_refused(any_task: str, tmp_path: Path) -> None:
    config = json.dumps(written(SMALL) | {"architectures": ["ModernBertForSpans"]})
    (tmp_path / "config.json").write_text(config)
    kind = HEADS[any_task]
    words = rf"holds a ModernBertForSpans, not a {kind.__name__}: put a new head on its encoder.*{kind.__name__}\("
    with pytest.raises(ValueError, match=words):
        kind.from_pretrained(tmp_path)


def test_an_encoder_without_a_head_is_refused_with_the_way(any_task: str, tmp_path: Path) -> None:
    head_twins(any_task)[1].model.save_pretrained(tmp_path)
    mine = HEADS[any_task].__name__
    with pytest.raises(ValueError, match=rf"holds an Encoder, not a {mine}: put a new head on its encoder.*{mine}\("):
        HEADS[any_task].from_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path).train()
    head = HEADS[any_task](encoder)
    assert head.model is encoder
    assert all(module.training for module in head.modules())
    head.eval().save_pretrained(tmp_path)
    HEADS[any_task].from_pretrained(tmp_path)


def test_a_folder_without_a_name_of_its_head_is_read_strictly(any_task: str, tmp_path: Path) -> None:
    head_twins(any_task)[1].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    HEADS[any_task].from_pretrained(tmp_path)
    other = next(kind for name, kind in HEADS.items() if name != any_task)
    if {any_task, other} != {"SequenceClassification", "TokenClassification"}:
        with pytest.raises(ValueError, match=rf"(?s)do not fit this {other.__name__}.*missing.*unexpected"):
            other.from_pretrained(tmp_path)


def test_what_would_not_load_is_refused(any_task: str, tmp_path: Path) -> None:
    _, model = head_twins(any_task)
    model.save_pretrained(tmp_path / "model")
    model.head.dense = nn.Sequential(model.head.dense)
    check_refused(model, tmp_path / "model", "head.dense")
    _, model = head_twins(any_task)
    with torch.no_grad():
        model.head.norm.weight[0] = torch.nan
    check_refused(model, tmp_path / "model", r"head\.norm\.weight has NaN")


def test_the_encoder_of_a_head_is_left_with_a_warning(any_task: str, tmp_path: Path) -> None:
    _, model = head_twins(any_task)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"tensors of a head are left out.*head\.dense\.weight"):
        encoder = Encoder.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(encoder(pack(TEXTS)), model.model(pack(TEXTS)))


# New heads


def test_a_new_head_is_drawn_as_in_transformers(any_task: str) -> None:
    """The same standard deviations, measured on wide layers, and the same numbers whatever the default device is."""
    config = replace(SMALL, hidden_size=256, vocab_size=2000, num_attention_heads=4, tie_word_embeddings=False)
    theirs, ours = head_twins(any_task, config)
    for module in theirs.modules():
        module._is_hf_initialized = False
    for parameter in theirs.parameters():
        parameter._is_hf_initialized = False
    theirs.init_weights()
    torch.manual_seed(0)
    ours = HEADS[any_task](Encoder(ours.config))
    for name, parameter in theirs.named_parameters():
        if name.startswith("model.") or parameter.dim() == 1:
            continue
        assert abs(dict(ours.named_parameters())[name].std() / parameter.std() - 1) < 0.15, name
    assert all(p.eq(0).all() for name, p in ours.named_parameters() if name in ("decoder.bias", "classifier.bias"))
    encoder = Encoder(ours.config)
    torch.manual_seed(1)
    wanted = HEADS[any_task](copy.deepcopy(encoder)).state_dict()
    torch.manual_seed(1)
    with torch.device("meta"):
        got = HEADS[any_task](encoder).state_dict()
    assert all(torch.equal(tensor, got[name]) for name, tensor in wanted.items())


def test_a_warm_start_from_a_masked_lm(any_task: str) -> None:
    _, mlm = head_twins("MaskedLM")
    assert isinstance(mlm, MaskedLM)
    made = HEADS[any_task](mlm.model, head=mlm.head)
    assert made.head is mlm.head
    assert made.model is mlm.model


# Use


def test_copies_are_equal_and_apart(any_task: str) -> None:
    _, ours = head_twins(any_task)
    with torch.inference_mode():
        wanted = ours(pack(TEXTS)).clone()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with torch.inference_mode():
            assert torch.equal(twin(pack(TEXTS)), wanted)
        assert twin.state_dict().keys() == ours.state_dict().keys()
        with torch.no_grad():
            twin.head.norm.weight += 1
    with torch.inference_mode():
        assert torch.equal(ours(pack(TEXTS)), wanted)


def test_a_session(any_task: str) -> None:
    _, ours = head_twins(any_task)
    session = Session(ours)
    with torch.inference_mode():
        for texts in (TEXTS, TEXTS[:1], random_ids([500] * 9, 100)):
            torch.testing.assert_close(session(pack(texts)), ours(pack(texts)), rtol=0, atol=1e-4)
    with pytest.raises(TypeError, match=rf"a Session of {type(ours).__name__} encodes no texts"):
        session.encode_queries(["one"])


@pytest.mark.parametrize(
    ("name", "pooling"),
    [*((name, "cls") for name in HEADS), ("SequenceClassification", "mean"), ("MultipleChoice", "mean")],
)
def test_compiled(name: str, pooling: str) -> None:
    """The packed entrance in one graph, for batches of any lengths; with labels too, and padded."""
    _, ours = head_twins(name, replace(SMALL, num_hidden_layers=1, classifier_pooling=pooling))
    compiled = torch.compile(ours, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for texts in (TEXTS, random_ids([30, 2, 8], 100)):
            torch.testing.assert_close(compiled(pack(texts)), ours(pack(texts)), rtol=0, atol=1e-5)
    if name != "MaskedLM":
        return
    losses = torch.compile(ours, backend="eager")
    labels = packed_labels(name)
    wanted, got = ours(pack(TEXTS), labels=labels).loss, losses(pack(TEXTS), labels=labels).loss
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses(IDS, MASK).logits, ours(IDS, MASK).logits, rtol=0, atol=1e-4)


def packed_loss(model: nn.Module, task: str) -> Tensor:
    if task == "QuestionAnswering":
        ends = torch.tensor([len(text) - 1 for text in TEXTS])
        return model(pack(TEXTS), start_positions=ends // 2, end_positions=ends).loss
    if task == "MultipleChoice":
        return model(pack(TEXTS[1:]), labels=torch.tensor([1, 0])).loss
    return model(pack(TEXTS), labels=packed_labels(task)).loss


def test_lora_of_peft(any_task: str) -> None:
    peft = pytest.importorskip("peft")
    _, ours = head_twins(any_task)
    last = "decoder" if any_task == "MaskedLM" else "classifier"
    config = peft.LoraConfig(target_modules=["Wqkv", "Wo", "dense"], modules_to_save=[last])
    model = peft.get_peft_model(copy.deepcopy(ours), config)
    before = packed_loss(model, any_task)
    torch.testing.assert_close(before, packed_loss(ours, any_task), rtol=1e-5, atol=1e-6)
    before.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert any("lora_B" in name and "Wqkv" in name for name in trained)
    assert any(last in name for name in trained)
    assert not any("layers.0.mlp.Wi" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    wanted = packed_loss(model, any_task)
    torch.testing.assert_close(packed_loss(model.merge_and_unload(), any_task), wanted, rtol=1e-4, atol=0)


class Rows(torch.utils.data.Dataset):
    """What a tokenizer and a data set of transformers give, a row a text, all of one length."""

    def __init__(self, task: str) -> None:
        ids = torch.tensor(random_ids([12] * 8, 100))
        mask = torch.ones_like(ids)
        self.rows = {"input_ids": ids, "attention_mask": mask}
        if task == "QuestionAnswering":
            self.rows |= {"start_positions": torch.arange(8), "end_positions": torch.arange(8) + 4}
        elif task == "MultipleChoice":
            ids = torch.tensor(random_ids([12] * 16, 100)).view(8, 2, 12)
            self.rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(8) % 2}
        else:
            self.rows["labels"] = some_labels(task, mask, classes(task))

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: rows[index] for name, rows in self.rows.items()}


def test_trainer_of_transformers(any_task: str, tmp_path: Path) -> None:
    """Its losses are those of transformers' model, with accumulation, evaluation and a checkpoint to resume from."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    theirs, ours = head_twins(any_task)
    losses = {}
    for name, model in {"theirs": theirs, "ours": ours}.items():
        arguments = TrainingArguments(
            str(tmp_path / name), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-3, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, save_steps=2,
            eval_strategy="steps", eval_steps=3, seed=1, max_grad_norm=1.0,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows(any_task), eval_dataset=Rows(any_task))
        trainer.train()
        history = trainer.state.log_history
        losses[name] = [row["loss"] for row in history if "loss" in row] + [
            row["eval_loss"] for row in history if "eval_loss" in row
        ]
    assert len(losses["ours"]) == 4
    if any_task == "MaskedLM":
        assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-2)
    else:
        # transformers' classifiers promise the loss over all steps of accumulation, but give that of each. Where there
        # are no `labels`, its Trainer divides.
        twice = 1 if any_task == "QuestionAnswering" else 2
        assert twice * losses["ours"][0] == pytest.approx(losses["theirs"][0], rel=0.1)
        assert losses["ours"][-1] == pytest.approx(losses["theirs"][-1], rel=0.1)
    resumed = Trainer(
        model=head_twins(any_task)[1], args=arguments, train_dataset=Rows(any_task), eval_dataset=Rows(any_task)
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    for got, wanted in zip(resumed.model.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
