"""Clocks of a single run, for `harness` (paired rounds on any device) and `gpu` (one contestant after the other)."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

CACHE_BYTES = 256 << 20  # more than the L2 cache of any GPU


class Timer(Protocol):
    def __call__(self, run: Callable[[], object]) -> float:
        """Seconds of one call of ``run``, whose result is dropped after the clock has stopped."""
        ...


class WallClock:
    """The host's clock, around all that the device was given."""

    def __init__(self, device: str) -> None:
        self.synchronize: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def __call__(self, run: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        result = run()
        self.synchronize()
        taken = time.perf_counter() - start
        del result
        return taken


class CudaEvents:
    """The GPU's own clock, with its L2 cache flushed before."""

    def __init__(self) -> None:
        self.flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, run: Callable[[], object]) -> float:
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = run()
        end.record()
        torch.cuda.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3
