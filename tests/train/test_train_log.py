"""The log of a run: one row for each step that counts, means over units, MFU, TensorBoard and W&B."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from worker_runs import TinyRun

from modernbert.config import EncoderConfig
from modernbert.encoder import Encoder
from modernbert.packing import pack
from modernbert.train import flops
from modernbert.train.batch_loss import BatchLoss
from modernbert.train.distributed import ALONE
from modernbert.train.flops import Peak, Utilisation, flops_per_token, matmul_rate, peak
from modernbert.train.log import Log, TensorBoard, WandB, keep_until


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_metrics_are_means_over_units_of_the_batches_that_have_them(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0, 2, ALONE)
    one = BatchLoss(torch.tensor(1.0), 10, {"a": torch.tensor(2.0)}, 3)
    two = BatchLoss(torch.tensor(5.0), 20, {"a": torch.tensor(6.0), "b": torch.tensor(7.0)}, torch.tensor(1))
    log.add_step([one], 1.0, 0.5, 10)
    log.add_step([two], 5.0, 1.5, 20)
    log.write(2, 1e-3)
    (row,) = rows(tmp_path)
    assert (row["a"], row["b"], row["loss"], row["grad_norm"]) == (3.0, 7.0, 3.0, 1.0)


def test_the_log_of_a_killed_run_has_each_step_once(tmp_path):
    file = tmp_path / "log.jsonl"
    lines = ['{"step": 20, "loss": 1}\n', "a note\n", '{"step": 40, "loss": 1}\n', '{"step": 60, "lo']
    file.write_text("".join(lines))
    keep_until(file, 30)
    assert file.read_text() == "".join(lines[:2])
    keep_until(file, 30)
    keep_until(tmp_path / "none.jsonl", 30)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_the_rows_of_the_checkpoint_itself_stay(tmp_path):
    """They were written before it, and no step of them is taken again."""
    file = tmp_path / "log.jsonl"
    lines = [f'{{"step": {step}, "loss": 1.0}}\n' for step in (19, 20, 20, 21)]
    file.write_text("".join(lines))
    keep_until(file, 20)
    assert file.read_text() == "".join(lines[:3])


def test_what_is_not_a_number_is_null_in_json(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0, 2, ALONE)
    log.write_validation(1, {"loss": float("nan")}, is_best=False)
    assert rows(tmp_path) == [{"step": 1, "valid_loss": None}]


# MFU


def test_flops_are_those_that_pytorch_counts():
    """Of all matrix products, forward and backward; attention over whole sequences is two products for each head."""
    from torch.utils.flop_counter import FlopCounterMode

    config = EncoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
    )
    encoder = Encoder(config)
    with FlopCounterMode(display=False) as counter:
        encoder(pack([[1] * 20, [2] * 20])).sum().backward()
    counted = sum(
        count for op, count in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm")
    )
    assert flops_per_token(config, length=0) * 40 == counted


def test_attention_and_the_decoder_count():
    config = EncoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
    )
    bare = flops_per_token(config, length=0)
    # One global layer sees all 1,000 tokens, two local ones 129. Two products of 2 * D FLOPs, three times.
    assert flops_per_token(config, length=1000) - bare == 12 * 32 * (1000 + 2 * 129)
    assert flops_per_token(config, length=0, decoded=0.25) - bare == 6 * 0.25 * 32 * 64


def test_a_base_model_takes_its_published_flops():
    """anchors.md: about 0.83 GFLOP a token at 1,024 tokens with 30 % decoded."""
    found = flops_per_token(EncoderConfig.preset("modernbert-base"), length=1024, decoded=0.3)
    assert found == pytest.approx(0.83e9, rel=0.1)


def test_the_peak_is_published_or_measured(monkeypatch):
    assert matmul_rate(torch.device("cpu"), torch.float32) > 1e8
    assert peak(torch.device("cpu"), torch.float32).source == "measured matrix product in float32"
    monkeypatch.setattr(flops, "matmul_rate", lambda device, dtype: 5.0)
    for name, rate in {
        "NVIDIA H200": 989e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40": 5.0,  # not an L4, and not in the table
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak(torch.device("cuda"), torch.bfloat16).flops == rate
        assert peak(torch.device("cuda"), torch.float32).flops == 5.0


def test_the_line_and_the_row_have_mfu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flops, "matmul_rate", lambda device, dtype: 1e9)
    TinyRun(tmp_path).fit(steps=20, flops_per_token=1000.0)
    (row,) = rows(tmp_path)
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * 1000 / 1e9, abs=1e-4)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "MFU is the share of 0.0 TFLOP/s on each rank (measured matrix product in float32)"
    assert f"tokens/s  MFU {100 * row['mfu']:.1f} %  lr" in last


def test_several_ranks_share_the_tokens():
    utilisation = Utilisation(2.0, Peak(100.0, "here"))
    assert utilisation.share(25.0) == 0.5


# Trackers


def test_tensorboard_shows_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path / "board")
    log = Log(tmp_path / "log.jsonl", 0, 60, ALONE, trackers=[board])
    for step in (20, 40):
        log.write_validation(step, {"loss": step / 10}, is_best=True)
    # Killed here; goes on from step 30.
    log = Log(tmp_path / "log.jsonl", 30, 60, ALONE, trackers=[TensorBoard(tmp_path / "board")])
    for step in (40, 60):
        log.write_validation(step, {"loss": step / 10}, is_best=True)
    log.close()
    board.close()
    found = EventAccumulator(str(tmp_path / "board")).Reload().Scalars("valid_loss")
    assert [(event.step, event.value) for event in found] == [(20, 2.0), (40, 4.0), (60, 6.0)]
    assert [row["step"] for row in rows(tmp_path)] == [20, 40, 60]


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("tensorboard", lambda folder: TensorBoard(folder), "tensorboard"),
        ("wandb", lambda folder: WandB(folder, {}), "wandb"),
    ],
)
def test_a_tracker_that_is_not_installed_names_its_extra(tmp_path, monkeypatch, module, make, extra):
    for name in [*sys.modules]:
        if name.startswith(("torch.utils.tensorboard", "tensorboard")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'modernbert\[{extra}\]'"):
        make(tmp_path)


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    """Only the calls are tested: what wandb does with them is its own matter."""
    calls = []

    class Run:
        def log(self, row, step):
            calls.append((step, row))

        def finish(self):
            calls.append("finish")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: calls.append(how) or Run()))
    for step in (0, 20):
        tracker = WandB(tmp_path, {"rate": 0.1}, project="p", mode="offline")
        tracker.start(step)
        tracker.add(step + 20, {"loss": 1.0})
        tracker.close()
    assert calls[0] == calls[3]
    assert calls[0]["config"] == {"rate": 0.1}
    assert (calls[0]["project"], calls[0]["mode"], calls[0]["resume"]) == ("p", "offline", "allow")
    assert calls[1:3] == [(20, {"loss": 1.0}), "finish"]


def test_wandb_itself_keeps_one_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (0, 20):
        tracker = WandB(tmp_path, {"rate": 0.1}, project="p", mode="offline")
        tracker.start(step)
        tracker.add(step + 20, {"loss": 1.0})
        tracker.close()
    identity = (tmp_path / "wandb-id").read_text()
    assert [file.stem for file in (tmp_path / "wandb").rglob("*.wandb")] == [f"run-{identity}"] * 2


def test_a_run_gives_its_rows_to_the_trackers(tmp_path):
    seen = []

    class Tracker:
        def start(self, step):
            seen.append(step)

        def add(self, step, row):
            seen.append((step, row["loss"]))

        def close(self):
            seen.append("closed")

    TinyRun(tmp_path).fit(steps=21, trackers=[Tracker()])
    assert seen == [0, *((row["step"], row["loss"]) for row in rows(tmp_path)), "closed"]
