import json
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from folders import tree

from modernbert.config import EncoderConfig
from modernbert.encoder import Encoder
from modernbert.heads.classifier import SequenceClassifier
from modernbert.heads.embedder import Embedder
from modernbert.heads.masked_lm import MaskedLM
from modernbert.heads.multiple_choice import MultipleChoice
from modernbert.heads.question_answering import QuestionAnswering
from modernbert.heads.token_classifier import TokenClassifier
from modernbert.recipes import finetune
from modernbert.recipes.finetune import TASKS, Config, main, points, with_published
from modernbert.train.claim import RUN
from modernbert.train.labelled import Texts, Words
from modernbert.train.options import parse
from modernbert.train.vocabulary import train_cased_tokenizer

GOOD, BAD = ("fine", "lovely", "great"), ("poor", "awful", "dull")
HEADERS = {"RTE": "index\tsentence1\tsentence2\tlabel", "STS-B": "index\tsentence1\tsentence2\tscore"}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint of the recipe `mlm`, as far as its files go."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = train_cased_tokenizer(
        [f"a {word} film in Paris by Ada London" for word in GOOD + BAD] * 9, vocab_size=300
    )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    MaskedLM(Encoder(EncoderConfig(vocab_size=300, classifier_pooling="mean", **shape, **ids))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentence(draw):
    label = draw.randrange(2)
    return f"a {draw.choice((BAD, GOOD)[label])} film {draw.randrange(9)}", label


def rows(task, seed, count):
    draw = random.Random(seed)
    if task == "words":
        places = [draw.choice(("Paris", "London")) for _ in range(count)]
        return "".join(f"by\tO\nAda\tB-person\nin\tO\n{place}\tB-place\n\n" for place in places)
    made = [sentence(draw) for _ in range(count)]
    if task == "texts":
        return "".join(json.dumps({"text": text, "label": ("bad", "good")[label]}) + "\n" for text, label in made)
    if task == "CoLA":
        return "".join(f"x\t{label}\t\t{text}\n" for text, label in made)
    values = (
        [float(label) for _, label in made]
        if task == "STS-B"
        else [("entailment", "not_entailment")[x] for _, x in made]
    )
    lines = (f"{i}\t{text}\ta film\t{value}" for i, ((text, _), value) in enumerate(zip(made, values, strict=True)))
    return "\n".join([HEADERS[task], *lines]) + "\n"


@pytest.fixture
def config(start, tmp_path):
    def made(task, **changes):
        for name, seed, count in (("train", 0, 64), ("dev", 1, 24)):
            (tmp_path / name).with_suffix(".jsonl").write_text(rows(task, seed, count))
        settings = {
            "epochs": 5,
            "batch_size": 16,
            "learning_rate": 5e-3,
            "threads": 1,
            "model": str(start),
            "output": str(tmp_path / "out"),
            "autocast": False,
            "save_minutes": 0.0,
            "labels": ("bad", "good") if task == "texts" else (),
        }
        return Config(
            task=task,
            train=str(tmp_path / "train.jsonl"),
            dev=str(tmp_path / "dev.jsonl"),
            **{**settings, **changes},
        )

    return made


def losses(monkeypatch, kind):
    seen, loss = [], kind.loss
    monkeypatch.setattr(kind, "loss", lambda self, *args: seen.append(loss(self, *args)) or seen[-1])
    return seen


SCORES = {
    "CoLA": {"matthews"},
    "RTE": {"accuracy"},
    "STS-B": {"pearson", "spearman"},
    "texts": {"accuracy"},
    "words": {"entity_f1"},
}


@pytest.mark.parametrize("task", SCORES)
def test_twenty_steps_learn(config, tmp_path, monkeypatch, task):
    kind = Words if task == "words" else Texts
    seen = losses(monkeypatch, kind)
    scores = main(config(task))
    found = [part.loss.item() for part in seen]
    assert len(found) == 20
    assert np.mean(found[-4:]) < 0.6 * np.mean(found[:4])
    assert scores.keys() == {"score", *SCORES[task]}
    assert scores["score"] > 0.9
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == scores
    head = TokenClassifier if task == "words" else SequenceClassifier
    loaded = head.from_pretrained(tmp_path / "out" / "model")
    wanted = {"words": ("O", "B-person", "B-place"), "texts": ("bad", "good"), "STS-B": ("LABEL_0",)}
    assert loaded.labels == wanted.get(task, loaded.labels)
    rows = [json.loads(row) for row in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert sum("valid_score" in row for row in rows) == 5  # after each epoch


@pytest.mark.parametrize("task", ["RTE", "words"])
def test_a_killed_run_resumes_to_bit_equal_weights(config, tmp_path, monkeypatch, task):
    kind = Words if task == "words" else Texts
    main(config(task, output=str(tmp_path / "whole")))
    loss, calls = kind.loss, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(kind, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        main(config(task))
    main(config(task))
    assert len(calls) == 9 + 12  # eight steps were kept
    one, other = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("whole", "out")
    )
    for name, wanted in one.items():
        assert torch.equal(wanted, other[name]), name


def test_the_head_of_a_masked_lm_is_kept(config, start):
    learnt = finetune.read(config("RTE"), config("RTE").train, finetune.Tokenizer.from_pretrained(start), ("a", "b"))
    model = finetune.build(config("RTE"), learnt)
    wanted = MaskedLM.from_pretrained(start).head.dense.weight
    assert torch.equal(model.head.dense.weight, wanted)
    assert model.config.classifier_pooling == "mean"


@pytest.mark.parametrize("kind", [QuestionAnswering, MultipleChoice, Embedder])
def test_a_model_of_any_kind_may_be_the_start(config, start, tmp_path, kind):
    """The first layer of its head is kept, if it has one, and no tensor is left over."""
    masked_lm, tokenizer = MaskedLM.from_pretrained(start), finetune.Tokenizer.from_pretrained(start)
    first = Embedder(masked_lm.model, tokenizer) if kind is Embedder else kind(masked_lm.model)
    first.save_pretrained(tmp_path / "first")
    tokenizer.save_pretrained(tmp_path / "first")
    settings = config("RTE", model=str(tmp_path / "first"))
    learnt = finetune.read(settings, settings.train, tokenizer, ("a", "b"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = finetune.build(settings, learnt)
    old, new = first.base_model.state_dict(), model.model.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)
    if kind is not Embedder:
        assert torch.equal(model.head.dense.weight, first.head.dense.weight)


def test_a_fine_tuned_model_may_be_the_start(config, tmp_path):
    """As the paper starts RTE, MRPC and STS-B from MNLI: a new classifier of another size on the old encoder."""
    main(config("texts", epochs=1))
    (tmp_path / "out").rename(tmp_path / "first")
    scores = main(config("STS-B", model=str(tmp_path / "first" / "model")))
    assert scores["pearson"] > 0.9


def test_the_best_epoch_is_kept(config, tmp_path, monkeypatch):
    found = iter([0.1, 0.9, 0.2, 0.3, 0.4, 0.9])
    monkeypatch.setattr(Texts, "scores", lambda self, model: {"score": next(found)})
    main(config("RTE"))
    best = torch.load(tmp_path / "out" / "best.pt", weights_only=True)
    assert best["step"] == 8
    saved = SequenceClassifier.from_pretrained(tmp_path / "out" / "model").state_dict()
    assert all(torch.equal(best["model"][name], saved[name]) for name in saved)


def test_the_published_settings_are_those_of_the_paper():
    """arXiv 2412.13663, table 6: learning rate, weight decay and epochs of the base model."""
    table = {
        "CoLA": (8e-5, 1e-6, 5),
        "MRPC": (5e-5, 5e-6, 10),
        "RTE": (5e-5, 1e-5, 3),
        "SST-2": (8e-5, 1e-5, 2),
        "STS-B": (8e-5, 5e-6, 10),
    }
    for task, wanted in table.items():
        c = with_published(Config(task=task, train="t", dev="d", model="m", output="o"))
        assert (c.learning_rate, c.weight_decay, c.epochs) == wanted == TASKS[task][:3]
    assert with_published(replace(c, epochs=1)).epochs == 1


def test_the_grid_has_the_points_of_the_paper():
    for task, most in (("RTE", 3), ("CoLA", 10)):
        found = points(Config(task=task, train="t", dev="d", model="m", output="o", grid=True))
        assert len({(c.learning_rate, c.weight_decay, c.epochs) for c in found}) == len({c.output for c in found}) == 48
        assert max(finetune.point_of(c).epochs for c in found) == most
        assert all(c.batch_size == TASKS[task].batch_size and not c.grid for c in found)


def test_the_grid_keeps_the_best_point(config, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "GRID", {"learning_rate": (1e-6, 5e-3), "weight_decay": (1e-6,)})
    monkeypatch.setattr(finetune, "EPOCHS", {"RTE": (2,)})
    scores = main(config("RTE", grid=True))
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == {**scores, "best": "0.005-1e-06-2"}
    assert (tmp_path / "out" / "0.005-1e-06-2" / "model").is_dir()
    assert main(config("RTE", grid=True)) == scores  # a second start finds all of it


def test_the_decay_of_a_weight_does_not_depend_on_the_learning_rate(config, monkeypatch):
    seen = []
    monkeypatch.setattr(finetune, "fit", lambda model, optimizer, *_, **__: seen.append(optimizer) or 1 / 0)
    for rate in (1e-3, 1e-2):
        with pytest.raises(ZeroDivisionError):
            main(config("RTE", learning_rate=rate, output=config("RTE").output + str(rate)))
    assert [o.defaults["lr"] * o.defaults["weight_decay"] for o in seen] == pytest.approx([1e-5, 1e-5])


def test_other_settings_and_other_files_are_refused_in_the_folder_of_a_run(config, tmp_path, start):
    main(config("RTE", epochs=1))
    before = tree(tmp_path / "out")
    for change in ({"epochs": 2}, {"seed": 1}, {"max_length": 9}, {"grid": True}):
        with pytest.raises(ValueError, match=rf"run\.json belongs to another run: .*{next(iter(change))} is"):
            main(config("RTE", **{"epochs": 1, **change}))
    other = config("RTE", epochs=1)
    (tmp_path / "train.jsonl").write_text(rows("RTE", 7, 64))
    with pytest.raises(ValueError, match="hash of train and model is"):
        main(other)
    assert tree(tmp_path / "out") == before


def test_a_folder_of_another_program_is_refused_untouched(config, tmp_path):
    (tmp_path / "out" / "model").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=rf"out holds model, but no {RUN} of a run"):
        main(config("RTE"))
    assert tree(tmp_path / "out") == {}


BAD_ROWS = {
    "CoLA": ("x\t2\t\tfilm\n", r":65: 'label' is '2', but must be one of 0, 1"),
    "RTE": ("64\ta film\t\tentailment\n", ":66: 'sentence2' is empty"),
    "STS-B": ("64\ta film\tb\tnan\n", ":66: 'score' is 'nan', but must be a number"),
    "texts": ('{"text": "a", "label": "ugly"}\n', r':65: "label" must be one of bad, good'),
    "words": ("word\n", ":321: wanted a word and its tag"),
}


@pytest.mark.parametrize("task", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(config, tmp_path, task):
    settings = config(task)
    row, message = BAD_ROWS[task]
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(row)
    with pytest.raises(ValueError, match=rf"train\.jsonl{message}"):
        main(settings)
    assert not (tmp_path / "out").exists()


def test_a_dev_file_with_other_labels_is_refused(config, tmp_path):
    settings = config("words")
    (tmp_path / "dev.jsonl").write_text("Ada\tB-animal\n\n")
    with pytest.raises(ValueError, match=r"dev\.jsonl: the tag 'B-animal' is not one of O, B-person, B-place"):
        main(settings)
    settings = config("texts", labels=())
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    (tmp_path / "dev.jsonl").write_text('{"text": "a", "label": 2}\n')
    with pytest.raises(ValueError, match=r"dev\.jsonl: there are 2 classes, but labels up to 2"):
        main(settings)


def test_an_empty_file_and_an_unknown_task_are_refused(config, tmp_path):
    settings = config("texts")
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"train\.jsonl: .*no rows"):
        main(settings)
    with pytest.raises(ValueError, match="--task is 'MNLI', but must be one of CoLA"):
        main(replace(settings, task="MNLI"))


def test_the_command_line_is_the_config():
    words = ["--task", "RTE", "--train", "t", "--dev", "d", "--model", "m", "--output", "o", "--epochs", "2", "--grid"]
    words += ["--no-autocast", "--labels", "a", "b"]
    wanted = Config(task="RTE", train="t", dev="d", model="m", output="o", epochs=2, grid=True, autocast=False,
                    labels=("a", "b"))  # fmt: skip
    assert parse(Config, None, words) == wanted


def test_tags_that_only_the_dev_file_has_may_be_named(config, tmp_path):
    settings = config("words", labels=("O", "B-person", "B-place", "B-animal"), epochs=1)
    with (tmp_path / "dev.jsonl").open("a") as file:
        file.write("Ada\tB-animal\n\n")
    main(settings)
    assert TokenClassifier.from_pretrained(tmp_path / "out" / "model").labels == settings.labels


def test_a_grid_has_its_output_in_the_home_folder_that_it_was_given(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "train", lambda point, group: {"score": point.learning_rate})
    main(config("RTE", grid=True, output="~/found", epochs=None, learning_rate=None))
    assert json.loads((tmp_path / "found" / "scores.json").read_text())["score"] == 8e-5
    assert not (tmp_path / "~").exists()


def test_texts_may_be_a_folder_of_files_and_changes_in_it_are_noticed(config, tmp_path):
    settings = config("texts", epochs=1)
    folder = tmp_path / "train"
    folder.mkdir()
    content = (tmp_path / "train.jsonl").read_text()
    (folder / "a.jsonl").write_text(content[: content.index("\n", 900) + 1])
    (folder / "b.jsonl").write_text(content[content.index("\n", 900) + 1 :])
    assert main(replace(settings, train=str(folder), output=str(tmp_path / "two"))) == main(settings)
    (folder / "b.jsonl").write_text(content)
    with pytest.raises(ValueError, match="hash of train and model is"):
        main(replace(settings, train=str(folder), output=str(tmp_path / "two")))
