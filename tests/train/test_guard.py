"""The file of a step that was not finite: any batch as plain tensors, and nothing overwritten."""

import math
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_checkpoints import disk_for
from worker_runs import TinyRun

from modernbert.packing import Tokens, pack
from modernbert.train.guard import plain


class Pair(NamedTuple):
    query: str
    index: np.ndarray


@dataclass
class Masked:
    input_ids_T: torch.Tensor
    source: str


def load(file):
    return torch.load(file, weights_only=True)


def test_every_kind_of_batch_becomes_plain(tmp_path):
    batch = {
        "pairs": [Pair("a", np.arange(3)), Pair("b", np.array(["x", None]))],
        3: Masked(torch.ones(2, requires_grad=True), "wiki"),
        "tokens": Tokens(pack([[1, 2], [3]]), torch.ones(3, dtype=torch.bool)),
        "numbers": (1, 2.5, True, None, np.float32(0.5), np.int64(7)),
        "other": {"a set"},
        "class": Pair,
    }
    torch.save(plain(batch), tmp_path / "batch.pt")
    found = load(tmp_path / "batch.pt")
    assert found["pairs"][0]["query"] == "a"
    assert found["pairs"][0]["index"].tolist() == [0, 1, 2]
    assert found["pairs"][1]["index"] == ["x", None]
    assert (found[3]["input_ids_T"].tolist(), found[3]["source"]) == ([1.0, 1.0], "wiki")
    assert found["tokens"]["batch"]["input_ids"].tolist() == [1, 2, 3]
    assert found["tokens"]["batch"]["lengths"] == [2, 1]
    assert found["numbers"] == [1, 2.5, True, None, torch.tensor(0.5), torch.tensor(7)]
    assert found["other"] == ["a set"]
    assert "Pair" in found["class"]


def poisoned(run, at):
    loss = run.loss

    def poison(batch):
        part = loss(batch)
        return part._replace(loss=part.loss * math.nan) if run.calls == at else part

    run.loss = poison
    return run


def test_the_offending_batch_of_several_is_saved(tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 3: .*/bad-step-3\.pt has its batches\. Try"):
        poisoned(TinyRun(tmp_path), 8).fit(accumulate=3)
    (bad,) = load(tmp_path / "bad-step-3.pt")
    x_B4, y_B1 = next(islice(TinyRun.every(), 7, None))
    assert (bad["rank"], bad["place"]) == (0, 1)
    assert math.isnan(bad["loss"])
    assert torch.equal(bad["batch"][0], x_B4)
    assert torch.equal(bad["batch"][1], y_B1)


def test_a_second_failure_does_not_overwrite_the_first(tmp_path):
    for _ in range(2):
        with pytest.raises(FloatingPointError):
            poisoned(TinyRun(tmp_path), 1).fit(steps=40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad-step-1-1.pt", "bad-step-1.pt"]


def test_all_batches_are_saved_if_only_the_gradients_are_wrong(tmp_path):
    run = TinyRun(tmp_path)
    loss = run.loss
    # The square root has an infinite slope at 0: a finite loss with gradients that are not.
    run.loss = lambda batch: (part := loss(batch))._replace(loss=part.loss + (part.loss - part.loss).sqrt())
    with pytest.raises(FloatingPointError, match="the norm of the gradients nan"):
        run.fit(accumulate=2)
    assert [row["place"] for row in load(tmp_path / "bad-step-1.pt")] == [0, 1]


def test_a_full_disk_does_not_hide_the_error_of_the_step(tmp_path):
    with disk_for(10), pytest.raises(FloatingPointError, match=r"step 1: .*could not be saved.*Try a lower"):
        poisoned(TinyRun(tmp_path), 1).fit(steps=40)
    assert list(tmp_path.iterdir()) == []
