"""What a user may give by mistake: files, options, devices, optimizers. Each is one sentence, or works as it should."""

import copy
import errno
import gzip
import json
import math
import os
import signal
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from worker_runs import TinyRun

from modernbert.train import checkpoints
from modernbert.train.averaging import EMA
from modernbert.train.claim import RUN, claim_folder
from modernbert.train.corpus import MANIFEST, Shards, lengths_file
from modernbert.train.distributed import ranks
from modernbert.train.examples import Labelled, read_labelled, read_pairs, read_texts
from modernbert.train.glue import read_glue
from modernbert.train.labelled import Texts
from modernbert.train.log import append
from modernbert.train.loop import BatchLoss
from modernbert.train.optim import load_moments
from modernbert.train.options import option, parse
from modernbert.train.passages import write_passages
from modernbert.train.reading import digest, files, versions
from modernbert.train.shards import write_shards
from modernbert.train.stages import STAGES
from modernbert.train.validation import Validation
from modernbert.train.vocabulary import train_tokenizer

PAIR = '{"query": "a", "positive": "b"}\n'


def assert_equal(one, other):
    for (name, wanted), got in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(wanted, got), name


# Files


TWICE = {
    "a key": '{"query": "a", "query": "c", "positive": "b"}',
    "another": '{"query": "a", "positive": "b", "positive": "b"}',
    "a key inside": '{"query": "a", "positive": "b", "about": [{"x": 1, "x": 2}]}',
}


@pytest.mark.parametrize("name", TWICE)
def test_a_key_that_is_there_twice_is_refused_with_its_line(tmp_path, name):
    file = tmp_path / "a.jsonl"
    file.write_text(PAIR + TWICE[name] + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: '(query|positive|x)' is there twice"):
        list(read_pairs(file))


def test_an_empty_path_is_not_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    assert list(read_texts(".")) == ["a"]
    for read in (files, versions, lambda source: list(read_texts(source))):
        with pytest.raises(ValueError, match="the source is the empty string"):
            read("")


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    file = tmp_path / "train.tsv"
    file.write_text("sentence1\tsentence1\tsentence2\tlabel\na\tb\tc\tentailment\n")
    with pytest.raises(ValueError, match=r"train\.tsv:1: a column is there twice, got sentence1, sentence1"):
        list(read_glue(file, "RTE"))


@pytest.mark.parametrize("place", [10, -6])
def test_gzip_with_a_wrong_byte_is_damaged(tmp_path, place):
    """In the head of the first block, and in the sum of the content at the end."""
    content = bytearray(gzip.compress(b'{"text": "a river"}\n' * 50))
    content[place] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is damaged"):
        list(read_texts(tmp_path / "a.jsonl.gz"))


def test_a_folder_of_save_to_disk_is_a_source_of_shards(tmp_path):
    datasets = pytest.importorskip("datasets")
    source = tmp_path / "source"
    datasets.Dataset.from_dict({"text": ["the river runs", "to the sea"]}).save_to_disk(str(source))
    tokenizer = train_tokenizer(iter(read_texts(source)), vocab_size=300)
    assert len(write_shards(source, tokenizer, tmp_path / "out")) == 2
    assert len(write_shards(source, tokenizer, tmp_path / "out")) == 2
    assert digest(files(source)) != digest(files(source)[1:])
    datasets.Dataset.from_dict({"text": ["another river", "to the sea"]}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="out has other shards: source is"):
        write_shards(tmp_path / "other", tokenizer, tmp_path / "out")


EDITS = {
    "no front": lambda about: about.pop("front"),
    "no back": lambda about: about.update(back=None),
    "shards as a number": lambda about: about.update(shards=3),
    "shards as numbers": lambda about: about.update(shards=[1, 2]),
    "shards of one number": lambda about: about.update(shards=[[1]]),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_manifest_that_was_edited_is_refused_by_name(tmp_path, name):
    (tmp_path / "a.jsonl").write_text('{"text": "the river runs"}\n')
    tokenizer = train_tokenizer(iter(["the river runs"]), vocab_size=300)
    write_shards(tmp_path / "a.jsonl", tokenizer, tmp_path / "out")
    about = json.loads((tmp_path / "out" / MANIFEST).read_text())
    EDITS[name](about)
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"out.manifest\.json is damaged: .*delete the folder"):
        Shards(tmp_path / "out", tokenizer)


def test_lengths_that_were_edited_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "the river runs"}\n{"text": "to the sea"}\n')
    tokenizer = train_tokenizer(iter(["the river runs"]), vocab_size=300)
    shards = write_shards(tmp_path / "a.jsonl", tokenizer, tmp_path / "out")
    np.save(lengths_file(tmp_path / "out", 0), shards.lengths[::-1] + np.uint32(1))
    with pytest.raises(ValueError, match="out is damaged: the lengths of its documents"):
        Shards(tmp_path / "out", tokenizer)


LABELS = {
    "a class beyond all texts": ([0, 1, 7], None, "3 texts have classes up to 7: number them from 0"),
    "a class without end": ([0, 10**30], None, r"2 texts have classes up to 1e\+30"),
    "a class beyond its names": ([0, 10**30], ("a", "b"), r"there are 2 classes, but labels up to 1e\+30"),
    "classes for numbers": ([0, 1], (), "the labels are classes, such as 1, but numbers to predict"),
    "numbers for classes": ([0.0, 1.0], ("a", "b"), "the labels are numbers to predict, such as 1.0, but classes"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_cannot_be_are_refused_before_they_take_memory(name):
    values, labels, words = LABELS[name]
    tokenizer = train_tokenizer(iter(["a b"]), vocab_size=300)
    with pytest.raises(ValueError, match=words):
        Texts.from_rows([Labelled("a", value) for value in values], tokenizer, labels=labels, max_length=8)


@pytest.mark.parametrize("label", [2**31, 10**30, 10**400, -1])
def test_a_number_that_no_class_has_is_refused_with_its_line(tmp_path, label):
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "a", "label": 0}}\n{{"text": "a", "label": {label}}}\n')
    with pytest.raises(ValueError, match=r'a\.jsonl:2: "label" must be the number of a class'):
        list(read_labelled(file))


def test_a_full_disk_is_told_with_the_file():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        append(Path("/dev/full"), "row\n")


def test_a_disk_that_is_full_for_numpy_is_told_with_the_file(tmp_path, monkeypatch):
    def full(file, values):
        file.write(b"half")
        raise OSError(f"{len(values)} requested and 4 written")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        OSError, match=r"No space left on device \(2 requested and 4 written\): .*passages\.offsets\.npy'"
    ):
        write_passages(lambda: iter(["a"]), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["passages.txt"]


def test_a_disk_that_is_full_for_pytorch_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    TinyRun(tmp_path).fit(steps=2)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(state, file):
        try:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left on device: .*checkpoint\.pt"):
        TinyRun(tmp_path).fit()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_best_weights_that_are_not_finite_are_not_saved(tmp_path):
    tiny = TinyRun(tmp_path)
    checkpoints.save_weights(tmp_path / "best.pt", tiny.model, {}, 1, {"loss": 1.0})
    before = (tmp_path / "best.pt").read_bytes()
    next(tiny.model.parameters()).data[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"step 2: 0\.weight is not finite"):
        checkpoints.save_weights(tmp_path / "best.pt", tiny.model, {}, 2, {"loss": 0.5})
    assert (tmp_path / "best.pt").read_bytes() == before


# The folder of a run


def test_a_run_that_has_only_its_settings_may_begin_again_with_others(tmp_path):
    def claim(recipe: str, settings: dict[str, object]) -> Path:
        with claim_folder(tmp_path / "out", recipe, settings) as folder:
            return folder

    folder = claim("mlm", {"seed": 1})
    (folder / ".nfs0001").write_text("")
    for settings in ({"seed": 2}, {"seed": 2, "rate": 0.1}):
        assert claim("finetune", settings) == folder
        assert json.loads((folder / RUN).read_text()) == {"recipe": "finetune", **settings}
    (folder / "log.jsonl").write_text("")
    assert claim("finetune", settings) == folder
    for recipe, other, words in (("mlm", settings, "recipe is 'finetune', now 'mlm'"), ("finetune", {}, "rate is 0.1")):
        with pytest.raises(ValueError, match=rf"run\.json belongs to another run: {words}"):
            claim(recipe, other)
    (folder / RUN).unlink()
    with pytest.raises(FileExistsError, match=rf"out holds log\.jsonl, but no {RUN} of a run"):
        claim("finetune", settings)


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(tmp_path):
    """Also with other settings: those of the first run stay. A run that was killed holds nothing."""
    out, settings = tmp_path / "out", {"seed": 1}
    for other in (settings, {"seed": 2}):
        with (
            claim_folder(out, "mlm", settings),
            pytest.raises(BlockingIOError, match=f"another run is writing to {out}"),
        ):
            claim_folder(out, "mlm", other).__enter__()
        assert json.loads((out / RUN).read_text()) == {"recipe": "mlm", **settings}
    with pytest.raises(KeyError), claim_folder(out, "mlm", settings):
        raise KeyError
    if not (killed := os.fork()):
        claim_folder(out, "mlm", settings).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(killed, 0)[1] == signal.SIGKILL
    with claim_folder(out, "mlm", settings) as folder:
        assert folder == out


# Options and devices


@dataclass(frozen=True)
class Config:
    steps: int = option("how often", 7)
    names: tuple[str, ...] = option("some words", ())
    grid: bool = option("a flag", False)


@pytest.mark.parametrize(
    "words",
    [
        "--steps 1 --steps 2",
        "--steps=1 --steps 2",
        "--names a --names b",
        "--grid --grid",
        "--step 3",
        "--st=3",
        "--gri",
    ],
)
def test_options_are_written_in_full_and_once(capsys, words):
    with pytest.raises(SystemExit):
        parse(Config, None, words.split())
    shown = capsys.readouterr().err
    assert "is given twice" in shown or "unrecognized arguments" in shown


@pytest.mark.parametrize("device", ["", "gpu", "meta", "cpu:7", "cuda:99", "cuda:-1"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=rf"device is '{device}', which this machine does not have"), ranks(device):
        pass


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_stage_has_finite_rates(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        replace(STAGES["ettin-17m"][0], **{name: value})


# The loop


def test_numbers_of_steps_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps is -1, but must be 0 or more"):
        TinyRun(tmp_path).fit(steps=-1)
    with pytest.raises(ValueError, match="accumulate is 0 in step 1"):
        TinyRun(tmp_path).fit(accumulate=0)
    with pytest.raises(ValueError, match="accumulate is -2 in step 3"):
        TinyRun(tmp_path).fit(accumulate=lambda step: 1 if step < 2 else -2)
    for steps in (0, -5):
        with pytest.raises(ValueError, match=f"steps is {steps}, but a validation"):
            Validation(dict, steps)


def test_no_steps_change_nothing(tmp_path):
    tiny = TinyRun(tmp_path)
    before = copy.deepcopy(tiny.model)
    tiny.fit(steps=0)
    assert_equal(before, tiny.model)
    assert tiny.calls == 0


def test_only_what_the_optimizer_has_is_clipped_and_averaged(tmp_path):
    """The gradients of all others add up from step to step, and must not count."""
    one, other = TinyRun(tmp_path / "one", dropout=0.0), TinyRun(tmp_path / "other", dropout=0.0)
    for tiny in (one, other):
        tiny.output.mkdir()
        tiny.optimizer = torch.optim.SGD(tiny.model[2].parameters(), lr=0.1)
    other.model[0].requires_grad_(False)
    assert_equal(one.fit(clip=0.01, accumulate=2).model, other.fit(clip=0.01, accumulate=2).model)


def with_head(tiny):
    """A loss with a head that the model does not have, as that of a distillation."""
    torch.manual_seed(7)
    head = nn.Linear(1, 1)
    tiny.optimizer = torch.optim.AdamW([*tiny.model.parameters(), *head.parameters()], lr=0.1)

    def loss(batch):
        tiny.calls += 1
        x_B4, y_B1 = batch
        return BatchLoss((head(tiny.model(x_B4)) - y_B1).square().mean(), 6, {}, 6)

    return head, loss


def test_a_module_beside_the_model_is_trained_and_resumed_as_the_model(tmp_path):
    heads = {}
    for name, stops in (("whole", [12]), ("resumed", [5, 12])):
        (tmp_path / name).mkdir()
        for steps in stops:
            tiny = TinyRun(tmp_path / name)
            heads[name], loss = with_head(tiny)
            tiny.fit(loss, steps=steps, accumulate=2, stateful={"head": heads[name]})
    assert_equal(heads["whole"], heads["resumed"])


def test_the_gradients_of_a_module_beside_the_model_are_means(tmp_path):
    gradients = []
    for accumulate in (1, 2):
        (tmp_path / str(accumulate)).mkdir()
        tiny = TinyRun(tmp_path / str(accumulate), dropout=0.0)
        head, loss = with_head(tiny)
        first = next(TinyRun.every())
        tiny.fit(loss, batches=lambda _, first=first: [first, first], steps=1, accumulate=accumulate, clip=None,
                 stateful={"head": head})  # fmt: skip
        gradients.append(head.weight.grad)
    torch.testing.assert_close(*gradients)


def test_what_no_checkpoint_would_keep_is_not_trained(tmp_path):
    tiny = TinyRun(tmp_path)
    _, loss = with_head(tiny)
    for stateful in ({}, {"ema": EMA(tiny.model, decay=0.5)}):
        with pytest.raises(ValueError, match="the optimizer trains 2 of 6 parameters that are not of the model"):
            tiny.fit(loss, stateful=stateful)
    tiny = TinyRun(tmp_path)
    tiny.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        tiny.fit()
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_called_again_in_one_process_keeps_its_rate(tmp_path):
    """As in a notebook, after it was interrupted and after it has ended."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "again").mkdir()
    whole, again = TinyRun(tmp_path / "whole").fit(), TinyRun(tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        again.fit(stop_at=5)
    again.fit(steps=9)
    again.fit()
    assert_equal(whole.model, again.model)


def test_the_next_stage_has_no_rate_of_the_last_one(tmp_path):
    first = TinyRun(tmp_path).fit(steps=3)
    later = torch.optim.AdamW(first.model.parameters(), lr=0.5, weight_decay=0.3)
    wanted = [dict(group) for group in later.param_groups]
    load_moments(later, first.optimizer.state_dict())
    assert [group.keys() for group in later.param_groups] == [group.keys() for group in wanted]
    assert later.param_groups[0]["lr"] == 0.5
    assert later.param_groups[0]["weight_decay"] == 0.3
    assert later.state[next(first.model.parameters())]["step"] == 3


def test_batches_that_are_the_same_list_are_a_source(tmp_path):
    tiny = TinyRun(tmp_path).fit(batches=lambda first: list(islice(TinyRun.every(), first, 12)))
    assert checkpoints.read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 12
    assert tiny.calls == 12
