"""Two ranks on this CPU: they train as one would, and fail with the name of the one that failed."""

import json
import re
import socket
import subprocess
import sys
import time
from itertools import count, islice

import numpy as np
import pytest
import torch
import torch.distributed as dist
from worker_runs import WORKER, Rows, environment, merged, texts, train

from modernbert.train import loop
from modernbert.train.checkpoints import load_weights, read_checkpoint
from modernbert.train.distributed import ALONE, Ranks, gather_counts, gather_rows, ranks
from modernbert.train.prepare import prepare

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

ROUNDING = 1e-10
"""Of float64 weights near 0.02 to 1, after six steps of AdamW at 1e-2.

Gradients differ by some 1e-16 of their size, because a sum over two batches is taken in another order. Where a
gradient is near 0, AdamW divides it by its own size, which enlarges the relative error of a step; 1e-10 is far above
what is left of that, and far below the 1e-2 of a step.
"""


def torchrun(kind, folder, ok=True):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", WORKER, kind]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=300, env=environment())
    assert (done.returncode == 0) is ok, done.stderr
    return done


def weights(folder):
    return read_checkpoint(folder / "checkpoint.pt")["model"]


def rows_of_log(folder):
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [[row[name] for name in ("loss", "root", "grad_norm")] for row in rows]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torchrun("equal", folder)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One rank with the same batches in each step: as many batches, or a single one of all of their texts."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_STEPS", 1)
        train(folder / "cut", lambda first: islice(map(texts, count()), first, None), accumulate=2)
        train(folder / "whole", lambda first: (merged(i, 2) for i in count(first)))
        train(folder / "accumulated", lambda first: islice(map(texts, count()), first, None), steps=3, accumulate=4)
    return folder


def test_ddp_has_the_bits_of_one_rank_with_the_same_batches(two, one):
    """A sum of two numbers does not depend on their order."""
    for name, wanted in weights(one / "cut").items():
        assert torch.equal(weights(two / "ddp")[name], wanted), name
    assert rows_of_log(two / "ddp") == rows_of_log(one / "cut")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("way", ["cut", "whole"])
def test_weights_and_losses_are_those_of_one_rank_with_the_same_global_batch(two, one, parallel, way):
    """The means are over rows, of which each batch has another number. The gathered checkpoint has all tensors."""
    got = weights(two / parallel)
    for name, wanted in weights(one / way).items():
        torch.testing.assert_close(got[name], wanted, rtol=0, atol=ROUNDING, msg=f"{name} {got[name]} {wanted}")
    logs = [np.array(rows_of_log(folder)) for folder in (two / parallel, one / way)]
    # The root is a mean of roots over batches, which a single batch has another one of.
    same = [0, 1, 2] if way == "cut" else [0, 2]
    np.testing.assert_allclose(logs[0][:, same], logs[1][:, same], rtol=0, atol=1.01e-4)  # written with four digits
    assert len(logs[0]) == 6


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_accumulation_on_two_ranks(two, one, parallel):
    for name, wanted in weights(one / "accumulated").items():
        torch.testing.assert_close(weights(two / f"{parallel}-accumulated")[name], wanted, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_resumed_run_on_two_ranks_has_the_same_bits(two, parallel):
    whole, resumed = (read_checkpoint(two / name / "checkpoint.pt") for name in (parallel, f"{parallel}-resumed"))
    for name, wanted in whole["model"].items():
        assert torch.equal(resumed["model"][name], wanted), name
    for index, wanted in whole["optimizer"]["state"].items():
        for name, tensor in wanted.items():
            assert torch.equal(resumed["optimizer"]["state"][index][name], tensor), name
    assert len(whole["random_of_others"]) == 1


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_rank_loads_and_goes_on_with_the_checkpoint_of_two(two, one, parallel, tmp_path, capsys):
    model = Rows()
    assert load_weights(two / parallel / "checkpoint.pt", model) == 6
    (tmp_path / "checkpoint.pt").write_bytes((two / parallel / "checkpoint.pt").read_bytes())
    batches = lambda first: islice(map(texts, count()), first, None)  # noqa: E731
    train(tmp_path, batches, steps=8, accumulate=2)
    train(one / "longer", batches, steps=8, accumulate=2)
    for name, wanted in weights(one / "longer").items():
        torch.testing.assert_close(weights(tmp_path)[name], wanted, rtol=0, atol=ROUNDING)
    assert "resumed at step 6. It was saved by 2 ranks" in capsys.readouterr().out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_other_settings_are_refused_on_all_ranks(two, parallel):
    for rank in range(2):
        words = (two / f"{parallel}-refused-{rank}").read_text()
        assert "checkpoint.pt belongs to another run: rate is 0.01, now 0.5" in words


def test_only_the_first_rank_writes(two):
    """Each step has one row in the log."""
    for parallel in ("ddp", "fsdp"):
        assert sorted(file.name for file in (two / parallel).iterdir()) == ["checkpoint.pt", "log.jsonl"]
        assert len((two / parallel / "log.jsonl").read_text().splitlines()) == 6


def test_an_error_of_the_first_rank_is_raised_on_all(two):
    assert [(two / f"on-first-{rank}").read_text() for rank in range(2)] == ["taken", "taken"]


def test_a_gradient_that_only_one_rank_has_is_the_sum(two):
    """In every dtype; a parameter that no rank has used keeps no gradient."""
    sums = {"both": 12.0, "half": 14.0, "first": 3.0, "second": 14.0}
    for rank in range(2):
        found = torch.load(two / f"gradients-{rank}.pt")
        assert found.pop("none") is None
        assert {name: grad.unique().tolist() for name, grad in found.items()} == {n: [x] for n, x in sums.items()}
        assert {name: grad.dtype for name, grad in found.items()} == {
            "both": torch.float64,
            "half": torch.float32,
            "first": torch.float64,
            "second": torch.float32,
        }


@pytest.mark.parametrize(("name", "sizes"), [("rows", [3, 5]), ("empty", [0, 2]), ("none", [0, 0])])
def test_gathered_rows_and_their_gradients(two, name, sizes):
    torch.manual_seed(7)
    every = torch.randn(sum(sizes), 4, dtype=torch.float64).requires_grad_()
    parts = every.split(sizes)
    sum((rank + 1) * (part @ every.T).exp().sum() for rank, part in enumerate(parts)).backward()
    for rank, wanted in enumerate(every.grad.split(sizes)):
        found = torch.load(two / f"{name}-{rank}.pt")
        assert found["counts"] == sizes
        assert torch.equal(found["gathered"], every.detach())
        torch.testing.assert_close(found["grad"], wanted, rtol=1e-12, atol=1e-12)


def test_a_rank_that_is_killed_ends_the_run_with_its_name(tmp_path):
    start = time.monotonic()
    done = torchrun("dies", tmp_path, ok=False)
    assert time.monotonic() - start < 120  # it ended, long before a timeout
    cause = done.stderr.partition("Root Cause")[2]
    assert re.search(r"rank\s*: 1 ", cause), done.stderr
    assert "SIGKILL" in cause or "-9" in cause
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3


@pytest.mark.sweep
def test_a_rank_that_raises_ends_the_run_with_its_name_and_error(tmp_path):
    done = torchrun("raises", tmp_path, ok=False)
    assert "ValueError: pairs.jsonl:7: no positive" in done.stderr
    assert re.search(r"rank\s*: 1 ", done.stderr.partition("Root Cause")[2]), done.stderr


@pytest.mark.sweep
def test_without_torchrun_the_other_rank_names_the_dead_one(tmp_path):
    """As under a scheduler that starts ranks, and ends none when another dies."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, "dies", str(tmp_path)],
            env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert "ConnectionError: rank 1 has died, or does not answer. This is rank 0 of 2" in errors[0]
    assert processes[0].returncode == 1


def test_a_batch_that_is_not_finite_is_saved_with_its_rank(two):
    words = [(two / f"poisoned-{rank}").read_text() for rank in range(2)]
    assert words[0] == words[1]
    assert "step 1: the loss is nan" in words[0]
    file = two / "poisoned" / "bad-step-1.pt"
    assert str(file) in words[0]
    (found,) = torch.load(file, weights_only=True)
    assert (found["rank"], found["batch"]) == (1, texts(1))


# Without a process group


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with ranks() as here:
        assert here == Ranks(0, 1, torch.device("cpu"))
        assert here == ALONE
        assert not dist.is_initialized()
        x_NE = torch.ones(2, 3, requires_grad=True)
        assert gather_rows(x_NE, here) is x_NE
        assert gather_counts(2, here) == [2]
        assert here.gather("a") == ["a"]
        assert here.on_first(lambda: 5) == 5
        prepare(Rows(), here, parallel="fsdp")


def test_a_group_that_is_there_is_used(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with ranks() as here:
            assert (here.rank, here.world_size) == (0, 1)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_a_count_that_does_not_fit_the_rows_is_refused():
    with pytest.raises(ValueError, match="counts has 3 rows for rank 0, x_NE has 2"):
        gather_rows(torch.ones(2, 3), Ranks(0, 2), [3, 1])


def test_a_way_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="parallel is 'dp', but must be ddp or fsdp"):
        prepare(Rows(), parallel="dp")
