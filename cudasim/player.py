"""Recorded calls played back: ``python player.py LIBRARY CALLS SEED...``.

A script that imports neither torch nor numpy, nor this package: a sanitizer then sees the kernels alone. Every buffer
is an allocation of its exact size, whose ends AddressSanitizer guards.
"""

import ctypes
import json
import pickle
import sys

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


def main(library_file: str, calls_file: str, seeds: list[int]) -> None:
    library = ctypes.CDLL(library_file)
    library.appo_error_text.restype = ctypes.c_char_p
    process = ctypes.CDLL(None)
    process.malloc.restype, process.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    process.free.argtypes = [ctypes.c_void_p]
    with open(calls_file, "rb") as file:
        calls = pickle.load(file)
    failures: dict[int, str] = {}
    counters: dict[str, int] = {}
    for seed in seeds:
        library.appo_emulation_seed(ctypes.c_uint64(seed))
        for number, call in enumerate(calls):
            buffers = [process.malloc(len(content)) for content in call["before"]]
            for buffer, content in zip(buffers, call["before"]):  # noqa: B905
                ctypes.memmove(buffer, content, len(content))
            params = bytearray(call["params"])
            for at, index in call["pointers"]:
                params[at : at + 8] = buffers[index].to_bytes(8, sys.byteorder)
            struct = (ctypes.c_char * len(params)).from_buffer(params)
            error = getattr(library, call["launcher"])(struct, ctypes.c_size_t(len(params)), None)
            if error:
                failures.setdefault(seed, f"{call['launcher']}: {library.appo_error_text(error).decode()}")
            for i, (buffer, content) in enumerate(zip(buffers, call["after"])):  # noqa: B905
                if not error and ctypes.string_at(buffer, len(content)) != content:
                    failures.setdefault(seed, f"call {number}, {call['launcher']}: buffer {i} differs")
                process.free(buffer)
        if not counters:
            values = (ctypes.c_uint64 * len(COUNTERS))()
            library.appo_emulation_counters(values)
            counters = dict(zip(COUNTERS, values))  # noqa: B905
    print(json.dumps({"failures": failures, "counters": counters}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(s) for s in sys.argv[3:]])
