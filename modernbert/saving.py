"""From a model to the tensors that are written: gathered, under the names of plain modules, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import weights

# What `torch.compile`, activation checkpointing and FSDP1 call the module that they wrap.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def state_of(module: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors to write for a `module` in whose architecture nothing is tied: its own, or those of `state`.

    Layers that share a parameter are written one by one, and names are those of `plain_names`. Tensors that are
    sharded over ranks are gathered on the first one, where they are copied to the CPU; the others get none.

    Raises:
        ValueError: a tensor without values of its own, or with values that loading refuses.
    """
    found: dict[str, Tensor] = {}
    memory: set[int] = set()
    state = plain_names(module.state_dict() if state is None else state)
    kept = not is_sharded(state) or dist.get_rank() == 0
    for name, given in state.items():
        where = f"{type(module).__name__} cannot be saved: {name}"
        whole = hasattr(given, "full_tensor") and not given.is_meta
        tensor = given.full_tensor().cpu() if whole else given  # pyright: ignore[reportAttributeAccessIssue]
        tensor = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor
        if type(tensor) is not Tensor or tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            more = f", {tensor.layout}, on {tensor.device}" if isinstance(tensor, Tensor) else ""
            raise ValueError(f"{where} is a {type(tensor).__name__}{more}; a plain tensor with values is wanted")
        if problem := weights.what_is_wrong(tensor):
            raise ValueError(f"{where} has {problem}")
        storage = tensor.untyped_storage().data_ptr()
        if kept:
            found[name] = tensor.clone() if storage in memory else tensor
            memory.add(storage)
    return found


def is_sharded(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors are in parts on several ranks (`DTensor`, whose import takes long)."""
    return any(hasattr(tensor, "full_tensor") for tensor in state.values())


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of a plain module: without what wrappers such as `torch.compile` and DDP add to them."""
    plain = {_plain_name(name): tensor for name, tensor in state.items()}
    whole = all(name.startswith("module.") for name in plain)
    return {name.removeprefix("module."): tensor for name, tensor in plain.items()} if whole else plain


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of wrappers that compute the same: `torch.compile`, DDP, activation checkpointing."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        name = "module" if isinstance(module, parallel) else next((n for n in WRAPPERS if n in module._modules), None)
        if name is None:
            return module
        module = module.get_submodule(name)


def on_first_rank(write: Callable[[], None]) -> None:
    """Call `write` on the first rank only. Every rank waits for its end, and fails if it failed.

    Raises:
        RuntimeError: on the other ranks, with the error of the first one.
    """
    problem: list[str | None] = [None]
    try:
        if dist.get_rank() == 0:
            problem = ["it was interrupted"]
            write()
            problem = [None]
    except Exception as error:
        problem = [f"{type(error).__name__}: {error}"]
        raise
    finally:
        dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise RuntimeError(f"the first rank could not save the model: {problem[0]}")


def check_same(model: nn.Module, loaded: nn.Module) -> None:
    """Raise a ValueError that names the first module of `model` that is another one in `loaded`.

    State dicts do not show an adapter whose parameters have the names of a plain layer, or a layer without parameters.
    """
    ours, theirs = ({_plain_name(name): part for name, part in _parts(root)} for root in (model, loaded))
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        got, want = ours.get(name), theirs.get(name)
        if got is None or want is None or not _computes_as(got, want):
            raise ValueError(
                f"{name} is {got}, which would be loaded as {want}; merge adapters into plain layers first"
            )


def _parts(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules below `root` by name, without the wrappers in `WRAPPERS`."""
    every = root.named_modules(remove_duplicate=False)
    return ((name, part) for name, part in every if name and WRAPPERS.isdisjoint(part._modules))


def _computes_as(module: nn.Module, plain: nn.Module) -> bool:
    """Whether it has the forward pass of `plain`, or of a class that `plain` inherits from, and the same settings."""
    forwards = [vars(each).get("forward") for each in type(plain).__mro__]
    return type(module).forward in forwards and module.extra_repr() == plain.extra_repr()
