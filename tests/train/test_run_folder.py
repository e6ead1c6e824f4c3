"""Which folders a run may begin or go on in; more of them in `tests/recipes/test_contrastive_folders.py`."""

import json

import pytest
from worker_runs import TinyRun

from modernbert.train.folder import run_folder
from modernbert.train.validation import Validation


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path):
    validation = Validation(lambda: {"score": 1.0}, 1, best="score")
    for name, steps in (("steps", 20), ("validation", 1)):
        (tmp_path / name).mkdir()
        TinyRun(tmp_path / name).fit(steps=steps, validation=validation)
        (tmp_path / name / "checkpoint.pt").unlink()
        assert run_folder(tmp_path / name) == tmp_path / name  # by its best weights
        (tmp_path / name / "best.pt").unlink()
        assert run_folder(tmp_path / name) == tmp_path / name  # by its log


@pytest.mark.parametrize("content", ["", "{", '{"step": 20, "lo'])
def test_a_run_that_was_killed_in_the_first_row_of_its_log_begins_again(tmp_path, content):
    (tmp_path / "log.jsonl").write_text(content)
    TinyRun(run_folder(tmp_path)).fit(steps=20)
    (row,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(row)["step"] == 20


@pytest.mark.parametrize("content", ["mine", "[1]\n", "{}\n", '{"step": 3, "note": "mine"}\n', "\xff\n"])
def test_a_log_of_another_program_is_refused(tmp_path, content):
    (tmp_path / "log.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(FileExistsError, match=r"holds log\.jsonl, but neither"):
        run_folder(tmp_path)


def test_weights_of_another_program_are_refused(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"holds best\.pt, but neither"):
        run_folder(tmp_path)
