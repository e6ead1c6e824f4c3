import copy
import itertools
import json
import math

import pytest
import torch
from worker_runs import TinyRun

from modernbert.train.checkpoints import check_finite
from modernbert.train.loop import BatchLoss


def killed_at(recipe, call, error):
    def loss(batch):
        part = recipe.loss(batch)
        if recipe.calls == call:
            raise error
        return part

    return loss


def poisoned_at(recipe, call, poison):
    def loss(batch):
        part = recipe.loss(batch)
        return poison(part) if recipe.calls == call else part

    return loss


def assert_equal(one, other):
    for (name, wanted), got in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(wanted, got), name


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("weight", [0.01, 100.0])
def test_steps_are_those_of_a_loop_by_hand(tmp_path, accumulate, weight):
    """Gradients of a small loss stay as they are, those of a large one are clipped; plain SGD shows their size."""
    recipe, twin = TinyRun(tmp_path, dropout=0.0), TinyRun(tmp_path, dropout=0.0)
    recipe.optimizer = torch.optim.SGD(recipe.model.parameters(), lr=0.1)
    recipe.fit(lambda batch: BatchLoss(recipe.loss(batch).loss * weight, 6, {}), steps=5, accumulate=accumulate)
    batches = TinyRun.every()
    for step in range(5):
        loss = sum(twin.loss(next(batches)).loss for _ in range(accumulate)) * weight / accumulate
        gradients = torch.autograd.grad(loss, list(twin.model.parameters()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert (norm > 1) == (weight > 1)
        with torch.no_grad():
            for parameter, gradient in zip(twin.model.parameters(), gradients, strict=True):
                parameter -= 0.1 / (step + 1) * gradient / max(1, norm)
    for got, wanted in zip(recipe.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_each_group_keeps_its_own_rate(tmp_path):
    recipe = TinyRun(tmp_path)
    groups = [{"params": [x], "lr": 0.1 * i} for i, x in enumerate(recipe.model.parameters(), start=1)]
    recipe.optimizer = torch.optim.AdamW(groups)
    recipe.fit(steps=3)
    rates = [group["lr"] for group in recipe.optimizer.param_groups]
    assert rates == pytest.approx([0.1 * i / 3 for i in range(1, 5)])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_run_resumes_to_bit_equal_weights(tmp_path, accumulate):
    """With dropout, moments of the optimizer, a falling rate, and batches that are all different."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = TinyRun(tmp_path / "whole").fit(accumulate=accumulate)
    killed = TinyRun(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        killed.fit(killed_at(killed, 5 * accumulate, KeyboardInterrupt()), accumulate=accumulate)
    resumed = TinyRun(tmp_path / "killed")
    torch.rand(7)  # another random state than that of the start
    resumed.fit(accumulate=accumulate)
    assert (killed.calls, resumed.calls) == (5 * accumulate, 8 * accumulate)  # four steps were kept
    assert_equal(whole.model, resumed.model)


def test_a_finished_run_is_not_trained_on(tmp_path):
    done = TinyRun(tmp_path).fit()
    again = TinyRun(tmp_path).fit()
    assert again.calls == 0
    assert_equal(done.model, again.model)


def test_the_model_trains_whatever_its_mode_was(tmp_path):
    recipe = TinyRun(tmp_path)
    recipe.model.eval()
    recipe.fit(steps=1)
    assert recipe.model.training


POISONS = {
    "loss": lambda part: part._replace(loss=part.loss * math.nan),
    "infinite loss": lambda part: part._replace(loss=part.loss + math.inf),
    # The square root has an infinite slope at 0: a finite loss with gradients that are not.
    "gradient": lambda part: part._replace(loss=part.loss + (part.loss - part.loss).sqrt()),
}


@pytest.mark.parametrize("name", POISONS)
def test_what_is_not_finite_stops_before_the_step(tmp_path, name):
    recipe = TinyRun(tmp_path)
    before = []

    def loss(batch):
        if recipe.calls == 6:
            before.append((copy.deepcopy(recipe.model), (tmp_path / "checkpoint.pt").read_bytes()))
        return poisoned_at(recipe, 7, POISONS[name])(batch)

    with pytest.raises(FloatingPointError, match=r"step 7: the loss is .*(nan|inf).* The step was not taken"):
        recipe.fit(loss)
    model, checkpoint = before[0]
    assert_equal(model, recipe.model)
    assert (tmp_path / "checkpoint.pt").read_bytes() == checkpoint
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 6
    assert TinyRun(tmp_path).fit().calls == 6  # and the run goes on from there


def test_one_bad_batch_of_several_stops_the_step(tmp_path):
    recipe = TinyRun(tmp_path)
    with pytest.raises(FloatingPointError, match="step 3:"):
        recipe.fit(poisoned_at(recipe, 8, POISONS["loss"]), accumulate=3)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The loss and the gradients of the last step are finite, the weights after it are not."""
    recipe = TinyRun(tmp_path)
    recipe.fit(steps=2)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(FloatingPointError, match=r"step 3: 0\.weight is not finite"):
        recipe.fit(steps=3, schedule=lambda step: math.inf)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept
    with pytest.raises(FloatingPointError, match=r"here: 0\.weight"):
        check_finite(recipe.model, "here")


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    TinyRun(tmp_path).fit(steps=1)
    with pytest.raises(ValueError, match=r"checkpoint\.pt belongs to another run: rate is 0\.1, now 0\.2"):
        TinyRun(tmp_path).fit(settings={"rate": 0.2})


@pytest.mark.parametrize("content", [b"", b"noise", "cut", {"model": 1}, [1]])
def test_a_checkpoint_that_cannot_be_read_is_named_and_kept(tmp_path, content):
    file = tmp_path / "checkpoint.pt"
    TinyRun(tmp_path).fit(steps=1)
    if content == "cut":
        content = file.read_bytes()[:-999]
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.pt is (damaged, or )?not (a|the) checkpoint"):
        TinyRun(tmp_path).fit()
    assert file.read_bytes() == before


def test_a_crash_while_saving_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    TinyRun(tmp_path).fit(steps=2)
    save = torch.save

    def crash(state, file):
        save(state, file)
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        TinyRun(tmp_path).fit()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


def test_checkpoints_are_written_in_intervals_and_at_the_end(tmp_path, monkeypatch):
    saved = []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: saved.append(state["step"]) or save(state, file))
    TinyRun(tmp_path).fit(steps=6, save_minutes=60.0)
    assert saved == [6]


def test_the_log_is_lines_to_read_and_json(tmp_path, capsys):
    recipe = TinyRun(tmp_path)
    seen = []

    def loss(batch):
        seen.append(recipe.loss(batch))
        return seen[-1]

    recipe.fit(loss, steps=50, accumulate=2)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40, 50]
    for row, parts in zip(rows, (seen[:40], seen[40:80], seen[80:]), strict=True):
        assert row["loss"] == pytest.approx(sum(part.loss.item() for part in parts) / len(parts), abs=1e-4)
        assert row["error"] == pytest.approx(sum(part.metrics["error"].item() for part in parts) / len(parts), abs=1e-4)
        assert row["lr"] == pytest.approx(0.1 / row["step"])
    assert rows[0]["tokens_per_s"] > 0
    assert rows[-1]["seconds_left"] == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3
    assert shown[0].startswith(f"step 20/50  loss {rows[0]['loss']:.4f}  error {rows[0]['error']:.4f}  ")
    assert shown[-1].endswith("lr 2.00e-03  0:00:00 left")


# Means over units, precision, clipping


def weighted(recipe, sizes):
    """A loss whose batches have other numbers of rows, and count them."""
    coming = itertools.cycle(sizes)

    def loss(batch):
        x_B4, y_B1 = (part[:next_size] for next_size in [next(coming)] for part in batch)
        error_B1 = recipe.model(x_B4) - y_B1
        return BatchLoss(error_B1.square().mean(), len(x_B4), {}, torch.tensor(len(x_B4)))

    return loss


def test_a_step_is_the_mean_over_units_however_they_are_cut(tmp_path):
    """Batches of 6, 1 and 3 rows weigh as many rows, not a third each."""
    recipe, twin = (TinyRun(tmp_path, dropout=0.0) for _ in range(2))
    recipe.optimizer = torch.optim.SGD(recipe.model.parameters(), lr=0.1)
    recipe.fit(weighted(recipe, [6, 1, 3]), steps=1, accumulate=3, clip=None)
    rows = [tuple(part[:size] for part in batch) for batch, size in zip(TinyRun.every(), [6, 1, 3], strict=False)]
    x_B4, y_B1 = (torch.cat(parts) for parts in zip(*rows, strict=True))
    (twin.model(x_B4) - y_B1).square().mean().backward()
    for got, wanted in zip(recipe.model.parameters(), twin.model.parameters(), strict=True):
        # Sums of ten float32 terms in another order.
        torch.testing.assert_close(got, wanted - 0.1 * wanted.grad, rtol=1e-5, atol=1e-6)


def test_a_single_batch_has_the_bits_of_its_own_mean(tmp_path):
    """It is not multiplied by its count and divided again, which would round."""
    recipe, twin = (TinyRun(tmp_path, dropout=0.0) for _ in range(2))
    recipe.fit(weighted(recipe, [5]), steps=1, clip=None)
    x_B4, y_B1 = (part[:5] for part in next(TinyRun.every()))
    (twin.model(x_B4) - y_B1).square().mean().backward()
    for got, wanted in zip(recipe.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(got.grad, wanted.grad)


def test_a_batch_without_units_counts_as_nothing(tmp_path):
    recipe, twin = (TinyRun(tmp_path, dropout=0.0) for _ in range(2))

    def loss(batch):
        part = recipe.loss(batch)
        return part._replace(count=6) if recipe.calls == 1 else part._replace(loss=part.loss * 0, count=0)

    recipe.fit(loss, steps=1, accumulate=2)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    x_B4, y_B1 = next(TinyRun.every())
    assert rows[0]["loss"] == pytest.approx((twin.model(x_B4) - y_B1).square().mean().item(), abs=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_units_is_not_an_error(tmp_path, accumulate):
    """As where no token of a small batch is masked."""
    recipe = TinyRun(tmp_path)
    before = copy.deepcopy(recipe.model)
    recipe.optimizer = torch.optim.SGD(recipe.model.parameters(), lr=0.1)
    recipe.fit(
        lambda batch: recipe.loss(batch)._replace(loss=recipe.model[0].bias.sum() * 0, count=0),
        steps=2,
        accumulate=accumulate,
    )
    assert_equal(before, recipe.model)


def test_gradients_are_clipped_to_a_norm_or_not_at_all(tmp_path):
    moved = {}
    for clip in (0.01, 0.02, None):
        recipe = TinyRun(tmp_path, dropout=0.0)
        recipe.optimizer = torch.optim.SGD(recipe.model.parameters(), lr=0.1)
        before = copy.deepcopy(recipe.model)
        (tmp_path / str(clip)).mkdir()
        recipe.output = tmp_path / str(clip)
        recipe.fit(steps=1, clip=clip)
        pairs = zip(recipe.model.parameters(), before.parameters(), strict=True)
        moved[clip] = torch.cat([(new - old).flatten() for new, old in pairs]).norm().item()
    assert moved[0.01] == pytest.approx(0.001, rel=1e-3)
    assert moved[0.02] == pytest.approx(0.002, rel=1e-3)
    assert moved[None] > 0.1


def test_autocast_computes_in_bfloat16_and_keeps_float32(tmp_path):
    recipe = TinyRun(tmp_path)
    seen = []
    recipe.model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    recipe.fit(steps=2, autocast=True)
    assert seen == [torch.bfloat16] * 2
    assert {parameter.dtype for parameter in recipe.model.parameters()} == {torch.float32}


def test_pure_bfloat16_resumes_to_the_same_bits(tmp_path):
    def run(name, *steps):
        (tmp_path / name).mkdir()
        for last in steps:
            recipe = TinyRun(tmp_path / name)
            recipe.model.bfloat16()
            recipe.optimizer = torch.optim.AdamW(recipe.model.parameters(), lr=0.1)

            def loss(batch, recipe=recipe):
                x_B4, y_B1 = batch
                return BatchLoss((recipe.model(x_B4.bfloat16()).float() - y_B1).square().mean(), 6, {})

            recipe.fit(loss, steps=last, accumulate=2)
        return recipe

    assert_equal(run("whole", 8).model, run("killed", 3, 8).model)


def test_batches_that_end_are_told_with_the_step(tmp_path):
    recipe = TinyRun(tmp_path)
    batches = itertools.islice(TinyRun.every(), 5)
    with pytest.raises(ValueError, match="the batches have ended in step 3 of 12"):
        recipe.fit(batches=lambda _: batches, accumulate=2)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


def test_more_steps_than_the_checkpoint_are_wanted(tmp_path):
    TinyRun(tmp_path).fit(steps=3)
    with pytest.raises(ValueError, match="has a checkpoint of step 3: ask for as many steps or more"):
        TinyRun(tmp_path).fit(steps=2)
