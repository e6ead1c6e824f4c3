"""Checkpoints of a run: the last one, from which it goes on, and the best one. Written in one step, by the first rank.

A checkpoint is one file of whole tensors, however the model is distributed, so that any number of ranks can read it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..files import half_written, replacing
from .distributed import ALONE, Ranks, is_sharded, local
from .options import check_same

LAST, BEST = "checkpoint.pt", "best.pt"
WEIGHTS = {"settings", "step", "model"}
CHECKPOINT = WEIGHTS | {"optimizer", "random"}
"""What a file has at least: one with weights, and one from which a run goes on."""
HALF = half_written("|".join(map(re.escape, (LAST, BEST))))
SHOWN = 8
"""Differences that an error lists."""


class Stateful(Protocol):
    """Something else of a run with a state, such as an `averaging.EMA`."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> object: ...


NOTHING: Mapping[str, Stateful] = MappingProxyType({})


class Progress(NamedTuple):
    """How far a run is: steps that are done, and the best number of its validation so far."""

    step: int = 0
    best: float | None = None


def save_checkpoint(
    file: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, object],
    progress: Progress,
    ranks: Ranks = ALONE,
    stateful: Mapping[str, Stateful] = NOTHING,
) -> None:
    """Atomic: a run that is killed here goes on from the checkpoint before. All ranks call it.

    Raises:
        FloatingPointError: a weight is not finite. OSError: no room. ValueError: a state that PyTorch would not read
            again. The old checkpoint stays.
    """
    check_finite(model, f"step {progress.step:,}", ranks)
    random = ranks.gather(_random_state(model))
    state = {
        "settings": dict(settings),
        "step": progress.step,
        "best": progress.best,
        "model": _whole(model.state_dict(), ranks),
        "optimizer": _whole(optimizer.state_dict(), ranks),
        "optimizer_class": type(optimizer).__name__,
        "stateful": {name: _whole(each.state_dict(), ranks) for name, each in stateful.items()},
        "random": random[0],
        "random_of_others": random[1:],
    }
    ranks.on_first(lambda: _write(state, file))


def save_weights(
    file: Path,
    model: nn.Module,
    settings: Mapping[str, object],
    step: int,
    metrics: Mapping[str, float],
    ranks: Ranks = ALONE,
) -> None:
    """The weights alone, with the metrics that they have. Atomic, as `save_checkpoint`."""
    check_finite(model, f"step {step:,}", ranks)
    state = {"settings": dict(settings), "step": step, "metrics": dict(metrics)}
    state["model"] = _whole(model.state_dict(), ranks)
    ranks.on_first(lambda: _write(state, file))


def load_checkpoint(
    file: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, object],
    ranks: Ranks = ALONE,
    stateful: Mapping[str, Stateful] = NOTHING,
) -> Progress:
    """Restore the model, the optimizer, the random state and the rest, or nothing. Without a checkpoint, step 0.

    What a run that was killed has left half written is removed.

    Raises:
        ValueError: the file is damaged, or of other settings, another model or another optimizer, with what differs.
        FileNotFoundError: only some ranks see it.
    """
    if ranks.is_first:
        for left in filter(lambda path: HALF.fullmatch(path.name), file.parent.glob(".*")):
            left.unlink(missing_ok=True)
    there = ranks.gather(file.exists())
    if not any(there):
        return Progress()
    if not all(there):
        blind = ", ".join(str(rank) for rank, seen in enumerate(there) if not seen)
        raise FileNotFoundError(f"rank {blind} does not see {file}: all ranks must share the folder of the run")
    state = read_checkpoint(file)
    check_same(file, state["settings"], settings)
    _check_weights(file, state["model"], model)
    _check_optimizer(file, state, optimizer)
    kept = state.get("stateful", {})
    if kept.keys() != stateful.keys():
        raise ValueError(f"{file} keeps the state of {sorted(kept)}, and this run has {sorted(stateful)}")
    _load_weights(model, state["model"])
    optimizer.load_state_dict(_like_parameters(state["optimizer"], optimizer))
    for name, each in stateful.items():
        here = each.state_dict()
        each.load_state_dict({key: _in_parts(x, here.get(key)) for key, x in kept[name].items()})
    every = [state["random"], *state.get("random_of_others", ())]
    same = len(every) == ranks.world_size
    if same:
        _set_random_state(model, every[ranks.rank])
    if ranks.is_first:
        note = "" if same else f". It was saved by {len(every)} ranks, so random numbers begin anew"
        print(f"resumed at step {state['step']:,}{note}", flush=True)
    return Progress(state["step"], state.get("best"))


def check_settings(file: Path, settings: Mapping[str, object]) -> None:
    """Raise a ValueError that names what differs if `file` is there and of other settings."""
    if file.exists():
        check_same(file, read_checkpoint(file, WEIGHTS)["settings"], settings)


def load_weights(file: Path, model: nn.Module) -> int:
    """Give `model` the weights of a checkpoint, such as `best.pt`, and return its step. All ranks call it.

    Raises:
        FileNotFoundError: the file does not exist. ValueError: it is damaged, or of another model.
    """
    state = read_checkpoint(file, WEIGHTS)
    _check_weights(file, state["model"], model)
    _load_weights(model, state["model"])
    return state["step"]


def read_checkpoint(file: Path, wanted: set[str] = CHECKPOINT) -> dict[str, Any]:
    """The content of a checkpoint, mapped. ValueError: damaged, or without what is `wanted`."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # as in `pickles.read`: a damaged file raises nearly any exception
        raise ValueError(f"{file} is damaged, or not a checkpoint: {error}") from error
    if not isinstance(state, dict) or not wanted <= state.keys():
        raise ValueError(f"{file} is not the checkpoint of a recipe")
    return state


def check_finite(model: nn.Module, when: str, ranks: Ranks = ALONE) -> None:
    """Raise a FloatingPointError that names the first parameter with a NaN or an infinity."""
    wrong = (name for name, x in model.named_parameters() if not torch.isfinite(local(x.detach())).all())
    for name in filter(None, ranks.gather(next(wrong, None))):
        raise FloatingPointError(f"{when}: {name} is not finite, so nothing was saved. Try a lower learning rate")


def _write(state: Mapping[str, object], file: Path) -> None:
    with replacing(file) as beside:
        try:
            with beside.open("wb") as opened:
                torch.save(state, opened)
        except RuntimeError as error:
            # PyTorch hides a full disk behind an error of the archive that it ends.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        try:
            torch.load(beside, map_location="cpu", weights_only=True, mmap=True)  # reads names, not tensors
        except pickle.UnpicklingError as error:
            wanted = "tensors, numbers, texts, lists and dicts"
            raise ValueError(f"{file} was not written, since it could hold {wanted} only: {error}") from error


def _check_weights(file: Path, there: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise a ValueError that names the tensors which the file and the model do not share."""
    here = model.state_dict()
    wrong = [f"{name} is only in the model" for name in here if name not in there]
    wrong += [f"{name} is only in the file" for name in there if name not in here]
    for name in here.keys() & there.keys():
        (old, new) = (f"{x.dtype} {list(x.shape)}".removeprefix("torch.") for x in (there[name], here[name]))
        if old != new:
            wrong.append(f"{name} is {old}, in the model {new}")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"{file} is of another model: {'; '.join(sorted(wrong)[:SHOWN])}{more}. Choose another --output, or the "
            "model of that run"
        )


def _check_optimizer(file: Path, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError if the optimizer is another one, or groups its parameters in another way."""
    name = type(optimizer).__name__
    there = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
    here = [len(group["params"]) for group in optimizer.param_groups]
    if state.get("optimizer_class", name) != name or there != here:
        old = f"{state.get('optimizer_class', name)} with groups of {there} parameters"
        raise ValueError(f"{file} is of another optimizer: {old}, now {name} with {here}. Choose another --output")


# Tensors in parts over ranks, and random states


def _whole(value: Any, ranks: Ranks) -> Any:
    """The value with each tensor that is in parts gathered, on the first rank only: the others get None for it."""
    if isinstance(value, Mapping):
        return {key: _whole(each, ranks) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole(each, ranks) for each in value]
    if isinstance(value, Tensor) and is_sharded(value):
        gathered = value.detach().full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
        return gathered.cpu() if ranks.is_first else None
    return value


def _in_parts(whole: Any, like: object) -> Any:
    """A whole tensor, which every rank has, distributed as `like` is. Anything else as it is."""
    if not (isinstance(whole, Tensor) and isinstance(like, Tensor) and is_sharded(like) and whole.shape == like.shape):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _load_weights(model: nn.Module, whole: Mapping[str, Tensor]) -> None:
    here = model.state_dict()
    model.load_state_dict({name: _in_parts(whole[name], here[name]) for name in here})


def _like_parameters(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer with its tensors distributed as the parameters are that they belong to."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    names = [each for group in state["param_groups"] for each in group["params"]]
    of = dict(zip(names, parameters, strict=True))
    found = {name: {key: _in_parts(x, of[name]) for key, x in each.items()} for name, each in state["state"].items()}
    return {**state, "state": found}


def _random_state(model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    random = {"cpu": torch.get_rng_state()}
    return random | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(model: nn.Module, random: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(random["cpu"])
    device = next(model.parameters()).device
    if device.type == "cuda" and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], device)
