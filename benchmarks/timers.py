"""The clock of a single run, for `harness` (paired rounds on any device); `gpu` has the GPU's own."""

import time
from collections.abc import Callable
from typing import Any

import torch


class WallClock:
    """The host's clock, around all that the device was given."""

    def __init__(self, device: str) -> None:
        self.synchronize: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def __call__(self, run: Callable[[], object]) -> float:
        """Seconds of one call of ``run``, whose result is dropped after the clock has stopped."""
        self.synchronize()
        start = time.perf_counter()
        result = run()
        self.synchronize()
        taken = time.perf_counter() - start
        del result
        return taken
