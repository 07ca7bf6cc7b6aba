"""Ctrl-C or SIGTERM ends a run after the step it is in: the first one asks, a second one interrupts at once."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object


class Stopped(SystemExit):
    """A run that was asked to end before its last step, and saved a checkpoint. Where nobody catches it, the process
    exits with 128 + the number of the signal, as shells expect: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, number: int, step: int, steps: int) -> None:
        super().__init__(128 + number)
        self.signal, self.step, self.steps = signal.Signals(number), step, steps

    def __str__(self) -> str:
        return f"stopped at step {self.step} of {self.steps} by {self.signal.name}"


class StopFlag:
    """While entered, SIGINT and SIGTERM set a flag. Handlers are put back on exit.

    In another thread than the main one no signals arrive: nothing is done there.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # of the signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        print("\nStopping after this step; a checkpoint will be saved. Once more to stop at once.", file=sys.stderr)

    def requested(self, accelerator: Accelerator) -> int | None:
        """The signal that any process got, None before; every process must call it."""
        if accelerator.num_processes == 1:
            return self.number
        return next((number for number in gather_object([self.number]) if number is not None), None)
