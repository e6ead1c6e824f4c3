"""What the host does for a layer in inference: Python frames and C calls, counted without a GPU.

    python tests/kernels/host_calls.py                  the counts
    python tests/kernels/host_calls.py --by-function    and which functions they are

The kernels are neither compiled nor launched: a stub driver takes the launches at the place where Triton's C code has
them. Counted is all that Python sees of one call of a layer, the third, so that every cache is filled.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NamedTuple
from unittest import mock

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "kernels")]

import torch
from offline import CompileOnly
from torch import Tensor
from triton.backends.nvidia.driver import CudaLauncher

import modernbert_kernels as ops
from modernbert.config import EncoderConfig
from modernbert.encoder import Layer, Rope
from modernbert.packing import pack

ARCH = 90


class Stub(CompileOnly):
    """A driver whose launches do nothing. Its launcher has the one Python frame of Triton's for CUDA."""

    get_current_stream: Any = staticmethod(id)  # a function in C, as the real one

    launches: ClassVar[list[tuple[Any, ...]]] = []
    """The binary and the arguments of each. Of the class, because kernels keep their binaries."""

    def __init__(self) -> None:
        super().__init__(ARCH)

    def get_current_device(self) -> None:
        """The index of the device of a tensor of the CPU, by two frames as of `torch.cuda.current_device`."""
        _initialized()

    def launcher(self, binary: str) -> CudaLauncher:
        """Triton's launcher, whose C function only notes its arguments."""
        made: Any = CudaLauncher.__new__(CudaLauncher)
        vars(made).update(
            dict.fromkeys(SIZES, 0), num_ctas=1, launch=lambda *args: self.launches.append((binary, *args))
        )
        return made


def _initialized() -> None:
    """A frame of `torch.cuda.current_device`."""


SIZES = (
    "global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align",
    "launch_cooperative_grid", "launch_pdl", "arg_annotations", "kernel_signature",
)  # fmt: skip


class Counts(NamedTuple):
    frames: int
    c_calls: int
    launches: int
    of_functions: Counter[str]


@contextmanager
def pretended() -> Iterator[Stub]:
    """Inside, tensors of the CPU are taken for those of a GPU, and launches do nothing."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver, jit

    stub = Stub()

    def compiled(function: Any, key: str, signature: Any, device: int, *_: Any) -> Any:
        binary: Any = CompiledKernel.__new__(CompiledKernel)
        vars(binary).update(name=key, src=None, module="", function=0, packed_metadata=(), _run=stub.launcher(key))
        function.device_caches[device][0][key] = binary
        return binary

    before = driver._active
    driver.set_active(stub)  # pyright: ignore  (it has all that is used)
    try:
        with (
            mock.patch.object(jit.JITFunction, "_do_compile", compiled),
            mock.patch.object(Tensor, "is_cuda", True, create=True),
        ):
            yield stub
    finally:
        driver._active = before


def count(call: Callable[[], Any], stub: Stub) -> Counts:
    """What the third call does."""
    found: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, called: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code.co_filename != __file__ or code.co_name in ("get_current_device", "_initialized"):
                found[f"{'/'.join(Path(code.co_filename).parts[-2:])}: {code.co_name}"] += 1
        elif event == "c_call" and frame.f_code.co_filename != __file__:
            found[f"C: {called.__name__}"] += 1

    call()
    call()
    stub.launches.clear()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    in_c = sum(times for name, times in found.items() if name.startswith("C: "))
    return Counts(found.total() - in_c, in_c, len(stub.launches), found)


def layer_counts() -> Counts:
    """Of a local layer of Ettin-17m in bfloat16, with a batch of one query."""
    config = EncoderConfig.preset("ettin-17m")
    layer = Layer(config, 1).to(torch.bfloat16).eval()
    batch = pack([[5] * 32])
    x, delta = torch.randn(2, 32, config.hidden_size).bfloat16()
    with torch.inference_mode(), pretended() as stub:
        cos, sin = ops.rotary_table.reference(batch.positions, 160_000.0, config.head_dim)
        rope = Rope(cos, sin, ops.token_ranges.reference(batch.cu_seqlens, None, batch.num_tokens))
        # A layer that writes into the stream gives no delta to the next one.
        given = delta if layer(x, delta, batch, rope)[1] is not None else None
        return count(lambda: layer(x, given, batch, rope), stub)


def main() -> None:
    counts = layer_counts()
    print(f"{counts.frames} Python frames, {counts.c_calls} C calls, {counts.launches} launches of Triton")
    if "--by-function" in sys.argv:
        for name, times in counts.of_functions.most_common():
            print(f"{times:5}  {name}")


if __name__ == "__main__":
    main()
