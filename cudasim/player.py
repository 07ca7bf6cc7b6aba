"""Recorded calls played back: ``python player.py LIBRARY CALLS pages|malloc SEED...``.

A script that imports neither torch nor numpy, nor this package: a sanitizer then sees the kernels alone. Every buffer
is memory of its own. "pages": what lies behind its end (with odd seeds: before its start) may not be touched, and ends
the process. "malloc": an allocation of the exact size, whose ends AddressSanitizer guards.
"""

import ctypes
import json
import mmap
import pickle
import sys
from typing import Any

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


process = ctypes.CDLL(None)
process.malloc.restype, process.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
process.free.argtypes = [ctypes.c_void_p]
process.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Allocation:
    """Memory from malloc."""

    def __init__(self, size: int) -> None:
        self.address = process.malloc(size)

    def free(self) -> None:
        process.free(self.address)


class GuardedPages:
    """Whole pages between two that nobody may touch. The memory ends with them, at an address that is a multiple of
    ``alignment`` from it, or begins with them."""

    def __init__(self, size: int, at_end: bool, alignment: int = 16) -> None:
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, whole + 2 * mmap.PAGESIZE)
        self.view = ctypes.c_char.from_buffer(self.memory)
        start = ctypes.addressof(self.view)
        self.guards = start, start + mmap.PAGESIZE + whole
        for guard in self.guards:
            if process.mprotect(guard, mmap.PAGESIZE, 0):
                raise OSError("mprotect failed")
        self.address = start + mmap.PAGESIZE + ((whole - size) // alignment * alignment if at_end else 0)

    def free(self) -> None:
        for guard in self.guards:
            process.mprotect(guard, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
        del self.view
        self.memory.close()


def main(library_file: str, calls_file: str, memory: str, seeds: list[int]) -> None:
    library = ctypes.CDLL(library_file)
    library.appo_error_text.restype = ctypes.c_char_p
    with open(calls_file, "rb") as file:
        calls = pickle.load(file)
    failures: dict[int, str] = {}
    counters: dict[str, int] = {}
    for seed in seeds:
        library.appo_emulation_seed(ctypes.c_uint64(seed))
        for number, call in enumerate(calls):
            sizes = [len(content) for content in call["before"]]
            buffers: list[Any] = [
                GuardedPages(size, seed % 2 == 0) if memory == "pages" else Allocation(size) for size in sizes
            ]
            for buffer, content in zip(buffers, call["before"]):  # noqa: B905
                ctypes.memmove(buffer.address, content, len(content))
            params = bytearray(call["params"])
            for at, index in call["pointers"]:
                params[at : at + 8] = buffers[index].address.to_bytes(8, sys.byteorder)
            struct = (ctypes.c_char * len(params)).from_buffer(params)
            error = getattr(library, call["launcher"])(struct, ctypes.c_size_t(len(params)), None)
            if error:
                failures.setdefault(seed, f"{call['launcher']}: {library.appo_error_text(error).decode()}")
            for i, (buffer, content) in enumerate(zip(buffers, call["after"])):  # noqa: B905
                if not error and ctypes.string_at(buffer.address, len(content)) != content:
                    failures.setdefault(seed, f"call {number}, {call['launcher']}: buffer {i} differs")
                buffer.free()
        if not counters:
            values = (ctypes.c_uint64 * len(COUNTERS))()
            library.appo_emulation_counters(values)
            counters = dict(zip(COUNTERS, values))  # noqa: B905
    print(json.dumps({"failures": failures, "counters": counters}))


if __name__ == "__main__":
    main(*sys.argv[1:4], [int(s) for s in sys.argv[4:]])
