"""The last and the best checkpoint: written in one step, refused by name, and resumed bit-equal after a kill -9."""

import random
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn
from worker_runs import WORKER, TinyRun, environment

from modernbert.train.checkpoints import load_weights, read_checkpoint
from modernbert.train.validation import Validation


@contextmanager
def disk_for(size):
    """Files cannot grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_killed_at_random_steps_reaches_the_same_weights(tmp_path):
    """`kill -9`, twice, at any moment: in a forward pass, in the optimizer, in the writing of a checkpoint."""
    folder = tmp_path / "killed"
    folder.mkdir()
    command = [sys.executable, WORKER, "run", str(folder)]
    for _ in range(2):
        calls = random.SystemRandom().randint(3, 15)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
            for line in process.stdout:
                if line.startswith("batch"):
                    calls -= 1
                if not calls:
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.returncode == -signal.SIGKILL
    subprocess.run(command, stdout=subprocess.DEVNULL, env=environment(), check=True)
    (tmp_path / "whole").mkdir()
    whole = TinyRun(tmp_path / "whole").fit(steps=40)
    for name, tensor in read_checkpoint(folder / "checkpoint.pt")["model"].items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name
    rows = [line.split(",")[0] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows == [line.split(",")[0] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    TinyRun(tmp_path).fit(steps=2)
    file = tmp_path / "checkpoint.pt"
    before = file.read_bytes()
    with disk_for(len(before) // 2), pytest.raises(OSError, match=r"checkpoint\.pt") as caught:
        TinyRun(tmp_path).fit(steps=4)
    assert "too large" in str(caught.value)
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]
    TinyRun(tmp_path).fit(steps=4)
    assert read_checkpoint(file)["step"] == 4


OTHER_MODELS = {
    "wider": (nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.3), nn.Linear(9, 1)), r"0\.weight is float32 \[8, 4\], in"),
    "without a bias": (
        nn.Sequential(nn.Linear(4, 8, bias=False), nn.Dropout(0.3), nn.Linear(8, 1)),
        r"0\.bias is only in the file",
    ),
    "deeper": (
        nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1), nn.Linear(1, 1)),
        r"3\.bias is only in the model; 3\.weight is only in the model",
    ),
    "another dtype": (
        nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1)).bfloat16(),
        r"0\.bias is float32 \[8\], in the model bfloat16 \[8\]",
    ),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_checkpoint_of_another_model_names_the_parameters(tmp_path, name):
    TinyRun(tmp_path).fit(steps=1)
    other = TinyRun(tmp_path)
    other.model, words = OTHER_MODELS[name]
    other.optimizer = torch.optim.AdamW(other.model.parameters(), lr=0.1)
    before = {key: tensor.clone() for key, tensor in other.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of another model: .*" + words):
        other.fit(steps=2)
    for key, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    with pytest.raises(ValueError, match=words):
        load_weights(tmp_path / "checkpoint.pt", other.model)


def test_many_differences_are_counted(tmp_path):
    TinyRun(tmp_path).fit(steps=1)
    other = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
    with pytest.raises(ValueError, match=r"; and 10 more\. Choose another --output"):
        load_weights(tmp_path / "checkpoint.pt", other)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    TinyRun(tmp_path).fit(steps=1)
    for optimizer, words in (
        (lambda model: torch.optim.SGD(model.parameters(), lr=0.1), r"AdamW .*, now SGD"),
        (
            lambda model: torch.optim.AdamW([{"params": [each]} for each in model.parameters()], lr=0.1),
            r"AdamW with groups of \[4\] parameters, now AdamW with \[1, 1, 1, 1\]",
        ),
    ):
        other = TinyRun(tmp_path)
        other.optimizer = optimizer(other.model)
        with pytest.raises(ValueError, match=r"checkpoint\.pt is of another optimizer: " + words):
            other.fit(steps=2)


def test_a_run_without_checkpoint_begins_again(tmp_path):
    run = TinyRun(tmp_path)
    run.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(KeyboardInterrupt):
        run.fit(stop_at=3, save_minutes=60.0)
    assert not (tmp_path / "checkpoint.pt").exists()
    assert TinyRun(tmp_path).fit(steps=1).calls == 1


def test_the_position_in_the_data_follows_from_the_steps(tmp_path):
    """Also where the number of batches of a step grows."""
    asked = []

    def batches(first):
        asked.append(first)
        return islice(TinyRun.every(), first, None)

    def grow(step):
        return 1 + step // 2

    TinyRun(tmp_path).fit(steps=3, batches=batches, accumulate=grow)
    run = TinyRun(tmp_path).fit(steps=5, batches=batches, accumulate=grow)
    assert asked == [0, 1 + 1 + 2]
    assert run.calls == 2 + 3


def test_it_can_be_read_by_pytorch_alone(tmp_path):
    run = TinyRun(tmp_path).fit(steps=2)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model = TinyRun(tmp_path).model
    model.load_state_dict(state["model"])
    for got, wanted in zip(model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(got, wanted)
    assert (state["step"], state["settings"]) == (2, {"rate": 0.1})


def test_a_fitted_model_has_to_share_the_settings_first(tmp_path):
    """Settings are compared before tensors, because they say what to do."""
    TinyRun(tmp_path).fit(steps=1)
    other = TinyRun(tmp_path)
    other.model = OTHER_MODELS["wider"][0]
    other.optimizer = torch.optim.AdamW(other.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"another run: rate is 0\.1, now 0\.2"):
        other.fit(steps=2, settings={"rate": 0.2})


class Average:
    """A little moving average of the weights."""

    def __init__(self, run):
        self.run, self.values = run, [parameter.detach().clone() for parameter in run.model.parameters()]
        run.optimizer.register_step_post_hook(lambda *_: self.update())

    @torch.no_grad()
    def update(self):
        for value, parameter in zip(self.values, self.run.model.parameters(), strict=True):
            value.lerp_(parameter, 0.25)

    def state_dict(self):
        return dict(enumerate(self.values))

    def load_state_dict(self, state):
        self.values = list(state.values())


def test_an_average_of_the_weights_resumes_too(tmp_path):
    averages = {}
    for name, stops in (("whole", [9]), ("killed", [4, 9])):
        (tmp_path / name).mkdir()
        for last in stops:
            run = TinyRun(tmp_path / name)
            averages[name] = Average(run)
            run.fit(steps=last, stateful={"ema": averages[name]})
    for got, wanted in zip(averages["killed"].values, averages["whole"].values, strict=True):
        assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match=r"keeps the state of \['ema'\], and this run has \[\]"):
        TinyRun(tmp_path / "whole").fit(steps=10)


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    mine = [".best.pt.original", ".checkpoint.pt.mine"]
    for name in (".checkpoint.pt.0123abcd", ".best.pt.0123abcd", *mine):
        (tmp_path / name).write_bytes(b"half")
    TinyRun(tmp_path).fit(steps=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*mine, "checkpoint.pt", "log.jsonl"]


def test_the_best_weights_of_other_settings_are_refused(tmp_path):
    TinyRun(tmp_path).fit(steps=2, validation=Validation(lambda: {"loss": 1.0}, 1))
    (tmp_path / "checkpoint.pt").unlink()
    before = (tmp_path / "best.pt").read_bytes()
    with pytest.raises(ValueError, match=r"best\.pt belongs to another run: rate is 0\.1, now 0\.2"):
        TinyRun(tmp_path).fit(steps=2, settings={"rate": 0.2})
    assert (tmp_path / "best.pt").read_bytes() == before


def test_settings_that_no_file_gives_back_are_refused_at_the_start(tmp_path):
    run = TinyRun(tmp_path)
    with pytest.raises(TypeError, match=r"settings must be numbers, texts, lists and dicts: .*PosixPath"):
        run.fit(settings={"folder": tmp_path})
    assert run.calls == 0
    TinyRun(tmp_path).fit(steps=1, settings={"rates": (1, 2)})
    TinyRun(tmp_path).fit(steps=2, settings={"rates": (1, 2)})


def test_a_checkpoint_that_could_not_be_read_again_replaces_nothing(tmp_path):
    """PyTorch saves any object, but loads few."""
    TinyRun(tmp_path).fit(steps=1, schedule=lambda step: np.float64(0.5))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    run = TinyRun(tmp_path)
    run.optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.param_groups[0].update(folder=tmp_path))
    with pytest.raises(ValueError, match=r"checkpoint\.pt was not written, since it could hold tensors, numbers"):
        run.fit(steps=2)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
