"""Validation changes nothing of the training, and its best number decides which weights are kept."""

import json
import math

import pytest
import torch
from torch import nn
from worker_runs import TinyRun

from modernbert.train.batch_loss import BatchLoss
from modernbert.train.checkpoints import load_weights, read_checkpoint
from modernbert.train.validation import Validation, mean_loss


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def measured(values, **options):
    coming = iter(values)
    return Validation(lambda: {"loss": next(coming), "other": 1.0}, 2, **options)


def test_it_runs_every_few_steps_and_after_the_last(tmp_path):
    TinyRun(tmp_path).fit(steps=5, validation=measured([3.0, 2.0, 2.5]))
    found = [row for row in rows(tmp_path) if "valid_loss" in row]
    assert [(row["step"], row["valid_loss"], row["valid_other"]) for row in found] == [
        (2, 3.0, 1.0),
        (4, 2.0, 1.0),
        (5, 2.5, 1.0),
    ]


@pytest.mark.parametrize(
    ("values", "highest", "best"), [([3.0, 2.0, 2.5], False, 4), ([3.0, math.nan, 3.5], True, 5), ([1.0, 1.0], True, 2)]
)
def test_the_best_weights_are_kept(tmp_path, values, highest, best):
    kept = {}
    run = TinyRun(tmp_path)
    validation = measured(values, highest=highest)
    measure = validation.measure

    def keeping():
        kept[len(kept)] = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        return measure()

    run.fit(steps=5 if len(values) == 3 else 4, validation=Validation(keeping, 2, highest=highest))
    other = TinyRun(tmp_path).model
    assert load_weights(tmp_path / "best.pt", other) == best
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, kept[(best + 1) // 2 - 1][name])
    assert read_checkpoint(tmp_path / "best.pt", {"metrics"})["metrics"]["other"] == 1.0


def test_a_resumed_run_knows_the_best_number(tmp_path):
    TinyRun(tmp_path).fit(steps=2, validation=measured([2.0]))
    TinyRun(tmp_path).fit(steps=4, validation=measured([3.0]))
    assert read_checkpoint(tmp_path / "best.pt", {"step"})["step"] == 2
    assert read_checkpoint(tmp_path / "checkpoint.pt")["best"] == 2.0


def test_the_training_is_the_same_with_and_without(tmp_path):
    """Modes of modules, the random state and gradients are as before."""
    runs = []
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        run = TinyRun(tmp_path / name)

        def measure(run=run):
            assert not run.model.training
            assert not torch.is_grad_enabled()
            torch.rand(5)
            run.model.train()
            return {"loss": 1.0}

        runs.append(run.fit(steps=6, validation=Validation(measure, 1) if name == "with" else None))
    for got, wanted in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(got, wanted)


def test_modules_that_were_frozen_stay_in_their_mode():
    from modernbert.train.distributed import ALONE

    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model[1].eval()
    Validation(lambda: {"loss": 0.0}, 1).run(model, ALONE)
    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_best_number_that_is_not_measured_is_named(tmp_path):
    with pytest.raises(ValueError, match="gives loss, other, but the best is to be found by 'nDCG@10'"):
        TinyRun(tmp_path).fit(steps=2, validation=measured([1.0], best="nDCG@10"))


def test_mean_loss_is_a_mean_over_units():
    def loss(batch):
        x = torch.tensor(batch)
        return BatchLoss(x.mean(), 1, {"square": x.square().mean()}, len(batch))

    batches = [[1.0], [2.0, 3.0, 4.0]]
    assert mean_loss(lambda: batches, loss)() == pytest.approx({"loss": 2.5, "square": 7.5})
    assert mean_loss(lambda: batches, loss)() == mean_loss(lambda: iter(batches), loss)()
    with pytest.raises(ValueError, match="empty"):
        mean_loss(lambda: [], loss)()
