"""The folder of a run: whose it is, what a run leaves alone in it, and what it refuses before it trains."""

import gzip
import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from folders import tree

from modernbert.heads.colbert import ColBERT
from modernbert.recipes import contrastive
from modernbert.recipes.contrastive import Config, main
from modernbert.train.claim import LOCK, RUN
from modernbert.train.teacher import text_key

TINY = Config(
    pairs="",
    output="",
    vocab_size=300,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    dim=8,
    steps=2,
    batch_pairs=8,
    batch_tokens=400,
    threads=1,
    save_minutes=0.0,
)


def lines(count, seed=0):
    draw = random.Random(seed)
    words = ["river", "mountain", "engine", "pressure", "violin", "market", "planet", "protein"]
    rows = ({"query": draw.choice(words), "positive": " ".join(draw.choices(words, k=6))} for _ in range(count))
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.jsonl").write_text(lines(40))
    return replace(TINY, pairs=str(tmp_path / "pairs"), output=str(tmp_path / "out"))


def pickled(content):
    return lambda path: torch.save(content, path)


def text(content):
    return lambda path: path.write_text(content)


FOREIGN = {
    "a checkpoint of Hugging Face": {"config.json": text("{}"), "tokenizer.json": text("{}"), "model/x": text("")},
    "a checkpoint of another trainer": {"checkpoint.pt": pickled({"model": {"w": torch.zeros(1)}, "step": 3})},
    "a file that is named like a checkpoint": {"checkpoint.pt": text("mine")},
    "tokens of another program": {"tokens.npz": text("mine")},
    "a log": {"log.jsonl": text("mine")},
    "a folder of models": {"model/best/weights": text("mine")},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_another_program_is_refused_untouched(config, tmp_path, name):
    for file, write in FOREIGN[name].items():
        (tmp_path / "out" / file).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "out" / file)
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=rf"out holds .*, but no {RUN} of a run"):
        main(config)
    assert tree(tmp_path) == before


def test_files_of_others_survive_a_run(config, tmp_path):
    hidden = {".env": b"1", ".git/config": b"2"}
    later = {"shards/0.tar": b"3", "config.json": b"4", "lock": b"5", "model/README.md": b"6"}
    for others, steps in ((hidden, 2), (later, 3)):
        for file, content in others.items():
            (tmp_path / "out" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "out" / file).write_bytes(content)
        main(replace(config, steps=steps))
    assert (hidden | later).items() <= tree(tmp_path / "out").items()


def test_an_output_that_is_not_a_folder_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to("disk")
    for output, error in (("", ValueError), ("file", NotADirectoryError), ("nowhere", NotADirectoryError)):
        with pytest.raises(error):
            main(replace(config, output=output))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere", "pairs"]


REFUSED = {
    "no pair": ({"a.jsonl": ""}, {}, "no pair of .* is left"),
    "no text": ({"a.jsonl": '{"query": " ", "positive": "\\n"}\n' * 9}, {}, "no pair of .* is left"),
    "one pair": ({"a.jsonl": lines(1)}, {}, "has one pair"),
    "a broken line": ({"a.jsonl": lines(5) + "{oops"}, {}, r"a\.jsonl:6: "),
    "no file of pairs": ({"a.json": lines(5)}, {}, r"no \*\.jsonl"),
    "a result without room": ({}, {"document_length": 1}, "document_length: a length of 1 has no room"),
    "a result without room for queries": ({}, {"query_length": 2}, "query_length: a length of 2 has no room"),
    "a training without room": ({}, {"train_query_length": 1}, "max_length 0 is below"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_on_is_refused_before_anything_but_the_settings_is_written(config, tmp_path, name):
    files, options, words = REFUSED[name]
    if files:
        (tmp_path / "pairs" / "a.jsonl").unlink()
    for file, content in files.items():
        (tmp_path / "pairs" / file).write_text(content)
    with pytest.raises(ValueError, match=words):
        main(replace(config, **options))
    assert set(tree(tmp_path / "out")) == {RUN, LOCK}


def test_pairs_in_gzip_are_those_of_the_plain_file(config, tmp_path):
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped" / "a.jsonl.gz").write_bytes(gzip.compress(lines(40).encode()))
    plain, zipped = main(config), main(replace(config, pairs=str(tmp_path / "zipped"), output=str(tmp_path / "other")))
    for one, other in zip(plain.parameters(), zipped.parameters(), strict=True):
        assert torch.equal(one, other)


def killed(config, monkeypatch, name):
    """Run until the recipe calls `name`."""
    with monkeypatch.context() as patch:
        patch.setattr(contrastive, name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main(config)


@pytest.mark.parametrize("when", ["batch_loss", "topic_vectors", "build"])
def test_a_run_that_was_killed_before_its_first_checkpoint_goes_on(config, tmp_path, monkeypatch, when):
    whole = main(replace(config, output=str(tmp_path / "whole")))
    killed(config, monkeypatch, when)
    for one, other in zip(whole.parameters(), main(config).parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_goes_on_with_the_tokenizer_of_its_tokens(config, tmp_path, monkeypatch):
    """Killed before it had written the tokenizer's files, or with those of another run in their place."""
    whole = main(replace(config, output=str(tmp_path / "whole")))
    killed(config, monkeypatch, "batch_loss")
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.jsonl").write_text('{"query": "completely", "positive": "different words"}\n' * 30)
    main(replace(config, pairs=str(other), output=str(tmp_path / "second"), steps=0))
    (tmp_path / "out" / "tokenizer.json").write_bytes((tmp_path / "second" / "tokenizer.json").read_bytes())
    (tmp_path / "out" / "tokenizer_config.json").unlink()
    for one, other in zip(whole.parameters(), main(config).parameters(), strict=True):
        assert torch.equal(one, other)
    names = ["tokenizer.json", "tokenizer_config.json", "model/tokenizer.json"]
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_pairs_that_change_while_they_are_read_are_noticed(config, tmp_path, monkeypatch):
    choose = contrastive.data.choose_pairs

    def changed(*args, **options):
        pairs = choose(*args, **options)
        (tmp_path / "pairs" / "a.jsonl").write_text(lines(41))
        return pairs

    monkeypatch.setattr(contrastive.data, "choose_pairs", changed)
    with pytest.raises(ValueError, match="changed while they were read"):
        main(config)
    assert set(tree(tmp_path / "out")) == {RUN, LOCK}


@pytest.mark.parametrize("change", ["size", "content", "name", "more"])
def test_pairs_that_changed_between_two_runs_are_refused(config, tmp_path, monkeypatch, change):
    killed(config, monkeypatch, "batch_loss")
    file = tmp_path / "pairs" / "a.jsonl"
    if change == "name":
        file.rename(file.with_name("b.jsonl"))
    else:
        more, other = file.with_name("b.jsonl"), file.read_text().replace("river", "brook")
        where, content = {"size": (file, lines(41)), "content": (file, other), "more": (more, lines(1))}[change]
        where.write_text(content)
    with pytest.raises(ValueError, match=r"tokens\.npz belongs to another run: hash of pairs"):
        main(config)


def test_a_time_that_changed_is_the_same_run(config, tmp_path, monkeypatch):
    killed(config, monkeypatch, "batch_loss")
    (tmp_path / "pairs" / "a.jsonl").touch()
    main(config)


@pytest.mark.parametrize("change", [{"seed": 1}, {"dim": 4}, {"learning_rate": 1.0}, {"batch_pairs": 4}])
def test_other_options_are_refused_after_a_checkpoint(config, tmp_path, change):
    main(config)
    before = tree(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"run\.json belongs to another run: {next(iter(change))} is"):
        main(replace(config, **change))
    assert tree(tmp_path / "out") == before


def test_a_run_that_fails_keeps_the_last_result(config, tmp_path, monkeypatch):
    """A weight that becomes NaN in the last step, and a result that float16 cannot hold."""
    main(config)
    model = tree(tmp_path / "out" / "model")
    half = ColBERT.half

    def broken(self):
        half(self).dense[0].linear.weight.data[0, 0] = float("nan")
        return self

    monkeypatch.setattr(ColBERT, "half", broken)
    with pytest.raises(FloatingPointError, match="the result in float16"):
        main(replace(config, steps=3))
    assert tree(tmp_path / "out" / "model") == model


def test_as_a_program_it_ends_with_a_sentence_and_status_1(config, tmp_path):
    words = [word for name in ("pairs", "output") for word in (f"--{name}", getattr(config, name))]
    (tmp_path / "pairs" / "a.jsonl").write_text("{oops\n")
    command = [sys.executable, "-m", "modernbert.recipes.contrastive", *words]
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=here, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/pairs/a.jsonl:1: Expecting property name")
    assert len(done.stderr.splitlines()) == 1


UNREAD = {
    "negatives": ["x"],
    "negative": "x",
    "hard_negatives": [],
    "negative_1": "x",
    "neg": ["x"],
    "hardNegatives": ["x"],
    "scores": [0.1],
    "teacher_score": 0.3,
    "label": 0,
    "weight": 2.0,
    "positives": ["x"],
    "instruction": "find",
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_field_that_other_trainers_learn_from_is_refused(config, tmp_path, name):
    row = json.dumps({"query": "a b", "positive": "c d", name: UNREAD[name]})
    (tmp_path / "pairs" / "a.jsonl").write_text(lines(3) + row + "\n")
    with pytest.raises(ValueError, match=rf'a\.jsonl:4: "{name}" would be ignored.*remove the field'):
        main(config)
    assert set(tree(tmp_path / "out")) == {RUN, LOCK}


def test_a_field_that_only_describes_a_pair_is_not_read(config, tmp_path):
    rows = [json.loads(line) | {"name": "x", "id": 3, "title": "t", "position": 1, "url": None} for line in
            lines(40).splitlines()]  # fmt: skip
    wanted = main(config)
    (tmp_path / "pairs" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = main(replace(config, output=str(tmp_path / "other")))
    for one, other in zip(wanted.parameters(), got.parameters(), strict=True):
        assert torch.equal(one, other)


WRONG_VALUES = {
    "steps": (-1, 1.5, True),
    "batch_pairs": (0, 1, -8),
    "batch_tokens": (0,),
    "accumulate": (0, -1),
    "learning_rate": (float("nan"), float("inf"), 0.0, -1.0, "1e-3"),
    "embedding_learning_rate": (float("nan"), -1.0),
    "temperature": (0.0, float("nan")),
    "teacher_temperature": (0.0,),
    "teacher_weight": (-0.1, 1.1, float("nan")),
    "warmup": (-0.1, float("nan")),
    "decay": (1.5, float("nan")),
    "rope_theta": (0.0,),
    "vocab_size": (0,),
    "dim": (0,),
    "query_length": (-3,),
    "train_document_length": (0,),
    "hidden_size": (0,),
    "num_hidden_layers": (0,),
    "teacher_pairs": (-1,),
    "seed": (-1,),
    "threads": (0,),
    "save_minutes": (float("nan"), -1.0),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_value_out_of_range_is_refused_before_anything_is_read(config, tmp_path, name):
    for value in WRONG_VALUES[name]:
        with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')} is {value!r}, but must be"):
            main(replace(config, pairs="nowhere", **{name: value}))
    assert not (tmp_path / "out").exists()


def test_options_about_a_teacher_want_a_teacher(config):
    for change in ({"teacher_model": "x"}, {"teacher_pairs": 3}):
        with pytest.raises(ValueError, match="--teacher, which is not given"):
            main(replace(config, **change))


def test_a_teacher_or_a_corpus_with_other_content_is_refused(config, tmp_path, monkeypatch):
    """The first run was killed before its first checkpoint."""
    np.save(tmp_path / "keys.npy", np.array([text_key("river")], np.uint64))
    np.save(tmp_path / "vectors.npy", np.ones((1, 4), np.float16))
    corpus = tmp_path / "corpus.jsonl.gz"
    corpus.write_bytes(gzip.compress(b'{"text": "one two three four five six seven eight"}\n', mtime=0))
    config = replace(config, teacher=str(tmp_path), decontaminate_against=(str(tmp_path),))
    killed(config, monkeypatch, "batch_loss")
    np.save(tmp_path / "vectors.npy", np.full((1, 4), 2, np.float16))
    with pytest.raises(ValueError, match=r"tokens\.npz belongs to another run: hash of pairs and teacher is"):
        main(config)
    np.save(tmp_path / "vectors.npy", np.ones((1, 4), np.float16))
    corpus.write_bytes(gzip.compress(b'{"text": "another corpus"}\n', mtime=0))
    with pytest.raises(ValueError, match=r"tokens\.npz belongs to another run: hash of corpora is"):
        main(config)


def test_fewer_steps_than_a_checkpoint_has_are_refused(config):
    main(config)
    with pytest.raises(ValueError, match="has a checkpoint of step 2: ask for as many steps or more"):
        main(replace(config, steps=1))


def test_a_run_that_was_refused_may_be_begun_again_with_other_settings(config, tmp_path):
    with pytest.raises(ValueError, match="max_length 0 is below"):
        main(replace(config, train_query_length=1))
    main(config)
    assert json.loads((tmp_path / "out" / RUN).read_text())["train_query_length"] == config.train_query_length
