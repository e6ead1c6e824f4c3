"""The training loop of every recipe: steps, their guard, the log, checkpoints and resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..files import replacing
from .options import check_same

B = TypeVar("B")

LOG_STEPS = 20
"""Steps of a line in the log."""


class BatchLoss(NamedTuple):
    """What a recipe computes of a batch: a scalar with its graph, the tokens read, and scalars for the log."""

    loss: Tensor
    tokens: int
    metrics: dict[str, Tensor]


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[B],
    batch_loss: Callable[[B], BatchLoss],
    *,
    output: Path,
    settings: Mapping[str, object],
    steps: int,
    schedule: Callable[[int], float],
    accumulate: int = 1,
    save_minutes: float = 5.0,
) -> None:
    """Train from the checkpoint in `output`, if there is one, to the last step.

    A resumed run reaches the weights of an uninterrupted one, bit for bit on the same machine, if `batches` and
    `batch_loss` are functions of the settings, of PyTorch's random state and of the weights.

    Args:
        batches: at least `steps * accumulate` of them, the same on every start. A resumed run skips those it has had.
        output: an existing folder for `checkpoint.pt` and `log.jsonl`.
        settings: what a resumed run must share; kept in the checkpoint.
        schedule: the factor of the optimizer's learning rates at a step, counted from 0.
        accumulate: batches of a step; their gradients are averaged.

    Raises:
        FloatingPointError: a loss, a gradient or a weight is not finite. The step is not taken, nothing is saved.
        ValueError: the checkpoint is damaged, has other settings, or is beyond `steps`.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    first = load_checkpoint(output / "checkpoint.pt", model, optimizer, settings)
    if first > steps:
        raise ValueError(f"{output} has a checkpoint of step {first:,}: ask for as many steps or more, or a new output")
    coming = islice(batches, first * accumulate, None)
    log = Log(output / "log.jsonl", steps)
    saved = time.monotonic()
    model.train()
    for step in range(first, steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step)
        optimizer.zero_grad(set_to_none=True)
        parts = []
        for _ in range(accumulate):
            part = batch_loss(next(coming))
            (part.loss / accumulate).backward()
            metrics = {name: value.detach() for name, value in part.metrics.items()}
            parts.append(BatchLoss(part.loss.detach(), part.tokens, metrics))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss, norm = torch.stack([torch.stack([part.loss for part in parts]).mean(), norm]).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {step + 1:,}: the loss is {loss}, the norm of the gradients {norm}. The step was not taken, and "
                f"{output} keeps the last checkpoint. Try a lower learning rate, or look for damaged data"
            )
        optimizer.step()
        log.add(loss, parts)
        last = step + 1 == steps
        if last or (step + 1) % LOG_STEPS == 0:
            log.write(step + 1, max(group["lr"] for group in optimizer.param_groups))
        if last or time.monotonic() - saved > 60 * save_minutes:
            save_checkpoint(output / "checkpoint.pt", model, optimizer, settings, step + 1)
            saved = time.monotonic()


def save_checkpoint(
    file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, object], step: int
) -> None:
    """Atomic: a run that is killed here goes on from the checkpoint before."""
    check_finite(model, f"step {step:,}")
    device = next(model.parameters()).device
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random}
    with replacing(file) as part:
        torch.save({"settings": dict(settings), "step": step, **state}, part)


def load_checkpoint(
    file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, object]
) -> int:
    """Restore the model, the optimizer and the random state; return the step to go on from, 0 without a checkpoint."""
    if not file.exists():
        return 0
    state = read_checkpoint(file)
    check_same(file, state["settings"], settings)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"]["cpu"])
    device = next(model.parameters()).device
    if device.type == "cuda" and "cuda" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["cuda"], device)
    print(f"resumed at step {state['step']:,}", flush=True)
    return state["step"]


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The content of a checkpoint, mapped. ValueError: damaged, or not written by `save_checkpoint`."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # as in `pickles.read`: a damaged file raises nearly any exception
        raise ValueError(f"{file} is damaged, or not a checkpoint: {error}") from error
    if not isinstance(state, dict) or not {"settings", "step", "model", "optimizer", "random"} <= state.keys():
        raise ValueError(f"{file} is not the checkpoint of a recipe")
    return state


def check_finite(model: nn.Module, when: str) -> None:
    """Raise a FloatingPointError that names the first parameter with a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise FloatingPointError(f"{when}: {name} is not finite, so nothing was saved. Try a lower learning rate")


class Log:
    """Means over the steps since the last line: a line to read on stdout, and the same as JSON in a file."""

    def __init__(self, file: Path, steps: int) -> None:
        self.file, self.steps = file, steps
        self._clear()

    def _clear(self) -> None:
        self.losses: list[float] = []
        self.parts: list[BatchLoss] = []
        self.started = time.monotonic()

    def add(self, loss: float, parts: list[BatchLoss]) -> None:
        self.losses.append(loss)
        self.parts += parts

    def write(self, step: int, learning_rate: float) -> None:
        seconds = time.monotonic() - self.started
        metrics = {
            name: torch.stack([part.metrics[name].float() for part in self.parts]).mean().item()
            for name in self.parts[0].metrics
        }
        means = {"loss": sum(self.losses) / len(self.losses), **metrics}
        speed = round(sum(part.tokens for part in self.parts) / seconds)
        left = round((self.steps - step) * seconds / len(self.losses))
        row = {"step": step, **{name: round(value, 4) for name, value in means.items()}, "tokens_per_s": speed}
        row |= {"lr": learning_rate, "seconds_left": left, "cpu_s": round(time.process_time())}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        words = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        print(
            f"step {step:,}/{self.steps:,}  {words}  {speed:,} tokens/s  lr {learning_rate:.2e}  {clock} left",
            flush=True,
        )
        self._clear()
