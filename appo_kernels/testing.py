"""The one way tests and benchmarks compare a result with its reference, and measure what it cost in memory.

A tolerance is relative to the framework: the error against an fp64 reference may be at most twice (three times for
gradients) the error torch makes on the same inputs in the same dtype.
"""

import gc
import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0


def max_error(got: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; infinities must stand in the same places, and a NaN on one side is infinite."""
    got, reference = got.detach().double(), reference.detach().double()
    if got.shape != reference.shape:
        raise AssertionError(f"shapes differ: got {tuple(got.shape)}, reference {tuple(reference.shape)}")
    difference = torch.where(got == reference, 0.0, got - reference).abs()
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


def assert_as_good_as(
    got: Tensor,
    reference: Tensor,
    framework: Tensor,
    *,
    factor: float = FORWARD_FACTOR,
    atol: float = 1e-6,
    name: str = "result",
) -> None:
    """err(got, reference) <= factor * err(framework, reference) + atol * max|reference|.

    got: what the kernel computed. reference: the same in fp64. framework: the same by torch in the kernel's dtype.
    """
    scale = float(reference.detach().double().nan_to_num(0, 0, 0).abs().max()) if reference.numel() else 0.0
    error, allowed = max_error(got, reference), factor * max_error(framework, reference) + atol * max(scale, 1e-30)
    if not error <= allowed:
        raise AssertionError(
            f"{name}: error {error:.3e} against fp64, allowed {allowed:.3e} "
            f"({factor:g} x torch's {max_error(framework, reference):.3e} + {atol:g} x {scale:.3e})"
        )


def compare(
    got: Mapping[str, Tensor], reference: Mapping[str, Tensor], framework: Mapping[str, Tensor], *, atol: float = 1e-6
) -> None:
    """``assert_as_good_as`` for every result in ``got``, by name; names of gradients begin with "grad"."""
    assert got, "nothing to compare"
    for name, result in got.items():
        factor = GRADIENT_FACTOR if name.startswith("grad") else FORWARD_FACTOR
        assert_as_good_as(result, reference[name], framework[name], factor=factor, atol=atol, name=name)


def peak_extra_bytes(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Peak memory that ``run`` took from torch's allocator beyond what was there before it, its result included.

    The same on every run, which a resident set is not. What libraries take elsewhere (packing buffers of a matrix
    product) is not counted, nor is memory that ``run`` frees and did not allocate.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reports its own start and stop below that
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    # The profile's public events leave out what an operator allocates inside.
    recorded = profile.profiler.kineto_results.events()
    changes = sorted((e for e in recorded if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in changes), initial=0))
