"""Ctrl-C ends a run after the step it is in: the first one asks, a second one interrupts at once."""

import signal
from types import FrameType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object


class StopFlag:
    """While entered, SIGINT and SIGTERM set a flag. Handlers are put back on exit."""

    def __init__(self) -> None:
        self._set = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._set:
            raise KeyboardInterrupt
        self._set = True
        print("\nStopping after this step; a checkpoint will be saved. Press Ctrl-C again to stop at once.", flush=True)

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; every process must call it."""
        if accelerator.num_processes == 1:
            return self._set
        return any(gather_object([self._set]))
