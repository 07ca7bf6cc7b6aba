"""The static gate of the CUDA kernels: nothing spills, on no architecture; attention's loop keeps its budget."""

import dataclasses
from collections import Counter

import pytest

from appo_kernels import cuda_library
from benchmarks.inspection import static_cuda
from benchmarks.inspection.static_cuda import Kernel, Shape

LIBRARY = cuda_library.path()


def why_not() -> str | None:
    """Why the built library cannot be looked at; None when it can."""
    if LIBRARY is None:
        return "the CUDA kernels were not built: there was no nvcc when the project was installed"
    sources = [f for f in static_cuda.SOURCES.iterdir() if f.suffix in (".cu", ".cuh", ".h")]
    if max(f.stat().st_mtime for f in sources) > LIBRARY.stat().st_mtime:
        return f"{LIBRARY} is older than csrc/: install again (pip install -e .)"
    return None


built = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@built
def test_no_kernel_of_the_built_library_spills() -> None:
    assert LIBRARY is not None
    found = static_cuda.kernels(LIBRARY, loops=False)
    codes = {word for word in str(cuda_library.built_for()).split() if word.startswith("sm_")}
    assert {kernel.arch for kernel in found} == codes and codes
    assert len({(k.name, k.element, k.head_dim) for k in found}) * len(codes) == len(found)
    assert not static_cuda.faults(found, static_cuda.shapes())


@built
@pytest.mark.slow
def test_the_loop_over_tiles_keeps_its_budget() -> None:
    assert LIBRARY is not None
    found = static_cuda.kernels(LIBRARY)
    lines, over = static_cuda.comparison(found, static_cuda.shapes())
    assert lines and not over


@pytest.mark.slow
def test_no_bank_conflicts() -> None:
    counted = static_cuda.conflicts()
    assert len(counted) == 5 * 3 + 2 * 2 and not any(counted.values())


KERNEL = Kernel("attention_forward", "bf16", "64", "sm_80", 160, 0, 0, Counter(all=400, tensor=64))
SHAPES = {("attention_forward", "64"): Shape("64x64", 128, 57344)}


def test_the_gate_can_fail() -> None:
    assert not static_cuda.faults([KERNEL], SHAPES) and not static_cuda.comparison([KERNEL], SHAPES)[1]
    spilling, large, costly = (
        dataclasses.replace(KERNEL, stack_bytes=8),
        dataclasses.replace(KERNEL, arch="sm_86"),
        dataclasses.replace(KERNEL, loop=Counter(all=600)),
    )
    assert "spilled" in static_cuda.faults([spilling], SHAPES)[0]
    too_much = {("attention_forward", "64"): Shape("64x64", 128, 100 << 10)}
    assert "no block fits" in static_cuda.faults([large], too_much)[0]
    assert "at most 1.1 allowed" in static_cuda.comparison([costly], SHAPES)[1][0]
    # Four warps share the 64 rows, eight the 128 of Triton's tile: 16 each.
    row = "| online attention + mass | bf16 | 64 | 80 | 128x32 | 8 | 238 | 0 | 33 | 1 | 190 | 32 |"
    assert static_cuda.triton_instructions(row, "64", "sm_80") == 380
