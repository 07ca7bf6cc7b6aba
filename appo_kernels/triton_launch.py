"""Shared by the Triton backends: the calls that they can serve, and the sizes that they pick per architecture."""

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import torch
from triton.runtime import driver

from appo_kernels.dispatch import Problem

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def interprets() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_on_host() -> bool:
    """Whether Triton launches kernels on CPU tensors: its interpreter, or a driver that says so (``host_memory``)."""
    return interprets() or bool(getattr(driver._active, "host_memory", False))


def unsupported(problem: Problem) -> str | None:
    """The reason that the Triton kernels cannot serve ``problem``; None when they can."""
    if problem.dtype not in DTYPES:
        return f"the Triton kernels take fp16, bf16 and fp32, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.head_dim > MAX_HEAD_DIM:
        return f"the Triton kernels take head sizes up to {MAX_HEAD_DIM}, not {problem.head_dim}"
    if problem.device.type == "cuda":
        if torch.cuda.get_device_capability(problem.device) < (8, 0):
            return "the Triton kernels need compute capability 8.0 or later"
        return None
    # tl.dot of Triton's interpreter multiplies the bit patterns of bf16 as if they were numbers.
    interpretable = not (problem.head_dim and problem.dtype == torch.bfloat16)
    if problem.device.type == "cpu" and runs_on_host():
        if interprets() and not interpretable:
            return "Triton's interpreter cannot multiply bf16 matrices"
        return None
    advice = " (or set TRITON_INTERPRET=1)" if interpretable else ""
    return f"the Triton kernels run on CUDA devices, not on {problem.device.type}{advice}"


def on_its_device(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Launch on the device of the first argument, a tensor: Triton takes the current one, whatever it is given."""

    @functools.wraps(function)
    def launch(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        device = args[0].device  # type: ignore[attr-defined]
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return function(*args, **kwargs)

    return launch


def architecture(device: torch.device) -> int:
    """80, 90, 100, ...: of a CUDA device, or the one that a driver of host memory compiles for (80 interpreted)."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return driver._active.get_current_target().arch if getattr(driver._active, "host_memory", False) else 80


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors to fill; 1 where kernels run on the host."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@dataclass(frozen=True)
class Tiling:
    rows: int  # lanes of a row tile: query rows times the query heads that share a key/value head
    keys: int
    warps: int
    stages: int  # tiles of keys in flight
    registers: int | None = None  # a thread may take so many; None: the assembler weighs them against occupancy
    ahead_partial: bool = True  # whether loops over partial tiles load keys ahead as well

    @property
    def partial_stages(self) -> int | None:
        """Of loops over partial tiles; None: as of the others."""
        return None if self.ahead_partial else 1

    @property
    def options(self) -> dict[str, int | None]:
        """As Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


TilingTable = dict[tuple[int, int, int], Tiling]
# Attention kernels: {(at least this architecture, bytes of an element, at most this padded head size): tiling}.
# Chosen so that nothing spills and the mass adds at most a twentieth to the main loop;
# `python -m benchmarks.inspection.static` prints what the choices cost. fp32 products are not tensor-core
# instructions: their operands lie in registers, so tiles are small, keys are not loaded ahead (what is ahead would be
# held in registers as well), and without a number of registers the assembler spills one or two to gain occupancy.
# sm_100 does not load ahead in two kinds of loops: Triton 3.8 puts the fence.proxy.async of a product before the wait
# for the keys that it is to cover, not behind it, where copies are waited for one after the other. On a B200 a product
# may then read shared memory as it was (pytorch issue 181248 is such a case); tests/ptx/test_blackwell.py sees it.
FORWARD = {
    (80, 2, 64): Tiling(128, 64, 8, 2),
    (80, 2, 128): Tiling(128, 32, 8, 2),
    (80, 2, 256): Tiling(64, 32, 8, 2),
    (80, 4, 64): Tiling(32, 32, 8, 1, 255),
    (80, 4, 128): Tiling(32, 16, 8, 1, 255),
    (80, 4, 256): Tiling(16, 16, 8, 1, 255),
    (90, 2, 32): Tiling(128, 64, 8, 2),
    (90, 2, 64): Tiling(128, 64, 8, 3),
    (90, 2, 128): Tiling(128, 64, 8, 3),
    (90, 2, 256): Tiling(128, 32, 8, 2),
    (100, 2, 32): Tiling(128, 64, 8, 2, 255, ahead_partial=False),
    (100, 2, 64): Tiling(128, 64, 8, 3, ahead_partial=False),
    (100, 2, 128): Tiling(128, 64, 8, 3, ahead_partial=False),
    (100, 2, 256): Tiling(64, 64, 8, 2, ahead_partial=False),
}
BACKWARD = {
    (80, 2, 32): Tiling(32, 32, 8, 2),
    (80, 2, 64): Tiling(64, 32, 8, 2),
    (80, 2, 128): Tiling(64, 32, 8, 2),
    (80, 2, 256): Tiling(32, 32, 8, 1),
    (80, 4, 64): Tiling(32, 16, 8, 1, 255),
    (80, 4, 128): Tiling(16, 16, 8, 1, 255),
    (80, 4, 256): Tiling(16, 16, 8, 1, 255),
}
# The passes of the backward keep different things in registers: delta nothing of its size, query one sum of a tile of
# rows, key two of a tile of keys.
BACKWARD_DELTA = BACKWARD | {(90, 2, 64): Tiling(64, 64, 8, 2), (90, 2, 128): Tiling(64, 64, 8, 2)}
BACKWARD_QUERY = BACKWARD | {
    (90, 2, 64): Tiling(128, 32, 8, 2),
    (90, 2, 128): Tiling(128, 32, 8, 2),
    (100, 2, 64): Tiling(128, 32, 8, 1),
    (100, 2, 128): Tiling(128, 32, 8, 1),
}
BACKWARD_KEY = BACKWARD


def padded_head_dim(head_dim: int) -> int:
    """The head size that tiles have: a power of two, at least 32; columns beyond ``head_dim`` are zeros."""
    return max(32, 1 << (head_dim - 1).bit_length())


def tiling(table: TilingTable, arch: int, element: int, head_dim: int, group: int) -> Tiling:
    """The entry of the smallest head size that fits, of the newest architecture not beyond ``arch``.

    group: query heads per key/value head; a row tile holds at least one row of each. Compute capability 12.x has the
    shared memory and the tensor-core instructions of 8.6 and 8.9, so it takes what they take.
    """
    arch = 80 if arch >= 120 else arch
    fits = [
        (widest, -least)
        for least, size, widest in table
        if least <= arch and size == element and padded_head_dim(head_dim) <= widest
    ]
    widest, minus_least = min(fits)
    choice = table[-minus_least, element, widest]
    return replace(choice, rows=max(choice.rows, 1 << (group - 1).bit_length()))
