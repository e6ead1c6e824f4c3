"""Every private name of another library that the two packages use: why, and since when it is there.

A new one fails here until it has a row, and so does a row without a user. The suite runs with the oldest torch that
`pyproject.toml` allows and with the newest, and asks each of them for the names.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[1]


class Private(NamedTuple):
    """Why a private name is used. `find` returns it, and `versions` have it, as far as is known."""

    reason: str
    find: Callable[[], Any] | None
    versions: str = "torch 2.11, 2.12, 2.13"


PACKAGE = "no public function returns the log-sum-exp that the gradient needs; test_flash.py has the signatures"
OPERATOR = "operators of torch are found by name; this one is the fast product of PyTorch's own compiler"
PRIVATE = {
    "_is_exporting_flag": Private(
        "is_exporting() is also true under torch.compile in 2.11", lambda: torch.compiler._is_exporting_flag
    ),
    "_C": Private("as _get_tracing_state", lambda: torch._C),
    "_get_tracing_state": Private(
        "torch.jit.is_tracing() takes three calls, and every op asks; nn.Module asks so too",
        lambda: torch._C._get_tracing_state,
    ),
    "_python_dispatch": Private("as _is_in_torch_dispatch_mode", lambda: torch.utils._python_dispatch),
    "_is_in_torch_dispatch_mode": Private(
        "a mode must see the operators, which otherwise launch their kernels at once",
        lambda: torch.utils._python_dispatch._is_in_torch_dispatch_mode,
    ),
    "_disable_dynamo": Private("torch.compiler.disable imports the compiler at once", lambda: torch._disable_dynamo),
    "_dynamo": Private("marks sizes that change with each batch, where it runs already", lambda: torch._dynamo),
    "_flash_attention_forward": Private(PACKAGE, lambda: torch.ops.aten._flash_attention_forward),
    "_flash_attention_backward": Private(PACKAGE, lambda: torch.ops.aten._flash_attention_backward),
    "_flash_attn_varlen_forward": Private(PACKAGE, None, "flash-attn from 2.7 on"),
    "_flash_attn_varlen_backward": Private(PACKAGE, None, "flash-attn from 2.7 on"),
    "_flash_attn_forward": Private(PACKAGE, None, "flash-attn-3 3.0"),
    "_flash_attn_backward": Private(PACKAGE, None, "flash-attn-3 3.0"),
    "_flash_attn_fwd": Private(PACKAGE, None, "flash-attn-4 4.0"),
    "_flash_attn_bwd": Private(PACKAGE, None, "flash-attn-4 4.0"),
    "_reorder_linear_weight": Private(OPERATOR, lambda: torch.ops.mkldnn._reorder_linear_weight),
    "_linear_pointwise": Private(OPERATOR, lambda: torch.ops.mkldnn._linear_pointwise),
    "_typeshed": Private("the type of any dataclass, for type checkers only", None, "type checkers"),
    "_is_amx_tile_supported": Private(
        "no public function says which processors multiply bfloat16 in tiles", lambda: torch.cpu._is_amx_tile_supported
    ),
    "_version": Private("whether a parameter was written to", lambda: torch.zeros(1)._version),
    "_pytree": Private("registers the output of the encoder for torch.export", lambda: torch.utils._pytree),
    "_register_namedtuple": Private("as _pytree", lambda: torch.utils._pytree._register_namedtuple),
    "_modules": Private("a replica has its own children", lambda: torch.nn.Module()._modules),
    "_parameters": Private("a replica has its own weights", lambda: torch.nn.Module()._parameters),
    "_buffers": Private("a replica has its own buffers", lambda: torch.nn.Module()._buffers),
    "_forward_hooks": Private("hooks on a module", lambda: torch.nn.Module()._forward_hooks),
    "_forward_pre_hooks": Private("hooks on a module", lambda: torch.nn.Module()._forward_pre_hooks),
    "_backward_hooks": Private("hooks on a module", lambda: torch.nn.Module()._backward_hooks),
    "_backward_pre_hooks": Private("hooks on a module", lambda: torch.nn.Module()._backward_pre_hooks),
    "_has_any_global_hook": Private("hooks on all modules", lambda: torch.nn.modules.module._has_any_global_hook),
    "_global_forward_hooks": Private("hooks on all modules", lambda: torch.nn.modules.module._global_forward_hooks),
    "_global_forward_pre_hooks": Private("as above", lambda: torch.nn.modules.module._global_forward_pre_hooks),
    **{
        f"_foreach_{name}": Private("one kernel for many tensors", partial(getattr, torch, f"_foreach_{name}"))
        for name in ("add_", "addcmul_", "clamp_min_", "div", "lerp_", "mul_", "sqrt")
    },
}


PUBLIC = {"_asdict", "_fields", "_make", "_replace"}
"""Documented names of `NamedTuple`, which begin with an underscore so that they are not those of fields."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every private name that a file reads from an object or imports from another library, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            found = [part for alias in node.names for part in alias.name.split(".")]
        else:
            continue
        yield from ((name, node.lineno) for name in found if is_private(name))


def own_names(tree: ast.AST) -> Iterator[str]:
    """Every name that a file defines or assigns, attributes included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def used(sources: dict[str, str]) -> dict[str, list[str]]:
    """The private names of other libraries in these files: name to the places that use it."""
    trees = {path: ast.parse(text) for path, text in sources.items()}
    own = {name for tree in trees.values() for name in own_names(tree)}
    found: dict[str, list[str]] = {}
    for path, tree in trees.items():
        for name, line in names(tree):
            if name not in own:
                found.setdefault(name, []).append(f"{path}:{line}")
    return found


def test_every_private_name_has_a_reason_and_every_reason_a_name() -> None:
    files = [path for package in ("modernbert", "kernels") for path in (ROOT / package).rglob("*.py")]
    found = used({str(path.relative_to(ROOT)): path.read_text("utf-8") for path in files})
    assert {name: places for name, places in found.items() if name not in PRIVATE} == {}
    assert PRIVATE.keys() - found.keys() == set()


@pytest.mark.parametrize("name", [name for name, row in PRIVATE.items() if row.find])
def test_the_installed_torch_has_it(name: str) -> None:
    find = PRIVATE[name].find
    assert find is not None
    try:
        find()
    except AttributeError as error:
        pytest.fail(f"torch {torch.__version__} has no {name} ({PRIVATE[name].versions} have): {error}")


def test_a_new_one_is_found() -> None:
    source = (
        "import torch\nfrom torch._dynamo import reset\nclass A:\n    def _mine(self): return torch._C, self._mine()\n"
    )
    assert used({"a.py": source}) == {"_dynamo": ["a.py:2"], "_C": ["a.py:4"]}
