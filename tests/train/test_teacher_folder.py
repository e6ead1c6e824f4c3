"""Each text is asked once, whatever happens to the process; the folder's rules are those its docstring gives."""

import errno
import os

import numpy as np
import pytest
import torch

from modernbert.train import teacher_folder
from modernbert.train.teacher_folder import Teacher, fill, text_key

TEXTS = [f"text {i}" for i in range(11)]
ME = {"model": "me"}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(teacher_folder, "PART", 4)


class Asked:
    """A teacher that counts what it was asked, and dies after some parts."""

    def __init__(self, parts=99):
        self.texts, self.parts = [], parts

    def __call__(self, part):
        if not self.parts:
            raise KeyboardInterrupt
        self.parts -= 1
        self.texts += part
        return np.array([[len(str(text)), text_key(text) % 97] for text in part], np.float32)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_a_caller_that_looks_while_another_begins(tmp_path, monkeypatch):
    """What the other has written since is not of another program."""
    names, asked = os.listdir, Asked()

    def begun_since(folder):
        monkeypatch.setattr(os, "listdir", names)
        fill(folder, TEXTS, asked, ME)
        return names(folder)

    monkeypatch.setattr(os, "listdir", begun_since)
    fill(tmp_path, TEXTS, asked, ME)
    assert asked.texts == TEXTS


def test_each_text_is_asked_once_and_found_again(tmp_path):
    asked = Asked()
    teacher = fill(tmp_path, iter(TEXTS + TEXTS[:3]), asked, ME)
    assert asked.texts == TEXTS
    rows = teacher.index(TEXTS)
    assert rows.tolist() == list(range(11))
    assert teacher.scores(rows)[:, 1].tolist() == [text_key(text) % 97 for text in TEXTS]
    fill(tmp_path, TEXTS, Asked(parts=0), ME)
    grown = fill(tmp_path, ["new", *TEXTS], more := Asked(), ME)
    assert more.texts == ["new"]
    assert grown.index([*TEXTS, "new", "unknown"]).tolist() == [*range(12), -1]
    assert teacher.scores(rows).shape == (11, 2)  # an open one stays as it was


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    fill(tmp_path / "whole", TEXTS, Asked(), ME)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "killed", TEXTS, Asked(parts=1), ME)
    # What `kill -9` leaves: values without their keys, and half of a file.
    np.save(tmp_path / "killed" / "values-000001.npy", np.ones((4, 2), np.float16))
    (tmp_path / "killed" / ".keys-000001.npy.0123abcd").write_bytes(b"half")
    assert len(Teacher(tmp_path / "killed").keys) == 4
    fill(tmp_path / "killed", TEXTS, asked := Asked(), ME)
    assert asked.texts == TEXTS[4:]
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_full_disk_leaves_the_parts_before_it(tmp_path, monkeypatch):
    save, calls = np.save, []

    def full(file, array):
        calls.append(1)
        if len(calls) == 4:  # the keys of the second part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(file, array)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_folder.np, "save", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*keys-000001\.npy'"):
            fill(tmp_path, TEXTS, Asked(), ME)
    assert len(Teacher(tmp_path).keys) == 4
    assert len(fill(tmp_path, TEXTS, asked := Asked(), ME).keys) == 11
    assert asked.texts == TEXTS[4:]


@pytest.mark.parametrize("gone", ["000000", "000001"])
def test_a_part_is_never_replaced(tmp_path, gone):
    """The number of parts may be that of one of them: a damaged part was deleted, or a script counted from 1."""
    fill(tmp_path, TEXTS, Asked(), ME)
    for name in ("keys", "values"):
        (tmp_path / f"{name}-{gone}.npy").unlink()
    before = content(tmp_path)
    found = fill(tmp_path, TEXTS, asked := Asked(), ME)
    assert len(found.keys) == 11
    assert len(asked.texts) == 4
    assert before.items() <= content(tmp_path).items()


def test_another_teacher_is_refused(tmp_path):
    fill(tmp_path, TEXTS[:1], Asked(), {"model": "a", "max_length": 96})
    before = content(tmp_path)
    for other in ({"model": "b", "max_length": 96}, {"model": "a", "max_length": 97}, {"model": "a"}):
        with pytest.raises(ValueError, match=r"another teacher: (max_length|model) is"):
            fill(tmp_path, TEXTS, Asked(), other)
    assert content(tmp_path) == before


@pytest.mark.parametrize("values", [[[1.0, float("nan")]], [[1e6, 0.0]], [float("inf")], [[1.0], [2.0]], [[[1.0]]]])
def test_a_wrong_answer_is_not_kept(tmp_path, values):
    with pytest.raises(ValueError, match=r"answer to 'text 0' is not finite|the teacher gave \("):
        fill(tmp_path, TEXTS[:1], lambda part: np.array(values), ME)
    assert not list(tmp_path.glob("keys*"))


def test_answers_of_another_width_are_refused(tmp_path):
    fill(tmp_path, TEXTS[:1], Asked(), ME)
    for answer in (lambda part: np.ones((len(part), 3)), lambda part: np.ones(len(part))):
        with pytest.raises(ValueError, match=r"wanted \[n, 2\]"):
            fill(tmp_path, TEXTS, answer, ME)


def test_a_folder_that_a_script_has_written_is_read(tmp_path):
    """By the rules of the docstring: any order, several parts, without teacher.json, values of pairs."""
    pairs = [("a", "b c"), ("a b", "c"), ("a", "b"), ("", "ab")]
    assert len({text_key(pair) for pair in pairs}) == 4
    for number, part in (("-000000", pairs[:1]), ("-000001", pairs[1:])):
        np.save(tmp_path / f"keys{number}.npy", np.array([text_key(pair) for pair in part], np.uint64))
        np.save(tmp_path / f"values{number}.npy", np.array([pairs.index(pair) for pair in part], np.float32))
    teacher = Teacher(tmp_path)
    assert teacher.width is None
    assert teacher.scores(teacher.index(pairs[::-1])).tolist() == [3, 2, 1, 0]
    with pytest.raises(ValueError, match=r"no answer to 1 of 2 texts"):
        teacher.scores(teacher.index([pairs[0], ("b", "a")]))
    with pytest.raises(FileExistsError, match=r"keys-000000\.npy"):
        fill(tmp_path, TEXTS, Asked(), ME)


def test_parts_that_contradict_one_another_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no keys\.npy"):
        Teacher(tmp_path)
    np.save(tmp_path / "keys.npy", np.array([1, 2], np.int64))
    np.save(tmp_path / "values.npy", np.zeros((2, 3), np.float16))
    with pytest.raises(ValueError, match=r"keys\.npy must be uint64"):
        Teacher(tmp_path)
    np.save(tmp_path / "keys.npy", np.array([1, 2, 3], np.uint64))
    with pytest.raises(ValueError, match=r"as long as values\.npy"):
        Teacher(tmp_path)
    np.save(tmp_path / "keys.npy", np.array([1, 2], np.uint64))
    np.save(tmp_path / "keys-000000.npy", np.array([3], np.uint64))
    np.save(tmp_path / "values-000000.npy", np.zeros((1, 4), np.float16))
    with pytest.raises(ValueError, match=r"vectors of one width"):
        Teacher(tmp_path)


def test_no_texts_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"there are no texts"):
        fill(tmp_path, iter(()), Asked(), ME)


def test_vectors_have_length_one_and_scores_are_as_they_were(tmp_path):
    teacher = fill(tmp_path / "vectors", ["a"], lambda part: torch.tensor([[3.0, 4.0]]), ME)
    torch.testing.assert_close(teacher[teacher.index(["a"])], torch.tensor([[0.6, 0.8]]), rtol=1e-3, atol=0)
    scores = fill(tmp_path / "scores", [("a", "b")], lambda part: torch.tensor([-1234.5678]), ME)
    assert scores.scores(scores.index([("a", "b")])).item() == np.float32(-1234.5678)
