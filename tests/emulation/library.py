"""Builds csrc/ as plain C++ with the emulated GPU, and speaks to its runtime.

A build is kept in ``build/emulation`` under a hash of sources and flags: only the first run after a change compiles.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
BUILDS = ROOT / "build" / "emulation"
# -O1 for the kernels: they are mostly calls of the runtime, and compile in half the time of -O2.
KERNEL_FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-x", "c++")
RUNTIME_FLAGS = ("-std=c++17", "-O3", "-g1", "-fPIC", "-Wall", "-march=native")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(sources: Path = SOURCES, *, flags: Sequence[str] = (), kernels: Sequence[str] | None = None) -> Path:
    """The library made of the kernel files named (default: all) in ``sources``; ``flags`` are for the kernels only.

    The runtime is never instrumented: it tells the sanitizers itself what the emulated hardware does.
    """
    cxx = compiler()
    assert cxx is not None, "the emulation needs a C++ compiler: install g++ or set CXX"
    files = [sources / k for k in kernels] if kernels else sorted(sources.glob("*.cu"))
    runtime = sorted((sources / "emulation").glob("*.cpp"))
    commands = [(cxx, *KERNEL_FLAGS, *flags, "-c", str(f)) for f in files]
    commands += [(cxx, *RUNTIME_FLAGS, "-c", str(f)) for f in runtime]
    headers = {
        folder: b"".join(h.read_bytes() for h in sorted(folder.iterdir()) if h.suffix in (".h", ".cuh"))
        for folder in (sources, sources / "emulation")
    }
    objects = []
    for file, command in zip(files + runtime, commands, strict=True):
        included = headers[sources / "emulation"] + (headers[sources] if file in files else b"")
        key = repr((command[:-1], file.name)).encode() + included + file.read_bytes()
        objects.append(BUILDS / "objects" / f"{file.name}.{hashlib.sha256(key).hexdigest()[:16]}.o")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_make, objects, commands))
    name = hashlib.sha256(repr((cxx, flags, objects)).encode()).hexdigest()[:16]
    library = BUILDS / name / "libappo_emulation.so"
    _make(library, (cxx, "-shared", *flags, *map(str, objects)))
    return library


def _make(target: Path, command: Sequence[str]) -> None:
    """Run ``command`` with ``-o target`` unless the target is there; of processes side by side, one does it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = f"{target}.unfinished"
            _run(*command, "-o", unfinished)
            os.rename(unfinished, target)


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-4000:]}")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch: the mangled name, as nvcc gives it too, geometry, and the bytes of the params struct."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    params: bytes


COUNTERS = (
    "launches",
    "blocks",
    "barriers",
    "shuffles",
    "ldmatrix",
    "mma",
    "async_copies",
    "shared_accesses",
    "bank_conflicts",
)


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
