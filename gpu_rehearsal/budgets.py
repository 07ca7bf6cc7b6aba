"""Counted costs of each call on the host, its launches, and what they may be: ``budgets.txt``."""

import collections
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from unittest import mock

import torch

from gpu_rehearsal.calls import Call, calls
from gpu_rehearsal.device import rehearse
from gpu_rehearsal.recording import MIXED, REFUSED, SYNC, UPLOAD, Recording

TABLE = Path(__file__).with_name("budgets.txt")
WIDTH = 52  # of the names in the table


@dataclass(frozen=True)
class Cost:
    """Of one call; of a backward alone where the name ends in "backward"."""

    syncs: int  # with checks of values
    unchecked_syncs: int  # without them
    operations: int  # torch operations without checks of values, matrix products left out
    products: int
    launches: int  # of Triton and CUDA kernels
    uploads: int

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def record(call: Call, *, checked: bool) -> list[Recording]:
    """The forward, and the backward where the call has one."""
    with mock.patch.dict(os.environ, {"APPO_CHECK_VALUES": "1" if checked else "0"}), rehearse() as forward:
        with forward.pause():
            torch.manual_seed(0)
            run = call.prepare()
        loss = run()
        if loss is None:
            return [forward]
        after = Recording()
        after.trace, after.launches, after.events = forward.trace[:], forward.launches[:], forward.events[:]
        forward.clear()
        loss.backward()
        return [after, forward]


def costs(call: Call) -> Iterator[tuple[str, Cost, list[Recording]]]:
    """Name, cost and what was recorded, of the forward and of the backward."""
    recorded = zip(record(call, checked=True), record(call, checked=False), strict=True)
    for phase, (checked, plain) in zip(("", " backward"), recorded, strict=False):
        cost = Cost(
            len(checked.of_kind(SYNC)), len(plain.of_kind(SYNC)), plain.operations, plain.products,
            len(plain.launches), len(plain.of_kind(UPLOAD)),
        )  # fmt: skip
        yield call.name + phase, cost, [checked, plain]


def refused(recordings: list[Recording]) -> list[str]:
    """Reasons for which a GPU would refuse."""
    kinds = (MIXED, REFUSED)
    return [str(event) for found in recordings for kind in kinds for event in found.of_kind(kind)]


def of_step(recording: Recording) -> Cost:
    """Of a whole training step, whose checks of values are not told apart."""
    return Cost(
        len(recording.of_kind(SYNC)), 0, recording.operations, recording.products, len(recording.launches),
        len(recording.of_kind(UPLOAD)),
    )  # fmt: skip


def risen(name: str, cost: Cost) -> list[str]:
    """Numbers of a training step that are more than a tenth above those of the table's line."""
    return [f"{a} -> {b}" for a, b in zip(read()[name].numbers, cost.numbers, strict=True) if b > 1.1 * a]


def new_by_place(short: Recording, long: Recording, kind: str) -> dict[str, tuple[int, int]]:
    """Places that asked for more events of a kind in the ``long`` one than in the ``short``, and how many in both."""
    before, after = (collections.Counter(e.where for e in found.of_kind(kind)) for found in (short, long))
    return {where: (before[where], n) for where, n in after.items() if n > before[where]}


def line(name: str, cost: Cost) -> str:
    return f"{name:{WIDTH}s}" + "".join(f"{number:11d}" for number in cost.numbers)


def header() -> str:
    names = [field.name.replace("unchecked_syncs", "unchecked") for field in fields(Cost)]
    return f"{'# call':{WIDTH}s}" + "".join(f"{name:>11s}" for name in names)


def read(path: Path = TABLE) -> dict[str, Cost]:
    found = {}
    for text in path.read_text().splitlines():
        if text and not text.startswith("#"):
            numbers = text[WIDTH:].split()
            found[text[:WIDTH].strip()] = Cost(*map(int, numbers))
    return found


def measured(only: str = "") -> Iterator[tuple[str, Cost, list[Recording]]]:
    for call in calls():
        if only in call.name:
            yield from costs(call)
