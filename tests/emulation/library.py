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
    digest = hashlib.sha256(repr((cxx, tuple(flags), KERNEL_FLAGS, RUNTIME_FLAGS, [f.name for f in files])).encode())
    headers = {f: f.read_bytes() for f in sorted(sources.rglob("*")) if f.suffix in (".h", ".cuh", ".cpp")}
    for content in [*headers.values(), *(f.read_bytes() for f in files)]:
        digest.update(content)
    folder = BUILDS / digest.hexdigest()[:16]
    library = folder / "libappo_emulation.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes side by side: one builds, the others wait
        if not library.exists():
            runtime = sorted((sources / "emulation").glob("*.cpp"))
            jobs = [(f, folder / f"{f.name}.o", (*KERNEL_FLAGS, *flags)) for f in files]
            jobs += [(f, folder / f"{f.name}.o", RUNTIME_FLAGS) for f in runtime]
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda job: _run(cxx, *job[2], "-c", str(job[0]), "-o", str(job[1])), jobs))
            unfinished = folder / "unfinished.so"
            _run(cxx, "-shared", *flags, "-o", str(unfinished), *(str(job[1]) for job in jobs))
            unfinished.rename(library)
    return library


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
