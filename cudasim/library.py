"""Builds of csrc/ as plain C++ with the emulated GPU.

A build is kept in ``build/emulation`` under a hash of sources and flags: only the first run after a change compiles.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)
BUILDS = ROOT / "build" / "emulation"
# -O1 for the kernels: they are mostly calls of the runtime, and compile in half the time of -O2. An index beyond an
# array of known size (registers, on a GPU) ends the process.
BOUNDS = ("-fsanitize=bounds", "-fsanitize-undefined-trap-on-error")
KERNEL_FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", *BOUNDS, "-x", "c++")
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
    objects = []
    for file, command in zip(files + runtime, commands, strict=True):
        key = repr((command[:-1], file.name)).encode() + b"".join(f.read_bytes() for f in sorted(_included(file)))
        objects.append(BUILDS / "objects" / f"{file.name}.{hashlib.sha256(key).hexdigest()[:16]}.o")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_make, objects, commands))
    name = hashlib.sha256(repr((cxx, flags, objects)).encode()).hexdigest()[:16]
    library = BUILDS / name / "libappo_emulation.so"
    _make(library, (cxx, "-shared", *flags, *map(str, objects)))
    return library


def _included(file: Path) -> set[Path]:
    """``file`` and every header of csrc/ that it includes, or that those do."""
    found, left = set(), [file.resolve()]
    while left:
        one = left.pop()
        if one not in found and one.exists():  # what a condition leaves out need not exist
            found.add(one)
            left += [(one.parent / name).resolve() for name in INCLUDE.findall(one.read_text())]
    return found


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


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Inside the block, backend "cuda" serves CPU tensors on the emulated GPU, which is built if it is not yet."""
    with mock.patch.dict(os.environ, APPO_EMULATION_LIBRARY=str(build())):
        yield
