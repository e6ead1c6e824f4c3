"""Runs that tests start in processes of their own: one that is killed, and ranks under `torchrun`.

python worker_runs.py KIND FOLDER
"""

import os
import signal
import sys
from itertools import count, islice
from pathlib import Path

import torch
from torch import nn

from modernbert.config import EncoderConfig
from modernbert.encoder import Encoder
from modernbert.packing import pack
from modernbert.train import distributed, loop
from modernbert.train.distributed import Ranks, gather_counts, gather_rows, ranks, sum_gradients
from modernbert.train.loop import BatchLoss, fit
from modernbert.train.prepare import prepare

WORKER, ROOT = __file__, Path(__file__).parents[2]


def environment(**more):
    """Of a process that runs this file."""
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | more


class TinyRun:
    """A regression with dropout, so that the random state matters, on batches that are all different."""

    def __init__(self, output, dropout=0.3):
        torch.manual_seed(3)
        self.output = output
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1))
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.calls = 0

    @staticmethod
    def every():
        for seed in count():
            x_B4 = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
            yield x_B4, x_B4.sum(1, keepdim=True)

    def loss(self, batch):
        self.calls += 1
        x_B4, y_B1 = batch
        error_B1 = self.model(x_B4) - y_B1
        return BatchLoss(error_B1.square().mean(), len(x_B4), {"error": error_B1.abs().mean()}, len(x_B4))

    def fit(self, loss=None, *, batches=lambda first: islice(TinyRun.every(), first, None), stop_at=None, **changes):
        def loss_or_stop(batch):
            if stop_at == self.calls:
                raise KeyboardInterrupt
            return (loss or self.loss)(batch)

        options = {"steps": 12, "save_minutes": 0.0, "settings": {"rate": 0.1}, "schedule": lambda step: 1 / (step + 1)}
        fit(self.model, self.optimizer, batches, loss_or_stop, output=self.output, **options | changes)
        return self


def run(folder):
    tiny = TinyRun(folder)
    loss = tiny.loss
    tiny.loss = lambda batch: print("batch", flush=True) or loss(batch)
    tiny.fit(steps=40)


# Ranks


STEPS = 6


class Rows(nn.Module):
    """An encoder with a head whose loss is a mean over some rows of each text, in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        config = EncoderConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        self.encoder, self.head, self.unused = Encoder(config), nn.Linear(16, 3), nn.Linear(2, 2)
        self.double()

    def forward(self, batch, rows):
        return self.head(self.encoder(batch, rows=rows))


def texts(index):
    """Batches of other numbers of texts, tokens and rows."""
    random = torch.Generator().manual_seed(index)
    lengths = torch.randint(2, 9, (2 + index % 3,), generator=random).tolist()
    return [torch.randint(50, (length,), generator=random).tolist() for length in lengths]


def merged(index, world):
    """The batches of all ranks as one."""
    return [text for rank in range(world) for text in texts(world * index + rank)]


def rows_loss(model, batch):
    packed = pack(batch)
    rows_Q = (packed.input_ids % 3 > 0).nonzero().squeeze(1)
    error = (model(packed, rows_Q) - (packed.input_ids[rows_Q, None] / 50.0)).square().mean()
    return BatchLoss(error, packed.num_tokens, {"root": error.sqrt()}, len(rows_Q))


def train(folder, batches, here=distributed.ALONE, *, parallel="ddp", steps=STEPS, rate=1e-2, **options):
    folder.mkdir(exist_ok=True)
    model = Rows()
    prepare(model, here, parallel=parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    settings = {"rate": rate}

    def loss(batch):
        return rows_loss(model, batch)

    options = {"schedule": lambda step: 1.0, "save_minutes": 0.0, "clip": 0.1} | options
    fit(model, optimizer, batches, loss, output=folder, settings=settings, steps=steps, ranks=here, **options)
    return model


def shared(here):
    """The loader of a rank: batches rank, rank + world_size, ..."""
    return lambda first: islice(map(texts, count()), here.rank + first * here.world_size, None, here.world_size)


def equal(folder):
    """Everything that two ranks do together, in one start, because a start takes seconds."""
    with ranks("cpu") as here:
        loop.LOG_STEPS = 1
        for parallel in ("ddp", "fsdp"):
            train(folder / parallel, shared(here), here, parallel=parallel)
            train(folder / f"{parallel}-accumulated", shared(here), here, parallel=parallel, steps=3, accumulate=2)
            train(folder / f"{parallel}-resumed", shared(here), here, parallel=parallel, steps=2)
            train(folder / f"{parallel}-resumed", shared(here), here, parallel=parallel)
            try:
                train(folder / parallel, shared(here), here, parallel=parallel, rate=0.5)
            except ValueError as error:
                (folder / f"{parallel}-refused-{here.rank}").write_text(str(error))
        rows(folder, here)
        gradients(folder, here)
        errors(folder, here)
        poisoned(folder, here)


def rows(folder, here: Ranks):
    """Each rank scores its own rows against those of all ranks, as with negatives from all ranks."""
    for name, sizes in (("rows", [3, 5]), ("empty", [0, 2]), ("none", [0, 0])):
        torch.manual_seed(7)
        every = torch.randn(sum(sizes), 4, dtype=torch.float64)
        start = sum(sizes[: here.rank])
        mine = every[start : start + sizes[here.rank]].clone().requires_grad_()
        counts = gather_counts(len(mine), here)
        gathered = gather_rows(mine, here, counts)
        loss = (mine @ gathered.T).exp().sum() * (here.rank + 1)
        loss.backward()
        torch.save(
            {"counts": counts, "gathered": gathered.detach(), "grad": mine.grad}, folder / f"{name}-{here.rank}.pt"
        )


def gradients(folder, here: Ranks):
    """Of parameters that both ranks use, one, and none, in two dtypes."""
    kinds = {"both": torch.float64, "half": torch.float32, "first": torch.float64, "second": torch.float32}
    found = {
        name: nn.Parameter(torch.zeros(2, 3, dtype=dtype)) for name, dtype in {**kinds, "none": torch.float64}.items()
    }
    used = {"both", "half", "first" if here.is_first else "second"}
    for number, name in enumerate(kinds):
        if name in used:
            found[name].grad = torch.full_like(found[name], 10.0 * here.rank + number + 1)
    sum_gradients(found.values(), here)
    torch.save({name: each.grad for name, each in found.items()}, folder / f"gradients-{here.rank}.pt")


def errors(folder, here: Ranks):
    def fails():
        raise FileExistsError("taken")

    try:
        here.on_first(fails)
    except FileExistsError as error:
        (folder / f"on-first-{here.rank}").write_text(str(error))
    assert here.on_first(lambda: "done") == "done"
    assert here.gather(here.rank) == [0, 1]


def poisoned(folder, here: Ranks):
    """The loss of one rank is NaN."""
    model = Rows()
    prepare(model, here)

    def loss(batch):
        part = rows_loss(model, batch)
        return part._replace(loss=part.loss * float("nan")) if here.rank == 1 else part

    optimizer = torch.optim.AdamW(model.parameters())
    (folder / "poisoned").mkdir(exist_ok=True)
    options = {"output": folder / "poisoned", "settings": {}, "steps": 3, "schedule": lambda step: 1.0}
    try:
        fit(model, optimizer, shared(here), loss, ranks=here, **options)
    except FloatingPointError as error:
        (folder / f"poisoned-{here.rank}").write_text(str(error))


def fails_at(folder, action):
    """Rank 1 does something at its fourth batch."""
    distributed.PATIENCE = 4.0
    with ranks("cpu", timeout_minutes=1.0) as here:

        def batches(first):
            for place, batch in enumerate(shared(here)(first)):
                if here.rank == 1 and place == 3:
                    action()
                yield batch

        train(folder / "run", batches, here)


def dies(folder):
    fails_at(folder, lambda: os.kill(os.getpid(), signal.SIGKILL))


def raises(folder):
    def action():
        raise ValueError("pairs.jsonl:7: no positive")

    fails_at(folder, action)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kinds = {"run": run, "equal": equal, "dies": dies, "raises": raises}
    kinds[sys.argv[1]](Path(sys.argv[2]))
