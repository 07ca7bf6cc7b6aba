"""Events on the pretended GPU, and the lines of the caller that asked for them."""

import collections
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SYNC, UPLOAD, MIXED, REFUSED, MISALIGNED = "sync", "upload", "mixed", "refused", "misaligned"
MOST_GRID = (2**31 - 1, 65_535, 65_535)
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}


@dataclass(frozen=True)
class Event:
    """kind "sync": the host waits; "upload": host memory goes to the GPU; "mixed": operands of both devices, which a
    GPU refuses; "refused": a launch that a GPU refuses; "misaligned": a matrix product that the vendor's fast kernels,
    which read 16 bytes at a time, do not take."""

    kind: str
    what: str
    where: str  # "file.py:12 < file.py:80": the innermost lines of this project, callee first


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Recording:
    def __init__(self, root: Path = ROOT) -> None:
        self.root = f"{root}/"
        self.events: list[Event] = []
        self.trace: list[str] = []  # torch operations by name and launches as "[kernel]", in order
        self.launches: list[Launch] = []
        self.paused = False

    def clear(self) -> None:
        for found in (self.events, self.trace, self.launches):
            found.clear()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing in here is recorded: inputs are made, results are looked at."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def note(self, kind: str, what: str) -> None:
        if not self.paused:
            self.events.append(Event(kind, what, self._where()))

    def operation(self, name: str) -> None:
        if not self.paused:
            self.trace.append(name)

    def launch(self, kernel: str, grid: Sequence[int], arguments: Sequence[Any], options: dict[str, Any]) -> None:
        if self.paused:
            return
        self.trace.append(f"[{kernel}]")
        self.launches.append(Launch(kernel, tuple(grid), tuple(arguments), options))
        if not all(0 < n <= most for n, most in zip((*grid, 1, 1)[:3], MOST_GRID, strict=True)):
            self.note(REFUSED, f"{kernel}: a grid of {tuple(grid)}")

    def of_kind(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    @property
    def products(self) -> int:
        return sum(name in PRODUCTS for name in self.trace)

    @property
    def operations(self) -> int:
        """torch operations that launch something and are no matrix products."""
        return len(self.trace) - len(self.launches) - self.products

    def report(self, title: str = "recorded") -> str:
        lines = [
            f"{title}: {self.operations} torch operations, {self.products} products, {len(self.launches)} launches, "
            f"{len(self.of_kind(SYNC))} synchronisations"
        ]
        for event, number in sorted(collections.Counter(self.events).items(), key=lambda item: str(item[0])):
            lines.append(f"  {event.kind:8s}{number:5d} x {event.what:32s} {event.where}")
        return "\n".join(lines)

    def _where(self, depth: int = 3) -> str:
        lines, frame = [], sys._getframe(2)
        own = f"{self.root}gpu_rehearsal/"
        at: Any = frame
        while at is not None and len(lines) < depth:
            name = at.f_code.co_filename
            if name.startswith(self.root) and "site-packages" not in name and not name.startswith(own):
                lines.append(f"{name.removeprefix(self.root)}:{at.f_lineno}")
            at = at.f_back
        return " < ".join(lines) or "outside of the project"
