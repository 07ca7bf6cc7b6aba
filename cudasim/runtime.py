"""The runtime of an emulated library: schedules, counted events and recorded launches."""

import contextlib
import ctypes
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

from cudasim.library import build
from cudasim.player import COUNTERS


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch: the mangled name, as nvcc gives it too, geometry, and the bytes of the params struct."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    params: bytes


class Emulator:
    """The runtime of one emulated library."""

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)
        self.library.appo_error_text.restype = ctypes.c_char_p

    @contextlib.contextmanager
    def schedule(self, seed: int) -> Iterator[None]:
        """A random schedule of threads; 0 is the regular one."""
        self.library.appo_emulation_seed(ctypes.c_uint64(seed))
        try:
            yield
        finally:
            self.library.appo_emulation_seed(ctypes.c_uint64(0))

    @contextlib.contextmanager
    def last_blocks(self, count: int) -> Iterator[None]:
        """Of each grid only the last ``count`` blocks are run, whose indices are the largest."""
        self.library.appo_emulation_last_blocks(ctypes.c_uint64(count))
        try:
            yield
        finally:
            self.library.appo_emulation_last_blocks(ctypes.c_uint64(0))

    def counters(self) -> dict[str, int]:
        """Events since the last call."""
        values = (ctypes.c_uint64 * len(COUNTERS))()
        self.library.appo_emulation_counters(values)
        return dict(zip(COUNTERS, values, strict=True))

    @contextlib.contextmanager
    def record(self, *, run: bool = True) -> Iterator[list[Launch]]:
        """The launches made inside the block, in the list when it ends; ``run=False``: they are not carried out."""
        launches: list[Launch] = []
        self.library.appo_emulation_record(1 if run else 2)
        try:
            yield launches
            for i in range(self.library.appo_emulation_launches()):
                launches.append(self._launch(i))
        finally:
            self.library.appo_emulation_record(0)

    def _launch(self, index: int) -> Launch:
        name, params, geometry = ctypes.c_char_p(), ctypes.c_void_p(), (ctypes.c_uint64 * 8)()
        self.library.appo_emulation_launch(index, ctypes.byref(name), ctypes.byref(params), geometry)
        g = [int(x) for x in geometry]
        assert name.value is not None and params.value is not None
        return Launch(
            name.value.decode(), (g[0], g[1], g[2]), (g[3], g[4], g[5]), g[6], ctypes.string_at(params.value, g[7])
        )


@functools.cache
def emulator() -> Emulator:
    return Emulator(build())
