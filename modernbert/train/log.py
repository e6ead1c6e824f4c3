"""What a run tells: a line to read, the same as JSON in `log.jsonl`, and trackers such as TensorBoard."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..files import replacing
from .batch_loss import BatchLoss
from .distributed import Ranks
from .flops import Utilisation

LOG = "log.jsonl"


class Tracker(Protocol):
    """Takes the rows of the log. Only the first rank calls it."""

    def start(self, step: int) -> None:
        """Before the first row; the run goes on after `step`, so that later rows of a run before it are void."""

    def add(self, step: int, row: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class Log:
    """Means over the steps since the last row. Every rank adds and writes; the first one prints and keeps.

    Args:
        step, steps: where the run begins, and where it ends. Rows in the file beyond `step` are of steps that are
            taken again, because the run before was killed after its last checkpoint: they are removed.
        utilisation: what MFU is computed from; None: without it.
    """

    def __init__(
        self,
        file: Path,
        step: int,
        steps: int,
        ranks: Ranks,
        utilisation: Utilisation | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.file, self.steps, self.ranks, self.utilisation = file, steps, ranks, utilisation
        self.trackers = trackers if ranks.is_first else ()
        if ranks.is_first:
            keep_until(file, step)
            if utilisation is not None:
                rate = f"{utilisation.peak.flops / 1e12:,.1f} TFLOP/s"
                print(f"MFU is the share of {rate} on each rank ({utilisation.peak.source})", flush=True)
        for tracker in self.trackers:
            tracker.start(step)
        self._clear()

    def _clear(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.tokens = 0.0
        self.parts: list[BatchLoss] = []
        self.started = time.monotonic()

    def add_step(self, parts: Sequence[BatchLoss], loss: float, norm: float, tokens: float) -> None:
        """The batches of this rank, and what all ranks have had in the step together."""
        self.parts += parts
        self.losses.append(loss)
        self.norms.append(norm)
        self.tokens += tokens

    def write(self, step: int, learning_rate: float) -> None:
        seconds = time.monotonic() - self.started
        means = {"loss": sum(self.losses) / len(self.losses), **self._metrics()}
        speed = self.tokens / seconds
        left = round((self.steps - step) * seconds / len(self.losses))
        row = {name: round(value, 4) for name, value in means.items()}
        row |= {"grad_norm": round(sum(self.norms) / len(self.norms), 4), "tokens_per_s": round(speed)}
        words = [f"step {step:,}/{self.steps:,}", *(f"{name} {value:.4f}" for name, value in means.items())]
        words.append(f"{round(speed):,} tokens/s")
        if self.utilisation is not None:
            row["mfu"] = round(self.utilisation.share(speed / self.ranks.world_size), 4)
            words.append(f"MFU {100 * row['mfu']:.1f} %")
        row |= {"lr": learning_rate, "seconds_left": left, "cpu_s": round(time.process_time())}
        words += [f"lr {learning_rate:.2e}", f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"]
        self._keep(step, row, "  ".join(words))
        self._clear()

    def write_validation(self, step: int, numbers: Mapping[str, float], *, is_best: bool) -> None:
        row = {f"valid_{name}": round(value, 4) for name, value in numbers.items()}
        words = [f"step {step:,}", *(f"{name} {value:.4f}" for name, value in row.items())]
        self._keep(step, row, "  ".join(words) + ("  best so far" if is_best else ""))

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()

    def _metrics(self) -> dict[str, float]:
        """The mean of each metric over the units of all batches that have it, on all ranks."""
        parts: dict[str, list[Tensor]] = {}
        for part in self.parts:
            for name, value in part.metrics.items():
                count = torch.full_like(value, 1, dtype=torch.float32) * part.count
                parts.setdefault(name, []).append(torch.stack([value.float() * count, count]))
        mine = {name: torch.stack(found).sum(0).tolist() for name, found in parts.items()}
        every = self.ranks.gather(mine)
        names = dict.fromkeys(name for each in every for name in each)
        sums = {name: [each[name] for each in every if name in each] for name in names}
        return {name: sum(s for s, _ in found) / max(sum(n for _, n in found), 1) for name, found in sums.items()}

    def _keep(self, step: int, row: Mapping[str, float], words: str) -> None:
        if not self.ranks.is_first:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN
        append(self.file, json.dumps({"step": step, **finite}) + "\n")
        print(words, flush=True)
        for tracker in self.trackers:
            tracker.add(step, row)


def append(file: Path, text: str) -> None:
    """Write `text` behind the content of a file. OSError: no room, with the path."""
    try:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(text)
    except OSError as error:
        error.filename = str(file)  # a full disk has no name
        raise


def keep_until(file: Path, step: int) -> None:
    """Remove the rows of `log.jsonl` after `step`, and a last row that was not finished. Atomic."""
    if not file.exists():
        return
    old = file.read_bytes().splitlines(keepends=True)
    new = [line for line in old if line.endswith(b"\n") and not _is_after(line, step)]
    if new != old:
        with replacing(file) as beside:
            beside.write_bytes(b"".join(new))


def _is_after(line: bytes, step: int) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] > step


class TensorBoard:
    """Writes the rows as scalars to a folder that `tensorboard --logdir FOLDER` shows.

    Raises:
        ModuleNotFoundError: the extra `tensorboard` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:  # torch raises its own if tensorboard is too old
            raise ModuleNotFoundError("TensorBoard needs an extra: pip install 'modernbert[tensorboard]'") from error
        self._open, self._folder = SummaryWriter, folder

    def start(self, step: int) -> None:
        self._writer = self._open(str(self._folder), purge_step=step + 1)

    def add(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a run that is killed keeps what it has shown

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Sends the rows to Weights & Biases. A resumed run goes on in the same run there: its id is in `wandb-id`.

    Args:
        folder: the output of the run. settings: shown as the config. options: of `wandb.init`, such as `project`.

    Raises:
        ModuleNotFoundError: the extra `wandb` is not installed.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], **options: Any) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ModuleNotFoundError("Weights & Biases needs an extra: pip install 'modernbert[wandb]'") from error
        self._wandb, self._folder, self._options = wandb, folder, {"config": dict(settings), **options}

    def start(self, step: int) -> None:
        name = self._folder / "wandb-id"
        if not name.exists():
            with replacing(name) as beside:
                beside.write_text(uuid.uuid4().hex, encoding="utf-8")
        identity = name.read_text(encoding="utf-8")
        self._run = self._wandb.init(dir=str(self._folder), id=identity, resume="allow", **self._options)

    def add(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        self._run.finish()
