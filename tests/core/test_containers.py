"""Packed, Tokens and Ragged in the hands of other libraries: moved, pinned, collated, pickled, mapped over."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils.data import DataLoader
from torch.utils.data._utils.collate import default_convert
from torch.utils.data._utils.pin_memory import pin_memory

from modernbert import Packed, Ragged, Tokens, pack


def some_tokens() -> Tokens:
    batch = replace(pack([[5, 6, 7], [8], []]), key_lengths=torch.tensor([2, 1, 0], dtype=torch.int32))
    return Tokens(batch, torch.tensor([True, False, True, True]), [[None, (0, 2), None], [(0, 1)], []], (0, 3, 0))


def some_ragged() -> Ragged:
    return Ragged.from_list([torch.randn(2, 4), torch.randn(0, 4), torch.randn(3, 4)])


def assert_same(got: Any, wanted: Any) -> None:
    """The same class with the same fields, whose tensors are equal."""
    assert type(got) is type(wanted)
    assert vars(got).keys() == vars(wanted).keys()
    for name, value in vars(wanted).items():
        found = vars(got)[name]
        if isinstance(value, Tensor):
            assert torch.equal(found, value), name
        elif isinstance(value, Packed):
            assert_same(found, value)
        else:
            assert found == value, name


MAKERS = [some_tokens, some_ragged, lambda: some_tokens().batch]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: x.to("cpu"),
        lambda x: x.to(torch.device("cpu"), non_blocking=True),
        default_convert,
        lambda x: next(iter(DataLoader([0, 1], batch_size=2, collate_fn=lambda _: x))),
        lambda x: next(iter(DataLoader([x], batch_size=None))),
        lambda x: _pytree.tree_map(lambda leaf: leaf, x),
        lambda x: _pytree.tree_unflatten(*_pytree.tree_flatten(x)),
    ],
)
def test_a_copy_is_the_same(make: Callable[[], Any], copied: Callable[[Any], Any]) -> None:
    """transformers.Trainer could not move `Tokens`: a NamedTuple cannot be rebuilt from a generator."""
    value = make()
    assert_same(copied(value), value)


def test_a_worker_of_a_data_loader_hands_them_over() -> None:
    tokens = some_tokens()
    loader = DataLoader([0, 1], batch_size=2, collate_fn=lambda _: {"queries": tokens}, num_workers=1)
    (found,) = list(loader)
    assert_same(found["queries"], tokens)


def test_a_device_is_for_what_the_model_reads() -> None:
    tokens = some_tokens().to("meta")
    assert all(x.is_meta for x in vars(tokens.batch).values() if isinstance(x, Tensor))
    assert tokens.keep.is_cpu
    assert tokens.offsets.tolist() == [0, 2, 3, 3]
    assert tokens.rows is not None
    assert tokens.rows.is_meta
    assert len(tokens) == 3
    part = tokens.select([1, 0])
    assert (part.batch.input_ids.is_meta, part.keep.tolist()) == (True, [True, True, False, True])
    assert part.truncated == (3, 0)
    ragged = some_ragged().to("meta")
    assert ragged.values.is_meta
    assert ragged.offsets.is_cpu
    assert [len(matrix) for matrix in ragged] == [2, 0, 3]


def test_a_ragged_moves_with_its_gradient() -> None:
    values = torch.randn(5, 4, requires_grad=True)
    Ragged(values, torch.tensor([0, 5])).to("cpu").values.sum().backward()
    assert values.grad is not None


@pytest.mark.parametrize("make", MAKERS)
def test_a_dtype_is_not_a_device(make: Callable[[], Any]) -> None:
    """It would have turned token ids into floats."""
    with pytest.raises(TypeError):
        make().to(torch.float16)


@pytest.mark.parametrize("make", MAKERS)
def test_memory_is_pinned_by_a_data_loader(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As its thread does it, in nested batches too."""
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    value = make()
    found = pin_memory({"queries": value, "list": [value]})
    assert_same(found["queries"], value)
    assert_same(found["list"][0], value)
    assert found["queries"] is not value
    assert pinned


def test_trees_have_tensors_as_leaves() -> None:
    tokens, ragged = some_tokens(), some_ragged()
    assert len(_pytree.tree_leaves(tokens)) == 5  # ids, positions, cu_seqlens, key_lengths, keep
    assert all(isinstance(leaf, Tensor) for leaf in _pytree.tree_leaves([tokens, ragged]))
    moved = _pytree.tree_map_only(Tensor, lambda leaf: leaf.to("meta"), {"a": [tokens, ragged]})
    assert moved["a"][0].batch.positions.is_meta
    assert moved["a"][1].values.is_meta
    shapes = _pytree.tree_map(lambda leaf: leaf.shape, ragged)
    assert (shapes.values, shapes.offsets) == ((5, 4), (4,))
    assert _pytree.tree_structure(tokens) == _pytree.tree_structure(some_tokens())


def test_wrong_tokens() -> None:
    tokens = some_tokens()
    for keep in (tokens.keep[:2], tokens.keep.long(), tokens.keep[None], tokens.keep.to("meta")):
        with pytest.raises(ValueError, match=r"keep of Tokens must be bool \[4\] on the CPU, got torch"):
            Tokens(tokens.batch, keep)


@pytest.mark.parametrize("make", MAKERS)
def test_accelerate_moves_them(make: Callable[[], Any]) -> None:
    """And does not join what it does not know, which would give wrong `cu_seqlens`."""
    operations = pytest.importorskip("accelerate.utils.operations")
    value = make()
    moved = operations.send_to_device({"a": value, "b": [value]}, torch.device("meta"))
    for found in (moved["a"], moved["b"][0]):
        assert type(found) is type(value)
        assert getattr(found, "batch", found).to("meta") is not None
    same = operations.recursively_apply(lambda leaf: leaf + 1, {"a": value, "b": torch.zeros(1)})
    assert same["a"] is value
    assert same["b"].item() == 1
    with pytest.raises(TypeError, match="Can only concatenate tensors"):
        operations.concatenate([{"a": value}, {"a": value}])


def test_lightning_moves_them() -> None:
    utilities = pytest.importorskip("lightning_fabric.utilities")
    moved = utilities.move_data_to_device({"a": [some_tokens()], "b": some_ragged()}, torch.device("meta"))
    assert moved["a"][0].batch.input_ids.is_meta
    assert moved["b"].values.is_meta
