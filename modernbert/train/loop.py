"""The training loop of every recipe: `fit`, and in it one step after another.

What is around a step is in files of its own: `distributed` (ranks), `checkpoints`, `validation`, `guard`, `log`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .batch_loss import BatchLoss as BatchLoss
from .batch_loss import totals
from .checkpoints import (
    BEST,
    LAST,
    NOTHING,
    Progress,
    Stateful,
    check_settings,
    load_checkpoint,
    save_checkpoint,
    save_weights,
)
from .distributed import ALONE, Ranks, no_sync, sum_gradients
from .flops import Utilisation, peak
from .guard import save_bad_batches
from .log import LOG, Log, Tracker
from .options import as_json
from .validation import Validation

B = TypeVar("B")

LOG_STEPS = 20
"""Steps of a line in the log."""


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Iterable[B]],
    batch_loss: Callable[[B], BatchLoss],
    *,
    output: Path,
    settings: Mapping[str, object],
    steps: int,
    schedule: Callable[[int], float],
    accumulate: int | Callable[[int], int] = 1,
    clip: float | None = 1.0,
    autocast: bool = False,
    validation: Validation | None = None,
    ranks: Ranks = ALONE,
    save_minutes: float = 5.0,
    flops_per_token: float | None = None,
    trackers: Sequence[Tracker] = (),
    stateful: Mapping[str, Stateful] = NOTHING,
) -> None:
    """Train from the checkpoint in `output`, if there is one, to the last step. All ranks call it.

    A step is the mean over the units of all its batches on all ranks (`BatchLoss.count`). So its gradients do not
    depend on how the units were cut into batches, but for rounding.

    A resumed run reaches the weights of an uninterrupted one, bit for bit on the same machine and number of ranks, if
    `batches` and `batch_loss` are functions of the settings, of PyTorch's random state and of the weights.

    Args:
        model: in float32, or in bfloat16 for pure bfloat16. With several ranks, `prepare` has seen it.
        optimizer: of parameters of the model, or of modules in `stateful`. It is the one that says what is trained:
            other parameters are not clipped, and nothing is sent of them.
        batches: called once, with the number of batches that this rank has had; gives those that follow, the same on
            every start. `lambda first: islice(each, first, None)` makes one of any iterable.
        output: an existing folder, which all ranks share, for `checkpoint.pt`, `best.pt` and `log.jsonl`.
        settings: what a resumed run must share, in kinds that JSON has; kept in the checkpoint.
        schedule: the factor of the optimizer's learning rates at a step, counted from 0.
        accumulate: batches of a step on a rank; or their number at a step, for a batch size that grows.
        clip: the largest norm of the gradients of a step; None: any.
        autocast: compute `batch_loss` in bfloat16 where PyTorch holds that to be safe; the weights stay in float32.
        validation: what to measure every so many steps. `best.pt` has the weights of its best number.
        save_minutes: minutes between two checkpoints; there is always one after the last step.
        flops_per_token: see `flops.flops_per_token`. With it the log has MFU.
        trackers: take the rows of the log too, such as `log.TensorBoard`.
        stateful: what else a checkpoint keeps, by name. `{"ema": ema}` with
            `optimizer.register_step_post_hook(lambda *_: ema.update())` makes an average of the weights resume too.

    Raises:
        FloatingPointError: a loss, a gradient or a weight is not finite. The step is not taken, nothing is overwritten,
            and the batches of the step are in a new file, `bad-step-N.pt`.
        ValueError: the checkpoint is damaged, has other settings, is of another model or is beyond `steps`; the
            optimizer has nothing to train, or what no checkpoint would keep; or the batches have ended.
    """
    settings = as_json(settings)  # now, and not at the first checkpoint
    if steps < 0:
        raise ValueError(f"steps is {steps}, but must be 0 or more")
    # By the name that PyTorch's own schedulers use: after a call, "lr" is that of its last step.
    rates = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    parameters = trained_parameters(model, optimizer, stateful)
    device = parameters[0].device
    batches_at = accumulate if callable(accumulate) else lambda step: accumulate
    check_settings(output / BEST, settings)
    first, best = load_checkpoint(output / LAST, model, optimizer, settings, ranks, stateful)
    if first > steps:
        raise ValueError(f"{output} has a checkpoint of step {first:,}: ask for as many steps or more, or a new output")
    coming = iter(batches(sum(map(batches_at, range(first)))))
    mfu = None
    if flops_per_token is not None and first < steps:
        mfu = Utilisation(flops_per_token, peak(device, torch.bfloat16 if autocast else parameters[0].dtype))
    log = Log(output / LOG, first, steps, ranks, mfu, trackers)
    saved = time.monotonic()
    model.train()

    for step in range(first, steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * float(schedule(step))  # a number of numpy could not be loaded again
        optimizer.zero_grad(set_to_none=True)
        had: list[B] = []
        parts: list[BatchLoss] = []
        number = batches_at(step)
        if number < 1:
            raise ValueError(f"accumulate is {number} in step {step + 1:,}, but a step needs a batch")
        # A single batch is its own mean: it is not multiplied and divided, which would round.
        is_single = number == 1 and ranks.is_alone
        for place in range(number):
            had.append(draw(coming, f"the batches have ended in step {step + 1:,} of {steps:,}"))
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                part = batch_loss(had[-1])
            with nullcontext() if place + 1 == number else no_sync(model):
                (part.loss if is_single else part.loss * part.count).backward()
            parts.append(part.detached())
        is_late = ranks.is_first and time.monotonic() - saved > 60 * save_minutes
        sums = torch.cat([totals(parts), torch.full((1,), float(is_late), device=device)])
        loss_sum, units, tokens, is_due = ranks.sum(sums)
        units = units.clamp(min=1)  # a step without any has a loss of 0
        if not is_single:
            average_gradients(parameters, units, ranks)
        norm = clip_gradients(parameters, clip)
        loss, norm, tokens, is_due = torch.stack([loss_sum / units, norm.float(), tokens, is_due]).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {step + 1:,}: the loss is {loss}, the norm of the gradients {norm}. The step was not taken, and "
                f"{output} keeps the last checkpoint. {save_bad_batches(output, step + 1, had, parts, ranks)}. Try a "
                "lower learning rate, or look for damaged data"
            )
        optimizer.step()

        done, is_last = step + 1, step + 1 == steps
        log.add_step(parts, loss, norm, tokens)
        if is_last or done % LOG_STEPS == 0:
            log.write(done, max(group["lr"] for group in optimizer.param_groups))
        if validation is not None and (is_last or done % validation.steps == 0):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                numbers = validation.run(model, ranks)
            if is_best := validation.is_better(numbers, best):
                best = numbers[validation.best]
                save_weights(output / BEST, model, settings, done, numbers, ranks)
            log.write_validation(done, numbers, is_best=is_best)
        if is_last or is_due:
            save_checkpoint(output / LAST, model, optimizer, settings, Progress(done, best), ranks, stateful)
            saved = time.monotonic()
    log.close()


def trained_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer, stateful: Mapping[str, Stateful] = NOTHING
) -> list[nn.Parameter]:
    """What the optimizer trains. ValueError: nothing, or a parameter of no module whose state a checkpoint keeps."""
    modules = [model, *(each for each in stateful.values() if isinstance(each, nn.Module))]
    kept = {parameter for module in modules for parameter in module.parameters()}
    found = [x for group in optimizer.param_groups for x in group["params"] if x.requires_grad]
    if not found:
        raise ValueError("the optimizer has no parameter with requires_grad: there is nothing to train")
    if lost := sum(parameter not in kept for parameter in found):
        raise ValueError(
            f"the optimizer trains {lost} of {len(found)} parameters that are not of the model, so a resumed run would "
            "lose them: give their module in stateful too, or make the optimizer after the model is prepared"
        )
    return found


def draw(coming: Iterator[B], ended: str) -> B:
    """The next batch. Raises a ValueError with the words `ended` if there is none."""
    for batch in coming:
        return batch
    raise ValueError(ended)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], units: Tensor, ranks: Ranks) -> None:
    """Make the sums over the units of this rank, which the gradients are, means over the `units` of all ranks."""
    sum_gradients(parameters, ranks)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(units)


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float | None) -> Tensor:
    """The norm of all gradients together, over all ranks, which is `largest` at most afterwards."""
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = getattr(norm, "full_tensor", lambda: norm)()  # of parts over ranks
    if largest is not None:
        clip_grads_with_norm_(parameters, largest, norm)
    return norm
