"""Calls of launchers, recorded from an operator and played back against another build of the kernels.

Played back in a process of its own (``player.py``), so that a build under ThreadSanitizer or AddressSanitizer, or one
with a planted fault that crashes, can be run.
"""

import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAYER = Path(__file__).with_name("player.py")


@dataclass
class Call:
    """One call of a launcher, with the bytes of all memory its params point to, before and after."""

    launcher: str
    params: bytes
    pointers: list[tuple[int, int]]  # (offset in params, index of the buffer)
    before: list[bytes]
    after: list[bytes]


def record(run: Any, monkeypatch: Any) -> list[Call]:
    """The calls that ``run()`` makes through ``cuda_library``."""
    from appo_kernels import cuda_library

    calls: list[Call] = []
    seen: dict[int, Any] = {}
    pointer, call = cuda_library.pointer, cuda_library.call

    def remember(tensor: Any) -> int | None:
        address = pointer(tensor)
        if tensor is not None and tensor.numel():
            seen[tensor.data_ptr()] = tensor
        return address

    def contents(tensor: Any) -> bytes:
        span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return ctypes.string_at(tensor.data_ptr(), span * tensor.element_size())

    def record_one(op: str, launcher: str, params: ctypes.Structure, device: Any) -> None:
        data = bytes(params)
        words = {at: int.from_bytes(data[at : at + 8], sys.byteorder) for at in range(0, len(data) - 7, 8)}
        places = [(at, seen[address]) for at, address in words.items() if address in seen]
        tensors = list({t.data_ptr(): t for _, t in places}.values())
        index = {t.data_ptr(): i for i, t in enumerate(tensors)}
        before = [contents(t) for t in tensors]
        call(op, launcher, params, device)
        pointers = [(at, index[t.data_ptr()]) for at, t in places]
        calls.append(Call(launcher, data, pointers, before, [contents(t) for t in tensors]))

    with monkeypatch.context() as patch:
        patch.setattr(cuda_library, "pointer", remember)
        patch.setattr(cuda_library, "call", record_one)
        run()
    assert calls, "the operator made no call"
    return calls


@dataclass(frozen=True)
class Outcome:
    """Outcome of a playback: ``failures`` by seed, the counters of the first seed, and the process's own words."""

    returncode: int
    failures: dict[int, str]
    counters: dict[str, int]
    output: str


def play(
    library: Path,
    calls: Sequence[Call],
    folder: Path,
    *,
    seeds: Sequence[int] = (0,),
    preload: str | None = None,
    timeout: int = 240,
) -> Outcome:
    """Play ``calls`` back in a new process, once per seed, the regular schedule first. A kernel that touches memory
    beyond a buffer, or beyond an array of its own, ends it. ``preload``: "libasan.so" or "libtsan.so", which then say
    what was touched."""
    file = folder / "calls.pickle"
    file.write_bytes(pickle.dumps([vars(c) for c in calls]))
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=0", TSAN_OPTIONS="exitcode=66 history_size=4")
    environment["UBSAN_OPTIONS"] = "print_stacktrace=1:halt_on_error=1"
    if preload:
        found = subprocess.run(
            [os.environ.get("CXX", "g++"), f"-print-file-name={preload}"], capture_output=True, text=True, check=True
        )
        environment["LD_PRELOAD"] = found.stdout.strip()
    memory = "malloc" if preload else "pages"
    command = [sys.executable, "-S", str(PLAYER), str(library), str(file), memory, *map(str, seeds)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    told = json.loads(lines[-1]) if lines else {"failures": {}, "counters": {}}
    failures = {int(seed): text for seed, text in told["failures"].items()}
    if result.returncode < 0 and not preload:
        name = signal.Signals(-result.returncode).name
        failures = {seeds[0]: f"ended by {name}: memory outside of all buffers, or of an array, was touched"}
    return Outcome(result.returncode, failures, told["counters"], result.stdout + result.stderr)
